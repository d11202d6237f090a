"""Collectives of rank models as onnxruntime's own, over NCCL, where these say the same.

    helix.collective          com.microsoft, since version 1
    AllToAllSingle            AllToAll(group_size)
    AllReduce(sum)            AllReduce
    AllGather                 AllGather(axis = 0, group_size); left out, axis is 1 in its schema and 0 in its kernel
    ReduceScatter             none

They know no groups: rank i of a job is place i of every collective. They sum, and take float16, float32 and float64 (AllToAll and AllGather
int64, too). So an export is mapped as a whole, or refused before anything is written. Only builds of onnxruntime with NCCL have them:
read in its sources (onnxruntime/core/graph/contrib_ops/collective_defs.cc), never run here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from onnx import FunctionProto, ModelProto, NodeProto, helper

from helix_compile.errors import ExportError
from helix_compile.export.onnx_scope import COLLECTIVES
from helix_compile.layout.degrees import HelixLayout, HelixMesh

NCCL = "com.microsoft"
DOMAINS = {"helix": COLLECTIVES, "ort-nccl": NCCL}  # by the name that an export is asked for
OPS = {"AllToAllSingle": "AllToAll", "AllReduce": "AllReduce", "AllGather": "AllGather"}
_OURS = {name: ours for ours, name in OPS.items()}
_EVERYONE = "world"
_DTYPES = ("float16", "float32", "float64")
_INSTEAD = 'nearest that works: collectives="helix", whose nodes a runtime defines'


def map_to_nccl(model: ModelProto, layout: HelixLayout, dtype: str) -> None:
    """Put onnxruntime's collectives in the place of ours, in place.

    Args:
        model: of a rank, its bodies functions.
        layout: of all ranks.
        dtype: of the model that was compiled: floats that are exchanged are in it, or wider.

    Raises:
        ExportError: names every collective that has no such op, and the model is as it was.
    """
    found = [node for node in _nodes(model) if node.domain == COLLECTIVES]
    if not found:
        raise ExportError(
            f"collectives='ort-nccl' has no effect: this export of {layout.world_size} rank(s) has no collective; leave it"
        )
    refused = dict.fromkeys(why for node in found if (why := _no_such(node, layout)))
    if dtype not in _DTYPES:
        refused[f"{dtype}: they take {', '.join(_DTYPES)}"] = None
    if refused:
        raise ExportError(f"collectives='ort-nccl': onnxruntime has no such op for {'; '.join(refused)}. {_INSTEAD}")
    for node in found:
        node.op_type, node.domain = OPS[node.op_type], NCCL
        del node.attribute[:]
        if node.op_type != "AllReduce":
            node.attribute.append(helper.make_attribute("group_size", layout.world_size))
        if node.op_type == "AllGather":
            node.attribute.append(helper.make_attribute("axis", 0))
    for proto in (model, *model.functions):
        for imported in proto.opset_import:
            if imported.domain == COLLECTIVES:
                imported.domain = NCCL


def check_collectives(name: str, format: str) -> None:
    """Raise ExportError unless collectives go by this name, in this format."""
    if name not in DOMAINS:
        raise ExportError(f"collectives={name!r} is unknown; one of {', '.join(DOMAINS)}")
    if format != "onnx" and name != "helix":
        raise ExportError(f"collectives={name!r} has no effect in format={format!r}: it is for nodes of ONNX; leave it")


def is_collective(node: NodeProto, domain: str) -> bool:
    """A collective of a domain, which may have other ops, too."""
    return node.domain == domain and (domain == COLLECTIVES or node.op_type in _OURS)


def collective_of(node: NodeProto, ranks: int) -> list[Any]:
    """[our name, axis, group size, reduction or ""]; onnxruntime's are of all `ranks`, whatever axis they were over."""
    given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if node.domain == COLLECTIVES:
        axis, reduction = (given.get(name, b"").decode() for name in ("axis", "reduce_op"))
        return [node.op_type, axis, given.get("group_size", 0), reduction]
    reduction = "sum" if node.op_type == "AllReduce" else ""
    size = given.get("group_size", ranks if reduction else 1)  # left out it is 1
    odd = node.op_type == "AllGather" and given.get("axis", 1) != 0
    return [_OURS[node.op_type], f"dim {given.get('axis', 1)}" if odd else _EVERYONE, size, reduction]


def axis_of(axis: str, domain: str) -> str:
    """What collectives over an axis of the plan are over in an export with collectives of `domain`."""
    return _EVERYONE if domain == NCCL else axis


def _nodes(model: ModelProto) -> Iterator[NodeProto]:
    holders: list[FunctionProto | Any] = [model.graph, *model.functions]
    for holder in holders:
        yield from holder.node


def _no_such(node: NodeProto, layout: HelixLayout) -> str:
    """Why onnxruntime has no such collective; "" where it has."""
    name, axis, _, reduction = collective_of(node, layout.world_size)
    if name not in OPS:
        return f"{name} over {axis}"
    if reduction not in ("", "sum"):
        return f"{name} ({reduction}) over {axis}: theirs sums"
    groups = [list(group) for group in HelixMesh(layout).groups[axis]]
    if groups != [list(range(layout.world_size))]:
        return f"{name} over {axis}, in groups {groups}: theirs is over all {layout.world_size} ranks in their order"
    return ""
