"""What a device still computes when the host has gone on: a replayed step that does not end is said, by a thread.

NCCL's own watchdog follows collectives that were launched. Those of a CUDA graph it does not see: where a peer never comes, the
replay never ends, and the host waits for it wherever it reads a value next.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from weakref import WeakMethod, finalize

_FIRST_PAUSE_S = 0.02  # doubles up to a second, or a twentieth of the timeout


def _not_yet() -> bool:
    return False


@dataclass
class DeviceStep:
    """A step that a device was given.

    Attributes:
        number, what: of the step, and what was replayed.
        is_done: asks the device; a host that has not even handed it over is not done.
    """

    number: int
    what: str
    is_done: Callable[[], bool] = _not_yet

    @property
    def is_handed_over(self) -> bool:
        """The host came back."""
        return self.is_done is not _not_yet


class DeviceSteps:
    """The steps of one module that are under way, the oldest first.

    Args:
        timeout_s: how long one may take once those before it are done: a host may be many steps ahead.
        overdue: called with one that took longer, in a thread, while its owner lives.
    """

    def __init__(self, timeout_s: float, overdue: WeakMethod[Callable[[DeviceStep], None]]):
        self._timeout_s, self._overdue = timeout_s, overdue
        self._queue: SimpleQueue[DeviceStep | None] = SimpleQueue()
        self._under_way: deque[DeviceStep] = deque()
        self._thread: threading.Thread | None = None

    @property
    def oldest(self) -> DeviceStep | None:
        """The one that is waited for, if any."""
        return next((step for step in self._under_way.copy() if not step.is_done()), None)

    @contextmanager
    def follow(self, number: int, what: str) -> Iterator[DeviceStep]:
        """Around the call that hands a step over; whoever does says how to ask for its end."""
        if self._thread is None:
            arguments = self._queue, self._under_way, self._timeout_s, self._overdue
            self._thread = threading.Thread(target=_watch, args=arguments, daemon=True, name="helix device steps")
            self._thread.start()
            finalize(self, self._queue.put, None)
        step = DeviceStep(number, what)
        self._under_way.append(step)
        self._queue.put(step)
        try:
            yield step
        except BaseException:
            step.is_done = lambda: True
            raise


def _watch(
    queue: SimpleQueue[DeviceStep | None],
    under_way: deque[DeviceStep],
    timeout_s: float,
    overdue: WeakMethod[Callable[[DeviceStep], None]],
) -> None:
    while (step := queue.get()) is not None:
        started, pause = time.monotonic(), _FIRST_PAUSE_S
        while not step.is_done():
            if time.monotonic() - started > timeout_s:
                if (call := overdue()) is not None:
                    call(step)
                return
            time.sleep(pause)
            pause = min(2 * pause, 1.0, timeout_s / 20)
        under_way.popleft()
