"""examples/train_recall.py: what it trains on, and that it learns from its sketch."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from helix_compile.eval.words import WORDS

FILE = Path(__file__).resolve().parents[2] / "examples" / "train_recall.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_recall", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_only_the_right_token_and_the_nearest_are_counted_once(script: ModuleType) -> None:
    ids, labels, positions, mask = script.draw_documents(random.Random(0), torch.Generator().manual_seed(0), 5.0)
    B, T = ids.shape
    asked = 0
    for row in range(B):
        for i in range(T):
            assert (mask[row, 0, i, i + 1 :] == -torch.inf).all()
            once = {j for j in range(i + 1) if mask[row, 0, i, j] == 0}
            nearest = {i, max(i - 1, 0)}
            if labels[row, i] < 0:
                assert once == nearest
                continue
            asked += 1
            (right,) = once - nearest
            assert ids[row, right] == labels[row, i] and ids[row, right - 1] == ids[row, i]
            assert positions[row, right] - positions[row, right - 1] == 1  # no jump inside a fact
            assert (ids[row, :i] == ids[row, i]).sum() == 1  # its word stood once before
    assert asked > B * T // 4 and positions.max() > T


def test_it_learns_and_saves_what_transformers_loads(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "COPIES", 0.0)  # short texts alone are learned in seconds
    assert script.main(tmp_path, steps=40, seed=0) < 3.0  # ln 578 = 6.4 knows nothing, 5.4 is the sketch
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert type(model).__name__ == "DeepseekV3ForCausalLM" and model.dtype == torch.bfloat16
    assert tokenizer(f"the {WORDS[511]}").input_ids == [2, 577] and len(tokenizer) == model.config.vocab_size
    ElementTree.fromstring((tmp_path / "loss.svg").read_text())
