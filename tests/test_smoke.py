"""The whole spine in a few seconds: tiny preset, four ranks, one prompt and one step."""

from __future__ import annotations

import torch

from helix_compile import helix_compile
from helix_compile.models.presets import build_model, preset_config


def test_four_ranks_equal_the_model() -> None:
    model = build_model(preset_config("tiny"))
    compiled = helix_compile(model, cp=4, max_seq_len=64)
    ids = torch.randint(0, 256, (2, 12))
    with torch.no_grad():
        expected = model(ids).logits
    got = torch.cat([compiled(ids[:, :11]), compiled(ids[:, 11:])], dim=1)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
