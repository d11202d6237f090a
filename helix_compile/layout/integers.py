"""Integers as they come from numpy and torch."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any


def plain_ints(values: Iterable[Any]) -> list[Any]:
    """Integers of numpy or torch as ints; everything else (bools too) as it is, for the caller to refuse."""
    return [v if isinstance(v, bool) or not hasattr(v, "__index__") else _as_int(v) for v in values]


def _as_int(value: Any) -> Any:
    try:
        return operator.index(value)
    except TypeError:  # a tensor or an array that is not one integer
        return value
