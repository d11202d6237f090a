"""The export around the layers carries none of their weights, and gives them back."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor, nn

from helix_compile.capture.layers import export_around, find_layers
from helix_compile.errors import CaptureError
from tests.support.models import fresh_model


def _held(model: nn.Module) -> dict[str, int]:
    named = (*model.named_parameters(), *model.named_buffers())
    return {name: id(tensor) for name, tensor in named}


def test_the_layers_weights_stay_out_and_come_back() -> None:
    model = fresh_model("short")
    before = _held(model)
    program, _, calls, _ = export_around(model, find_layers(model)[1])
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


@pytest.mark.parametrize("returned", [Tensor, tuple])
@pytest.mark.parametrize("annotation", [Tensor, tuple])
def test_a_layers_annotation_may_be_wrong(annotation: type, returned: type) -> None:
    """Glm4's and Gemma3's say a tuple and return a tensor; the other way round rows of the batch would be lost."""
    model = fresh_model("short")
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1

    class Layer(type(model.model.layers[0])):  # type: ignore[misc] # the class is only known now
        def forward(self, hidden_states: Tensor, past_key_values: Any = None, **kwargs: Any) -> Any:
            out = super().forward(hidden_states, past_key_values=past_key_values, **kwargs)
            return (out,) if returned is tuple else out

    Layer.forward.__annotations__["return"] = annotation
    model.model.layers[0].__class__ = Layer
    norm = model.model.norm
    if returned is tuple:
        whole = norm.forward
        norm.forward = lambda out: whole(out[0])
    program, _, calls, _ = export_around(model, find_layers(model)[1])
    logits = program.graph_signature.user_outputs[0]
    (value,) = (n.meta["val"] for n in program.graph.nodes if n.name == logits)
    assert value.dim() == 3 and len(calls) == 1
