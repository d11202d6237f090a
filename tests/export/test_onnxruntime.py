"""Rank models in stock onnxruntime with a real exchange, against the unmodified model: options, kinds of attention, dtypes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from helix_compile import helix_compile
from tests.export.test_onnx_ranks import TOLERANCE, check_caches, compiled_tiny, run
from tests.support.families import FAMILIES, tiny_family
from tests.support.models import tiny_model
from tests.support.onnx_ranks import OnnxRanks
from tests.support.ort_ranks import ort_rank


def ort_deviation(model: Any, compiled: Any, folder: Path, **how: Any) -> float:
    """Largest deviation of a logit; caches are compared too."""
    ranks = OnnxRanks(folder, compiled.export(folder), ort_rank)
    worst = run(model, compiled, ranks, **how)
    check_caches(compiled, ranks)
    return worst


@pytest.mark.parametrize(
    "options",
    [
        {"merge": "ag_rs", "v_up": "before"},
        {"q_proj": "gather", "ep": 1},
        {"cp": 2, "tpa": 2, "tokens_per_block": 1},
        {"head": "shard", "pad_heads": True, "ep": 2},
    ],
    ids=lambda options: "-".join(f"{k}_{v}" for k, v in options.items()),
)
def test_options(options: dict[str, Any], tmp_path: Path) -> None:
    compiled = compiled_tiny(**options)
    assert ort_deviation(tiny_model("plain", torch.float32), compiled, tmp_path / "out") <= TOLERANCE


def test_float64_is_the_model_to_its_own_precision(tmp_path: Path) -> None:
    """The model's own islands of float32 leave 1e-7 or so."""
    model = tiny_model("plain", torch.float64)
    compiled = helix_compile(model, cp=4, tokens_per_block=4, max_batch_size=4, max_seq_len=64)
    assert ort_deviation(model, compiled, tmp_path / "out") <= 1e-6


@pytest.mark.parametrize(("name", "variant"), [("mistral", "window"), ("deepseek_v32", "")])
def test_kinds_of_attention(name: str, variant: str, tmp_path: Path) -> None:
    """Grouped queries that forget, and an indexer that chooses."""
    assert family_deviation(name, variant, tmp_path) <= TOLERANCE


def family_deviation(name: str, variant: str, folder: Path) -> float:
    """A family of tests/support/families.py at cp=2, row 3 idle where its masks allow that."""
    model = tiny_family(name, variant, torch.float32)
    options = {"tokens_per_block": 2, "max_batch_size": 4, "max_seq_len": 64, **FAMILIES[name].options}
    compiled = helix_compile(model, cp=2, **options)
    idle = None if compiled.plan.shortest_reach else 3
    return ort_deviation(model, compiled, folder / "out", idle=idle)
