"""What a user hangs on a model is part of it: captured once, noticed when it is new, still there afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from helix_compile import RuntimeFault, helix_compile
from tests.support.driver import random_ids
from tests.support.models import fresh_model


def _twice(module: nn.Module, args: Any, output: Any) -> Any:
    return output * 2


def _off(model: Any, compiled: Any) -> float:
    ids = random_ids(model, 2, 6)
    compiled.reset()
    with torch.no_grad():
        expected = model(ids).logits
    return float((compiled(ids) - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(
    "place",
    [pytest.param(p, marks=pytest.mark.slow) for p in ("model.layers.0", "model.norm")] + ["model.layers.1.mlp"],
)
def test_a_hook_is_captured_once_and_a_new_one_is_noticed(place: str) -> None:
    model = fresh_model()
    before = helix_compile(model, cp=2)
    assert _off(model, before) < 1e-7
    handle = model.get_submodule(place).register_forward_hook(_twice)
    hooked = helix_compile(model, cp=2)
    assert _off(model, hooked) < 1e-7
    with pytest.raises(RuntimeFault, match="given other hooks"):
        _off(model, before)
    assert list(model.get_submodule(place)._forward_hooks.values()) == [_twice]
    handle.remove()
    assert _off(model, helix_compile(model, cp=2)) < 1e-7


def test_what_is_not_rewritten_is_told_by_name() -> None:
    """An FFN that no pattern takes is exact, replicated, and in the report."""
    model = fresh_model()
    for layer in model.model.layers[:2]:
        layer.mlp.act_fn = nn.Softplus().eval()  # softplus(0) != 0: padding rows would add something
    compiled = helix_compile(model, cp=2)
    assert _off(model, compiled) < 1e-7
    told = dict(compiled.plan.not_rewritten)
    assert "softplus" in told["linear mlp.gate_proj.weight"]
    assert {"linear mlp.up_proj.weight", "linear mlp.down_proj.weight"} <= set(told)
    assert "linear mlp.gate_proj.weight" in str(compiled.inspect())
