"""open_world(): which world runs the ranks, and the interface that a world has."""

from __future__ import annotations

import os
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Protocol

from torch import fx

from helix_compile.errors import LoweringUnavailable, PlanError
from helix_compile.mesh import HelixMesh
from helix_compile.virtual_world import Hook, VirtualWorld


class World(Protocol):
    """Runs the lowered graphs of the ranks that live in this process."""

    mesh: HelixMesh
    sent_bytes: list[Fraction]

    @property
    def ranks(self) -> Sequence[int]:
        """Ranks in this process."""

    def run(
        self,
        graphs: fx.GraphModule | Sequence[fx.GraphModule],
        inputs: Sequence[Sequence[Any]],
        hook: Hook | None = None,
    ) -> list[Any]:
        """Outputs by rank."""


def open_world(mesh: HelixMesh, world: object) -> World:
    """The world that `world` names: "virtual", or "auto" (virtual unless torchrun set WORLD_SIZE).

    Raises:
        LoweringUnavailable: real ranks, which are not in this version.
        PlanError: an unknown name.
    """
    if world == "auto":
        world = "distributed" if "WORLD_SIZE" in os.environ else "virtual"
    if world == "virtual":
        return VirtualWorld(mesh)
    if world == "distributed" or not isinstance(world, str):
        raise LoweringUnavailable(
            f"world={world!r}: one process a rank (torchrun, ProcessGroup, DeviceMesh) is not in this version; "
            'use world="virtual", all ranks in this process'
        )
    raise PlanError(
        f"option world={world!r} is unknown; expected 'auto', 'virtual' or 'distributed'"
    )
