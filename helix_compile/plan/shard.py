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
from helix_compile.plan.helix_plan import Cut, ParamShard

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
    whole: list[Range] = [(0, size) for size in shard.view]
    local = list(shard.view)
    if shard.window is not None:
        dim, start, length = shard.window
        whole[dim], local[dim] = (start, start + length), length
    # of each cut dim the ranges that a rank takes, and where each begins in its shard
    taken = []
    for cut in shard.cuts:
        local[cut.dim] = cut.width(layout)
        taken.append([(cut.dim, *run) for run in cut.runs(layout, rank)])
    found: list[Box] = []
    for runs in product(*taken):
        kept, at = list(whole), [0] * len(whole)
        for dim, start, stop, place in runs:
            first = whole[dim][0]
            kept[dim], at[dim] = (first + start, first + stop), place
        found += _boxes(shard, kept, at)
    sizes = (math.prod(stop - start for start, stop in box.local) for box in found)
    return ShardBoxes(tuple(found), tuple(local), padded=sum(sizes) != math.prod(local))


def _boxes(shard: ParamShard, kept: list[Range], at: list[int]) -> Iterator[Box]:
    """Of one range of each dim of the view, which begins at `at` in the shard."""
    source_shape = list(shard.source_shape)
    if shard.index is not None:
        source_shape[0] = len(shard.index)
    runs, dim = [], 0
    for axis, size in enumerate(source_shape):
        dims = _dims_of(size, shard.view, dim, last=axis == len(source_shape) - 1)
        index = shard.index if axis == 0 else None
        runs.append(list(_runs(shard.view[dim : dim + dims], kept[dim : dim + dims], index)))
        dim += dims
    for one in product(*runs):
        places = (r for _, parts in one for r in parts)
        yield Box(
            tuple(source for source, _ in one),
            tuple((start + p, stop + p) for (start, stop), p in zip(places, at, strict=True)),
        )


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
    """`rank`'s part of `whole`, zero-padded to the common width; a view of it where that is possible.

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
        part = _cut(part, cut, layout, rank)
    return part.reshape(shard.shape)  # a copy only of rows with others between the heads


def _cut(whole: Tensor, cut: Cut, layout: HelixLayout, rank: int) -> Tensor:
    """`rank`'s part along one dim: a view where no zeros lie in it."""
    runs, width = cut.runs(layout, rank), cut.width(layout)
    if runs and runs[0][1] - runs[0][0] == width:
        return whole.narrow(cut.dim, runs[0][0], width)
    part = whole.new_zeros([width if d == cut.dim else size for d, size in enumerate(whole.shape)])
    for start, stop, at in runs:
        part.narrow(cut.dim, at, stop - start).copy_(whole.narrow(cut.dim, start, stop - start))
    return part
