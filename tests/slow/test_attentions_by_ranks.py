"""Sinks beside windows, caches of other layers, latents without rope, windows of MLA beside indexers, layers that are leaves: four
processes against the virtual world, node by node and in compiled segments. What tests/distributed/test_world.py has is not repeated.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from helix_compile import helix_compile
from tests.distributed.steps import ATTENTIONS, attention_model, run_steps, torchrun

pytestmark = [pytest.mark.slow, pytest.mark.multi_process]
LIMIT = 1e-5


@pytest.fixture(scope="module")
def node_by_node() -> dict[str, Tensor]:
    """Logits of the virtual world by name."""
    expected = {}
    for name, (_, _, options) in ATTENTIONS.items():
        compiled = helix_compile(attention_model(name), world="virtual", lower="reference", **options)
        expected[name] = run_steps(compiled)
        assert expected[name].abs().max() > 0.01
        assert compiled.plan.leaves or name != "kimi_linear"
        sites = [site for body in compiled.plan.bodies for site in body.attentions]
        assert any(site.sinks for site in sites) or name != "granite_swa"
        assert any(site.cache_of for site in sites) or name != "mistral_large4"
        assert any(site.window and not site.top_k for site in sites) or name != "dots3_note"
    return expected


@pytest.mark.parametrize("lower", ["reference", "inductor"])
def test_four_processes_are_the_virtual_world(node_by_node: dict[str, Tensor], lower: str, tmp_path: Path) -> None:
    """Compiled, both worlds are what either is node by node."""
    if lower == "inductor":  # the ranks find the code on disk
        for name, (_, _, options) in ATTENTIONS.items():
            compiled = helix_compile(attention_model(name), world="virtual", lower=lower, **options)
            assert compiled.programs() is not None
            assert close(run_steps(compiled), node_by_node[name]), name
    result = torchrun("attention_worker.py", str(tmp_path), lower, seconds=1500)
    assert result.returncode == 0, result.stderr
    for rank in range(4):
        seen = load_file(tmp_path / f"seen_{rank}.safetensors")
        sent = json.loads((tmp_path / f"sent_{rank}.json").read_text())
        for name, logits in node_by_node.items():
            assert close(seen[name], logits), (rank, name)
            counted, planned = sent[name]
            assert counted == planned > 0, (rank, name)
            assert torch.equal(seen[name].argmax(-1), logits.argmax(-1))


def close(got: Tensor, expected: Tensor) -> bool:
    return bool((got - expected).abs().max() <= LIMIT * expected.abs().max())
