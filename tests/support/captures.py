"""Captures that tests share: one a structure and process. The product remembers nothing, since no key sees all that a model is.

A test whose model changes in ways that structure_key does not see (a global, an object's attribute, a closure) is marked
`fresh_capture`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from helix_compile.capture import model as capture_model
from helix_compile.capture.captured import CapturedGraph
from helix_compile.capture.structure import structure_key

KEPT = 64


def remembered(capture: Callable[..., CapturedGraph]) -> Callable[..., CapturedGraph]:
    """`capture` with a memo."""
    memo: OrderedDict[tuple, CapturedGraph] = OrderedDict()

    def captured(model: Any, whole: bool, keep: dict[int, str], unmatched: str) -> CapturedGraph:
        key = (whole, unmatched, tuple(sorted(keep.items())), structure_key(model))
        if key not in memo:
            memo[key] = replace(capture(model, whole, keep, unmatched), model=None)
        memo.move_to_end(key)
        if len(memo) > KEPT:
            memo.popitem(last=False)
        return memo[key]

    return captured


def share() -> None:
    """For a worker process, which no fixture reaches."""
    capture_model._captured = remembered(capture_model._captured)
