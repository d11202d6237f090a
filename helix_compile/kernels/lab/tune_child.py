"""Trials in a process of their own: a candidate that faults takes its CUDA context with it, and every later one would fail.

    ChildTrials(target, sizes, device)(entry, config) -> Trial

On an H200 one candidate's illegal memory access made 147 others of the same process "fail". The child is kept while its
trials go well, and replaced when it faults, dies or hangs.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from helix_compile.errors import LoweringUnavailable
from helix_compile.kernels.lab.tune import LocalTrials, Trial, Trials, TuneSizes, cudagraph_ms
from helix_compile.kernels.mla.tuning import MlaConfig, MlaEntry
from helix_compile.kernels.target import KernelTarget

TIMEOUT_S = 300.0  # a candidate compiles, runs and is timed in far less


def card_trials(target: KernelTarget, sizes: TuneSizes, device: torch.device) -> Trials:
    """What a child runs: trials timed by replays of a CUDA graph."""
    return LocalTrials(target, sizes, device, cudagraph_ms)


class ChildTrials:
    """Trials(entry, config) of make(*arguments), which is called in the child; close() ends it."""

    def __init__(self, *arguments: Any, make: Callable[..., Trials] = card_trials, timeout_s: float = TIMEOUT_S):
        self.arguments, self.make, self.timeout_s = arguments, make, timeout_s
        self._child: tuple[BaseProcess, Connection] | None = None

    def __call__(self, entry: MlaEntry, config: MlaConfig) -> Trial:
        """The child's trial, or why it gave none."""
        process, pipe = self._child = self._child or self._started()
        pipe.send((entry, config))
        try:
            if not pipe.poll(self.timeout_s):
                self.close()
                return Trial(entry, config, reason=f"took longer than {self.timeout_s:g} s")
            trial: Trial = pipe.recv()
        except (EOFError, ConnectionResetError):
            process.join()
            self.close()
            return Trial(entry, config, reason=f"ended its process (exit status {process.exitcode})")
        if trial.faulted:
            self.close()
        return trial

    def close(self) -> None:
        """End the child, whatever it does."""
        if self._child is not None:
            process, pipe = self._child
            pipe.close()
            process.kill()
            process.join()
            self._child = None

    def _started(self) -> tuple[BaseProcess, Connection]:
        context = multiprocessing.get_context("spawn")  # a forked child can't use CUDA
        here, there = context.Pipe()
        process = context.Process(target=_serve, args=(there, self.make, self.arguments), daemon=True)
        process.start()
        there.close()
        if not here.poll(TIMEOUT_S):  # it imports torch and Triton first, which is no candidate's time
            process.kill()
            raise LoweringUnavailable(f"kernels: a process for trials did not start in {TIMEOUT_S:g} s")
        here.recv()
        return process, here


def _serve(pipe: Connection, make: Callable[..., Trials], arguments: tuple[Any, ...]) -> None:
    trials = make(*arguments)
    pipe.send("ready")
    while True:
        try:
            entry, config = pipe.recv()
        except EOFError:
            return
        pipe.send(trials(entry, config))
