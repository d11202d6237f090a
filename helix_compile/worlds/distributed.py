"""One rank a process: the graphs of the virtual world, text for text, over torch.distributed.

Axis names become process groups only here, while a graph runs. Nothing replaces c10d: a collective node calls its
_c10d_functional op with the group's name, and wait_tensor waits for it. What the ranks must agree on: agreement.py.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from fractions import Fraction
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx

from helix_compile.errors import RuntimeFault
from helix_compile.ir.collectives import COLLECTIVES, WAIT
from helix_compile.layout.degrees import HelixMesh
from helix_compile.worlds.agreement import AgreedInputs, StartAgreement, StepAgreement
from helix_compile.worlds.groups import axis_groups, given_groups, next_world
from helix_compile.worlds.guard import RankGuard, is_transport_error
from helix_compile.worlds.program import Program
from helix_compile.worlds.tape import Tape, recorded
from helix_compile.worlds.virtual import check_axis
from helix_compile.worlds.walk import Graphs, Hook, Pending, Post, Walk, rank_fault

_Walking = Generator[tuple[Pending, str], Tensor | None, Any]


@dataclass
class _Started:
    """A collective: what WAIT takes, of this step."""

    is_local: bool
    value: Any = None


class DistributedWorld:
    """This process's rank of `mesh`; its peers are the other members of the parent group.

    Attributes:
        num_collectives: collectives that this rank took part in, by (op, axis).
    """

    def __init__(
        self, mesh: HelixMesh, parent: Any, timeout: timedelta, check: str, groups: Mapping[str, Any] | None = None
    ):
        self.mesh, self._timeout = mesh, timeout
        self._given = given_groups(groups or {}, parent, mesh)
        self._parent: Any = parent  # until start(): who holds a group keeps its threads alive
        self.rank = parent.rank()
        self._groups: dict[str, str] = {}  # made by start()
        self._broken = ""
        self._gathers = 0
        self.reset_counters()
        # a fake group has no peers to ask: its one rank is a world of its own
        store = dist.PrefixStore(f"helix/{next_world(parent)}", parent.get_group_store())
        self._backend = dist.get_backend(parent)
        fake = self._backend == "fake"
        self.guard = RankGuard(store, self.rank, 1 if fake else mesh.world_size, timeout)
        self._start_agreement = StartAgreement(self.guard)
        self._agreement, self._agreed_inputs = StepAgreement(self.guard, check), AgreedInputs()

    @property
    def ranks(self) -> Sequence[int]:
        """Ranks that live in this process: one."""
        return (self.rank,)

    @property
    def host_collectives(self) -> str:
        """Why a tape can't hold its collectives: those of nccl are launches on a stream, others wait on the host."""
        return "" if self._backend == "nccl" else f"{self._backend} works through the host"

    @property
    def is_leader(self) -> bool:
        """True on rank 0, which prints and writes what all ranks have in common."""
        return self.rank == 0

    @property
    def sent_bytes(self) -> list[Fraction]:
        """One entry, the bytes that left this rank since the last reset_counters(), as the virtual world counts them."""
        return [sum((n * COLLECTIVES[op].egress(peers, b) for (op, peers, b), n in self._sent.items()), Fraction(0))]

    def reset_counters(self) -> None:
        """Start counting bytes and collectives again."""
        self._sent = Counter[tuple[str, int, int]]()  # (op, peers, bytes of its argument)
        self.num_collectives: Counter[tuple[str, str]] = Counter()

    def start(self, claims: Mapping[str, Callable[[], str]]) -> None:
        """Compare what the ranks are about to run, then make the groups. Collective.

        Raises:
            RuntimeFault: names the rank that differs, and in what.
        """
        said = self._start_agreement.differing({name: claim() for name, claim in claims.items()}, "start")
        if said:
            raise RuntimeFault(said)
        self._groups = axis_groups(self._parent, self.mesh, self._timeout, self._given)
        self._parent = None

    def run(
        self,
        graphs: Graphs,
        inputs: Sequence[Sequence[Any]],
        hook: Hook | None = None,
        agreed: Mapping[str, Tensor] | None = None,
    ) -> list[Any]:
        """Run this rank's graph (`graphs`, or its one item) on inputs[0]; returns [output]. Every rank calls it.

        Args:
            hook: called with (rank, node, value) after every node.
            agreed: what all ranks must give alike, on the host; default: read from the inputs.

        Raises:
            RuntimeFault: ranks that differ in the step's inputs (nothing was run then), or differed in those of the step
                before; a peer that raised, died or is stuck; a fault of the graph. After all but the first the ranks no
                longer agree on where they are, and every later run is refused.
        """
        graph = graphs if isinstance(graphs, fx.GraphModule) else graphs[0]
        if agreed is None:
            agreed = self._agreed_inputs.of(graph.graph, inputs[0])
        return self._agreed(
            agreed, lambda: self._walk(lambda post: Walk(self.rank, post, {}, hook).graph(graph, inputs[0], ""))
        )

    def run_programs(
        self,
        programs: Sequence[Program],
        step: Mapping[str, Tensor],
        agreed: Mapping[str, Tensor] | None = None,
        tape: Tape | None = None,
    ) -> list[Any]:
        """Run a step that is prepared: this rank's program on the inputs `step`; takes, returns and raises as run().

        Args:
            tape: an empty one records the step, a recorded one takes it: `programs` are not walked then. Whatever a peer does of
                the three, each takes part in the same collectives.
        """
        (program,) = programs
        doing = "" if tape is None else tape.what
        return self._agreed(step if agreed is None else agreed, lambda: self._run(program, step, tape), doing)

    def _run(self, program: Program, step: Mapping[str, Tensor], tape: Tape | None) -> Any:
        if tape is None:
            return self._walk(lambda post: program.walk(step, post))
        if self.host_collectives or self.guard.world_size == 1:  # the host waits for each collective, or there is none
            return self._taped(program, step, tape)
        with self.guard.device_steps.follow(self.guard.step, tape.what) as followed:
            outputs = self._taped(program, step, tape)
            followed.is_done = tape.mark()
        return outputs

    def _taped(self, program: Program, step: Mapping[str, Tensor], tape: Tape) -> Any:
        if tape.is_done:
            self._sent.update(tape.sent)
            self.num_collectives.update(tape.collectives)
            return self._guarded(tape.what, tape.play)
        with recorded(tape, self._sent, self.num_collectives):
            return tape.finish(self._walk(lambda post: program.walk(step, post, tape), tape))

    def _agreed(self, agreed: Mapping[str, Tensor], run: Callable[[], Any], doing: str = "") -> list[Any]:
        """Run when all ranks have the same step; `doing` says to the others what it is."""
        if self._broken:
            raise RuntimeFault(f"these ranks can't go on, start them again; what happened: {self._broken}")
        self.guard.begin_step(doing)
        try:
            said = self._agreement.begin(agreed, "input_ids")
            if not said:
                return [run()]
        except BaseException as error:
            self._broken = f"{type(error).__name__}: {error}"
            self.guard.raised(error)
            raise
        finally:
            self.guard.end_step()
        raise RuntimeFault(said)

    def settle(self) -> None:
        """Compare what of the last step is not compared yet. Every rank calls it; nobody waits long.

        Raises:
            RuntimeFault: the ranks took it with different inputs; every later run is refused.
        """
        try:
            self._agreement.settle("between steps")
        except RuntimeFault as error:
            self._broken = self._broken or f"{type(error).__name__}: {error}"
            raise

    def share_random_state(self, device: torch.device) -> None:
        """Every rank goes on with rank 0's random state, so that sampling gives the same tokens. Collective."""
        states = [torch.get_rng_state()]
        if device.type == "cuda":
            states.append(torch.cuda.get_rng_state(device))
        mine = [state.tolist() for state in states] if self.is_leader else None
        leaders = json.loads(self.gather_texts(json.dumps(mine))[0])
        torch.set_rng_state(torch.tensor(leaders[0], dtype=torch.uint8))
        if device.type == "cuda":
            torch.cuda.set_rng_state(torch.tensor(leaders[1], dtype=torch.uint8), device)

    def gather_texts(self, mine: str) -> list[str]:
        """Every rank's text, by rank; so a barrier too. Through the store: for saving and seeds, not for steps."""
        if self.guard.world_size == 1:
            return [mine]
        store, number = self.guard.store, self._gathers
        keys = [f"gather/{number}/{r}" for r in range(self.guard.world_size)]
        store.set(keys[self.rank], mine)
        self.guard.wait(keys, "between steps")
        texts = [text.decode() for text in store.multi_get(keys)]
        if number:
            store.delete_key(f"gather/{number - 1}/{self.rank}")  # all ranks have read it
        self._gathers += 1
        return texts

    def _walk(self, walk: Callable[[Post], _Walking], tape: Tape | None = None) -> Any:
        started: dict[int, tuple[_Started, str]] = {}

        def post(op: str, args: tuple, where: str) -> Pending:
            ticket = len(tickets)
            tickets.append(op)
            started[ticket] = self._start(op, args, where, tape), where
            return Pending(op, ticket)

        tickets: list[str] = []
        steps = walk(post)
        value = None
        try:
            while True:
                pending, where = steps.send(value)
                if pending.ticket not in started:
                    number = f"collective #{pending.ticket}"
                    raise rank_fault(self.rank, where, f"{pending.op} ({number}) is waited for twice")
                value = self._wait(started.pop(pending.ticket)[0], where, tape)
        except StopIteration as stop:
            if started:
                left = ", ".join(where for _, where in started.values())
                raise rank_fault(self.rank, left, "started, but never waited for") from None
            return stop.value

    def _start(self, op: str, args: tuple, where: str, tape: Tape | None) -> _Started:
        tensor, axis = args[0], args[-1]
        check_axis(self.mesh, axis, self.rank, where)
        members = self.mesh.members(axis, self.rank)
        self._sent[op, len(members), tensor.nbytes] += 1
        self.num_collectives[(op, axis)] += 1
        started = _Started(is_local=len(members) == 1)
        if started.is_local:
            started.value = tensor.clone() if tape is None else tape.launch(torch.clone, (tensor,))
            return started
        if axis not in self._groups:
            raise RuntimeFault(
                f"rank {self.rank}, node {where}: axis {axis!r} has no process group; "
                f"graphs exchange over {', '.join(self._groups)}"
            )

        def start(*tensors: Tensor) -> None:
            call = partial(COLLECTIVES[op].target, *tensors, *args[1:-1], self._groups[axis])
            started.value = self._guarded(where, call)

        if tape is None:
            start(tensor)
        elif self.host_collectives:
            tape.apart(start, (tensor,))
        else:
            tape.launch(start, (tensor,))
        return started

    def _wait(self, started: _Started, where: str, tape: Tape | None) -> Tensor:
        """The value of a collective; without a tape, or in a piece of one, by torch's own wait."""
        if started.is_local:
            return started.value

        def wait() -> Tensor:
            return self._guarded(where, WAIT, started.value)

        if tape is None:
            return wait()
        found: Tensor = tape.apart(wait) if self.host_collectives else tape.launch(wait, ())
        return found

    def _guarded(self, where: str, call: Callable[..., Any], *args: Any) -> Any:
        self.guard.node = where
        try:
            return call(*args)
        except RuntimeError as error:
            if is_transport_error(error):
                raise self.guard.lost_peers(where, error) from error
            raise RuntimeFault(f"rank {self.rank}, node {where}: {type(error).__name__}: {error}") from error
