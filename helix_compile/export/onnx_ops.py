"""The functions of helix_ops.onnx.txt, read; and the rules that call them for helix:: ops and collectives."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, Protocol

import onnx.parser
import torch
from onnx import FunctionProto
from torch import fx

from helix_compile.export.onnx_aten import RULES, Rule, Writer, argument, dtype_of, rule
from helix_compile.export.onnx_scope import COLLECTIVES, HELIX, ONNX_DTYPES, OPSET, Two, Value
from helix_compile.ir.collectives import ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, REDUCE_SCATTER, WAIT
from helix_compile.ir.ops import helix
from helix_compile.kernels.reference_sparse import NOWHERE

TEXT = Path(__file__).with_name("helix_ops.onnx.txt")
_HEADER = f'<domain: "{HELIX}", opset_import: ["" : {OPSET}, "{HELIX}" : 1]>\n'
ONNX_NAMES = {
    ALL_TO_ALL.name: "AllToAllSingle",
    ALL_REDUCE.name: "AllReduce",
    ALL_GATHER.name: "AllGather",
    REDUCE_SCATTER.name: "ReduceScatter",
}


@cache
def helix_functions() -> dict[str, FunctionProto]:
    """Every function of the text by name, in its order: none calls one that stands behind it. What stands above one is its doc_string."""
    found: dict[str, FunctionProto] = {}
    for block in TEXT.read_text(encoding="utf-8").split("\n\n"):
        lines = block.splitlines()
        code = [line for line in lines if not line.startswith("#")]
        if code:
            function = onnx.parser.parse_function(_HEADER + "\n".join(code))
            function.doc_string = "\n".join(line.removeprefix("# ") for line in lines if line.startswith("#"))
            found[function.name] = function
    return found


@cache
def _called(name: str) -> frozenset[str]:
    """A function and all that it calls."""
    inner = [n.op_type for n in helix_functions()[name].node if n.domain == HELIX]
    return frozenset({name}.union(*(_called(n) for n in inner)))


def functions_for(names: set[str]) -> list[FunctionProto]:
    """These functions and those that they call, in the order of the text."""
    wanted = set[str]().union(*(_called(name) for name in names))
    return [function for name, function in helix_functions().items() if name in wanted]


class CacheWriter(Writer, Protocol):
    """A Writer that knows which name a cache has now."""

    def append_to(self, node: fx.Node, name: str) -> None:
        """From here on the cache that `node` is goes by `name`."""

    def group_size(self, axis: str) -> int:
        """Ranks along an axis of the mesh."""


def _call(w: CacheWriter, node: fx.Node, name: str, *inputs: str, outputs: int = 1, **attributes: int) -> Any:
    return w.scope.op(name, *inputs, outputs=outputs, domain=HELIX, wanted=node.name, **attributes)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _no_fp8(w: CacheWriter, node: fx.Node) -> None:
    for name in ("cache_scale", "index_key"):
        if node.kwargs.get(name) is not None:
            raise w.refuse(node, f"{name}: caches in FP8 are not exported to ONNX")


@rule(helix.shard_index.default)
def _shard_index(w: CacheWriter, node: fx.Node) -> Value:
    positions, rank, cp, block = node.args
    result: Value = _call(
        w, node, "shard_index", w.value(positions), w.value(rank), outputs=2, cp=cp, tokens_per_block=block
    )
    return result


@rule(helix.first_visible.default)
def _first_visible(w: CacheWriter, node: fx.Node) -> Value:
    positions, rank, cp, block, window, chunk = node.args
    degrees = {"cp": cp, "tokens_per_block": block, "window": window, "chunk": chunk}
    return str(_call(w, node, "first_visible", w.value(positions), w.value(rank), **degrees))


@rule(helix.cache_append.default)
def _cache_append(w: CacheWriter, node: fx.Node) -> Value:
    _no_fp8(w, node)
    cache, *others, latent, k_rope = node.args
    entries = [w.typed(x, dtype_of(cache)) for x in (latent, k_rope)]
    written, visible = _call(
        w, node, "cache_append", w.value(cache), *(w.value(x) for x in others), *entries, outputs=2
    )
    w.append_to(cache, written)
    return str(visible)


def _first_slot(w: CacheWriter, node: fx.Node, visible: str) -> str:
    first = node.kwargs.get("first")
    return str(w.scope.op("Sub", visible, visible, wanted="from_the_start") if first is None else w.value(first))


def _decode(name: str, tensors: int) -> Rule:
    """Attention whose `tensors` first arguments are those of the function, the last of them `visible`; then the scale."""

    def write(w: CacheWriter, node: fx.Node) -> Value:
        _no_fp8(w, node)
        inputs = [w.value(x) for x in node.args[:tensors]]
        wide = _wide(dtype_of(node.args[0]))
        if name in ("mla_decode", "gqa_decode"):
            inputs.append(_first_slot(w, node, inputs[-1]))
        inputs.append(w.scope.constant(float(node.args[tensors]), wide))
        outputs = 1 if name == "index_scores" else 2
        result: Value = _call(w, node, name, *inputs, outputs=outputs, accumulate=ONNX_DTYPES[wide])
        return result

    return write


RULES[helix.mla_decode.default] = _decode("mla_decode", 5)
RULES[helix.gqa_decode.default] = _decode("gqa_decode", 5)
RULES[helix.index_scores.default] = _decode("index_scores", 5)
RULES[helix.mla_decode_slots.default] = _decode("mla_decode_slots", 7)


def _plain(name: str) -> Rule:
    """An op whose arguments are those of the function."""

    def write(w: CacheWriter, node: fx.Node) -> Value:
        return str(_call(w, node, name, *(w.value(x) for x in node.args)))

    return write


for _name in ("embed_rows", "merge_lse", "total_lse", "apply_sinks", "rescale_by_lse"):
    RULES[getattr(helix, _name).default] = _plain(_name)


@rule(helix.moe_experts.default)
def _moe_experts(w: CacheWriter, node: fx.Node) -> Value:
    accumulate = ONNX_DTYPES[_wide(dtype_of(node.args[0]))]
    return str(_call(w, node, "moe_experts", *(w.value(x) for x in node.args), accumulate=accumulate))


@rule(helix.pack_heads.default)
def _pack_heads(w: CacheWriter, node: fx.Node) -> Value:
    """One buffer; of two dtypes two, since ONNX has no bytes of a tensor."""
    o, lse, peers = node.args
    if dtype_of(o) == dtype_of(lse):
        return str(_call(w, node, "pack_heads", w.value(o), w.value(lse), peers=peers))
    return Two(*(str(_call(w, node, "heads_to_rows", w.value(x), peers=peers)) for x in (lse, o)))


@rule(helix.unpack_heads.default)
def _unpack_heads(w: CacheWriter, node: fx.Node) -> Value:
    buffer, o, lse = (w.value(x) for x in node.args)
    if isinstance(buffer, Two):
        parts = ((buffer.second, o), (buffer.first, lse))
        return tuple(_call(w, node, "rows_to_heads", rows, like) for rows, like in parts)
    result: Value = _call(w, node, "unpack_heads", buffer, o, lse, outputs=2)
    return result


# rows of a part of a batch


def _bounds(w: CacheWriter, whole: str, part: int, parts: int) -> tuple[str, str, str]:
    """The first row of a part, the one behind its last, and the rows of all: int64 [1] each."""
    s, rows = w.scope, w.scope.size_of(whole, 0).name
    first, behind = (
        s.op("Div", s.op("Mul", rows, s.ints([n])), s.ints([parts]), wanted="rows") for n in (part, part + 1)
    )
    return first, behind, rows


@rule(helix.rows_of_part.default)
def _rows_of_part(w: CacheWriter, node: fx.Node) -> Value:
    source, part, parts = node.args
    x = w.value(source)
    first, behind, _ = _bounds(w, x, part, parts)
    return str(w.scope.op("Slice", x, first, behind, w.scope.ints([0]), wanted=node.name))


@rule(helix.place_rows.default)
def _place_rows(w: CacheWriter, node: fx.Node) -> Value:
    source, like, part, parts = node.args
    first, behind, rows = _bounds(w, w.value(like), part, parts)
    s, others = w.scope, w.scope.ints([0] * (source.meta["val"].dim() - 1))
    pads = s.op("Concat", first, others, s.op("Sub", rows, behind), others, axis=0)
    return str(s.op("Pad", w.value(source), pads, wanted=node.name))


# an indexer's choice: a candidate is a score and a position


@rule(helix.topk_candidates.default)
def _topk_candidates(w: CacheWriter, node: fx.Node) -> Value:
    scores, visible, rank, top_k, cp, block = node.args
    inputs = (w.value(x) for x in (scores, visible, rank))
    return Two(*_call(w, node, "topk_candidates", *inputs, outputs=2, top_k=top_k, cp=cp, tokens_per_block=block))


@rule(helix.kth_candidate.default)
def _kth_candidate(w: CacheWriter, node: fx.Node) -> Value:
    candidates = _two(w, node)
    result: Value = _call(w, node, "kth_candidate", candidates.first, candidates.second, outputs=2, top_k=node.args[1])
    return result


def _two(w: CacheWriter, node: fx.Node) -> Two:
    value = w.value(node.args[0])
    if not isinstance(value, Two):
        raise w.refuse(node, "its argument does not come from topk_candidates")
    return value


@rule(helix.rows_for_owners.default)
def _rows_for_owners(w: CacheWriter, node: fx.Node) -> Value:
    candidates = _two(w, node)
    wide = torch.float64 if dtype_of(node.args[0]) is torch.int64 else torch.float32
    none = w.scope.constant(-torch.inf, wide), w.scope.constant(NOWHERE, torch.int64)
    both = zip((candidates.first, candidates.second), none, strict=True)
    return Two(*(_call(w, node, "rows_for_owners", x, fill, peers=node.args[1]) for x, fill in both))


@rule(helix.pack_kth.default)
def _pack_kth(w: CacheWriter, node: fx.Node) -> Value:
    return Two(*(w.value(x) for x in node.args))


@rule(helix.unpack_kth.default)
def _unpack_kth(w: CacheWriter, node: fx.Node) -> Value:
    found, visible = _two(w, node), w.value(node.args[1])
    return tuple(_call(w, node, "rows_of_owners", x, visible) for x in (found.first, found.second))


@rule(helix.select_slots.default)
def _select_slots(w: CacheWriter, node: fx.Node) -> Value:
    *tensors, top_k, cp, block = node.args
    inputs = (w.value(x) for x in tensors)
    result: Value = _call(w, node, "select_slots", *inputs, outputs=2, top_k=top_k, cp=cp, tokens_per_block=block)
    return result


# collectives


def _collective(w: CacheWriter, node: fx.Node, axis: str, name: str, **attributes: Any) -> Value:
    """One node; of a value that is two, two."""
    name, size = ONNX_NAMES[name], w.group_size(axis)

    def one(x: str) -> str:
        return str(w.scope.op(name, x, domain=COLLECTIVES, wanted=node.name, axis=axis, group_size=size, **attributes))

    value = w.value(node.args[0])
    return Two(one(value.first), one(value.second)) if isinstance(value, Two) else one(value)


@rule(ALL_REDUCE.target)
def _all_reduce(w: CacheWriter, node: fx.Node) -> Value:
    _, op, axis = node.args
    return _collective(w, node, axis, ALL_REDUCE.name, reduce_op=op)


@rule(REDUCE_SCATTER.target)
def _reduce_scatter(w: CacheWriter, node: fx.Node) -> Value:
    _, op, _, axis = node.args
    return _collective(w, node, axis, REDUCE_SCATTER.name, reduce_op=op)


@rule(ALL_GATHER.target)
def _all_gather(w: CacheWriter, node: fx.Node) -> Value:
    return _collective(w, node, node.args[2], ALL_GATHER.name)


@rule(ALL_TO_ALL.target)
def _all_to_all(w: CacheWriter, node: fx.Node) -> Value:
    _, received, sent, axis = node.args
    if len({*received, *sent}) != 1:
        raise w.refuse(node, f"its parts differ in size: {received}, {sent}")
    return _collective(w, node, axis, ALL_TO_ALL.name)


@rule(WAIT)
def _wait(w: CacheWriter, node: fx.Node) -> Value:
    """ONNX has no values that are not there yet."""
    value: Value = w.value(argument(node, 0, "tensor"))
    return value
