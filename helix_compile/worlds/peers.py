"""What this process says before SIGTERM ends it, also while its main thread waits inside C++, and which of its peers live.

torchrun ends survivors about 0.1 s after a death. A rank that hangs in gloo can't run a signal handler; but Python's own C
handler writes to a pipe at once, and a thread reads it, speaks and ends the process, as SIGTERM would have.

Which processes of this host live is read from /proc at any time, and heard at once when one dies by a thread on their
pidfds: a rank that waits inside gloo may hear nothing of a death until torchrun ends it, 0.1 s later.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple
from weakref import WeakMethod

EXIT_STATUS = 128 + signal.SIGTERM
PATIENCE_S = 2.0  # for a store that does not answer any more; torchrun sends SIGKILL after 30

_LOOK_MS = 5000  # how long a thread outlives its owner


def before_sigterm(speak: Callable[[], None]) -> bool:
    """Call `speak` when SIGTERM comes, then end. False where somebody else handles SIGTERM or wakes up by signals.

    Call it in the main thread; the first caller in a process has it.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        return False
    if (before := signal.set_wakeup_fd(-1)) != -1:
        signal.set_wakeup_fd(before)
        return False
    hear, wake = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)

    def listen() -> None:
        while signal.SIGTERM not in os.read(hear, 64):
            pass
        speaker = Thread(target=speak, daemon=True)
        speaker.start()
        speaker.join(PATIENCE_S)
        os._exit(EXIT_STATUS)

    def handle(number: int, frame: Any) -> None:
        threading.Event().wait()  # the thread ends this process

    Thread(target=listen, daemon=True, name="helix last words").start()
    signal.signal(signal.SIGTERM, handle)
    return True


class Life(NamedTuple):
    """A process: host and pid namespace, pid within it, and when it was born (a pid comes again)."""

    host: str
    pid: int
    born: str


def own_life() -> Life:
    """This process."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return Life(f"{socket.gethostname()} {space}", os.getpid(), _state(os.getpid())[1])


def is_dead(life: Life, here: Life) -> bool:
    """True if it is known to have ended; False if it lives, or can't be seen from `here`."""
    if life.host != here.host or not life.born:
        return False
    state, born = _state(life.pid)
    return state in ("", "Z", "X") or born != life.born


def watch(lives: Iterable[Life], here: Life, speak: WeakMethod[Callable[[], None]]) -> None:
    """Call `speak` when one of these processes ends, at once, as long as its owner lives.

    Processes of other hosts, and systems without pidfd, are not watched.
    """
    poll, open_fds = select.poll(), set()
    for life in lives:
        if life.host == here.host and life.born and hasattr(os, "pidfd_open"):
            with suppress(OSError):  # ended before; /proc says so
                open_fds.add(pidfd := os.pidfd_open(life.pid))
                poll.register(pidfd, select.POLLIN)
    if open_fds:
        Thread(target=_listen, args=(poll, open_fds, speak), daemon=True, name="helix peers").start()


def _listen(poll: select.poll, open_fds: set[int], speak: WeakMethod[Callable[[], None]]) -> None:
    while open_fds:
        ended = [pidfd for pidfd, _ in poll.poll(_LOOK_MS)]
        if (call := speak()) is None:
            break
        for pidfd in ended:
            poll.unregister(pidfd)
            os.close(pidfd)
            open_fds.remove(pidfd)
            call()
        del call  # it holds the owner
    for pidfd in open_fds:
        os.close(pidfd)


def _state(pid: int) -> tuple[str, str]:
    """(state, start time) by /proc; ("", "") where there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", ""
    return fields[0], fields[19]
