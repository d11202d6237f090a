"""Rank models in stock onnxruntime with a real exchange, against the unmodified model: options, kinds of attention, dtypes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import helper

from helix_compile import helix_compile
from helix_compile.export.formats import check_export
from tests.export.test_onnx_ranks import TOLERANCE, check_caches, compiled_tiny, run
from tests.support.driver import deviation, left_padded, random_ids
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
        {"overlap": "hopb", "v_up": "before"},
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


@pytest.fixture(scope="module", params=["float16", "bfloat16"])
def in_16_bits(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Any]:
    """A module in 16 bits, its export and its manifest."""
    model, folder = tiny_model("short", torch.float32), tmp_path_factory.mktemp("bits") / "out"
    dtype = getattr(torch, request.param)
    compiled = helix_compile(model, cp=4, tokens_per_block=4, max_batch_size=4, max_seq_len=64, dtype=dtype)
    return compiled, folder, compiled.export(folder)


def test_16_bits_are_stored_as_they_are(in_16_bits: tuple[Any, Path, Any]) -> None:
    """Every weight bit for bit; o and lse differ in dtype, and travel one after the other."""
    compiled, folder, manifest = in_16_bits
    dtype = getattr(torch, compiled.plan.dtype)
    for rank in compiled.ranks:
        model = onnx.load(folder / f"rank{rank.rank}.onnx")
        held = {t.name: t for t in model.graph.initializer if t.name in manifest["weights"]}
        assert held and all(t.raw_data == _bits(rank.params[name]) for name, t in held.items())
        assert any(t.data_type == helper.np_dtype_to_tensor_dtype(np.dtype(_NAMES[dtype])) for t in held.values())
    assert check_export(folder) == []
    exchanges = [c for c in manifest["collectives"] if c[0] == "AllToAllSingle"]
    assert len(exchanges) == 2 * len(compiled.ranks[0].cache)
    assert any("bfloat16" in needed for needed in manifest["needs"]) == (dtype is torch.bfloat16)


_NAMES: dict[torch.dtype, Any] = {torch.float16: np.float16, torch.bfloat16: ml_dtypes.bfloat16}


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def test_float16_runs_in_the_reference_evaluator(tmp_path: Path) -> None:
    """Against the module in float16: a few roundings of 2**-11 each."""
    model = tiny_model("short", torch.float32)
    compiled = helix_compile(model, cp=4, tokens_per_block=4, max_batch_size=4, max_seq_len=64, dtype=torch.float16)
    ranks, mask = OnnxRanks(tmp_path / "out", compiled.export(tmp_path / "out")), left_padded([5, 2, 9, 1])
    for tokens in (0, 1, 3):
        mask = torch.ones(4, tokens, dtype=torch.int64) if tokens else mask
        ids = random_ids(model, *mask.shape)
        expected, got = compiled(ids, mask), torch.tensor(ranks.step(ids, mask)[0])
        assert got.dtype is torch.float16
        assert deviation(got.float(), expected.float(), mask) <= 16 * 2**-11


@pytest.mark.parametrize(
    ("name", "variant"), [("mistral", "window"), pytest.param("deepseek_v32", "", marks=pytest.mark.slow)]
)
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
