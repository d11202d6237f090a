"""Rotary tables that depend on the length of a call's longest sequence: exact over steps that cross the switch.

longrope has a second table, dynamic one for each length. A model in memory, a folder of it, prompts that a step would cut.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from helix_compile import CaptureError, HelixModule, RuntimeFault, helix_compile, verify
from helix_compile.runtime import step
from helix_compile.verifier.numeric.reference import WidenedIslands
from tests.support.driver import random_ids, worst_deviation
from tests.support.families import fresh_family

SWITCH = 12
ROPES: dict[str, dict[str, Any]] = {
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0],
        "long_factor": [3.5],
        "original_max_position_embeddings": SWITCH,
        "factor": 4.0,
    },
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 3.0},
    "default": {"rope_type": "default", "rope_theta": 10000.0},
}
STEPS = (1, 1, 1, 1, 3, 1, 5)


def model_of(kind: str, folder: Path | None = None, family: str = "minicpm3") -> Any:
    """A model whose tables are in float32, as from_pretrained makes them: a table made anew is in float32, too."""
    length = SWITCH if kind == "dynamic" else 48
    model = fresh_family(family, max_position_embeddings=length)
    width = model.config.qk_rope_head_dim // 2
    sized = {k: v * width if isinstance(v, list) else v for k, v in ROPES[kind].items()}
    built = fresh_family(family, max_position_embeddings=length, rope_parameters=sized)
    if folder is not None:
        built.save_pretrained(folder)
    tables = type(built.model.rotary_emb)(built.config)
    built.model.rotary_emb = tables
    return built.eval()


SLOW = pytest.mark.slow


@pytest.mark.fresh_capture
@pytest.mark.parametrize("kind", ["longrope", pytest.param("dynamic", marks=SLOW)])
def test_steps_across_the_switch_are_exact(kind: str) -> None:
    model = model_of(kind)
    table = model.model.rotary_emb.inv_freq.clone()
    compiled = helix_compile(model, cp=2, tokens_per_block=2, max_batch_size=3, max_seq_len=48)
    assert torch.equal(model.model.rotary_emb.inv_freq, table)
    assert worst_deviation(model, compiled, [5, 2, 9], STEPS) < 1e-10
    assert max(compiled.lengths.tolist()) > SWITCH
    if kind == "longrope":  # the model keeps it, and takes it as it is
        model.model.rotary_emb.long_inv_freq.mul_(1.1)
        with pytest.raises(RuntimeFault, match=r"model\.rotary_emb\.long_inv_freq was edited in place"):
            compiled(random_ids(model, 3, 1))
        model.model.rotary_emb.long_inv_freq.div_(1.1)
    compiled.reset()  # a table that stays would be seen
    fixed = helix_compile(model_of("default"), cp=2, max_seq_len=48)
    long = random_ids(model, 1, SWITCH + 4)
    assert (compiled(long) - fixed(long)).abs().max() > 1e-3


@pytest.mark.fresh_capture
@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_a_folder_is_exact_across_the_switch(kind: str, tmp_path: Path) -> None:
    """The long table is in no checkpoint: it is computed as the rotary module does for a model in memory."""
    model_of(kind, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    compiled = helix_compile(tmp_path, cp=2, tokens_per_block=2, max_batch_size=3, max_seq_len=48)
    assert worst_deviation(model, compiled, [5, 2, 9], STEPS) < 1e-10
    assert max(compiled.lengths.tolist()) > SWITCH
    compiled.save(tmp_path / "saved")
    again = HelixModule.load(tmp_path / "saved")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float64
    ).eval()  # its table is that of its last call
    assert worst_deviation(model, again, [SWITCH + 5, SWITCH - 1], (1, 2)) < 1e-10  # across it in one call


@pytest.mark.fresh_capture
@pytest.mark.parametrize("kind", [pytest.param("longrope", marks=SLOW), "dynamic"])
def test_a_long_prompt_is_not_cut(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first tokens take the table of its last one: in chunks they would take another."""
    model = model_of(kind, family="deepseek_v3")
    compiled = helix_compile(model, cp=2, tokens_per_block=2, max_batch_size=2, max_seq_len=48)
    ids = random_ids(model, 2, SWITCH + 7)
    monkeypatch.setattr(step, "SCORE_TOKENS", 64)
    assert len(step.chunks_of(SWITCH + 7, 2, SWITCH + 7)) > 1
    with WidenedIslands(), torch.no_grad():
        expected = model(ids).logits
        assert (compiled(ids) - expected).abs().max() / expected.abs().max() < 1e-10


@pytest.mark.slow
@pytest.mark.fresh_capture
def test_a_dynamic_model_is_verified() -> None:
    model = model_of("dynamic")
    report = verify(helix_compile(model, cp=2, tokens_per_block=2, max_batch_size=2, max_seq_len=48), model)
    assert report.ok, report


def test_a_table_that_someone_wrote_is_refused() -> None:
    model = model_of("dynamic")
    model.model.rotary_emb.inv_freq.mul_(1.1)
    with pytest.raises(CaptureError, match=r"`model\.rotary_emb\.inv_freq` is not the table of the configuration"):
        helix_compile(model, cp=2)


def test_a_table_that_is_made_in_another_way_is_refused() -> None:
    model = model_of("dynamic")
    rotary = model.model.rotary_emb
    own = type(rotary).forward

    class Doubled(type(rotary)):  # type: ignore[misc]
        def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
            return own(self, x, position_ids * 2)

    rotary.__class__ = Doubled
    with pytest.raises(
        CaptureError, match=r"`model\.rotary_emb` \(Doubled, rope_type dynamic\) makes its table for a sequence of 12"
    ):
        helix_compile(model, cp=2)
