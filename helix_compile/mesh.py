"""HelixMesh: axis name -> rank lists. Built once from a HelixLayout and never mutated."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from helix_compile.layout import AXES, HelixLayout


@dataclass(frozen=True)
class HelixMesh:
    """The ranks of a layer with both views over them. Graphs carry axis names; this maps them to ranks."""

    layout: HelixLayout

    @property
    def world_size(self) -> int:
        """N."""
        return self.layout.world_size

    @cached_property
    def groups(self) -> dict[str, tuple[tuple[int, ...], ...]]:
        """Per axis the groups of ranks that differ in that axis only, members in axis order."""
        return {axis: self._groups_of(axis) for axis in AXES}

    def members(self, axis: str, rank: int) -> tuple[int, ...]:
        """The group of `rank` along `axis`."""
        return next(group for group in self.groups[axis] if rank in group)

    def _groups_of(self, axis: str) -> tuple[tuple[int, ...], ...]:
        others = {"kvp": "tpa", "tpa": "kvp", "tpf": "ep", "ep": "tpf"}
        ranks = range(self.world_size)
        if axis == "world":
            return (tuple(ranks),)
        other = others[axis]
        return tuple(
            tuple(r for r in ranks if self.layout.index(other, r) == i)
            for i in range(self.layout.size(other))
        )
