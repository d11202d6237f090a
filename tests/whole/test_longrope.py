"""longrope takes its long table for the whole call once a position is beyond the switch: exact over steps that cross it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from helix_compile import CaptureError, helix_compile
from helix_compile.verifier.numeric.reference import WidenedIslands
from tests.support.driver import Reference, deviation, left_padded, random_ids
from tests.support.families import fresh_family

SWITCH = 12
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0],
    "long_factor": [3.5],
    "original_max_position_embeddings": SWITCH,
    "factor": 4.0,
}


def model_with(rope: dict[str, Any], **changes: Any) -> Any:
    width = fresh_family("minicpm3").config.qk_rope_head_dim // 2
    sized = {k: v * width if isinstance(v, list) else v for k, v in rope.items()}
    return fresh_family("minicpm3", rope_parameters=sized, max_position_embeddings=48, **changes)


@pytest.mark.fresh_capture
def test_steps_across_the_switch_are_exact() -> None:
    model = model_with(LONGROPE)
    table = model.model.rotary_emb.inv_freq.clone()
    compiled = helix_compile(model, cp=2, tokens_per_block=2, max_batch_size=3, max_seq_len=48)
    assert torch.equal(model.model.rotary_emb.inv_freq, table)
    reference, mask = Reference(model), left_padded([5, 2, 9])
    ids, worst = random_ids(model, *mask.shape), []
    for tokens in (1, 1, 1, 1, 3, 1, 5, 0):
        with WidenedIslands():
            worst.append(deviation(compiled(ids, mask), reference.step(ids, mask), mask))
        mask = torch.ones(3, tokens, dtype=torch.int64)
        ids = random_ids(model, 3, tokens)
    assert max(compiled.lengths.tolist()) > SWITCH
    assert max(worst) < 1e-10
    with WidenedIslands():
        compiled.reset()
        fixed = helix_compile(model_with({"rope_type": "default", "rope_theta": 10000.0}), cp=2, max_seq_len=48)
        long = random_ids(model, 1, SWITCH + 4)
        assert (compiled(long) - fixed(long)).abs().max() > 1e-3  # the long table is not the short one


@pytest.mark.fresh_capture
def test_a_prompt_across_the_switch_is_exact() -> None:
    model = model_with(LONGROPE)
    compiled = helix_compile(model, cp=2, tokens_per_block=2, max_batch_size=2, max_seq_len=48)
    ids = random_ids(model, 2, SWITCH + 7)
    with WidenedIslands(), torch.no_grad():
        expected = model(ids).logits
        assert (compiled(ids) - expected).abs().max() / expected.abs().max() < 1e-10


def test_dynamic_rope_is_refused_with_what_works() -> None:
    model = fresh_family("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0})
    with pytest.raises(CaptureError, match=r"`model\.rotary_emb` has rope_type 'dynamic'(.|\n)*what works:.*'yarn'"):
        helix_compile(model, cp=2)


def test_a_folder_is_refused_with_what_works(tmp_path: Path) -> None:
    """The long table is in no checkpoint, and on meta it has no value."""
    model_with(LONGROPE, dtype=torch.float32).save_pretrained(tmp_path)
    with pytest.raises(CaptureError, match=r"`model.rotary_emb.long_inv_freq` .* has no value .* load the model first"):
        helix_compile(tmp_path, cp=2, max_seq_len=48)
