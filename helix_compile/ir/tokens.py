"""Does a result depend on which tokens come in one call? A long prompt may be cut into chunks only if it does not.

Shown by dataflow, op by op, on the finished graph: attention and routed experts are ops of ours there and known; everything
else must be elementwise, or work along dims that hold no tokens. What is not on the list is not shown.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from helix_compile.ir.graph import aten, helix_op, input_ref, is_call, placeholders
from helix_compile.ir.stage import graphs_of

_ALONE = frozenset(
    {
        aten.transpose.int,
        aten.permute.default,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.squeeze.default,
        aten.expand.default,
        aten.movedim.int,
        aten.t.default,
        aten.contiguous.default,
        aten.zeros_like.default,
        aten.ones_like.default,
        aten.empty_like.default,
        aten.full_like.default,
        aten.sym_size.int,
        aten._to_copy.default,
        aten.type_as.default,
        aten.detach.default,
        aten.alias.default,
        aten.arange.default,
        aten.arange.start,
        aten.full.default,
        aten.zeros.default,
        aten.ones.default,
        aten.scalar_tensor.default,
        aten.lift_fresh_copy.default,
        aten.one_hot.default,
        aten.view_as_real.default,
        aten.view_as_complex.default,
    }
)
_SAME_FOR_ALL = (
    aten.full.default,
    aten.zeros.default,
    aten.ones.default,
    aten.empty.memory_format,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
    aten.new_empty.default,
    aten.expand.default,
    aten.arange.default,
    aten.arange.start,
)
_COUNTING = (aten.arange.default, aten.arange.start, aten.arange.start_step, aten.scalar_tensor.default)
_FILLED = {aten.full.default: 1, aten.full_like.default: 1}  # op -> argument whose value fills it
_VIEWS = (
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
)
# op -> (argument that holds its dim or dims, what it is where it is left out; None: all)
_ALONG: dict[Any, tuple[int, Any]] = {
    aten.sum.dim_IntList: (1, None),
    aten.mean.dim: (1, None),
    aten.amax.default: (1, None),
    aten.amin.default: (1, None),
    aten.max.dim: (1, None),
    aten.min.dim: (1, None),
    aten.topk.default: (2, -1),
    aten.sort.default: (1, -1),
    aten.argmax.default: (1, None),
    aten.argmin.default: (1, None),
    aten.cumsum.default: (1, None),
    aten.softmax.int: (1, None),
    aten._softmax.default: (1, None),
    aten.log_softmax.int: (1, None),
    aten.logsumexp.default: (1, None),
    aten.var.correction: (1, None),
    aten.linalg_vector_norm.default: (2, None),
    aten.gather.default: (1, None),
    aten.scatter.value: (1, None),
    aten.scatter.src: (1, None),
    aten.slice.Tensor: (1, 0),
    aten.select.int: (1, None),
    aten.cat.default: (1, 0),
    aten.stack.default: (1, 0),
    aten.split_with_sizes.default: (2, 0),
    aten.split.Tensor: (2, 0),
    aten.chunk.default: (2, 0),
    aten.unbind.int: (1, 0),
    aten.repeat_interleave.self_int: (2, None),
    aten.glu.default: (1, -1),
}


_REDUCING = (
    aten.sum.dim_IntList,
    aten.mean.dim,
    aten.amax.default,
    aten.amin.default,
    aten.cumsum.default,
    aten.softmax.int,
    aten._softmax.default,
    aten.logsumexp.default,
    aten.var.correction,
    aten.linalg_vector_norm.default,
)


def mixing_node(stage: fx.GraphModule, padding: bool = False) -> fx.Node | None:
    """The first node of a lowered stage that is not shown to treat every token of a call alone; None: all are.

    `padding`: the first that is shown to mix tokens instead: padding would be mixed in.
    """
    for _, graph in graphs_of(stage):
        tokens = _token_symbols(graph.graph)
        for node in graph.graph.nodes:
            if node.op == "call_module" and "leaf" in node.meta:
                return node  # the user's own code: nothing is shown
            if padding and not (is_call(node, *_REDUCING) and node.args[0].meta["val"].is_floating_point()):
                continue
            if node.op == "call_function" and not _is_alone(node, tokens):
                return node
    return None


def _token_symbols(graph: fx.Graph) -> set[Any]:
    """The symbols of T: hidden and input_ids are [B, T, ...]."""
    given = [n for n in placeholders(graph) if input_ref(n).kind == "hidden" or input_ref(n).name == "input_ids"]
    sizes = [n.meta["val"].shape[1] for n in given[:1]]
    return {s for size in sizes if isinstance(size, torch.SymInt) for s in size.node.expr.free_symbols}


def _dims(value: Any, tokens: set[Any]) -> set[int]:
    """Dims of a value that hold tokens."""
    if not isinstance(value, Tensor):
        return set()
    sizes = enumerate(value.shape)
    return {d for d, s in sizes if isinstance(s, torch.SymInt) and tokens & s.node.expr.free_symbols}


def _is_alone(node: fx.Node, tokens: set[Any]) -> bool:
    target, values = node.target, [n.meta.get("val") for n in node.all_input_nodes]
    held = [_dims(value, tokens) for value in values]
    if _counts_tokens(node, tokens):
        return False
    if not any(held) and not helix_op(node) and _makes_tokens(node, tokens):
        return False
    if not any(held) or helix_op(node) or target in _ALONE or getattr(target, "__module__", "") == operator.__name__:
        return True
    if getattr(target, "namespace", "") == "_c10d_functional" or target is operator.getitem:
        return True
    if torch.Tag.pointwise in getattr(target, "tags", ()) or target is aten.polar.default:
        return _aligned(node, values, tokens)
    if target in _VIEWS:
        return _per_token(values[0], tokens) == _per_token(node.meta["val"], tokens)
    if target in _ALONG:
        return _along(node, values[0], tokens)
    if target in (aten.embedding.default, aten.index.Tensor):
        return not held[0]  # a table that is looked up
    if is_call(node, aten.linear.default, aten.mm.default, aten.addmm.default, aten.bmm.default, aten.matmul.default):
        return _product(node, tokens)
    if target is aten.einsum.default:
        return _einsum(node, tokens)
    if target in (aten.native_layer_norm.default, aten.layer_norm.default, aten.rms_norm.default):
        normal = len(node.args[1])
        return not {d for d in held[0] if d >= values[0].dim() - normal}
    return False


def _counts_tokens(node: fx.Node, tokens: set[Any]) -> bool:
    """How many tokens a call has, or a token's number in it, becomes a value: arange(T), x / T, full((), T)."""
    counts = lambda n: isinstance(n, fx.Node) and _is_count(n.meta.get("val"), tokens)  # noqa: E731
    if node.target in _FILLED:
        return counts(node.args[_FILLED[node.target]])
    is_scalar_math = torch.Tag.pointwise in getattr(node.target, "tags", ())
    return (is_scalar_math or node.target in _COUNTING) and any(map(counts, node.all_input_nodes))


def _makes_tokens(node: fx.Node, tokens: set[Any]) -> bool:
    """A dim of T out of nothing that has one, or a size of T given to an op: only what is the same for every token may be."""
    if node.target in _SAME_FOR_ALL or not isinstance(node.target, torch._ops.OpOverload):
        return False
    out = pytree.tree_leaves(node.meta.get("val"))
    sized = [n for n in node.all_input_nodes if _is_count(n.meta.get("val"), tokens)]
    return any(_dims(value, tokens) for value in out) or (bool(sized) and any(isinstance(v, Tensor) for v in out))


def _is_count(value: Any, tokens: set[Any]) -> bool:
    return isinstance(value, torch.SymInt | torch.SymFloat) and bool(tokens & value.node.expr.free_symbols)


def _aligned(node: fx.Node, values: list[Any], tokens: set[Any]) -> bool:
    """Broadcast operands: tokens meet the same tokens."""
    out = node.meta["val"]
    if not isinstance(out, Tensor):
        return False
    met = _dims(out, tokens)
    return (
        all({d + out.dim() - v.dim() for d in _dims(v, tokens)} <= met for v in values if isinstance(v, Tensor))
        and len(met) <= 1
    )


def _per_token(value: Any, tokens: set[Any]) -> tuple[Any, ...]:
    """(what one token holds behind the dim of the tokens, T or B * T that the dims before make up): a view keeps both."""
    held = sorted(_dims(value, tokens))
    if len(held) != 1:
        return ("?", len(held))
    behind = math.prod(value.shape[held[0] + 1 :])
    before = math.prod(value.shape[: held[0] + 1])
    return (str(_text(behind)), str(_text(before)))


def _text(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def _along(node: fx.Node, value: Any, tokens: set[Any]) -> bool:
    where, default = _ALONG[node.target]
    if node.target is aten.slice.Tensor and list(map(str, node.meta["val"].shape)) == list(map(str, value.shape)):
        return True  # nothing is cut off
    parts = [n.meta["val"] for n in node.args[0]] if isinstance(node.args[0], (list, tuple)) else [value]
    given = node.args[where] if len(node.args) > where else node.kwargs.get("dim", default)
    if given is None:
        return False
    dims = given if isinstance(given, (list, tuple)) else [given]
    rank = parts[0].dim() + (node.target is aten.stack.default)
    held = {d for part in parts for d in _dims(part, tokens)}
    return not rank or not held & {d % rank for d in dims}


def _product(node: fx.Node, tokens: set[Any]) -> bool:
    """The summed dim holds no tokens, and tokens of one side don't meet tokens of the other."""
    a, b = (n.meta["val"] for n in node.args[-2:][:2]) if is_call(node, aten.addmm.default) else _sides(node)
    mine, other = _dims(a, tokens), _dims(b, tokens)
    if a.dim() - 1 in mine:
        return False
    return not other or (is_call(node, aten.bmm.default) and other == mine == {0})


def _sides(node: fx.Node) -> tuple[Tensor, Tensor]:
    a, b = node.args[:2]
    return a.meta["val"], b.meta["val"]


def _einsum(node: fx.Node, tokens: set[Any]) -> bool:
    terms, _, out = str(node.args[0]).replace(" ", "").partition("->")
    letters = {
        letter
        for term, operand in zip(terms.split(","), node.args[1], strict=True)
        for dim in _dims(operand.meta["val"], tokens)
        for letter in term[dim]
    }
    return len(letters) <= 1 and letters <= set(out)
