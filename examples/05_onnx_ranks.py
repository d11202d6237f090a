"""Four rank models in stock onnxruntime, one thread each, with an exchange of our own: what leaves helix_compile runs without it.

onnxruntime knows no collectives; here they are Python ops of onnxruntime-extensions (pip install onnxruntime onnxruntime-extensions).
An engine would have NCCL behind them: nothing else in the files is left to define.
"""

from __future__ import annotations

import json
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import onnxruntime_extensions
import torch
from onnx import helper
from onnxruntime_extensions import PyCustomOpDef, onnx_op

from helix_compile import helix_compile
from helix_compile.models.presets import build_model, preset_config

RANKS, DOMAIN = 4, "ai.onnx.contrib"
COLLECTIVES = ("AllToAllSingle", "AllReduce", "AllGather", "ReduceScatter")


class Exchange:
    """What ranks give each other: the members of a group meet, and each takes its part of what all brought."""

    def __init__(self, groups: dict[str, list[list[int]]]):
        self.groups = groups
        self.barriers = {(a, tuple(g)): threading.Barrier(len(g)) for a, gs in groups.items() for g in gs}
        self.brought: dict[tuple[str, int], np.ndarray] = {}

    def run(self, rank: int, op: str, x: np.ndarray, axis: str) -> np.ndarray:
        members = next(g for g in self.groups[axis] if rank in g)
        barrier, place = self.barriers[axis, tuple(members)], members.index(rank)
        self.brought[axis, rank] = x
        barrier.wait(60)
        parts = [self.brought[axis, member] for member in members]  # in the order of the axis
        if op == "AllReduce":
            mine = np.sum(parts, axis=0)
        elif op == "ReduceScatter":
            mine = np.split(np.sum(parts, axis=0), len(members))[place]
        elif op == "AllGather":
            mine = np.concatenate(parts)
        else:  # part i of dim 0 goes to member i
            mine = np.concatenate([np.split(part, len(members))[place] for part in parts])
        barrier.wait(60)
        return mine


def register(exchange: Exchange) -> None:
    """One op a rank and collective. All before the first session: a session points into the library's list of ops."""
    for op in COLLECTIVES:
        attributes = {"axis": PyCustomOpDef.dt_string, "group_size": PyCustomOpDef.dt_int64}
        if op in ("AllReduce", "ReduceScatter"):
            attributes["reduce_op"] = PyCustomOpDef.dt_string
        for rank in range(RANKS):

            def collective(
                x: Any, axis: str, group_size: int, reduce_op: str = "", op: str = op, rank: int = rank
            ) -> Any:
                return exchange.run(rank, op, x, axis)

            float32 = [PyCustomOpDef.dt_float]
            onnx_op(op_type=f"{op}_{rank}", inputs=float32, outputs=float32, attrs=attributes)(collective)


def session(folder: Path, rank: int) -> Callable[[dict[str, np.ndarray]], list[np.ndarray]]:
    """A rank's model, its collectives renamed to the Python ops."""
    model = onnx.load(folder / f"rank{rank}.onnx", load_external_data=False)
    for nodes in (model.graph.node, *(function.node for function in model.functions)):
        for node in nodes:
            if node.domain == "helix.collective":
                node.domain, node.op_type = DOMAIN, f"{node.op_type}_{rank}"
    for proto in (model, *model.functions):
        proto.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    path = folder / f"with_python_ops_{rank}.onnx"  # beside the weights
    onnx.save(model, path)
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(onnxruntime_extensions.get_library_path())
    options.log_severity_level = 3
    own = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda feeds: own.run(None, feeds)


def main(folder: Path) -> float:
    model = build_model(preset_config("tiny"))
    helix_compile(model, cp=RANKS, max_batch_size=2, max_seq_len=256, tokens_per_block=4).export(folder)

    # from here on: files, onnxruntime and numpy
    manifest = json.loads((folder / "manifest.json").read_text())
    register(Exchange(manifest["groups"]))
    runs = [session(folder, rank) for rank in range(RANKS)]
    inputs = {i["name"]: i for i in manifest["inputs"]}
    sites = [name for name in inputs if name.startswith("cache_")]
    caches = [{n: np.zeros(inputs[n]["shape"], inputs[n]["dtype"]) for n in sites} for _ in range(RANKS)]
    pages = inputs["page_table"]["shape"][1]
    ids = torch.randint(0, 256, (2, 12))
    worst, done = 0.0, 0
    for tokens in (7, 1, 3, 1):  # a prompt, then steps
        step = {
            "input_ids": ids[:, done : done + tokens].numpy(),
            "positions": np.tile(np.arange(done, done + tokens), (2, 1)),
            "page_table": np.arange(2 * pages).reshape(2, pages),
        }
        results: list[Any] = [None] * RANKS

        def work(rank: int, step: dict[str, Any] = step, results: list[Any] = results) -> None:
            results[rank] = runs[rank]({**step, **caches[rank]})

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(RANKS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for cache, (_, *written) in zip(caches, results, strict=True):
            cache.update(zip(sites, written, strict=True))
        done += tokens
        with torch.no_grad():
            expected = model(input_ids=ids[:, :done]).logits[:, -tokens:].numpy()
        worst = max(worst, float(np.abs(results[0][0] - expected).max() / np.abs(expected).max()))
    held = [int((cache[sites[0]] != 0).any(-1).sum()) for cache in caches]
    print(
        f"{RANKS} ranks in onnxruntime {onnxruntime.__version__}: largest deviation of a logit from the model {worst:.1e}"
    )
    print(f"tokens of 2 sequences of {done} that each rank caches: {held}")
    return worst


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        assert main(Path(name) / "exported") <= 1e-5
