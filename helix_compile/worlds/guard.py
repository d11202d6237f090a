"""Who is to blame when a rank stops: each rank keeps a status record in the store that torchrun's agent owns.

gloo says "Connection closed by peer [127.0.0.1]:38211" or "Timed out waiting"; the records say which rank, step and
node. A rank that raises writes its error before it goes. On one host a dead process is seen at once in the
process table; on another host by the mark that every survivor sets and a dead rank does not.

torchelastic's error files can't say this: a rank can't read those of its peers, one that was killed writes none, and
the agent shows them when all is over, without step and node.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from threading import Lock
from types import TracebackType
from typing import Any
from weakref import WeakMethod, WeakSet

import torch.distributed as dist

from helix_compile.errors import RuntimeFault
from helix_compile.worlds.overdue import DeviceStep, DeviceSteps
from helix_compile.worlds.peers import Life, before_sigterm, is_dead, own_life, watch

GRACE_S = 0.5  # for survivors on other hosts to mark themselves
_FIRST_PAUSE_S = 0.0001  # doubles up to _LOOK_S: peers come within a millisecond, or much later
_LOOK_S = 0.02  # between two looks at the peers; torchrun ends survivors 0.1 s after a death
_TRANSPORT = ("gloo", "Timed out", "Connection closed", "Connection reset", "NCCL", "nccl")


def is_transport_error(error: BaseException) -> bool:
    """True if the text is that of a collective whose peer went, not of a wrong argument."""
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _TRANSPORT)


@dataclass(frozen=True)
class RankRecord:
    """What a rank last said of itself.

    Attributes:
        step: number of the step it began last; 0 before the first.
        time: of that, by the rank's own clock.
        error: "ValueError: ..." if it raised.
        lost: it reported its peers lost, so it lives.
        left: its script ended; it was in no step then.
        doing: what that step is, where it is not launched call by call.
        life: its process.
    """

    step: int
    time: float
    life: Life
    error: str = ""
    lost: bool = False
    left: bool = False
    doing: str = ""


class RankGuard:
    """This rank's record, and what the records of the others say when a step fails."""

    def __init__(self, store: Any, rank: int, world_size: int, timeout: timedelta):
        self.store, self.rank, self.world_size, self.timeout = store, rank, world_size, timeout
        self.step = 0
        self.node = ""
        self.running = False
        self._said = ""
        self._lock = Lock()
        self.device_steps = DeviceSteps(timeout.total_seconds(), WeakMethod(self.overdue))
        self._own = RankRecord(0, time.time(), own_life())
        self._say()
        _GUARDS.add(self)
        _hook_exceptions()

    def begin_step(self, doing: str = "") -> None:
        """The rank begins its next step."""
        self.step += 1
        self.running = True
        if self.step == 1:
            lives = [record.life for record in self._records().values() if record is not None]
            watch(lives, self._own.life, WeakMethod(self.speak))
        self._say(step=self.step, time=time.time(), doing=doing)

    def end_step(self) -> None:
        """The step is done."""
        self.running = False

    def raised(self, error: BaseException, step: int | None = None) -> None:
        """Tell the peers that this rank raised, and at which step (default: the one that runs or comes)."""
        if self._own.error or self._own.lost:
            return
        inside = self.running and isinstance(error, RuntimeFault)  # its text names rank and node
        cause = error.__cause__ if inside and error.__cause__ else error
        at = self.step + (not self.running) if step is None else step
        text = f"{type(cause).__name__}: {cause}".splitlines()[0]
        self._say(step=at, time=time.time(), error=text)

    def tell(self, error: BaseException) -> None:
        """This rank raised before its first step: say so, and wait until every peer has heard, raised too or is dead."""
        self.raised(error, step=0)
        deadline = time.monotonic() + self.timeout.total_seconds()
        while time.monotonic() < deadline and not all(map(self._is_done, self._records().values())):
            time.sleep(_LOOK_S)

    def _is_done(self, record: RankRecord | None) -> bool:
        """It said its word, or can't any more."""
        if record is None:
            return False
        ended = record.left or is_dead(record.life, self._own.life)
        return bool(record.lost or record.error or ended)

    def leave(self) -> None:
        """The script ends."""
        self._say(left=True)

    def wait(self, keys: list[str], node: str, owed: Sequence[str] = ()) -> None:
        """Until all `keys` (each ends in the rank that sets it: "claims/7/2") are in the store.

        Args:
            owed: keys without which the rank that sets `keys` can't: after the timeout these are to blame first.

        Raises:
            RuntimeFault: a peer raised or died meanwhile, or the timeout passed; names the rank.
        """
        # check() in a loop: a wait() that times out logs two lines of C++ each time
        self.wait_until(lambda: self.store.check(keys), lambda: self._absent(owed) or self._absent(keys), node)

    def wait_until(self, done: Callable[[], bool], late: Callable[[], list[int]], node: str) -> None:
        """Until `done`; `late` names the ranks that it waits for. Raises as wait()."""
        self.node = node
        started = time.monotonic()
        looked, pause = started, _FIRST_PAUSE_S
        try:
            while not done():
                time.sleep(pause)
                pause = min(2 * pause, _LOOK_S)
                now = time.monotonic()
                if now - started > self.timeout.total_seconds():
                    missing, records = late(), self._records()
                    raise self.fault(node, "; ".join(_stuck(r, records[r]) for r in missing))
                if now - looked > _LOOK_S:
                    looked = now
                    found = self._culprits(self._records())
                    if found and not done():  # they may come, and then leave
                        raise self.fault(node, found)
        except dist.DistNetworkError as error:
            raise self.fault(node, f"the store of torchrun's agent is gone: {error}") from error

    def lost_peers(self, node: str, error: BaseException) -> RuntimeFault:
        """The fault to raise for a transport error at `node`: whose end it was, found in the records."""
        try:
            self._say(lost=True)
            deadline = time.monotonic() + GRACE_S
            while not (found := self._culprits(self._records())):
                if time.monotonic() > deadline:
                    silent = {r: record for r, record in self._records().items() if record is None or not record.lost}
                    found = "; ".join(_stuck(r, record) for r, record in silent.items())
                    found = found or f"every peer lives and none raised; the transport said: {error}"
                    break
                time.sleep(_LOOK_S)
        except RuntimeError as gone:  # the store too
            found = f"{error}; the store that holds the ranks' records is gone too: {gone}"
        return self.fault(node, found)

    def overdue(self, late: DeviceStep) -> None:
        """A device does not finish a step: say it, and end this process, whose host may wait for the device in C++ for ever.

        So does NCCL's watchdog where a launched collective does not end.
        """
        with suppress(RuntimeError):  # the store is gone: torchrun ends this process too
            records = self._records()
            behind = {r: record for r, record in records.items() if record is None or record.step < late.number}
            culprits = self._culprits(records)
            found = culprits or "; ".join(_stuck(r, record) for r, record in (behind or records).items())
            said = "the device has not finished it" if late.is_handed_over else "the host did not come back from it"
            said += f" within {self.timeout.total_seconds():g} s"
            if not (late.is_handed_over or culprits or behind):  # no peer is late, but this rank
                self.raised(TimeoutError(f"{late.what}: {said}"), late.number)
            self.fault(late.what, f"{said}: {found}", late.number)
        time.sleep(GRACE_S)  # for peers whose device waits as long: torchrun ends them 0.1 s after the first
        os._exit(1)

    def fault(self, node: str, what: str, step: int | None = None) -> RuntimeFault:
        """The error, said at once on stderr: torchrun may end this process before its traceback is printed.

        Args:
            step: where it is not the one that runs.
        """
        with self._lock:  # the thread that watches peers may be saying it
            if not self._said:
                step = self.step if step is None else step
                where = f"in step {step} at graph node '{node}'" if step else "before step 1"
                self._said = f"rank {self.rank} lost its peers {where}: {what}"
                sys.stderr.write(f"helix_compile: {self._said}\n")  # one write: ranks share the pipe
                sys.stderr.flush()
                with suppress(RuntimeError):  # the store may be gone
                    self._say(lost=True)
        fault = RuntimeFault(self._said)
        fault.is_said = True
        return fault

    def speak(self) -> None:
        """If a step runs that a peer has broken, say so; for a thread, while this rank waits inside the transport, or its device."""
        late = self.device_steps.oldest
        if self.running or late is not None:
            with suppress(RuntimeError):
                if found := self._culprits(self._records()):
                    if late is None:
                        self.fault(self.node, found)
                    else:
                        self.fault(late.what, found, late.number)

    def _absent(self, keys: Sequence[str]) -> list[int]:
        """Ranks whose key is not there."""
        return [int(k.rpartition("/")[2]) for k in keys if not self.store.check([k])]

    def _say(self, **changed: Any) -> None:
        self._own = replace(self._own, **changed)
        self.store.set(f"record/{self.rank}", json.dumps(asdict(self._own)))

    def _records(self) -> dict[int, RankRecord | None]:
        """Of the peers; None where a rank has not said anything yet."""
        keys = {r: f"record/{r}" for r in range(self.world_size) if r != self.rank}
        if not keys:
            return {}
        if self.store.check(list(keys.values())):
            texts = self.store.multi_get(list(keys.values()))
            return {r: _read(t) for r, t in zip(keys, texts, strict=True)}
        found = {r: self.store.check([k]) for r, k in keys.items()}
        return {r: _read(self.store.get(k)) if found[r] else None for r, k in keys.items()}

    def _culprits(self, records: dict[int, RankRecord | None]) -> str:
        """Ranks that are known to have raised, else to be dead; "" if none is."""
        known = {r: record for r, record in records.items() if record is not None}
        raised = {r: record for r, record in known.items() if record.error}
        if raised:
            first = min(raised, key=lambda r: raised[r].time)
            return f"rank {first} raised at step {raised[first].step}: {raised[first].error}"
        # not to blame: a survivor that said its word, and one that left after its part of this step
        return "; ".join(
            _stuck(r, record)
            for r, record in known.items()
            if not (record.lost or (record.left and record.step >= self.step)) and is_dead(record.life, self._own.life)
        )


def _read(text: bytes) -> RankRecord:
    fields = json.loads(text)
    return RankRecord(**{**fields, "life": Life(*fields["life"])})


def _stuck(rank: int, record: RankRecord | None) -> str:
    life = "none"
    if record is not None:
        doing = f" ({record.doing})" if record.doing else ""
        life = f"step {record.step}{doing}, {max(0.0, time.time() - record.time):.1f}s ago"
    return f"rank {rank} died or is stuck without an exception; last sign of life: {life}"


_GUARDS: WeakSet[RankGuard] = WeakSet()


def _hook_exceptions() -> None:
    """How the process ends is told to the peers, also between two steps; set up once a process."""
    before = sys.excepthook
    if getattr(before, "tells_helix_peers", False):
        return

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        _each_guard(lambda guard: guard.raised(error))
        before(kind, error, trace)

    hook.tells_helix_peers = True  # type: ignore[attr-defined] # a mark on our own function
    sys.excepthook = hook
    atexit.register(_each_guard, RankGuard.leave)
    before_sigterm(partial(_each_guard, RankGuard.speak))


def _each_guard(act: Callable[[RankGuard], None]) -> None:
    for guard in list(_GUARDS):
        with suppress(RuntimeError):  # the store is gone: nobody to tell
            act(guard)
