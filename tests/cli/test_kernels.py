"""helix-compile kernels on DeepSeek-V3, with no GPU: what the plan selects fits, and uses what the card has."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import DeepseekV3Config, LlamaConfig

from tests.support.command import run_here
from tests.support.models import SIZES

LIMITS = {"sm_100": (124, "tcgen05"), "sm_90": (194, "wgmma")}  # Triton 3.7.0, 128 heads


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own: compiled kernels and interpreted ones can't share one."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "helix_compile", "kernels", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


Compiled = tuple[str, Path, list[dict[str, Any]]]


@pytest.fixture(scope="module", params=["sm_100", pytest.param("sm_90", marks=pytest.mark.slow)])
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """An architecture, and the selected kernels of DeepSeek-V3 for it: a quarter of a minute of the compiler."""
    folder = tmp_path_factory.mktemp("kernels")
    options = ["--cp", "4", "--batch", "8", "--max-seq-len", "131072"]
    result = run(*options, "--arch", request.param, "--json", "--out", str(folder))
    assert result.returncode == 0, result.stderr
    return request.param, folder, json.loads(result.stdout)["kernels"]


def test_every_kernel_fits_and_lies_where_it_says(compiled: Compiled) -> None:
    arch, folder, records = compiled
    names = {r["kernel"] for r in records}
    assert {"mla_decode", "merge_lse", "pack_heads.splits", "cache_append.norm_rope", "moe_router"} <= names
    for record in records:
        assert record["fits"] and record["arch"] == arch, record
        assert record["shared_bytes"] <= 232_448 and record["tmem_columns"] <= 512
        assert f".target {arch}a" in (folder / record["ptx"]).read_text()
        assert (folder / record["cubin"]).read_bytes()[:4] == b"\x7fELF"


def test_attention_uses_the_card(compiled: Compiled) -> None:
    arch, _, records = compiled
    limit, tensor_core = LIMITS[arch]
    (record,) = [r for r in records if r["kernel"] == "mla_decode"]
    assert record["tma"] and record["tensor_core"] == tensor_core
    assert 20 < record["instructions_per_kv_token"] <= limit
    assert ("in halves" in record["config"]) == (arch == "sm_100")  # Triton 3.7.0 can
    if arch == "sm_90":
        assert record["spills"] == 0
    for other in (r for r in records if r["kernel"] != "mla_decode"):
        assert other["spills"] == 0 and other["instructions_per_kv_token"] is None


@pytest.mark.slow  # half a minute of the compiler
def test_an_fp8_cache_of_keys_and_values(tmp_path: Path) -> None:
    """The plan's kernels, append among them, fit both architectures; attention to one token spills nothing."""
    sizes = {"hidden_size": 1024, "intermediate_size": 1024, "num_hidden_layers": 1, "vocab_size": 256}
    heads = {"num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128}
    LlamaConfig(**sizes, **heads, max_position_embeddings=131072).save_pretrained(tmp_path)
    options = ["--cp", "4", "--arch", "sm_100", "--arch", "sm_90", "--cache-dtype", "fp8_e4m3", "--all", "--json"]
    result = run(str(tmp_path / "config.json"), *options, "--out", str(tmp_path / "out"))
    assert result.returncode == 0, result.stdout
    records = json.loads(result.stdout)["kernels"]
    assert all(r["fits"] for r in records)
    for arch, (_, tensor_core) in LIMITS.items():
        own = [r for r in records if r["arch"] == arch]
        assert "cache_append" in {r["kernel"] for r in own}
        first = next(r for r in own if r["kernel"] == "gqa_decode")
        assert "16 rows" in first["config"] and "FP8 cache" in first["config"]
        assert first["spills"] == 0 and first["tma"] and first["tensor_core"] == tensor_core


@pytest.mark.slow  # half a minute of the compiler
def test_no_copy_is_wider_than_a_row_is_aligned_to(tmp_path: Path) -> None:
    """Rows of R + r = 26 floats: an asynchronous copy of 16 bytes from there is "misaligned address" on a card."""
    DeepseekV3Config(**SIZES).save_pretrained(tmp_path)
    config = str(tmp_path / "config.json")
    result = run(config, "--cp", "4", "--arch", "sm_90", "--dtype", "float32", "--json", "--out", str(tmp_path / "out"))
    assert result.returncode == 0, result.stderr
    (record,) = [r for r in json.loads(result.stdout)["kernels"] if "mla" in r["kernel"]]
    assert record["kernel"] == "mla_pointer_decode"
    ptx = (tmp_path / "out" / record["ptx"]).read_text()
    assert "ld.global" in ptx
    copies = re.findall(r"cp\.async\.c[ag]\S* \[[^]]*\], \[[^]]*\], (0x\w+)", ptx)
    assert all(int(size, 16) <= 8 for size in copies)


def test_wrong_use(tmp_path: Path) -> None:
    unknown = run_here("kernels", "tiny", "--arch", "sm_42", "--out", str(tmp_path))
    assert unknown.returncode == 2 and "sm_100" in unknown.stderr and unknown.stdout == ""
    interpreted = run_here("kernels", "tiny", "--out", str(tmp_path / "out"))
    assert interpreted.returncode == 2 and "TRITON_INTERPRET" in interpreted.stderr
    assert run("tiny", "--tune", "--out", str(tmp_path)).returncode == 2
    assert not any(tmp_path.iterdir())
