"""The export around the layers carries none of their weights, and gives them back."""

from __future__ import annotations

import pytest
from torch import nn

from helix_compile.capture_layers import export_around, find_layers
from helix_compile.errors import CaptureError
from tests.support.models import fresh_model


def _held(model: nn.Module) -> dict[str, int]:
    named = (*model.named_parameters(), *model.named_buffers())
    return {name: id(tensor) for name, tensor in named}


def test_the_layers_weights_stay_out_and_come_back() -> None:
    model = fresh_model("short")
    before = _held(model)
    program, calls = export_around(model, find_layers(model)[1])
    carried = [*program.graph_signature.parameters, *program.graph_signature.buffers]
    assert "model.lm_head.weight" in carried and not [n for n in carried if ".layers." in n]
    assert len(calls) == 2 and _held(model) == before


def test_they_come_back_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh_model("short")
    before = _held(model)
    monkeypatch.setattr(model.model.norm, "forward", lambda x: x.nonsense)
    with pytest.raises(CaptureError, match="nonsense"):
        export_around(model, find_layers(model)[1])
    assert _held(model) == before
