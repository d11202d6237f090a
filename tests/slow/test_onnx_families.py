"""ONNX rank models in onnxruntime, slow tier: families at cp=2, and each option of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.export.test_onnx_ranks import TOLERANCE, compiled_tiny
from tests.export.test_onnxruntime import family_deviation, ort_deviation
from tests.support.families import FAMILIES
from tests.support.models import tiny_model

pytestmark = pytest.mark.slow

# leaves are not exportable; the others are refused by helix_compile itself
LEAVES = ("kimi_linear", "bailing_hybrid", "longcat_flash")
ROWS = [(name, "") for name, family in FAMILIES.items() if not family.refused and name not in LEAVES]
VARIANTS = [(n, v) for n, family in FAMILIES.items() for v in family.variants if n not in LEAVES]


@pytest.mark.parametrize(("name", "variant"), [*ROWS, *VARIANTS], ids=lambda x: x or "plain")
def test_family(name: str, variant: str, tmp_path: Path) -> None:
    assert family_deviation(name, variant, tmp_path) <= TOLERANCE


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"merge": "ag_rs"},
        {"q_proj": "gather"},
        {"v_up": "before"},
        {"v_up": "after"},
        {"cp": 2, "tpa": 2},
        {"ep": 1},
        {"tokens_per_block": 1},
        {"head": "shard", "pad_heads": True},
    ],
    ids=lambda options: "-".join(f"{k}_{v}" for k, v in options.items()) or "defaults",
)
def test_each_option(options: dict[str, Any], tmp_path: Path) -> None:
    compiled = compiled_tiny(**options)
    assert ort_deviation(tiny_model("plain", torch.float32), compiled, tmp_path / "out") <= TOLERANCE
