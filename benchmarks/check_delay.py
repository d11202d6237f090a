"""What comparing the ranks' inputs costs a step when what a rank posts is seen late: check="every", "deferred", "off", in one run.

    python benchmarks/check_delay.py [--step-ms 10] [--repeats 40]

Four ranks are threads over a store in memory that shows a post only after a delay, as one at the end of a slow link would. A step
is a sleep and a barrier in place of its collectives, so it needs no core, and the comparison is all that can differ. On a machine
whose processes share cores the store's own work hides this difference (benchmarks/distributed_step.py).
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from measuring import format_machine, print_table

from helix_compile.worlds.agreement import StepAgreement
from helix_compile.worlds.guard import RankGuard

RANKS = 4
DELAYS_MS = (0, 1, 5, 20)


class LateStore:
    """A store in which posts are seen `seconds` after they were set; everything else at once."""

    def __init__(self, seconds: float):
        self._store, self._seconds, self._lock = dist.HashStore(), seconds, threading.Lock()
        self._late: list[tuple[float, str, str]] = []

    def set(self, key: str, value: str) -> None:
        """As a store's."""
        if not key.startswith("post/"):
            return self._store.set(key, value)
        with self._lock:
            self._late.append((time.perf_counter() + self._seconds, key, value))

    def __getattr__(self, name: str) -> Any:
        with self._lock:  # whoever asks for anything sees what has arrived
            now = time.perf_counter()
            arrived = [late for late in self._late if late[0] <= now]
            self._late = [late for late in self._late if late[0] > now]
            for _, key, value in arrived:
                self._store.set(key, value)
        return getattr(self._store, name)


def main() -> None:
    """One row a delay."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--step-ms", type=float, default=10.0)
    parser.add_argument("--repeats", type=int, default=40)
    arguments = parser.parse_args()
    rows = []
    for delay in DELAYS_MS:
        ms = {check: _step_ms(check, delay, arguments) for check in ("every", "deferred", "off")}
        ratios = [f"{ms[check] / ms['off']:.2f}" for check in ("every", "deferred")]
        rows.append([f"{delay} ms", *(f"{t:.2f} ms" for t in ms.values()), *ratios])
    print(f"{format_machine()}; {RANKS} threads, a step of {arguments.step_ms:g} ms")
    print_table(["a post is seen after", "every", "deferred", "off", "every / off", "deferred / off"], rows)


def _step_ms(check: str, delay_ms: float, arguments: argparse.Namespace) -> float:
    """Mean over the steps of rank 0: a wait may come at every second one."""
    store, barrier = LateStore(delay_ms / 1e3), threading.Barrier(RANKS)
    guards = [RankGuard(store, rank, RANKS, timedelta(seconds=30)) for rank in range(RANKS)]

    def steps(rank: int) -> Iterator[float]:
        agreement = StepAgreement(guards[rank], check)
        for number in range(arguments.repeats + 2):
            started = time.perf_counter()
            agreement.guard.step += 1
            assert not agreement.begin({"input_ids": torch.full((1, 1), number)}, "input_ids")
            time.sleep(arguments.step_ms / 1e3)
            barrier.wait()
            yield time.perf_counter() - started

    with ThreadPoolExecutor(RANKS) as pool:
        taken, *_ = pool.map(lambda rank: list(steps(rank)), range(RANKS))
    return statistics.fmean(taken[2:]) * 1e3


if __name__ == "__main__":
    main()
