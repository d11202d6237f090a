"""Exports of programs (pt2, aoti) by real ranks that have neither the model nor transformers, and the real model's size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from helix_compile import helix_compile
from helix_compile.export.formats import check_export
from tests.distributed.steps import ROOT
from tests.support.exported_run import worst_of_ranks
from tests.support.gqa_models import fresh_gqa
from tests.support.models import fresh_model
from tests.test_readme import example

pytestmark = [pytest.mark.slow, pytest.mark.multi_process]

SIZES: dict[str, Any] = {"tokens_per_block": 4, "max_batch_size": 3, "max_seq_len": 64, "world": "virtual"}
LATENT = {
    "four": {"cp": 4},
    "two": {"cp": 2},
    "ag_rs": {"cp": 4, "merge": "ag_rs", "q_proj": "gather"},
    "v_up": {"cp": 4, "v_up": "before", "ep": 1},
    "tpa": {"cp": 2, "tpa": 2},
    "head": {"cp": 4, "head": "shard", "pad_heads": True, "tokens_per_block": 1},
}
GROUPED = {"four": {"cp": 4}, "tpa": {"cp": 2, "tpa": 2}, "ag_rs": {"cp": 2, "merge": "ag_rs"}}


def checked(model: Any, options: dict[str, Any], format: str, tmp_path: Path) -> None:
    compiled = helix_compile(model, **{**SIZES, **options})
    compiled.export(tmp_path / "out", format=format)
    assert check_export(tmp_path / "out") == []
    by_axis = options.get("tpa", 1) == 2
    assert worst_of_ranks(model, compiled, tmp_path / "out", tmp_path / "run", by_axis) <= 1e-5


@pytest.mark.parametrize("options", LATENT.values(), ids=LATENT)
def test_pt2_with_latents_and_experts(options: dict[str, Any], tmp_path: Path) -> None:
    checked(fresh_model("short", torch.float32), options, "pt2", tmp_path)


@pytest.mark.parametrize("options", GROUPED.values(), ids=GROUPED)
def test_pt2_with_kv_heads(options: dict[str, Any], tmp_path: Path) -> None:
    checked(fresh_gqa("qwen3", torch.float32), options, "pt2", tmp_path)


@pytest.mark.parametrize("options", [LATENT["two"], LATENT["ag_rs"], LATENT["tpa"]], ids=["two", "ag_rs", "tpa"])
def test_aoti_with_latents_and_experts(options: dict[str, Any], tmp_path: Path) -> None:
    checked(fresh_model("short", torch.float32), options, "aoti", tmp_path)


def test_aoti_with_kv_heads(tmp_path: Path) -> None:
    checked(fresh_gqa("qwen3", torch.float32), GROUPED["tpa"], "aoti", tmp_path)


def test_the_example(tmp_path: Path) -> None:
    assert example("06_native_package.py").main(tmp_path / "native") <= 1e-5


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_all_61_layers_of_the_real_configuration(tmp_path: Path) -> None:
    """In a process of its own, without weights: one program a distinct segment, whatever the depth."""
    script = ROOT / "benchmarks" / "export_programs.py"
    command = [sys.executable, str(script), "--out", str(tmp_path / "out"), "--json"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    measured = json.loads(run.stdout.splitlines()[-1])
    assert measured["layers"] == 61 and measured["programs"] <= 8
    assert measured["export_cpu_s"] + measured["load_cpu_s"] <= 60
    assert measured["export_extra"] + measured["load_extra"] <= 100 * 2**20
