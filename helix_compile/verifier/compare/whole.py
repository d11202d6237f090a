"""One value out of what the ranks have of it: shards joined, partial sums added, copies side by side; how far two are apart."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributed.tensor.placement_types import Partial, Shard

from helix_compile.layout.degrees import HelixMesh
from helix_compile.layout.placement import Layout, parse_layout
from helix_compile.runtime.values import flat_places, token_dims
from helix_compile.verifier.compare.dumps import Value

SHAPE = "shape"  # what differs where nothing else can be compared


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
    """

    shape: tuple[int, ...]
    places: Tensor
    elements: Tensor
    figures: Figures | None
    ranks: tuple[int, ...]
    cut: int | None = None
    part: int = 0

    def owner(self, at: tuple[int, ...]) -> tuple[int, ...]:
        """The ranks that an element at these coordinates comes from; without coordinates the group."""
        if self.cut is None or not at:
            return self.ranks
        return (self.ranks[at[self.cut] // self.part],)


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


def fitted(a: Whole, b: Whole) -> tuple[Whole, Whole] | None:
    """Both without the zeros that pad the last shards of one; None if their shapes do not meet."""
    if a.shape == b.shape:
        return a, b
    if len(a.shape) != len(b.shape):
        return None
    other = [d for d, (x, y) in enumerate(zip(a.shape, b.shape, strict=True)) if x != y]
    longer = a if a.shape[other[0]] > b.shape[other[0]] else b
    if len(other) > 1 or longer.cut != other[0]:
        return None
    shape = (b if longer is a else a).shape
    return _narrowed(a, shape), _narrowed(b, shape)


def _narrowed(whole: Whole, shape: tuple[int, ...]) -> Whole:
    """The leading part; the zeros behind it are in no figure."""
    at = torch.stack(torch.unravel_index(whole.places, whole.shape), 1)
    kept = (at < torch.tensor(shape)).all(1)
    return replace(whole, shape=shape, places=flat_places(at[kept], shape), elements=whole.elements[kept])


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
        off = abs(x - y) / max(x, y) if x != y else 0.0
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
    figures = [f.largest for f in (a.figures, b.figures) if f is not None]
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
