"""Which processes of this host live: by /proc at any time, and at once when one dies, by a thread on their pidfds.

A rank that waits inside gloo may hear nothing of a death until torchrun ends it, 0.1 s later; the thread hears it.
"""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import NamedTuple

_LOOK_MS = 5000  # how long a thread outlives its owner


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


def watch(lives: dict[int, Life], here: Life, tell: Callable[[int], bool]) -> None:
    """Call `tell` with the rank of each of these processes that ends, at once, until it returns False.

    It is called with -1 now and then, to learn whether it still wants to hear. Processes of other hosts, and systems
    without pidfd, are not watched.
    """
    poll, ranks = select.poll(), {}
    for rank, life in lives.items():
        if life.host == here.host and life.born and hasattr(os, "pidfd_open"):
            try:
                pidfd = os.pidfd_open(life.pid)
            except OSError:
                continue  # ended before; /proc says so
            ranks[pidfd] = rank
            poll.register(pidfd, select.POLLIN)
    if ranks:
        Thread(target=_listen, args=(poll, ranks, tell), daemon=True, name="helix peers").start()


def _listen(poll: select.poll, ranks: dict[int, int], tell: Callable[[int], bool]) -> None:
    wanted = True
    while ranks and wanted:
        for pidfd, _ in poll.poll(_LOOK_MS):
            poll.unregister(pidfd)
            os.close(pidfd)
            wanted = tell(ranks.pop(pidfd)) and wanted
        wanted = wanted and tell(-1)
    for pidfd in ranks:
        os.close(pidfd)


def _state(pid: int) -> tuple[str, str]:
    """(state, start time) by /proc; ("", "") where there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", ""
    return fields[0], fields[19]
