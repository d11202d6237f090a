"""Tensors of a layer that are neither parameters nor buffers: they are cut, followed, saved and verified like those."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helix_compile import CaptureError, HelixModule, RuntimeFault, helix_compile, verify
from tests.support.driver import prompt_deviation as deviation
from tests.support.driver import random_ids
from tests.support.gqa_models import fresh_gqa

WIDTH = 36


class Scaled(nn.Module):
    """An MLP whose result is multiplied by a constant of some kind."""

    def __init__(self, inner: nn.Module, kind: str, value: float = 1.5):
        super().__init__()
        self.inner, self.kind, self.value = inner, kind, value
        self.wide = torch.full((WIDTH,), value, dtype=torch.float64)
        self.scalar = torch.tensor(value, dtype=torch.float64)
        self.listed = [torch.full((WIDTH,), value, dtype=torch.float64)]

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        match self.kind:
            case "torch.tensor":
                return y * torch.tensor([self.value] * WIDTH, dtype=y.dtype)
            case "new_tensor":
                return y * y.new_tensor(self.value)
            case "where":
                return torch.where(y > 0, torch.tensor(0.0, dtype=y.dtype), y)
            case "permuted":
                return y[..., torch.tensor([*range(1, WIDTH), 0])]
            case "attribute":
                return y * self.wide
            case "scalar attribute":
                return y * self.scalar
            case "listed":
                return y * self.listed[0]
        raise AssertionError(self.kind)


def model_of(kind: str, values: tuple[float, float] = (1.5, 1.5)) -> Any:
    model = fresh_gqa("llama", num_hidden_layers=2)
    for layer, value in zip(model.model.layers, values, strict=True):
        layer.mlp = Scaled(layer.mlp, kind, value)
    return model.eval()


def compiled_of(model: Any) -> HelixModule:
    return helix_compile(model, cp=2, tpa=1, tokens_per_block=4, max_seq_len=32)


@pytest.mark.parametrize(
    "kind",
    [
        "torch.tensor",
        "permuted",
        "attribute",
        "listed",
        pytest.param("new_tensor", marks=pytest.mark.slow),
        pytest.param("where", marks=pytest.mark.slow),
        pytest.param("scalar attribute", marks=pytest.mark.slow),
    ],
)
def test_a_constant_is_exact_in_layers_that_share_a_body_and_in_those_that_do_not(kind: str) -> None:
    for values in ((1.5, 1.5), (1.5, 2.5)):
        model = model_of(kind, values)
        assert deviation(model, compiled_of(model)) <= 1e-10


@pytest.mark.parametrize("kind", ["attribute", "listed"])
def test_an_edit_in_place_of_one_layers_constant_is_followed(kind: str) -> None:
    """The layers' constants are equal at birth: their bodies may be one, their constants are two."""
    model = model_of(kind)
    compiled = compiled_of(model)
    assert deviation(model, compiled) <= 1e-10
    second = model.model.layers[1].mlp
    (second.wide if kind == "attribute" else second.listed[0]).mul_(2.0)
    assert deviation(model, compiled) <= 1e-10


def test_a_replaced_attribute_is_told() -> None:
    model = model_of("attribute")
    compiled = compiled_of(model)
    model.model.layers[1].mlp.wide = torch.ones(WIDTH, dtype=torch.float64)
    with pytest.raises(RuntimeFault, match=r"model\.layers\.1\.mlp\.wide was replaced"):
        compiled(random_ids(model, 1, 3))


@pytest.mark.parametrize("kind", ["torch.tensor", "attribute"])
def test_constants_are_saved_and_verified(kind: str, tmp_path: Path) -> None:
    model = model_of(kind)
    compiled = compiled_of(model)
    report = verify(compiled, model)
    assert report.ok, report
    compiled.save(tmp_path / "saved")
    ids = random_ids(model, 2, 9)
    assert torch.equal(HelixModule.load(tmp_path / "saved")(ids), compiled(ids))


def test_a_constant_around_the_layers_is_exact() -> None:
    model = model_of("attribute")
    model.model.norm = Scaled(model.model.norm, "torch.tensor", 0.75).eval()
    assert deviation(model, compiled_of(model)) <= 1e-10


def test_a_model_on_meta_is_planned_with_its_constants() -> None:
    """And never run. Of a folder, whose weights are read, they are refused: tests/whole/test_longrope.py."""
    model = model_of("attribute")
    for layer in model.model.layers:
        layer.mlp.wide = layer.mlp.wide.to("meta")
    with pytest.raises(RuntimeFault, match="on the meta device: it can be inspected, not run"):
        compiled_of(model.to("meta"))(torch.zeros(1, 1, dtype=torch.int64))


@pytest.mark.parametrize("on", [True, False])
def test_dropout_that_is_on_is_refused(on: bool) -> None:
    class Noisy(nn.Module):
        def __init__(self, inner: nn.Module):
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(self.inner(x), 0.5, training=on)

    model = fresh_gqa("llama", num_hidden_layers=1)
    model.model.layers[0].mlp = Noisy(model.model.layers[0].mlp).eval()
    if on:
        with pytest.raises(CaptureError, match=r"is random .*dropout that is on"):
            compiled_of(model)
    else:
        assert deviation(model, compiled_of(model)) <= 1e-10


def test_dropout_in_the_attention_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh_gqa("llama", num_hidden_layers=1)
    attend = nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        nn.functional, "scaled_dot_product_attention", lambda *a, **k: attend(*a, **{**k, "dropout_p": 0.1})
    )
    with pytest.raises(CaptureError, match=r"is random \(aten.scaled_dot_product_attention"):
        compiled_of(model)
