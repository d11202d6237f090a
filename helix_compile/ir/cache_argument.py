"""Under which name a forward takes the cache and an output gives it back: asked of the forward, not of a version.

transformers calls it `past_key_values` up to 5.23 and `cache` from 5.24 on; a model of one's own may do either.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

from transformers.cache_utils import Cache

CACHE_NAMES = ("cache", "past_key_values", "past_key_value")


def cache_argument(forward: Callable[..., Any]) -> str | None:
    """The parameter of `forward` that takes a transformers Cache: by its annotation, else by its name; None: none does."""
    parameters = inspect.signature(forward).parameters
    annotated = [name for name, parameter in parameters.items() if _is_cache(parameter.annotation)]
    named = [name for name in CACHE_NAMES if name in parameters]
    return next(iter([*annotated, *named]), None)


def call_with_cache(module: Any, cache: Any, **inputs: Any) -> Any:
    """module(**inputs) with the cache under the name that the module's forward gives it."""
    return module(**inputs, **{cache_argument(module.forward) or "past_key_values": cache})


def cache_of_output(output: Any) -> Any:
    """The cache that a model's output holds, or None."""
    found = (getattr(output, name, None) for name in CACHE_NAMES)
    return next((cache for cache in found if cache is not None), None)


def _is_cache(annotation: Any) -> bool:
    if isinstance(annotation, str):
        return any(word.endswith("Cache") for word in re.findall(r"[\w.]+", annotation))
    if isinstance(annotation, type):
        return issubclass(annotation, Cache)
    return any(_is_cache(part) for part in getattr(annotation, "__args__", ()))
