"""One typing rule an op: from the layouts of its inputs to that of its output. An op without a rule is an error.

Here: aten ops. The helix:: ops and collectives are in helix_rules.py.

A rule raises Violation where an op would compute something else than the unsharded op: a partial sum in a nonlinear op,
shards that do not meet, a per-rank value that is read as if it were whole. Layouts are in normal form throughout.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.distributed.tensor.placement_types import Partial, Placement, Shard

from helix_compile.ir.graph import aten
from helix_compile.ir.sizes import shape_of
from helix_compile.layout.degrees import HelixLayout
from helix_compile.layout.placement import Layout, PartialSoftmax, PartialTopK, PerRank, format_layout

Result = Layout | tuple[Layout, ...]


Rule = Callable[[fx.Node, Callable[[Any], Layout], HelixLayout], Result]


class Violation(Exception):
    """An op that does not take the layouts it gets.

    `kind` is one of "layout", "partial" (a partial value where the whole is needed), "pending" (a collective that is
    not waited for exactly once), "collective" (one that its operand does not call for), "unknown" (no typing rule).
    """

    def __init__(self, reason: str, kind: str = "layout"):
        super().__init__(reason)
        self.kind = kind


def require(condition: bool, reason: str, kind: str = "layout") -> None:
    """Raise Violation unless `condition` holds."""
    if not condition:
        raise Violation(reason, kind)


def is_partial(layout: Any) -> bool:
    """True if a layout (or one of a tuple of them) has a partial sum, softmax or top-k."""
    if isinstance(layout, tuple):
        return any(is_partial(x) for x in layout)
    return any(isinstance(p, (Partial, PartialSoftmax, PartialTopK)) for p in layout.values())


def _map_dims(layout: Layout, new_dim: Callable[[int], int | None], what: str) -> Layout:
    """The layout with every Shard moved to its new dim; anything else is kept."""
    moved = dict(layout)
    for axis, placement in layout.items():
        if isinstance(placement, Shard):
            dim = new_dim(placement.dim)
            if dim is None:
                raise Violation(f"{what} works across dim {placement.dim}, which is cut over {axis}")
            moved[axis] = Shard(dim)
    return moved


def reshape_map(before: tuple[int, ...], after: tuple[int, ...]) -> dict[int, int]:
    """First dim of each group of dims that a reshape keeps together: dim before -> dim after."""
    mapping, i, j = {}, 0, 0
    while i < len(before) and j < len(after):
        first, left, right = (i, j), before[i], after[j]
        i, j = i + 1, j + 1
        while left != right:
            if left < right:
                left, i = left * before[i], i + 1
            else:
                right, j = right * after[j], j + 1
        mapping[first[0]] = first[1]
    return mapping


def _reshape(node: fx.Node, of: Callable[[Any], Layout], degrees: HelixLayout) -> Result:
    mapping = reshape_map(shape_of(node.args[0]), shape_of(node))
    return _map_dims(of(node.args[0]), mapping.get, "a reshape")


def _same(node: fx.Node, of: Callable[[Any], Layout], degrees: HelixLayout) -> Result:
    return of(node.args[0])


def _moved(node: fx.Node, of: Callable[[Any], Layout], degrees: HelixLayout) -> Result:
    """Views that only move, add or drop dims: each dim gets a prime for a stride, and is where that is found again."""
    shape = shape_of(node.args[0])
    view = node.target(torch.empty_strided(shape, _PRIMES[: len(shape)], device="meta"), *node.args[1:])
    # a new dim before one of size 1 has that one's stride: the last counts
    dim_of = {stride: argument for argument, stride in enumerate(view.stride())}
    return _map_dims(of(node.args[0]), lambda d: dim_of.get(_PRIMES[d]), node.target._opname)


# larger than any size that a body is captured with: no product of sizes and strides is one of them
_PRIMES = (1000003, 1000033, 1000037, 1000039, 1000081, 1000099, 1000117, 1000121)


def _along(argument: int) -> Rule:
    """Ops that cut or join along the dim given by `argument` (default 0); that dim must be whole."""

    def rule(node: fx.Node, of: Callable[[Any], Layout], degrees: HelixLayout) -> Result:
        ndim = len(shape_of(node.args[0]))
        along = (node.args[argument] if len(node.args) > argument else 0) % ndim
        layout = _map_dims(of(node.args[0]), lambda d: None if d == along else d, str(node.target))
        parts = node.meta["val"]
        return (layout,) * len(parts) if isinstance(parts, (tuple, list)) else layout

    return rule


def _joined(node: fx.Node, of: Callable[[Any], Layout], degrees: HelixLayout) -> Result:
    """Cat along a dim that is whole; stack by a new dim before and behind which everything keeps its place."""
    layouts, what = [of(n) for n in node.args[0]], node.target._opname
    require(all(x == layouts[0] for x in layouts), f"{what} of {[format_layout(x) for x in layouts]}")
    along = (node.args[1] if len(node.args) > 1 else 0) % node.meta["val"].dim()
    if what == "stack":
        return _map_dims(layouts[0], lambda d: d + (d >= along), what)
    return _map_dims(layouts[0], lambda d: None if d == along else d, what)


def _getitem(node: fx.Node, of: Callable[[Any], Any], degrees: HelixLayout) -> Result:
    return of(node.args[0])[node.args[1]]


def _linear(node: fx.Node, of: Callable[[Any], Layout], degrees: HelixLayout) -> Result:
    x, weight = of(node.args[0]), of(node.args[1])
    bias = of(node.args[2]) if len(node.args) > 2 and node.args[2] is not None else None
    last = len(shape_of(node)) - 1
    out: Layout = {}
    for axis in {*x, *weight}:
        a, w = x.get(axis), weight.get(axis)
        if isinstance(w, Shard) and w.dim == 0:
            require(a is None, f"columns of the result are cut over {axis}, but the input is {a} there")
            out[axis] = Shard(last)
        elif isinstance(w, Shard):
            require(a == Shard(last), f"input columns of the weight are cut over {axis}, the input is {a} there")
            out[axis] = Partial("sum")
        elif isinstance(a, Shard):
            require(a.dim != last and w is None, f"the input's columns are cut over {axis}, the weight's are whole")
            out[axis] = a
        else:
            require(isinstance(a, Partial) and w is None and bias is None, f"linear of {a} over {axis}")
            out[axis] = a  # type: ignore[assignment] # checked above
    if bias is not None:
        require(not any(isinstance(p, Partial) for p in out.values()), "a bias is added to a partial sum")
        rows = {axis for axis, p in out.items() if p == Shard(last)}
        require(set(bias) == rows, f"bias is {format_layout(bias)}, the result {format_layout(out)}")
    return out


def _einsum(node: fx.Node, of: Callable[[Any], Layout], degrees: HelixLayout) -> Result:
    inputs, result = node.args[0].split("->")
    terms = list(zip(inputs.split(","), (of(n) for n in node.args[1]), strict=True))
    out: Layout = {}
    for axis in {a for _, layout in terms for a in layout}:
        letters = {t[p.dim] for t, layout in terms if isinstance(p := layout.get(axis), Shard)}
        others = [p for _, x in terms if (p := x.get(axis)) is not None and not isinstance(p, Shard)]
        if not letters:  # linear in each operand, so one partial operand stays partial
            require(len(others) == 1 and not isinstance(others[0], PerRank), f"einsum of {others} over {axis}")
            out[axis] = others[0]
            continue
        require(len(letters) == 1 and not others, f"einsum mixes {letters} and {others} over {axis}")
        letter = letters.pop()
        for term, layout in terms:
            met = letter not in term or layout.get(axis) == Shard(term.index(letter))
            require(met, f"dim '{letter}' is cut over {axis} in one operand only")
        out[axis] = Shard(result.index(letter)) if letter in result else Partial("sum")
    return out


def elementwise(node: fx.Node, of: Callable[[Any], Layout], degrees: HelixLayout) -> Result:
    """Any op that works on each element alone; add and scaling also take partial sums."""
    tensors = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
    ndim = len(shape_of(node))
    out: Layout = {}
    for axis in {a for n in tensors for a in of(n)}:
        placements = [of(n).get(axis) for n in tensors]
        present = [p for p in placements if p is not None]
        if all(isinstance(p, Shard) for p in present):
            out[axis] = _aligned(tensors, placements, ndim, axis)
        elif all(isinstance(p, Partial) for p in present):
            additive = node.target in _ADDITIVE and len(present) == len(tensors) == 2
            scaling = node.target in _SCALING and len(present) == 1
            require(additive or scaling, f"a partial sum over {axis} reaches {node.target}")
            out[axis] = present[0]
        else:
            one = len(tensors) == 1 and isinstance(present[0], PerRank) and node.target in _SCALING
            require(one, f"{', '.join(map(str, present))} over {axis} reaches {node.target}")
            out[axis] = present[0]
    return out


_ADDITIVE = (aten.add.Tensor, aten.sub.Tensor)


_SCALING = (aten.mul.Tensor, aten.div.Tensor)


def _aligned(tensors: list[fx.Node], placements: list[Placement | None], ndim: int, axis: str) -> Placement:
    """The common shard; an operand that is not cut must be broadcast along that dim."""
    shapes = [shape_of(n) for n in tensors]
    dims = {p.dim + ndim - len(s) for s, p in zip(shapes, placements, strict=True) if isinstance(p, Shard)}
    require(len(dims) == 1, f"operands are cut along different dims {sorted(dims)} over {axis}")
    dim = dims.pop()
    for shape, placement in zip(shapes, placements, strict=True):
        own = dim - (ndim - len(shape))
        require(
            placement is not None or own < 0 or shape[own] == 1,
            f"one operand is cut along dim {dim} over {axis}, the other is whole",
        )
    return Shard(dim)


def _last_dim_joined(node: fx.Node, of: Callable[[Any], Layout], degrees: HelixLayout) -> Result:
    last = len(shape_of(node.args[0])) - 1
    return _map_dims(of(node.args[0]), lambda d: None if d == last else d, str(node.target))


def _mean(node: fx.Node, of: Callable[[Any], Layout], degrees: HelixLayout) -> Result:
    """Of dims that are whole; a norm of each head keeps its heads cut."""
    layout, ndim = of(node.args[0]), len(shape_of(node.args[0]))
    require(all(isinstance(p, Shard) for p in layout.values()), f"a mean of {format_layout(layout)}")
    gone = sorted(d % ndim for d in node.args[1])
    keep = len(node.args) > 2 and node.args[2]
    return _map_dims(layout, lambda d: None if d in gone else d if keep else d - sum(g < d for g in gone), "mean")


def _norm(node: fx.Node, of: Callable[[Any], Layout], degrees: HelixLayout) -> Result:
    """Layer norm, RMS norm: the dims that are normalised are whole, and so are weight and bias, which have these dims."""
    x, *weights = (n for n in node.args if isinstance(n, fx.Node))
    layout = of(x)
    require(all(isinstance(p, Shard) for p in layout.values()), f"a norm of {format_layout(layout)}")
    require(
        not any(of(w) for w in weights),
        f"weights of a norm are {[format_layout(of(w)) for w in weights]}, expected whole",
    )
    first = len(shape_of(x)) - len(node.args[1])
    return _map_dims(layout, lambda d: d if d < first else None, str(node.target))


def _read_as(node: fx.Node, of: Callable[[Any], Layout], degrees: HelixLayout) -> Result:
    """Bytes read as another dtype: of the last dim, which is whole, some become one."""
    last = len(shape_of(node)) - 1
    return _map_dims(of(node.args[0]), lambda d: None if d == last else d, str(node.target))


def _expand(node: fx.Node, of: Callable[[Any], Layout], degrees: HelixLayout) -> Result:
    shift = len(shape_of(node)) - len(shape_of(node.args[0]))
    return _map_dims(of(node.args[0]), lambda d: d + shift, "expand")


_RESHAPES = (
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
)


_MOVES = (aten.transpose.int, aten.movedim.int, aten.permute.default, aten.unsqueeze.default, aten.squeeze.dim)


ELEMENTWISE = (
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.silu.default,
    aten.gelu.default,
    aten.relu.default,
    aten.sigmoid.default,
    aten.neg.default,
    aten.rsqrt.default,
    aten.pow.Tensor_Scalar,
    aten.cos.default,
    aten.sin.default,
    aten.exp.default,
    aten.tanh.default,
    aten._to_copy.default,
    aten.clamp.default,
    aten.masked_fill.Scalar,
    aten.bitwise_not.default,
    aten.where.self,
)


def _zeros(node: fx.Node, of: Callable[[Any], Layout], degrees: HelixLayout) -> Result:
    """A zero of the dtype and device of what is given, whose value is not read; more of them are of a size that might be."""
    given = of(node.args[0])
    require(not (given and node.args[1]), f"zeros like a value that is {format_layout(given)}")
    return {}


RULES: dict[Any, Rule] = {
    **dict.fromkeys(_RESHAPES, _reshape),
    **dict.fromkeys(ELEMENTWISE, elementwise),
    **dict.fromkeys(_MOVES, _moved),
    aten.clone.default: _same,
    aten.contiguous.default: _same,
    aten.alias.default: _same,
    aten.type_as.default: _same,  # the other operand lends its dtype only
    aten.view_as_complex.default: _last_dim_joined,
    aten.view_as_real.default: _same,
    aten.view.dtype: _read_as,
    aten.slice.Tensor: _along(1),
    aten.split_with_sizes.default: _along(2),
    aten.split.Tensor: _along(2),
    aten.cat.default: _joined,
    aten.stack.default: _joined,
    aten.expand.default: _expand,
    aten.mean.dim: _mean,
    aten.new_zeros.default: _zeros,
    aten.layer_norm.default: _norm,
    aten.rms_norm.default: _norm,
    operator.getitem: _getitem,
    aten.linear.default: _linear,
    aten.einsum.default: _einsum,
}
