"""Programs of every family that is rewritten, stepped by all ranks in one process as load_exported() does without a group."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helix_compile import helix_compile, load_exported
from helix_compile.export.formats import check_export
from tests.slow.test_onnx_families import ROWS, VARIANTS
from tests.support.driver import Reference, deviation, left_padded, random_ids
from tests.support.families import FAMILIES, tiny_family

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("name", "variant"), [*ROWS, *VARIANTS], ids=lambda x: x or "plain")
def test_family(name: str, variant: str, tmp_path: Path) -> None:
    model = tiny_family(name, variant, torch.float32)
    options = {"tokens_per_block": 2, "max_batch_size": 4, "max_seq_len": 64, **FAMILIES[name].options}
    compiled = helix_compile(model, cp=2, **options)
    compiled.export(tmp_path / "out", format="pt2")
    assert check_export(tmp_path / "out") == []
    module, reference, mask, worst = load_exported(tmp_path / "out"), Reference(model), left_padded([5, 2, 9]), 0.0
    for tokens in (0, 1, 3, 1):
        mask = torch.ones(3, tokens, dtype=torch.int64) if tokens else mask
        ids = random_ids(model, *mask.shape)
        logits = module(ids, mask)
        assert torch.equal(logits, compiled(ids, mask))
        worst = max(worst, deviation(logits, reference.step(ids, mask), mask))
    assert worst <= 1e-5
