"""Pieces of a step as CUDA graphs: what worlds/tape.py calls a recorder, on a card."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from helix_compile.worlds.tape import Piece, Recorder

_CAPTURE = threading.Lock()  # torch takes one capture at a time in a process


class CudaGraphs:
    """Records on a stream of its own, into one pool of memory for all graphs of a module.

    One pool is enough: a module takes one step at a time, and nothing that a graph has computed is needed when the next step begins
    (outputs are copied out). What is kept, static inputs and results of calls between graphs, lies outside of it.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._stream: torch.cuda.Stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._open: tuple[torch.cuda.CUDAGraph, AbstractContextManager[Any]] | None = None

    def warm_up(self, run: Callable[[], Any]) -> Any:
        """Run on the stream that records: what a stream gets at its first use (cuBLAS's workspace) is then not a part of a graph."""
        outer = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(outer)
        with torch.cuda.stream(self._stream):
            result = run()
        outer.wait_stream(self._stream)
        for value in pytree.tree_leaves(result):
            if isinstance(value, Tensor) and value.is_cuda:
                value.record_stream(outer)
        return result

    def begin(self) -> None:
        """Enter a capture. What other threads do meanwhile (a step of another module, a watchdog of nccl) does not end it."""
        _CAPTURE.acquire()
        inside = torch.cuda.stream(self._stream)
        try:
            torch.cuda.synchronize(self._device)
            inside.__enter__()
            try:
                graph = torch.cuda.CUDAGraph()
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            except BaseException:
                inside.__exit__(None, None, None)
                raise
        except BaseException:
            _CAPTURE.release()
            raise
        self._open = graph, inside

    def launch(self, call: Callable[..., Any], arguments: Sequence[Any]) -> Any:
        """What it launches is recorded, not run."""
        return call(*arguments)

    def end(self) -> Piece:
        """Leave the capture, for the stream of the caller, whatever comes of it."""
        assert self._open is not None
        (graph, inside), self._open = self._open, None
        try:
            graph.capture_end()
        finally:
            inside.__exit__(None, None, None)
            _CAPTURE.release()
        return graph

    def abandon(self) -> None:
        """Leave it after an error, which says more than that a capture was broken off."""
        with suppress(RuntimeError):
            self.end()

    def wait(self) -> None:
        """Until the card has nothing left to do."""
        with _CAPTURE:  # a card that waits as a whole would break a capture off
            torch.cuda.synchronize(self._device)

    def mark(self) -> Callable[[], bool]:
        """An event behind what was replayed."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        done: Callable[[], bool] = event.query
        return done


def recorder_for(device: torch.device) -> Recorder | None:
    """What records steps on a device; None where there is nothing like it."""
    return CudaGraphs(device) if device.type == "cuda" else None
