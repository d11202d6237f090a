"""Placements: how a value lies over each axis of the mesh.

torch.distributed.tensor's Replicate, Shard(dim) and Partial("sum"), plus four of ours: PartialSoftmax for the pair
(partial_o, lse), which is neither a sum nor a shard (it needs the merge by log-sum-exp), PartialTopK for scores and
candidates of a rank's own keys, Chosen for the slots that are left of them, and PerRank for what differs on each rank
by construction.

A layout is a dict axis -> placement. An axis that is not named is Replicate. Layouts are kept in normal form:
a value that is cut or summed over every rank is written over "world", not over two axes.
"""

from __future__ import annotations

import re
from typing import Any

from torch.distributed.tensor.placement_types import Partial, Placement, Replicate, Shard

from helix_compile.layout.degrees import ATTENTION_AXES, AXES, FFN_AXES, HelixLayout

Layout = dict[str, Placement]


class Mark(Placement):
    """A placement of ours that has no fields: equal to every other of its class.

    No dataclass: its __init__ would not call that of the base, which is a C++ class in torch 2.11.
    """

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other)

    def __hash__(self) -> int:
        return hash(type(self))

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()


class PartialSoftmax(Mark):
    """Attention over a part of the keys: exact only after the merge by log-sum-exp."""

    def __str__(self) -> str:
        return "PS"


class PartialTopK(Mark):
    """Scores or best keys of a part of the keys: which are chosen is known only after a look at all ranks' candidates."""

    def __str__(self) -> str:
        return "PK"


class Chosen(Mark):
    """A rank's slots that are chosen among the keys of all ranks, and how many there are."""

    def __str__(self) -> str:
        return "C"


class PerRank(Mark):
    """Another value on each rank by construction: slots, visible lengths, a cache shard, a rank index.

    Only an op that knows what it means may read it.
    """

    def __str__(self) -> str:
        return "L"


class Rows(Mark):
    """Rows of one part of the batch, which is attended to and exchanged a part at a time; no placement over an axis of the mesh.

    `placed`: as many rows as all parts have, of which those of the others are nobody's.
    """

    def __init__(self, part: int, parts: int, placed: bool = False):
        super().__init__()
        self.part, self.parts, self.placed = part, parts, placed

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rows) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __str__(self) -> str:
        return f"{self.part}/{self.parts}{' of all' * self.placed}"

    def __repr__(self) -> str:
        return f"Rows({self.part}, {self.parts}, {self.placed})"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.part, self.parts, self.placed)


ROWS = "rows"  # what stands in a layout for the batch, beside the axes of the mesh

_MARKS: dict[str, type[Mark]] = {str(mark()): mark for mark in (PartialSoftmax, PartialTopK, Chosen, PerRank)}


def normal_form(layout: Layout, degrees: HelixLayout) -> Layout:
    """Drop axes of size 1 and Replicate entries (marks that are not mesh axes stay); fold a whole view with equal placements into "world"."""
    kept = {
        axis: p
        for axis, p in layout.items()
        if (axis not in AXES or degrees.size(axis) > 1) and not isinstance(p, Replicate)
    }
    for view in (ATTENTION_AXES, FFN_AXES):
        axes = [axis for axis in view if degrees.size(axis) > 1]
        if axes and all(axis in kept for axis in axes):
            placements = {kept[axis] for axis in axes}
            foldable = len(placements) == 1 and isinstance(kept[axes[0]], (Shard, Partial))
            if foldable:
                kept = {a: p for a, p in kept.items() if a not in axes} | {"world": placements.pop()}
    return kept


def format_placement(placement: Placement) -> str:
    """Short text of one placement: "R", "S(2)", "P(sum)", "PS", "PK", "C", "L"."""
    if isinstance(placement, (*_MARKS.values(), Rows)):
        return str(placement)
    if isinstance(placement, Shard):
        return f"S({placement.dim})"
    if isinstance(placement, Partial):
        return f"P({placement.reduce_op})"
    return "R"


def format_layout(layout: Layout) -> str:
    """Short text of a layout, e.g. "world:S(2)"; "R" when replicated over every axis."""
    return ", ".join(f"{a}:{format_placement(p)}" for a, p in sorted(layout.items())) or "R"


def parse_layout(text: str) -> Layout:
    """Inverse of format_layout."""
    if text == "R":
        return {}
    layout: Layout = {}
    for item in text.split(", "):
        axis, placement = item.split(":")
        if shard := re.fullmatch(r"S\((\d+)\)", placement):
            layout[axis] = Shard(int(shard[1]))
        elif partial := re.fullmatch(r"P\((\w+)\)", placement):
            layout[axis] = Partial(partial[1])
        elif rows := re.fullmatch(r"(\d+)/(\d+)( of all)?", placement):
            layout[axis] = Rows(int(rows[1]), int(rows[2]), bool(rows[3]))
        elif placement in _MARKS:
            layout[axis] = _MARKS[placement]()
        else:
            raise ValueError(f"unknown placement {placement!r} in layout {text!r}")
    return layout
