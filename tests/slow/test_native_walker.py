"""The walker in C++ of examples/07_native_walker: ranks as threads, without Python, against the unmodified model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from helix_compile import helix_compile
from helix_compile.export.formats import check_export
from helix_compile.export.manifest import described_file, format_manifest
from tests.support.driver import Reference, deviation
from tests.support.exported_run import steps_of
from tests.support.gqa_models import fresh_gqa
from tests.support.models import fresh_model
from tests.test_readme import example

pytestmark = [pytest.mark.slow, pytest.mark.multi_process]

SIZES: dict[str, Any] = {"tokens_per_block": 4, "max_batch_size": 3, "max_seq_len": 64, "world": "virtual"}


@pytest.fixture(scope="module")
def walker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("walker") / "walker"
    example("07_native_walker.py").build(program)
    return program


def worst(model: Any, walker: Path, folder: Path) -> float:
    """Over ragged prompts, T = 1 and 3, a row that idles, and all ranks."""
    steps, reference, found = steps_of(model), Reference(model), 0.0
    logits = example("07_native_walker.py").stepped(walker, folder, steps)
    for number, (ids, mask) in enumerate(steps):
        expected = reference.step(ids, mask)
        found = max(found, *(deviation(of_rank[number], expected, mask) for of_rank in logits))
    return found


def test_latents_and_experts(walker: Path, tmp_path: Path) -> None:
    """And on a ledger that is another one: what it computes hangs on the files."""
    model = fresh_model("short", torch.float32)
    helix_compile(model, cp=4, **SIZES).export(tmp_path / "out", format="aoti")
    assert check_export(tmp_path / "out") == []
    assert worst(model, walker, tmp_path / "out") <= 1e-5
    path = tmp_path / "out" / "walk.json"
    turned = path.read_text().replace('{"node": "kvp_rank"}, 4, 4]', '{"node": "kvp_rank"}, 2, 4]')
    assert turned != path.read_text()
    path.write_text(turned)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    manifest["files"]["walk.json"] = described_file(path)
    (tmp_path / "out" / "manifest.json").write_text(format_manifest(manifest))
    assert worst(model, walker, tmp_path / "out") > 1e-2


def test_kv_heads_over_two_axes(walker: Path, tmp_path: Path) -> None:
    model = fresh_gqa("qwen3", torch.float32)
    helix_compile(model, cp=2, tpa=2, **SIZES).export(tmp_path / "out", format="aoti")
    assert worst(model, walker, tmp_path / "out") <= 1e-5
