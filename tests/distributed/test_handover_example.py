"""examples/04_handover as it is meant: prefill in a process of its own, decode by four torchrun ranks."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from helix_compile.models.presets import build_model, preset_config
from tests.distributed.steps import ROOT, launch, torchrun

EXAMPLE = ROOT / "examples/04_handover"


@pytest.mark.slow
@pytest.mark.multi_process
def test_four_ranks_decode_what_another_process_prefilled(tmp_path: Path) -> None:
    prefill = launch([sys.executable, str(EXAMPLE / "prefill.py"), str(tmp_path)], 200)
    assert prefill.returncode == 0, prefill.stderr
    decode = torchrun(str(EXAMPLE / "decode.py"), str(tmp_path))
    assert decode.returncode == 0, decode.stderr
    model = build_model(preset_config("tiny"))
    prompts = torch.randint(0, 256, (2, 50), generator=torch.Generator().manual_seed(1))
    expected = model.generate(prompts, max_new_tokens=24, do_sample=False, pad_token_id=0)
    assert json.loads(decode.stdout) == expected[:, 50:].tolist()  # one document: one rank printed
