"""Where a forward takes its cache is read off the forward: by annotation, then by name, under the decorators of transformers."""

from __future__ import annotations

import functools
from typing import Any, Optional

import pytest
from transformers.cache_utils import Cache, DynamicCache

from helix_compile.ir.cache_argument import cache_argument


def annotated(hidden: Any, store: Cache | None = None, cache: int = 0) -> None: ...


def in_words(hidden: Any, store: Cache | None = None) -> None: ...


def optional(hidden: Any, store: Optional[DynamicCache] = None) -> None: ...  # noqa: UP045 - the old spelling is the case


def newer(hidden: Any, cache: Any = None) -> None: ...


def older(hidden: Any, past_key_values: Any = None, use_cache: bool = True) -> None: ...


@functools.wraps(newer)
def wrapped(*args: Any, **kwargs: Any) -> None: ...


def without(hidden: Any, cached: bool = False) -> None: ...


@pytest.mark.parametrize(
    ("forward", "name"),
    [
        (annotated, "store"),
        (in_words, "store"),
        (optional, "store"),
        (newer, "cache"),
        (older, "past_key_values"),
        (wrapped, "cache"),
        (without, None),
    ],
)
def test_the_argument(forward: Any, name: str | None) -> None:
    assert cache_argument(forward) == name
