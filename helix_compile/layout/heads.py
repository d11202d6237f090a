"""Heads that the ranks do not divide: zero heads are put between them, and every rank owns as many places.

    MLA      0 1 2 3 4 . . .                 one list, zeros at its end
    grouped  0 1 2 . | 3 4 5 . | . . . .     zeros at the end of each group, whole groups of zeros behind

A query head keeps its KV head, because every group grows alike. Cached heads are dearest, so there are no more of them
than tpa asks for; then the smallest group that fits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from helix_compile.layout.degrees import HelixLayout


@dataclass(frozen=True)
class HeadPadding:
    """`groups` groups of `group` heads on `padded_groups * padded_group` places; as many where nothing is padded."""

    groups: int
    group: int
    padded_groups: int
    padded_group: int

    @property
    def heads(self) -> int:
        """Heads of the model."""
        return self.groups * self.group

    @property
    def places(self) -> int:
        """Heads of all ranks together, zero heads included."""
        return self.padded_groups * self.padded_group

    def before(self, place: int) -> int:
        """Heads of the model on the places before `place`."""
        group, member = divmod(place, self.padded_group)
        return min(group * self.group + min(member, self.group), self.heads)

    def runs(self, start: int, stop: int) -> tuple[tuple[int, int, int], ...]:
        """The heads on places [start, stop): (first, end, where `first` lies behind `start`), in order."""
        found: list[tuple[int, int, int]] = []
        for group in range(start // self.padded_group, min(-(-stop // self.padded_group), self.groups)):
            first = group * self.padded_group
            low, high = max(start, first), min(stop, first + self.group)
            if low < high:
                head = group * self.group + low - first
                if found and self.group == self.padded_group:  # nothing between two groups: one run
                    found[-1] = (found[-1][0], found[-1][1] + high - low, found[-1][2])
                else:
                    found.append((head, head + high - low, low - start))
        return tuple(found)


def head_padding(heads: int, kv_heads: int, layout: HelixLayout) -> HeadPadding:
    """Where `heads` query heads lie on cp * tpa ranks. `kv_heads` is 0 where all share one latent."""
    N = layout.world_size
    groups = kv_heads or 1
    padded_groups = -(-kv_heads // layout.tpa) * layout.tpa if kv_heads else 1
    step = N // math.gcd(N, padded_groups)
    group = heads // groups
    return HeadPadding(groups, group, padded_groups, -(-group // step) * step)
