"""One thread at a time in what holds a batch: a module, or a step out of an exported folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from threading import Lock
from typing import Any

import torch

from helix_compile.errors import RuntimeFault


@contextmanager
def alone(lock: Lock | Any, method: str, advice: str = "") -> Iterator[None]:
    """Hold the lock, on the host's device: there is one batch, one ledger and one cache a rank.

    Raises:
        RuntimeFault: another thread holds it; `advice` says what to do.
    """
    if not lock.acquire(blocking=False):
        raise RuntimeFault(f"{method}: another thread is using this module, which has one batch and one cache{advice}")
    # what a step makes on the host belongs there, whatever torch.set_default_device() says
    elsewhere = torch.get_default_device().type != "cpu"
    try:
        with torch.device("cpu") if elsewhere else nullcontext():
            yield
    finally:
        lock.release()
