"""Sinks beside windows, caches of other layers, latents without rope, windows of MLA beside indexers, layers that are leaves: four
processes against the virtual world, in one launch. What tests/distributed/test_world.py has is not repeated.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helix_compile import helix_compile
from tests.distributed.steps import ATTENTIONS, attention_model, run_steps, torchrun

pytestmark = [pytest.mark.slow, pytest.mark.multi_process]
LIMIT = 1e-5


def test_four_processes_are_the_virtual_world(tmp_path: Path) -> None:
    result = torchrun("attention_worker.py", str(tmp_path), seconds=1500)
    assert result.returncode == 0, result.stderr
    expected, sites = {}, {}
    for name, (_, _, options) in ATTENTIONS.items():
        compiled = helix_compile(attention_model(name), world="virtual", **options)
        expected[name] = run_steps(compiled)
        assert expected[name].abs().max() > 0.01
        assert compiled.plan.leaves or name != "kimi_linear"
        sites[name] = [site for body in compiled.plan.bodies for site in body.attentions]
    assert any(site.sinks for site in sites["granite_swa"]) and any(site.cache_of for site in sites["mistral_large4"])
    assert any(site.window and not site.top_k for site in sites["dots3_note"])
    for rank in range(4):
        seen, sent = (
            load_file(tmp_path / f"seen_{rank}.safetensors"),
            json.loads((tmp_path / f"sent_{rank}.json").read_text()),
        )
        for name, logits in expected.items():
            assert (seen[name] - logits).abs().max() <= LIMIT * logits.abs().max(), (rank, name)
            counted, planned = sent[name]
            assert counted == planned > 0, (rank, name)
            assert torch.equal(seen[name].argmax(-1), logits.argmax(-1))
