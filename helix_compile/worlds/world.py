"""open_world(): which world runs the ranks, and the interface that a world has."""

from __future__ import annotations

import hashlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from fractions import Fraction
from typing import Any, Protocol

import torch
from torch import Tensor

from helix_compile.errors import HelixError, PlanError
from helix_compile.layout.degrees import HelixLayout, HelixMesh
from helix_compile.worlds.distributed import DistributedWorld
from helix_compile.worlds.groups import early_store, local_device, open_parent
from helix_compile.worlds.program import Program
from helix_compile.worlds.tape import Tape
from helix_compile.worlds.virtual import VirtualWorld
from helix_compile.worlds.walk import Graphs, Hook

DEFAULT_TIMEOUT_S = 300.0  # ranks may load weights for minutes before they meet; HELIX_TIMEOUT overrides it


class World(Protocol):
    """Runs the lowered graphs of the ranks that live in this process."""

    mesh: HelixMesh
    num_collectives: Counter[tuple[str, str]]

    @property
    def sent_bytes(self) -> list[Fraction]:
        """Bytes that left each rank in this process."""

    @property
    def ranks(self) -> Sequence[int]:
        """Ranks in this process."""

    @property
    def host_collectives(self) -> str:
        """Why a tape can't hold its collectives; "" if it can."""

    @property
    def is_leader(self) -> bool:
        """This process prints and writes what all ranks have in common."""

    def start(self, claims: Mapping[str, Callable[[], str]]) -> None:
        """Before the first run: what the ranks must have in common is compared."""

    def run(
        self,
        graphs: Graphs,
        inputs: Sequence[Sequence[Any]],
        hook: Hook | None = None,
        agreed: Mapping[str, Tensor] | None = None,
    ) -> list[Any]:
        """Outputs of the ranks in this process, whose inputs are given in the order of `ranks`; see DistributedWorld.run()."""

    def settle(self) -> None:
        """After a last step: what of it the ranks have not compared yet is compared."""

    def run_programs(
        self,
        programs: Sequence[Program],
        step: Mapping[str, Tensor],
        agreed: Mapping[str, Tensor] | None = None,
        tape: Tape | None = None,
    ) -> list[Any]:
        """The same of a step that is prepared; recorded on `tape`, or taken by it once that is done."""

    def share_random_state(self, device: torch.device) -> None:
        """All processes go on with rank 0's random state."""

    def gather_texts(self, mine: str) -> list[str]:
        """The text of every process."""


def is_distributed(world: object) -> bool:
    """Does `world` mean one process a rank? "auto" does iff torchrun set WORLD_SIZE."""
    return "WORLD_SIZE" in os.environ if world == "auto" else world != "virtual"


def open_world(
    mesh: HelixMesh,
    world: object,
    device: torch.device,
    check: str = "deferred",
    groups: Mapping[str, Any] | None = None,
) -> World:
    """The world that `world` names.

    Args:
        world: "virtual", "distributed", "auto", a ProcessGroup or a DeviceMesh.
        device: where the ranks compute.
        check: when real ranks compare what they were given for a step; see StepAgreement.
        groups: axis -> ProcessGroup of this rank there, in place of one that would be made.

    Raises:
        HelixError: as open_parent() and HELIX_TIMEOUT say.
    """
    if not is_distributed(world):
        return VirtualWorld(mesh)
    timeout = _timeout()
    name = "distributed" if isinstance(world, str) and world == "auto" else world
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where nccl looks for this process's GPU
    return DistributedWorld(mesh, open_parent(name, mesh, device, timeout), timeout, check, groups)


@contextmanager
def errors_told(world: object, cp: int, tpa: int, device: torch.device) -> Iterator[None]:
    """What one rank alone raises before the ranks meet, such as for a damaged file on its node, is told to the others.

    The rank says its error at once, meets the others where they open their world, and raises when they have heard. Had
    it left, they would wait for it, or be ended by torchrun without a word. Of ranks with one long error (a folder that
    is damaged for all) the first says and raises it whole, the others its first line.
    """
    try:
        yield
    except Exception as error:
        if not is_distributed(world):
            raise
        short = _say(error)
        # no such world, or the others are gone: the error itself says more
        with suppress(HelixError, RuntimeError):
            layout = HelixLayout(kvp=cp, tpa=tpa, ep=1, tpf=cp * tpa)
            opened = open_world(HelixMesh(layout), world, device)
            assert isinstance(opened, DistributedWorld)
            opened.guard.tell(error)
        if short is not None:
            raise short from None
        raise


def _say(error: Exception) -> HelixError | None:
    """On stderr, whole or in short; the short error to raise if another rank has said the same."""
    rank = os.environ.get("RANK", "?")
    text, short = f"{type(error).__name__}: {error}", None
    if isinstance(error, HelixError):
        error.is_said = True
        if "\n" in text and (first := _first_to_say(text, rank)) != rank:
            line = str(error).splitlines()[0]
            short = type(error)(f"{line} (the same error as rank {first}'s, which has it whole)")
            short.is_said = True
    sys.stderr.write(f"helix_compile: rank {rank}: {type(error).__name__}: {short or error}\n")
    sys.stderr.flush()
    return short


def _first_to_say(text: str, rank: str) -> str:
    """The rank that said this first; `rank` itself where the ranks share no store yet."""
    with suppress(RuntimeError):  # the store is gone: say it
        if (store := early_store()) is not None:
            key = f"helix/said/{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}"
            return store.compare_set(key, "", rank).decode()
    return rank


def _timeout() -> timedelta:
    """HELIX_TIMEOUT in seconds: how long a rank waits for its peers."""
    text = os.environ.get("HELIX_TIMEOUT", str(DEFAULT_TIMEOUT_S))
    try:
        seconds = float(text)
        if not 0 < seconds < 1e9:
            raise ValueError
    except ValueError as error:
        raise PlanError(f"HELIX_TIMEOUT must be a number of seconds > 0, got {text!r}") from error
    return timedelta(seconds=seconds)


def device_for(device: str | torch.device | None, world: object = "virtual") -> torch.device | None:
    """The asked device, checked to exist; None means where the model is. "cuda" is this rank's own GPU."""
    if device is None:
        return None
    try:
        found = torch.device(device)
        found = local_device(found) if is_distributed(world) else found
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise HelixError(f"device={str(device)!r} can't be used here: {error}") from error
    return found
