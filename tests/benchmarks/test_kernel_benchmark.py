"""What the kernel benchmark says without a device: its command line, its formulas by hand, and that it refuses."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def costs(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("kernel_costs")


@pytest.fixture
def kernels(costs: ModuleType) -> ModuleType:
    """By its path: the name `kernels` is taken, by a link for readers."""
    spec = importlib.util.spec_from_file_location("kernels_benchmark", BENCHMARKS / "kernels.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_mla_by_hand(costs: ModuleType) -> None:
    """A token is 576 values of 2 bytes and, for each of 128 heads, 576 + 512 multiplications and additions."""
    one, two = (costs.mla_decode_cost(1, S, 128, 512, 64) for S in (1000, 1001))
    assert two.nbytes - one.nbytes == 1152
    assert two.flops - one.flops == 2 * 128 * 576 + 2 * 128 * 512 == 278528
    assert one.nbytes == 1000 * 1152 + 128 * (576 * 2 + 512 * 2 + 4)
    more = costs.mla_decode_cost(3, 1000, 128, 512, 64, T=2)
    assert more.flops == 6 * one.flops
    assert more.nbytes == 3 * (1000 * 1152 + 2 * 128 * (576 * 2 + 512 * 2 + 4))


def test_gqa_by_hand(costs: ModuleType) -> None:
    """8 KV heads of 128: 4096 bytes a token; 64 query heads: 4 * 64 * 128 operations."""
    one, two = (costs.gqa_decode_cost(1, S, 64, 8, 128, 128) for S in (5, 6))
    assert two.nbytes - one.nbytes == 4096 and two.flops - one.flops == 32768


def test_merge_and_experts_by_hand(costs: ModuleType) -> None:
    merge = costs.merge_lse_cost(P=8, rows=16, W=512)
    assert merge.nbytes == 8 * 16 * (1024 + 4) + 16 * 1024 and merge.flops == 2 * 8 * 16 * 512
    experts = costs.moe_experts_cost(N=4, choices=6, experts_hit=5, D=7168, F=2048)
    assert experts.nbytes == 5 * 3 * 2048 * 7168 * 2 + 2 * 4 * 7168 * 2
    assert experts.flops == 6 * 6 * 7168 * 2048


def test_fraction_names_the_limit_that_binds(costs: ModuleType) -> None:
    card = costs.Card(bytes_per_s=1e12, flops_per_s=100e12, source="")
    assert costs.fraction_of_limit(costs.Cost(1e9, 1e9), 2e-3, card) == (0.5, "memory")
    assert costs.fraction_of_limit(costs.Cost(1e12, 1e9), 0.02, card) == (0.5, "tensor")
    # 128 heads share a latent token: 242 operations a byte, near the ridge of an H100 (295)
    h100 = costs.CARDS["NVIDIA H100 80GB HBM3"]
    long = costs.mla_decode_cost(1, 2**20, 128, 512, 64)
    assert round(long.flops / long.nbytes) == 242 < h100.flops_per_s / h100.bytes_per_s


def test_command_line(kernels: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    default = kernels.parse([])
    assert default.op == list(kernels.OPS) and not default.json
    assert (min(default.tokens), max(default.tokens)) == (4096, 2**20)
    assert (min(default.batch), max(default.batch)) == (1, 64)
    chosen = kernels.parse(["--op", "merge_lse", "gqa_decode", "--batch", "2", "--tokens", "77", "--json"])
    assert (chosen.op, chosen.batch, chosen.tokens) == (["merge_lse", "gqa_decode"], [2], [77])
    assert chosen.json
    for wrong in (["--batch", "0"], ["--op", "softmax"], ["--tokens", "many"]):
        with pytest.raises(SystemExit):
            kernels.parse(wrong)
        assert wrong[1] in capsys.readouterr().err


def test_sets_of_inputs(kernels: ModuleType) -> None:
    """Enough to flush a cache of 50 MB, one where an input is larger, none where it does not fit."""
    gib = 2**30
    assert kernels.input_sets(5e6, 50_000_000, 70 * gib) == 41
    assert kernels.input_sets(8 * gib, 50_000_000, 70 * gib) == 1
    assert kernels.input_sets(40 * gib, 50_000_000, 70 * gib) == 0
    assert kernels.input_sets(1e3, 50_000_000, 70 * gib) == kernels.MAX_SETS


def test_an_unknown_card_gets_absolute_figures_only(kernels: ModuleType) -> None:
    assert "only absolute figures" in kernels.describe_card("Some Card 3000")
    assert "3.35 TB/s" in kernels.describe_card("NVIDIA H100 80GB HBM3")


SMALL: dict[str, Any] = {
    "R": 32,
    "ROPE": 16,
    "MLA_HEADS": 8,
    "GQA_HEADS": 6,
    "KV_HEADS": 2,
    "HEAD_DIM": 16,
    "HIDDEN": 32,
    "EXPERT_WIDTH": 16,
    "EXPERTS": 8,
    "TOP_K": 3,
    "EP": 2,
    "PEERS": 4,
    "PAGE": 16,
    "DTYPE": torch.float32,
    "DEVICE": "cpu",
}


@pytest.mark.parametrize("op", ["mla_decode", "gqa_decode", "merge_lse", "moe_experts"])
def test_the_providers_compute_the_same(op: str, costs: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is timed side by side agrees, small and by the interpreter; a length that ends inside a page."""
    calls = importlib.import_module("kernel_calls")
    for name, value in SMALL.items():
        monkeypatch.setattr(calls, name, value)
    for subject in calls.subjects(op, [3], [37]):
        results = {name: call() for name, call in subject.make().items() if not name.startswith("Flash")}
        baseline = next(name for name in results if name.startswith("torch"))
        assert subject.cost.nbytes > 0 and len(results) == 2
        torch.testing.assert_close(results["helix"], results[baseline], rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_refusal_without_a_device() -> None:
    run = subprocess.run([sys.executable, str(BENCHMARKS / "kernels.py"), "--json"], capture_output=True, text=True)
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.strip().endswith("torch finds none here; nothing was measured.")
