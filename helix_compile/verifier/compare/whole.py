"""One value out of what the ranks have of it: shards joined, partial sums added, copies side by side; how far two are apart."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributed.tensor.placement_types import Partial, Shard

from helix_compile.layout.degrees import HelixMesh
from helix_compile.layout.placement import Layout, parse_layout
from helix_compile.runtime.values import flat_places, token_dims
from helix_compile.verifier.compare.dumps import Value

SHAPE, DTYPE = "shape", "dtype"  # what differs where nothing else can be compared


@dataclass(frozen=True)
class Figures:
    """Norm and largest of the finite elements, and how many are not finite."""

    norm: float
    largest: float
    nonfinite: int


@dataclass(frozen=True)
class Whole:
    """A value as a group of ranks has it.

    Attributes:
        elements: [n] float64 at flat indices `places` of `shape`, ascending.
        figures: None where they can't be: the norm of a sum is not the sum of norms.
        ranks: the group. Of a joined value each has one part, `part` wide, of `cut`, the dim that is split.
        rows: where padding was left out of that dim, the places of those that are left.
    """

    shape: tuple[int, ...]
    places: Tensor
    elements: Tensor
    figures: Figures | None
    ranks: tuple[int, ...]
    cut: int | None = None
    part: int = 0
    rows: Tensor | None = None

    def owner(self, at: tuple[int, ...]) -> tuple[int, ...]:
        """The ranks that an element at these coordinates comes from; without coordinates the group."""
        if self.cut is None or not at:
            return self.ranks
        row = at[self.cut] if self.rows is None else int(self.rows[at[self.cut]])
        return (self.ranks[row // self.part],)


@dataclass(frozen=True)
class Deviation:
    """How far two values are apart, over the largest element of either.

    Attributes:
        off: inf where one is not finite and the other is.
        what: "element", or the figure that says so: "norm", "largest element", "elements that are not finite", "shape".
        at: coordinates of the element that is furthest off.
        values: that element, or that figure, of both.
    """

    off: float
    what: str = "element"
    at: tuple[int, ...] = ()
    values: tuple[float, float] = (0.0, 0.0)


def own(value: Value, rank: int) -> Whole:
    """What one rank has, as it is."""
    entry = value.entry
    figures = Figures(entry.norm, entry.largest, entry.nonfinite)
    shape = tuple(entry.shape)
    return Whole(shape, value.places, value.elements.double(), figures, (rank,))


def layout_of(text: str) -> Layout | None:
    """The layout that a dump says; None where it is not known or has no text of its own (a packed buffer)."""
    try:
        return parse_layout(text)
    except ValueError:
        return None


def wholes(values: list[Value], mesh: HelixMesh) -> list[Whole]:
    """The value as each group of ranks that can know it has it; [] where its parts make no whole.

    Args:
        values: of one node, by rank.
    """
    layout = layout_of(values[0].entry.layout)
    parts = [own(value, rank) for rank, value in enumerate(values)]
    if layout is None or len({(v.entry.layout, *v.entry.shape) for v in values}) > 1:
        return []
    if not layout:
        first = parts[0]
        alike = all(p.figures == first.figures and torch.equal(p.elements, first.elements) for p in parts[1:])
        return [replace(first, ranks=tuple(range(len(parts))))] if alike else parts
    if len(layout) > 1:
        return []
    ((axis, placement),) = layout.items()
    groups = mesh.groups[axis]
    if type(placement) is Shard:
        return [_joined([parts[r] for r in group], placement.dim, group) for group in groups]
    if type(placement) is Partial and placement.reduce_op == "sum":
        return [_summed([parts[r] for r in group], group) for group in groups]
    return []


def _joined(parts: list[Whole], dim: int, ranks: tuple[int, ...]) -> Whole:
    first = parts[0]
    shape = tuple(size * len(parts) if d == dim else size for d, size in enumerate(first.shape))
    known = [p.figures for p in parts if p.figures is not None]
    figures = Figures(
        math.hypot(*(f.norm for f in known)), max(f.largest for f in known), sum(f.nonfinite for f in known)
    )
    places, size = [], first.shape[dim]
    for i, part in enumerate(parts):
        at = torch.stack(torch.unravel_index(part.places, part.shape), 1)
        at[:, dim] += i * size
        places.append(flat_places(at, shape))
    order = torch.cat(places).argsort()
    elements = torch.cat([p.elements for p in parts])[order]
    return Whole(shape, torch.cat(places)[order], elements, figures, ranks, dim, size)


def _summed(parts: list[Whole], ranks: tuple[int, ...]) -> Whole:
    elements = torch.stack([p.elements for p in parts]).sum(0)
    return Whole(parts[0].shape, parts[0].places, elements, None, ranks)


Places = tuple[int | None, ...]  # which head of the model lies on each place of all ranks, None: a zero head


def fitted(
    a: Whole, b: Whole, padded: Sequence[Sequence[Places]] = ((), ()), zeros: bool = True
) -> tuple[Whole, Whole] | None:
    """Both without the zeros that pad the last shards of one, or without zero heads; None if their shapes do not meet.

    Args:
        padded: of each side, how heads lie at sites with zero heads.
        zeros: what zero heads have is zero too (weights), so that figures are those of the model's heads; a value may be
            what a zero head has attended to.
    """
    if a.shape == b.shape:
        return a, b
    if len(a.shape) != len(b.shape):
        return None
    other = [d for d, (x, y) in enumerate(zip(a.shape, b.shape, strict=True)) if x != y]
    if len(other) > 1:
        return None
    dim = other[0]
    by_tail = (_tail_cut(a, dim, b.shape[dim]), _tail_cut(b, dim, a.shape[dim]))
    sides = [[w, *_without_zero_heads(w, dim, places, zeros)] for w, places in zip((a, b), padded, strict=True)]
    by_heads = next(((x, y) for x in sides[0] for y in sides[1] if x.shape == y.shape), None)
    if by_tail[0] is None or by_tail[1] is None:
        return by_heads
    # a width that is padded looks like heads that are; what is dropped of a width is zero
    if by_heads and not (_lost_zeros(a, by_tail[0]) and _lost_zeros(b, by_tail[1])):
        return by_heads
    return by_tail[0], by_tail[1]


def _lost_zeros(before: Whole, after: Whole) -> bool:
    """All elements are known, and those that were dropped are zero."""
    if len(before.elements) < math.prod(before.shape):
        return False
    return int((before.elements != 0).sum()) == int((after.elements != 0).sum())


def _tail_cut(whole: Whole, dim: int, size: int) -> Whole | None:
    """The leading `size` of a dim that is split; the zeros behind it are in no figure."""
    if size >= whole.shape[dim]:
        return whole
    return _kept_rows(whole, dim, torch.arange(size), figures=True) if whole.cut == dim else None


def _without_zero_heads(whole: Whole, dim: int, padded: Sequence[Places], zeros: bool) -> Iterator[Whole]:
    """For each way in which the dim may hold heads."""
    for places in padded:
        width, rest = divmod(whole.shape[dim], len(places))
        if width and not rest:
            first = torch.tensor([place for place, head in enumerate(places) if head is not None]) * width
            yield _kept_rows(whole, dim, (first[:, None] + torch.arange(width)).flatten(), figures=zeros)


def _kept_rows(whole: Whole, dim: int, rows: Tensor, figures: bool) -> Whole:
    """`figures`: what is left out is zero, so they are still true."""
    shape = tuple(len(rows) if d == dim else size for d, size in enumerate(whole.shape))
    known = whole.figures if figures else None
    left = replace(whole, shape=shape, figures=known, rows=rows if whole.cut == dim else None)
    at = torch.stack(torch.unravel_index(whole.places, whole.shape), 1)
    now = torch.full((whole.shape[dim],), -1)
    now[rows] = torch.arange(len(rows))
    at[:, dim] = now[at[:, dim]]
    kept = at[:, dim] >= 0
    places = flat_places(at[kept], shape)
    order = places.argsort()
    return replace(left, places=places[order], elements=whole.elements[kept][order])


def deviation(a: Whole, b: Whole, mask: Tensor | None) -> Deviation:
    """How far `b` is from `a`, which has the same shape; padding is not looked at.

    Elements are compared where both have them, and norm and largest element where both have those.
    """
    found = _of_elements(a, b, mask)
    if a.figures is None or b.figures is None:
        return found
    if a.figures.nonfinite != b.figures.nonfinite:
        counts = (float(a.figures.nonfinite), float(b.figures.nonfinite))
        return found if found.off == math.inf else Deviation(math.inf, "elements that are not finite", (), counts)
    for what, x, y in (
        ("norm", a.figures.norm, b.figures.norm),
        ("largest element", a.figures.largest, b.figures.largest),
    ):
        off = abs(x - y) / max(abs(x), abs(y)) if x != y and not (math.isnan(x) and math.isnan(y)) else 0.0
        off = math.inf if math.isnan(off) else off  # a figure of finite elements that is none itself
        if off > 2 * found.off:  # an element that is off says more than a figure that is off by about as much
            found = Deviation(off, what, (), (x, y))
    return found


def _of_elements(a: Whole, b: Whole, mask: Tensor | None) -> Deviation:
    places = a.places[torch.isin(a.places, b.places, assume_unique=True)]
    places = places[_kept(a.shape, places, mask)]
    if not len(places):
        return Deviation(0.0)
    x, y = _at(a, places), _at(b, places)
    same = (x == y) | (x.isnan() & y.isnan())
    gap = torch.where(same, 0.0, (x - y).abs()).nan_to_num(nan=math.inf)
    worst = int(gap.argmax())
    finite = torch.cat([x, y]).abs()
    finite = finite[finite.isfinite()]
    figures = [f.largest for f in (a.figures, b.figures) if f is not None and math.isfinite(f.largest)]
    scale = max([float(finite.max()) if len(finite) else 0.0, *figures])
    off = float(gap[worst])
    at = torch.unravel_index(places[worst], a.shape) if a.shape and off else ()
    return Deviation(
        off / scale if scale else off, "element", tuple(int(i) for i in at), (float(x[worst]), float(y[worst]))
    )


def _at(whole: Whole, places: Tensor) -> Tensor:
    if torch.equal(whole.places, places):
        return whole.elements
    return whole.elements[torch.searchsorted(whole.places, places)]


def _kept(shape: tuple[int, ...], places: Tensor, mask: Tensor | None) -> Tensor:
    """Which of `places` are not at padding."""
    everything = torch.ones(len(places), dtype=torch.bool)
    if mask is None or bool(mask.all()) or not len(places):
        return everything
    dims = token_dims(shape, *mask.shape)
    if not dims:
        return everything
    at = torch.unravel_index(places, shape)
    return (mask[at[dims[0]], at[dims[1]]] if len(dims) == 2 else mask.flatten()[at[dims[0]]]).bool()
