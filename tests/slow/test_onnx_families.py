"""ONNX rank models in onnxruntime, slow tier: families at cp=2, and each option of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from helix_compile import helix_compile
from helix_compile.export.formats import check_export
from tests.export.test_onnx_plan import Device
from tests.export.test_onnx_ranks import TOLERANCE, compiled_tiny
from tests.export.test_onnxruntime import family_deviation, ort_deviation
from tests.support.driver import Reference, deviation, left_padded, random_ids
from tests.support.families import FAMILIES, tiny_family
from tests.support.models import tiny_model

pytestmark = pytest.mark.slow

# leaves are not exportable; the others are refused by helix_compile itself
LEAVES = ("kimi_linear", "bailing_hybrid", "longcat_flash")
ROWS = [(name, "") for name, family in FAMILIES.items() if not family.refused and name not in LEAVES]
VARIANTS = [(n, v) for n, family in FAMILIES.items() for v in family.variants if n not in LEAVES]


@pytest.mark.parametrize(("name", "variant"), [*ROWS, *VARIANTS], ids=lambda x: x or "plain")
def test_family(name: str, variant: str, tmp_path: Path) -> None:
    assert family_deviation(name, variant, tmp_path) <= TOLERANCE


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "deepseek_v32", "gemma4"])
def test_plan_of_a_family(name: str, tmp_path: Path) -> None:
    """plan.onnx in stock onnxruntime, and its specs against the weights of the ranks: heads, experts, an indexer, shared caches."""
    model, options = tiny_family(name, "", torch.float32), {"max_batch_size": 4, "max_seq_len": 64}
    compiled, logical = (helix_compile(model, cp=cp, tokens_per_block=2, **options) for cp in (2, 1))
    manifest = compiled.export(tmp_path / "out", logical=logical)
    assert check_export(tmp_path / "out") == []
    device, reference, worst, mask = (
        Device(tmp_path / "out", manifest["plan_model"]),
        Reference(model),
        0.0,
        left_padded([5, 2, 9]),
    )
    for tokens in (0, 1, 3):
        mask = torch.ones(3, tokens, dtype=torch.int64) if tokens else mask
        ids = random_ids(model, *mask.shape)
        worst = max(worst, deviation(device.step(ids, mask), reference.step(ids, mask), mask))
    assert worst <= TOLERANCE


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
