"""Which rectangular parts of an original parameter make up a shard, and where each lies in it: for reading by slices."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from helix_compile.errors import PlanError
from helix_compile.layout.degrees import HelixLayout
from helix_compile.plan.helix_plan import ParamShard

Range = tuple[int, int]


@dataclass(frozen=True)
class Box:
    """[start, stop) of each dim of the original, and of each dim of the shard's view, which hold the same elements."""

    source: tuple[Range, ...]
    local: tuple[Range, ...]


@dataclass(frozen=True)
class ShardBoxes:
    """A shard as boxes.

    Attributes:
        boxes: cover all of the shard but its padding.
        local_shape: the shard in dims of ParamShard.view, padding included; `ParamShard.shape` has as many elements.
        padded: True if some elements are in no box.
    """

    boxes: tuple[Box, ...]
    local_shape: tuple[int, ...]
    padded: bool


def shard_boxes(shard: ParamShard, layout: HelixLayout, rank: int) -> ShardBoxes:
    """What `rank` reads for `shard`, the very elements that cut_param takes."""
    kept: list[Range] = [(0, size) for size in shard.view]
    local = list(shard.view)
    if shard.window is not None:
        dim, start, length = shard.window
        kept[dim], local[dim] = (start, start + length), length
    for cut in shard.cuts:
        start, stop = cut.bounds(layout, rank)
        first = kept[cut.dim][0]
        kept[cut.dim], local[cut.dim] = (first + start, first + stop), cut.width(layout)
    source_shape = list(shard.source_shape)
    if shard.index is not None:
        source_shape[0] = len(shard.index)
    runs, at = [], 0
    for axis, size in enumerate(source_shape):
        dims = _dims_of(size, shard.view, at, last=axis == len(source_shape) - 1)
        index = shard.index if axis == 0 else None
        runs.append(list(_runs(shard.view[at : at + dims], kept[at : at + dims], index)))
        at += dims
    boxes = tuple(
        Box(tuple(source for source, _ in one), tuple(r for _, parts in one for r in parts)) for one in product(*runs)
    )
    real = [stop - start for start, stop in kept]
    return ShardBoxes(boxes, tuple(local), padded=real != local)


def _dims_of(size: int, view: tuple[int, ...], at: int, last: bool) -> int:
    """How many dims of `view`, from `at` on, split a dim of `size`."""
    if last:
        return len(view) - at
    elements, dims = view[at], 1
    while elements < size:
        elements, dims = elements * view[at + dims], dims + 1
    return dims


def _runs(
    sizes: tuple[int, ...], kept: list[Range], index: tuple[int, ...] | None
) -> Iterator[tuple[Range, tuple[Range, ...]]]:
    """Rows in a row of one dim that `sizes` split: ([start, stop) of the dim, the same in the shard's own dims)."""
    last = len(sizes) - 1
    if index is None:  # dims that are kept whole go with the one before them
        while last > 0 and kept[last] == (0, sizes[last]):
            last -= 1
    stride = math.prod(sizes[last + 1 :])
    whole = tuple((0, size) for size in sizes[last + 1 :])
    start, stop = kept[last]
    for outer in product(*(range(*bounds) for bounds in kept[:last])):
        row = 0
        for size, i in zip(sizes, outer, strict=False):
            row = row * size + i
        row *= sizes[last]
        before = tuple((i - k[0], i - k[0] + 1) for i, k in zip(outer, kept, strict=False))
        if index is None:
            if stop > start:
                rows = ((row + start) * stride, (row + stop) * stride)
                yield rows, (*before, (0, stop - start), *whole)
            continue
        for first, end in _consecutive(index[row + start : row + stop]):
            at = index[row + start + first]
            yield (at, at + end - first), (*before, (first, end))


def _consecutive(rows: tuple[int, ...]) -> Iterator[Range]:
    """[first, end) positions of `rows` that count up by one."""
    first = 0
    for end in range(1, len(rows) + 1):
        if end == len(rows) or rows[end] != rows[end - 1] + 1:
            yield first, end
            first = end


def cut_param(whole: Tensor, shard: ParamShard, layout: HelixLayout, rank: int) -> Tensor:
    """`rank`'s part of `whole`, zero-padded to the common width.

    Raises:
        PlanError: `whole` does not have the shape that the plan was made for.
    """
    if tuple(whole.shape) != shard.source_shape:
        raise PlanError(
            f"parameter {shard.source}: got shape {tuple(whole.shape)}, the plan expects {shard.source_shape}"
        )
    if shard.index is not None:
        whole = whole[torch.tensor(shard.index, device=whole.device)]
    part = whole.view(shard.view)
    if shard.window is not None:
        part = part.narrow(*shard.window)
    for cut in shard.cuts:
        start, stop = cut.bounds(layout, rank)
        part = part.narrow(cut.dim, start, stop - start)
        missing = cut.width(layout) - (stop - start)
        if missing:
            zeros = part.new_zeros([missing if d == cut.dim else s for d, s in enumerate(part.shape)])
            part = torch.cat([part, zeros], dim=cut.dim)
    return part.view(shard.shape)
