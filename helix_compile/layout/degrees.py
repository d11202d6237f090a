"""HelixLayout: how many ranks share what, and the rank arithmetic of both views. No torch.distributed here.

One list of N ranks is read in two ways and never changed (helix-algorithm, section 2):

    attention view   rank = tpa_rank * kvp + kvp_rank      kvp ranks are consecutive
    FFN view         rank = ep_rank  * tpf + tpf_rank

Identity that everything rests on: the head block that a rank owns after the exchange is its own rank number,
so the row block of o_proj that it holds is the plain rank-th cut.

HelixMesh: axis name -> rank lists. Built once from a HelixLayout and never mutated.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from helix_compile.errors import LayoutError

ATTENTION_AXES = ("tpa", "kvp")
FFN_AXES = ("ep", "tpf")
AXES = (*ATTENTION_AXES, *FFN_AXES, "world")


@dataclass(frozen=True, kw_only=True)
class HelixLayout:
    """Degrees of one layer's ranks: `world_size == kvp * tpa == ep * tpf`.

    Args:
        kvp: ranks that share a KV cache by sequence (public name `cp`; the paper's KVP).
        tpa: tensor parallel over heads in attention. The latent cache is replicated over it.
        ep: expert parallel in the FFN.
        tpf: tensor parallel in the FFN.
    """

    kvp: int
    tpa: int
    ep: int
    tpf: int

    def __post_init__(self) -> None:
        for name in (*ATTENTION_AXES, *FFN_AXES):
            degree = getattr(self, name)
            if isinstance(degree, bool) or not isinstance(degree, int) or degree < 1:
                raise LayoutError(f"layout: {name} must be an int >= 1, got {degree!r}")
        if self.kvp * self.tpa != self.ep * self.tpf:
            raise LayoutError(
                f"layout: attention uses cp*tpa = {self.kvp}*{self.tpa} = {self.kvp * self.tpa} ranks, "
                f"the FFN uses ep*tpf = {self.ep}*{self.tpf} = {self.ep * self.tpf}; they are the same ranks"
            )

    @property
    def world_size(self) -> int:
        """N, the ranks of a layer."""
        return self.kvp * self.tpa

    def size(self, axis: str) -> int:
        """Ranks along `axis` ("kvp", "tpa", "ep", "tpf" or "world")."""
        return self.world_size if axis == "world" else int(getattr(self, axis))

    def index(self, axis: str, rank: int) -> int:
        """Coordinate of `rank` along `axis`."""
        match axis:
            case "world":
                return rank
            case "kvp":
                return rank % self.kvp
            case "tpa":
                return rank // self.kvp
            case "tpf":
                return rank % self.tpf
            case "ep":
                return rank // self.tpf
        raise LayoutError(f"layout: unknown axis {axis!r}; one of {', '.join(AXES)}")


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
            tuple(r for r in ranks if self.layout.index(other, r) == i) for i in range(self.layout.size(other))
        )
