"""A tiny model for tests of the planner, costed once; round accelerators."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch

from helix_compile.capture.source import captured_from
from helix_compile.compile import match_model
from helix_compile.config.options import HelixOptions
from helix_compile.models.presets import build_model, preset_config
from helix_compile.predict.accelerators import PRESETS, Accelerator
from helix_compile.predict.costed import CostedModel
from helix_compile.predict.formats import cache_format, weight_format
from helix_compile.predict.search import Goal

CONTEXT = 1 << 20


def costed(model: Any, **options: Any) -> CostedModel:
    """Any model, with what is not searched."""
    base = HelixOptions(**{"cp": 2, "max_batch_size": 12, "max_seq_len": CONTEXT, **options})
    return CostedModel(*match_model(captured_from(model, None), base), base)


@lru_cache(maxsize=1)
def tiny_costed() -> CostedModel:
    """The preset, in bfloat16 and without weights."""
    return costed(build_model(preset_config("tiny"), dtype=torch.bfloat16, meta=True))


def goal(**changes: Any) -> Goal:
    """Eight GB200 and long sequences, or what is asked for."""
    own = {"accelerator": PRESETS["gb200"], "ranks": 8, "context": CONTEXT, "batches": (1, 8, 64), "fewer_ranks": True}
    formats = {"weights": weight_format("auto"), "cache": cache_format("auto")}
    return Goal(**{**own, **formats, **changes})


def machine(**changes: Any) -> Accelerator:
    """GB200 with other figures."""
    return replace(PRESETS["gb200"], **changes)
