"""Rank models in stock onnxruntime: collectives are Python ops of onnxruntime-extensions, one name a rank and dtype.

The library keeps its ops in a list that sessions point into: one that is registered behind a session moves those of before. So all
are registered at once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import onnxruntime_extensions
from onnx import TensorProto, helper
from onnxruntime_extensions import PyCustomOpDef, onnx_op

from tests.support.onnx_ranks import Exchange

DOMAIN, RANKS = "ai.onnx.contrib", 4
DTYPES = {
    TensorProto.FLOAT: PyCustomOpDef.dt_float,
    TensorProto.DOUBLE: PyCustomOpDef.dt_double,
    TensorProto.INT64: PyCustomOpDef.dt_int64,
}
SUMS = ("AllReduce", "ReduceScatter")
_exchanges: dict[int, Exchange] = {}  # of the ranks that are running


def ort_rank(path: Path, rank: int, exchange: Exchange) -> Callable[[dict[str, Any]], list[Any]]:
    """The model of a rank in onnxruntime; it exchanges with the ranks that were made last."""
    _register()
    model = onnx.load(path, load_external_data=False)
    for nodes in (model.graph.node, *(f.node for f in model.functions)):
        _use_python_ops(nodes, rank, _dtypes(model))
    for proto in (model, *model.functions):
        proto.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    own = path.with_name(f"ort_{path.name}")  # beside the weights
    onnx.save(model, own)
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(onnxruntime_extensions.get_library_path())
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(str(own), options, providers=["CPUExecutionProvider"])
    own.unlink()

    def run(feeds: dict[str, Any]) -> list[Any]:
        _exchanges[rank] = exchange
        return list(session.run(None, feeds))

    return run


def _dtypes(model: Any) -> dict[str, int]:
    """Dtype of what travels: that of the model, but for positions of an indexer's candidates."""
    logits = model.graph.output[1].type.tensor_type.elem_type  # a cache's: logits may be wider
    return {"": logits, "position": TensorProto.INT64}


def _use_python_ops(nodes: Any, rank: int, dtypes: dict[str, int]) -> None:
    positions = set[str]()
    for node in nodes:
        is_position = any(name in positions for name in node.input)
        if node.op_type in ("topk_candidates", "kth_candidate"):
            positions.add(node.output[1])
        elif is_position and node.op_type not in ("kth_candidate", "select_slots"):
            positions.update(node.output)
        if node.domain == "helix.collective":
            dtype = dtypes["position" if is_position else ""]
            node.domain, node.op_type = DOMAIN, _name(node.op_type, rank, dtype)


def _name(op: str, rank: int, dtype: int) -> str:
    return f"{op}_{rank}_{dtype}"


@cache
def _register() -> None:
    for op in ("AllReduce", "ReduceScatter", "AllGather", "AllToAllSingle"):
        attributes = {"axis": PyCustomOpDef.dt_string, "group_size": PyCustomOpDef.dt_int64}
        if op in SUMS:
            attributes["reduce_op"] = PyCustomOpDef.dt_string
        for rank in range(RANKS):
            for dtype, theirs in DTYPES.items():
                name = _name(op, rank, dtype)
                onnx_op(op_type=name, inputs=[theirs], outputs=[theirs], attrs=attributes)(_op(op, rank))


def _op(op: str, rank: int) -> Callable[..., Any]:
    def run(x: Any, axis: str, group_size: int, reduce_op: str | None = None) -> Any:
        return _exchanges[rank].run(rank, op, x, axis, group_size, reduce_op)

    return run
