"""One rule an aten op: the ONNX nodes that compute it. An op without a rule is an error.

A rule gets the node and a Writer, which knows the ONNX value of each fx node, and returns the value of the result.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import fx

from helix_compile.export.onnx_scope import ONNX_DTYPES, Scope, Size, Two, Value
from helix_compile.ir.graph import aten


class Writer(Protocol):
    """Who writes one graph: see onnx_graph.py."""

    scope: Scope

    def value(self, x: Any) -> Any:
        """The ONNX value of an fx node (numbers stand for themselves)."""

    def typed(self, x: Any, dtype: torch.dtype) -> str:
        """A tensor of this dtype: an fx node's, cast where it has another, or a constant."""

    def refuse(self, node: fx.Node, why: str) -> Exception:
        """The error that says that `node` can't be written, and why."""


Rule = Callable[[Any, fx.Node], Value]  # of a Writer; of helix:: ops and collectives, of a CacheWriter
RULES: dict[Any, Rule] = {}


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    """Register a rule of these ops."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(targets, function))
        return function

    return register


def argument(node: fx.Node, place: int, name: str, default: Any = None) -> Any:
    """An argument by its place or name."""
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def dtype_of(x: Any) -> torch.dtype:
    """Of an fx node's value."""
    found: torch.dtype = x.meta["val"].dtype
    return found


def rank_of(x: Any) -> int:
    """How many dims an fx node's value has."""
    return int(x.meta["val"].dim())


def _dim(node: fx.Node, dim: int, extra: int = 0) -> int:
    """A dim of the first argument, counted from the front."""
    assert isinstance(node.args[0], fx.Node)
    return dim % (rank_of(node.args[0]) + extra)


# arithmetic: operands in the dtype of the result


def _binary(op: str) -> Rule:
    def write(w: Writer, node: fx.Node) -> Value:
        if node.kwargs.get("alpha", 1) != 1 or "rounding_mode" in node.kwargs:
            raise w.refuse(node, f"keywords {dict(node.kwargs)}")
        a, b = node.args[:2]
        if dtype_of(node).is_complex:
            return _complex(w, node, op)
        if dtype_of(node) is torch.bool:
            raise w.refuse(node, "arithmetic of truth values")
        return str(w.scope.op(op, w.typed(a, dtype_of(node)), w.typed(b, dtype_of(node)), wanted=node.name))

    return write


for _name, _op in (("add", "Add"), ("sub", "Sub"), ("mul", "Mul"), ("div", "Div")):
    RULES[getattr(aten, _name).Tensor] = _binary(_op)
for _name, _op in (("multiply", "Mul"), ("subtract", "Sub"), ("divide", "Div")):
    RULES[getattr(aten, _name).Tensor] = _binary(_op)
for _name, _op in (("maximum", "Max"), ("minimum", "Min")):
    RULES[getattr(aten, _name).default] = _binary(_op)


def _complex(w: Writer, node: fx.Node, op: str) -> Value:
    a, b = (w.value(x) for x in node.args[:2])
    assert isinstance(node.args[0], fx.Node)
    real = torch.float64 if dtype_of(node.args[0]) is torch.complex128 else torch.float32
    s = w.scope
    if op == "Mul" and isinstance(a, Two) and isinstance(b, Two):
        first = s.op("Sub", s.op("Mul", a.first, b.first), s.op("Mul", a.second, b.second))
        return Two(first, s.op("Add", s.op("Mul", a.first, b.second), s.op("Mul", a.second, b.first)))
    if op == "Mul" and isinstance(a, Two) and isinstance(node.args[1], (int, float)):
        factor = s.constant(float(node.args[1]), real)
        return Two(s.op("Mul", a.first, factor), s.op("Mul", a.second, factor))
    raise w.refuse(node, "complex numbers are only multiplied")


def _comparison(op: str) -> Rule:
    def write(w: Writer, node: fx.Node) -> Value:
        a, b = node.args[:2]
        tensors = [x.meta["val"] for x in (a, b) if isinstance(x, fx.Node)]
        numbers = [x for x in (a, b) if not isinstance(x, fx.Node)]
        dtype = torch.result_type(*tensors, *numbers)
        x, y = w.typed(a, dtype), w.typed(b, dtype)
        if op == "NotEqual":
            return str(w.scope.op("Not", w.scope.op("Equal", x, y), wanted=node.name))
        return str(w.scope.op(op, x, y, wanted=node.name))

    return write


for _name, _op in (
    *(("eq", "Equal"), ("ne", "NotEqual"), ("lt", "Less"), ("le", "LessOrEqual")),
    *(("gt", "Greater"), ("ge", "GreaterOrEqual")),
):
    RULES[getattr(aten, _name).Tensor] = RULES[getattr(aten, _name).Scalar] = _comparison(_op)


def _unary(op: str) -> Rule:
    def write(w: Writer, node: fx.Node) -> Value:
        return str(w.scope.op(op, w.typed(node.args[0], dtype_of(node)), wanted=node.name))

    return write


for _name, _op in (
    *(("cos", "Cos"), ("sin", "Sin"), ("exp", "Exp"), ("log", "Log"), ("tanh", "Tanh"), ("sqrt", "Sqrt")),
    *(("sigmoid", "Sigmoid"), ("relu", "Relu"), ("neg", "Neg"), ("abs", "Abs"), ("floor", "Floor")),
    *(("reciprocal", "Reciprocal"), ("erf", "Erf")),
):
    RULES[getattr(aten, _name).default] = _unary(_op)


@rule(aten.rsqrt.default)
def _rsqrt(w: Writer, node: fx.Node) -> Value:
    root = w.scope.op("Sqrt", w.typed(node.args[0], dtype_of(node)))
    return str(w.scope.op("Reciprocal", root, wanted=node.name))


@rule(aten.silu.default)
def _silu(w: Writer, node: fx.Node) -> Value:
    x = w.value(node.args[0])
    return str(w.scope.op("Mul", x, w.scope.op("Sigmoid", x), wanted=node.name))


@rule(aten.gelu.default)
def _gelu(w: Writer, node: fx.Node) -> Value:
    """Spelled out: stock runtimes have no Gelu and no Erf of float64."""
    s, x, dtype = w.scope, w.value(node.args[0]), dtype_of(node)
    half, one = s.constant(0.5, dtype), s.constant(1.0, dtype)
    if argument(node, 1, "approximate", "none") == "tanh":
        cubed = s.op("Mul", s.op("Mul", s.op("Mul", x, x), x), s.constant(0.044715, dtype))
        inner = s.op("Mul", s.op("Add", x, cubed), s.constant(math.sqrt(2 / math.pi), dtype))
        gate = s.op("Tanh", inner)
    else:
        gate = s.op("Erf", s.op("Mul", x, s.constant(math.sqrt(0.5), dtype)))
    return str(s.op("Mul", s.op("Mul", x, half), s.op("Add", gate, one), wanted=node.name))


@rule(aten.pow.Tensor_Scalar, aten.square.default)
def _pow(w: Writer, node: fx.Node) -> Value:
    x = w.typed(node.args[0], dtype_of(node))
    if node.target is aten.square.default or node.args[1] == 2:
        return str(w.scope.op("Mul", x, x, wanted=node.name))
    return str(w.scope.op("Pow", x, w.typed(node.args[1], dtype_of(node)), wanted=node.name))


@rule(aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default)
def _clamp(w: Writer, node: fx.Node) -> Value:
    low, high = argument(node, 1, "min"), argument(node, 2, "max")
    if node.target is aten.clamp_max.default:
        low, high = None, low
    bounds = ["" if x is None else w.typed(x, dtype_of(node)) for x in (low, high)]
    return str(w.scope.op("Clip", w.typed(node.args[0], dtype_of(node)), *bounds, wanted=node.name))


@rule(aten.bitwise_not.default, aten.logical_not.default)
def _not(w: Writer, node: fx.Node) -> Value:
    if dtype_of(node.args[0]) is not torch.bool:
        raise w.refuse(node, f"bits of {dtype_of(node.args[0])}")
    return str(w.scope.op("Not", w.value(node.args[0]), wanted=node.name))


def _logical(op: str) -> Rule:
    def write(w: Writer, node: fx.Node) -> Value:
        if any(dtype_of(x) is not torch.bool for x in node.args[:2]):
            raise w.refuse(node, "bits of what are no truth values")
        return str(w.scope.op(op, *(w.value(x) for x in node.args[:2]), wanted=node.name))

    return write


for _name, _op in (("and", "And"), ("or", "Or")):
    RULES[getattr(aten, f"bitwise_{_name}").Tensor] = _logical(_op)
    RULES[getattr(aten, f"logical_{_name}").default] = _logical(_op)


@rule(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def _masked_fill(w: Writer, node: fx.Node) -> Value:
    x, mask, fill = node.args
    return str(w.scope.op("Where", w.value(mask), w.typed(fill, dtype_of(node)), w.value(x), wanted=node.name))


@rule(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf)
def _where(w: Writer, node: fx.Node) -> Value:
    condition, a, b = node.args
    both = (w.typed(x, dtype_of(node)) for x in (a, b))
    return str(w.scope.op("Where", w.value(condition), *both, wanted=node.name))


@rule(aten._to_copy.default, aten.to.dtype)
def _cast(w: Writer, node: fx.Node) -> Value:
    return w.typed(node.args[0], dtype_of(node))


@rule(aten.type_as.default)
def _type_as(w: Writer, node: fx.Node) -> Value:
    return w.typed(node.args[0], dtype_of(node))


@rule(
    aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default
)
def _same(w: Writer, node: fx.Node) -> Value:
    value: Value = w.value(node.args[0])
    return value


# products and sums


@rule(aten.linear.default)
def _linear(w: Writer, node: fx.Node) -> Value:
    x, weight = (w.value(n) for n in node.args[:2])
    columns = w.scope.op("Transpose", weight, perm=[1, 0])
    bias = argument(node, 2, "bias")
    if bias is None:
        return str(w.scope.op("MatMul", x, columns, wanted=node.name))
    return str(w.scope.op("Add", w.scope.op("MatMul", x, columns), w.value(bias), wanted=node.name))


@rule(aten.einsum.default)
def _einsum(w: Writer, node: fx.Node) -> Value:
    equation, operands = node.args[:2]
    assert isinstance(operands, (list, tuple))
    return str(w.scope.op("Einsum", *(w.value(n) for n in operands), wanted=node.name, equation=equation))


@rule(aten.bmm.default, aten.mm.default, aten.matmul.default)
def _matmul(w: Writer, node: fx.Node) -> Value:
    return str(w.scope.op("MatMul", *(w.value(n) for n in node.args[:2]), wanted=node.name))


def _reduction(op: str) -> Rule:
    def write(w: Writer, node: fx.Node) -> Value:
        dims, keep = argument(node, 1, "dim"), argument(node, 2, "keepdim", False)
        x = w.typed(node.args[0], dtype_of(node))
        axes = [] if not dims else [w.scope.ints(dims)]
        return str(w.scope.op(op, x, *axes, wanted=node.name, keepdims=int(keep)))

    return write


RULES[aten.mean.dim], RULES[aten.sum.dim_IntList] = _reduction("ReduceMean"), _reduction("ReduceSum")
RULES[aten.amax.default] = _reduction("ReduceMax")


@rule(aten.max.dim)
def _max(w: Writer, node: fx.Node) -> Value:
    """The largest values and where they stand; torch says of equal ones that which it is, is open."""
    dim, keep, x = node.args[1], argument(node, 2, "keepdim", False), w.value(node.args[0])
    values = w.scope.op("ReduceMax", x, w.scope.ints([dim]), wanted=node.name, keepdims=int(keep))
    if not any(u.target is operator.getitem and u.args[1] == 1 for u in node.users):
        return (values, None)
    return values, w.scope.op("ArgMax", x, wanted=node.name, axis=dim, keepdims=int(keep))


@rule(aten.cumsum.default)
def _cumsum(w: Writer, node: fx.Node) -> Value:
    dim = w.scope.constant(int(node.args[1]), torch.int64)
    return str(w.scope.op("CumSum", w.typed(node.args[0], dtype_of(node)), dim, wanted=node.name))


@rule(aten.softmax.int, aten._softmax.default)
def _softmax(w: Writer, node: fx.Node) -> Value:
    x = w.typed(node.args[0], dtype_of(node))
    return str(w.scope.op("Softmax", x, wanted=node.name, axis=int(node.args[1])))


@rule(aten.layer_norm.default)
def _layer_norm(w: Writer, node: fx.Node) -> Value:
    _, sizes, *_ = node.args
    weight, bias, eps = argument(node, 2, "weight"), argument(node, 3, "bias"), argument(node, 4, "eps", 1e-5)
    normed, dtype = _normed(w, node, len(sizes), eps, centred=True), dtype_of(node)
    return _scaled(w, node, normed, weight, bias, dtype)


@rule(aten.rms_norm.default)
def _rms_norm(w: Writer, node: fx.Node) -> Value:
    eps = argument(node, 3, "eps")
    if eps is None:
        eps = torch.finfo(dtype_of(node)).eps
    normed = _normed(w, node, len(node.args[1]), eps, centred=False)
    return _scaled(w, node, normed, argument(node, 2, "weight"), None, dtype_of(node))


def _normed(w: Writer, node: fx.Node, dims: int, eps: float, centred: bool) -> str:
    """Over the last dims, in float32 or wider."""
    s, wide = w.scope, torch.promote_types(dtype_of(node), torch.float32)
    x, axes = w.typed(node.args[0], wide), s.ints(range(-dims, 0))
    if centred:
        x = s.op("Sub", x, s.op("ReduceMean", x, axes, keepdims=1))
    variance = s.op("ReduceMean", s.op("Mul", x, x), axes, keepdims=1)
    return str(s.op("Div", x, s.op("Sqrt", s.op("Add", variance, s.constant(float(eps), wide)))))


def _scaled(w: Writer, node: fx.Node, normed: str, weight: Any, bias: Any, dtype: torch.dtype) -> str:
    wide = torch.promote_types(dtype, torch.float32)
    for op, other in (("Mul", weight), ("Add", bias)):
        if other is not None:
            normed = w.scope.op(op, normed, w.typed(other, wide))
    return normed if wide == dtype else str(w.scope.op("Cast", normed, wanted=node.name, to=ONNX_DTYPES[dtype]))


# where elements stand


def _on_parts(write: Rule) -> Rule:
    """What moves dims moves those of both parts of a value that is two."""

    def both(w: Writer, node: fx.Node) -> Value:
        value = w.value(node.args[0])
        if not isinstance(value, Two):
            return write(w, node)
        return Two(*(str(write(_PartOf(w, node.args[0], part), node)) for part in (value.first, value.second)))

    return both


class _PartOf:
    """A writer to whom one node's value is one of its parts."""

    def __init__(self, w: Writer, node: Any, part: str):
        self._w, self._node, self._part = w, node, part
        self.scope, self.typed, self.refuse = w.scope, w.typed, w.refuse

    def value(self, x: Any) -> Any:
        return self._part if x is self._node else self._w.value(x)


def moves(*targets: Any) -> Callable[[Rule], Rule]:
    """Register a rule of ops that only move dims."""

    def register(function: Rule) -> Rule:
        return rule(*targets)(_on_parts(function))

    return register


@moves(aten.view.default, aten.reshape.default, aten._unsafe_view.default)
def _view(w: Writer, node: fx.Node) -> Value:
    sizes = [w.value(size) for size in node.args[1]]
    return _reshaped(w, node, sizes)


def _reshaped(w: Writer, node: fx.Node, sizes: list[Any]) -> str:
    # without the attribute a 0 means "as before" (a latent without rope has a rope part of no numbers)
    as_said: dict[str, Any] = {"allowzero": 1} if any(isinstance(size, int) and size == 0 for size in sizes) else {}
    return str(w.scope.op("Reshape", w.value(node.args[0]), w.scope.shape(sizes), wanted=node.name, **as_said))


@moves(aten.flatten.using_ints)
def _flatten(w: Writer, node: fx.Node) -> Value:
    start, end = _dim(node, argument(node, 1, "start_dim", 0)), _dim(node, argument(node, 2, "end_dim", -1))
    rank = rank_of(node.args[0])
    return _reshaped(w, node, [*_sizes(w, node, 0, start), -1, *_sizes(w, node, end + 1, rank)])


@moves(aten.unflatten.int)
def _unflatten(w: Writer, node: fx.Node) -> Value:
    dim, rank = _dim(node, node.args[1]), rank_of(node.args[0])
    split = [w.value(size) for size in node.args[2]]
    return _reshaped(w, node, [*_sizes(w, node, 0, dim), *split, *_sizes(w, node, dim + 1, rank)])


def _sizes(w: Writer, node: fx.Node, start: int, end: int) -> list[Any]:
    """Sizes of dims of the first argument: numbers where they are known."""
    known = node.args[0].meta["val"].shape
    x = w.value(node.args[0])
    return [int(known[d]) if isinstance(known[d], int) else w.scope.size_of(x, d) for d in range(start, end)]


@moves(aten.transpose.int)
def _transpose(w: Writer, node: fx.Node) -> Value:
    order = list(range(rank_of(node)))
    a, b = _dim(node, node.args[1]), _dim(node, node.args[2])
    order[a], order[b] = order[b], order[a]
    return str(w.scope.op("Transpose", w.value(node.args[0]), wanted=node.name, perm=order))


@moves(aten.t.default)
def _t(w: Writer, node: fx.Node) -> Value:
    return str(w.scope.op("Transpose", w.value(node.args[0]), wanted=node.name, perm=[1, 0]))


@moves(aten.permute.default)
def _permute(w: Writer, node: fx.Node) -> Value:
    order = [_dim(node, d) for d in node.args[1]]
    return str(w.scope.op("Transpose", w.value(node.args[0]), wanted=node.name, perm=order))


@moves(aten.movedim.int)
def _movedim(w: Writer, node: fx.Node) -> Value:
    order = list(range(rank_of(node)))
    order.insert(_dim(node, node.args[2]), order.pop(_dim(node, node.args[1])))
    return str(w.scope.op("Transpose", w.value(node.args[0]), wanted=node.name, perm=order))


@moves(aten.unsqueeze.default)
def _unsqueeze(w: Writer, node: fx.Node) -> Value:
    axis = w.scope.ints([_dim(node, node.args[1], extra=1)])
    return str(w.scope.op("Unsqueeze", w.value(node.args[0]), axis, wanted=node.name))


@moves(aten.squeeze.dim)
def _squeeze(w: Writer, node: fx.Node) -> Value:
    dim = _dim(node, node.args[1])
    if rank_of(node) == rank_of(node.args[0]):  # not of size 1: torch leaves it
        return str(w.value(node.args[0]))
    return str(w.scope.op("Squeeze", w.value(node.args[0]), w.scope.ints([dim]), wanted=node.name))


@moves(aten.expand.default)
def _expand(w: Writer, node: fx.Node) -> Value:
    sizes = [1 if size == -1 else w.value(size) for size in node.args[1]]
    return str(w.scope.op("Expand", w.value(node.args[0]), w.scope.shape(sizes), wanted=node.name))


@moves(aten.slice.Tensor)
def _slice(w: Writer, node: fx.Node) -> Value:
    dim, start = _dim(node, argument(node, 1, "dim", 0)), argument(node, 2, "start")
    end, step = argument(node, 3, "end"), argument(node, 4, "step", 1)
    last = torch.iinfo(torch.int64).max
    start, end = 0 if start is None else start, last if end is None else end
    x = w.value(node.args[0])
    if (start, step) == (0, 1) and end == last:
        return str(x)
    bounds = [w.scope.shape([w.value(v)]) for v in (start, end)]
    return str(w.scope.op("Slice", x, *bounds, w.scope.ints([dim]), w.scope.ints([step]), wanted=node.name))


@rule(aten.slice_scatter.default)
def _slice_scatter(w: Writer, node: fx.Node) -> Value:
    """What lies before the slice, the source in its place, what lies behind it."""
    x, source = (w.value(n) for n in node.args[:2])
    dim, step = _dim(node, argument(node, 2, "dim", 0)), argument(node, 5, "step", 1)
    start, end, last = argument(node, 3, "start"), argument(node, 4, "end"), torch.iinfo(torch.int64).max
    start, end = 0 if start is None else start, last if end is None else end
    if step != 1 or not isinstance(start, int) or not isinstance(end, int) or start < 0 or end < 0:
        raise w.refuse(node, f"its slice is [{start}:{end}:{step}]")
    s, axis = w.scope, w.scope.ints([dim])
    before = [s.op("Slice", x, s.ints([0]), s.ints([start]), axis)] if start else []
    behind = [s.op("Slice", x, s.ints([end]), s.ints([last]), axis)] if end != last else []
    return str(s.op("Concat", *before, source, *behind, wanted=node.name, axis=dim))


@moves(aten.select.int)
def _select(w: Writer, node: fx.Node) -> Value:
    place = w.scope.constant(int(node.args[2]), torch.int64)
    return str(w.scope.op("Gather", w.value(node.args[0]), place, wanted=node.name, axis=_dim(node, node.args[1])))


@rule(aten.split_with_sizes.default, aten.split.Tensor, aten.chunk.default)
def _split(w: Writer, node: fx.Node) -> Value:
    dim, parts = argument(node, 2, "dim", 0), node.meta["val"]
    sizes = w.scope.ints([int(part.shape[dim]) for part in parts])
    names = w.scope.op(
        "Split", w.value(node.args[0]), sizes, outputs=len(parts), wanted=node.name, axis=_dim(node, dim)
    )
    return names if isinstance(names, tuple) else (names,)


@rule(aten.unbind.int)
def _unbind(w: Writer, node: fx.Node) -> Value:
    dim, x = _dim(node, argument(node, 1, "dim", 0)), w.value(node.args[0])
    places = [w.scope.constant(i, torch.int64) for i in range(len(node.meta["val"]))]
    return tuple(w.scope.op("Gather", x, place, wanted=node.name, axis=dim) for place in places)


@rule(aten.cat.default)
def _cat(w: Writer, node: fx.Node) -> Value:
    parts = [w.typed(n, dtype_of(node)) for n in node.args[0]]
    return str(w.scope.op("Concat", *parts, wanted=node.name, axis=argument(node, 1, "dim", 0)))


@rule(aten.stack.default)
def _stack(w: Writer, node: fx.Node) -> Value:
    dim = argument(node, 1, "dim", 0) % rank_of(node)
    axis = w.scope.ints([dim])
    parts = [w.scope.op("Unsqueeze", w.typed(n, dtype_of(node)), axis) for n in node.args[0]]
    return str(w.scope.op("Concat", *parts, wanted=node.name, axis=dim))


@rule(aten.repeat_interleave.self_int)
def _repeat_interleave(w: Writer, node: fx.Node) -> Value:
    """Each row `repeats` times: a dim behind it that is broadcast, and joined to it."""
    repeats, dim = node.args[1], argument(node, 2, "dim")
    if dim is None or not isinstance(repeats, int):
        raise w.refuse(node, "it repeats no dim by a number")
    dim, rank, s = _dim(node, dim), rank_of(node.args[0]), w.scope
    wide = s.op("Unsqueeze", w.value(node.args[0]), s.ints([dim + 1]))
    many = s.op("Expand", wide, s.ints([repeats if d == dim + 1 else 1 for d in range(rank + 1)]))
    shape = s.shape([*_sizes(w, node, 0, dim), -1, *_sizes(w, node, dim + 1, rank)])
    return str(s.op("Reshape", many, shape, wanted=node.name))


@rule(aten.repeat.default)
def _repeat(w: Writer, node: fx.Node) -> Value:
    """The whole tensor again and again along each dim; dims that are new stand in front."""
    counts = [w.value(count) for count in node.args[1]]
    new, x = len(counts) - rank_of(node.args[0]), w.value(node.args[0])
    if new:
        x = w.scope.op("Unsqueeze", x, w.scope.ints(range(new)))
    return str(w.scope.op("Tile", x, w.scope.shape(counts), wanted=node.name))


# choosing


@rule(aten.embedding.default)
def _embedding(w: Writer, node: fx.Node) -> Value:
    return str(w.scope.op("Gather", w.value(node.args[0]), w.value(node.args[1]), wanted=node.name, axis=0))


@rule(aten.index.Tensor, aten.index_select.default)
def _index(w: Writer, node: fx.Node) -> Value:
    if node.target is aten.index_select.default:
        _, axis, chosen = node.args
    else:
        given = [(axis, chosen) for axis, chosen in enumerate(node.args[1]) if chosen is not None]
        if len(given) != 1:
            raise w.refuse(node, "it is indexed along several dims")
        axis, chosen = given[0]
    if dtype_of(chosen) not in (torch.int64, torch.int32):
        raise w.refuse(node, f"it is indexed by {dtype_of(chosen)}")
    return str(w.scope.op("Gather", w.value(node.args[0]), w.value(chosen), wanted=node.name, axis=axis))


@rule(aten.gather.default)
def _gather(w: Writer, node: fx.Node) -> Value:
    x, axis, places = node.args[:3]
    return str(w.scope.op("GatherElements", w.value(x), w.value(places), wanted=node.name, axis=axis))


@rule(aten.scatter.value, aten.scatter.src)
def _scatter(w: Writer, node: fx.Node) -> Value:
    x, axis, places, source = node.args[:4]
    index = w.value(places)
    if isinstance(source, fx.Node):
        updates = w.value(source)
    else:
        updates = w.scope.op("Expand", w.typed(source, dtype_of(node)), w.scope.op("Shape", index))
    return str(w.scope.op("ScatterElements", w.value(x), index, updates, wanted=node.name, axis=axis))


@rule(aten.topk.default)
def _topk(w: Writer, node: fx.Node) -> Value:
    dim, largest = argument(node, 2, "dim", -1), argument(node, 3, "largest", True)
    count = w.scope.shape([w.value(node.args[1])])
    x = w.value(node.args[0])
    result: Value = w.scope.op("TopK", x, count, outputs=2, wanted=node.name, axis=dim, largest=int(largest))
    return result


@rule(aten.sort.default, aten.sort.stable)
def _sort(w: Writer, node: fx.Node) -> Value:
    """TopK of all: of equal ones the earlier comes first, as in a stable sort."""
    shift = 1 if node.target is aten.sort.stable else 0
    dim = argument(node, 1 + shift, "dim", -1)
    descending = argument(node, 2 + shift, "descending", False)
    x = w.value(node.args[0])
    count = w.scope.size_of(x, _dim(node, dim)).name
    result: Value = w.scope.op("TopK", x, count, outputs=2, wanted=node.name, axis=dim, largest=int(descending))
    return result


# new tensors


def _filled(number: float | None) -> Rule:
    def write(w: Writer, node: fx.Node) -> Value:
        fill = node.args[1] if number is None else number
        shape = w.scope.op("Shape", w.value(node.args[0]))
        return str(w.scope.op("Expand", w.typed(fill, dtype_of(node)), shape, wanted=node.name))

    return write


RULES[aten.zeros_like.default], RULES[aten.ones_like.default] = _filled(0), _filled(1)
RULES[aten.full_like.default] = _filled(None)


@rule(aten.full.default, aten.zeros.default, aten.ones.default)
def _full(w: Writer, node: fx.Node) -> Value:
    fill = {aten.zeros.default: 0, aten.ones.default: 1}.get(node.target)
    number = node.args[1] if fill is None else fill
    shape = w.scope.shape([w.value(size) for size in node.args[0]])
    return str(w.scope.op("Expand", w.typed(number, dtype_of(node)), shape, wanted=node.name))


@rule(aten.copy.default)
def _copy(w: Writer, node: fx.Node) -> Value:
    """The source in the sizes and dtype of the first argument."""
    shape = w.scope.op("Shape", w.value(node.args[0]))
    return str(w.scope.op("Expand", w.typed(node.args[1], dtype_of(node)), shape, wanted=node.name))


@rule(aten.arange.default, aten.arange.start)
def _arange(w: Writer, node: fx.Node) -> Value:
    start, end = (0, node.args[0]) if node.target is aten.arange.default else node.args[:2]
    bounds = [w.typed(x, dtype_of(node)) for x in (start, end, 1)]
    return str(w.scope.op("Range", *bounds, wanted=node.name))


# complex numbers


@rule(aten.polar.default)
def _polar(w: Writer, node: fx.Node) -> Value:
    length, angle = (w.value(x) for x in node.args[:2])
    s = w.scope
    return Two(s.op("Mul", length, s.op("Cos", angle)), s.op("Mul", length, s.op("Sin", angle)))


@rule(aten.view_as_complex.default)
def _view_as_complex(w: Writer, node: fx.Node) -> Value:
    x = w.value(node.args[0])
    places = [w.scope.constant(i, torch.int64) for i in (0, 1)]
    return Two(*(w.scope.op("Gather", x, place, axis=-1) for place in places))


@rule(aten.view_as_real.default)
def _view_as_real(w: Writer, node: fx.Node) -> Value:
    value, last = w.value(node.args[0]), w.scope.ints([-1])
    assert isinstance(value, Two)
    parts = [w.scope.op("Unsqueeze", part, last) for part in (value.first, value.second)]
    return str(w.scope.op("Concat", *parts, wanted=node.name, axis=-1))


# sizes


@rule(aten.sym_size.int)
def _sym_size(w: Writer, node: fx.Node) -> Value:
    x = w.value(node.args[0])
    x = x.first if isinstance(x, Two) else x
    return w.scope.size_of(x, int(node.args[1]) % rank_of(node.args[0]))


def _of_sizes(op: str) -> Rule:
    def write(w: Writer, node: fx.Node) -> Value:
        a, b = (w.scope.shape([w.value(x)]) for x in node.args[:2])
        return Size(w.scope.op(op, a, b, wanted=node.name))

    return write


# sizes are never negative, so a Div is a floor
for _function, _op in (
    *((operator.mul, "Mul"), (operator.add, "Add"), (operator.sub, "Sub"), (operator.floordiv, "Div")),
):
    RULES[_function] = _of_sizes(_op)


@rule(operator.getitem)
def _getitem(w: Writer, node: fx.Node) -> Value:
    values = w.value(node.args[0])
    assert isinstance(values, tuple)
    item: Value = values[node.args[1]]
    return item
