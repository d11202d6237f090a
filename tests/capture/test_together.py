"""Python numbers that one layer, or one step, leaves for another: seen in steps of the whole model, or they do no harm."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers.models.llama.modeling_llama as modeling_llama
from torch import Tensor, nn

from helix_compile import CaptureError, helix_compile
from helix_compile.capture.model import capture
from tests.support.driver import worst_deviation
from tests.support.gqa_models import fresh_gqa

pytestmark = pytest.mark.fresh_capture
Leave = Callable[[int, Tensor], float]  # number of a layer, what reaches its MLP -> what the result is multiplied by
SHARED = SimpleNamespace(scale=1.0, length=7, registry={"calls": 0}, memo={}, steps=0)


@pytest.fixture(autouse=True)
def as_at_first() -> None:
    vars(SHARED).update(scale=1.0, length=7, registry={"calls": 0}, memo={}, steps=0)


class Scaled(nn.Module):
    """An MLP whose result is multiplied by a number."""

    def __init__(self, inner: nn.Module, number: int, factor: Leave):
        super().__init__()
        self.inner, self.number, self.factor = inner, number, factor

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.factor(self.number, x)


def model_that(factor: Leave, layers: int = 3) -> Any:
    model: Any = fresh_gqa("llama", num_hidden_layers=layers)
    for number, layer in enumerate(model.model.layers):
        layer.mlp = Scaled(layer.mlp, number, factor).eval()
    return model


def from_size(number: int, x: Tensor) -> float:
    if number == 0:
        SHARED.scale = x.shape[1] * 0.1
        return 1.0
    return SHARED.scale


def without_a_size(number: int, x: Tensor) -> float:
    """Each layer alone is one function at all sizes."""
    before, SHARED.scale = SHARED.scale, 0.5 + number
    return before


def by_count(number: int, x: Tensor) -> float:
    SHARED.registry["calls"] += 1
    return 1.0 + 0.01 * SHARED.registry["calls"]


def of_the_step_before(number: int, x: Tensor) -> float:
    if number == 2:
        SHARED.length = x.shape[0]
    return 1.0 + 0.1 * SHARED.length if number == 0 else 1.0


def growing_to_a_limit(number: int, x: Tensor) -> float:
    """From the third step on nothing changes any more."""
    SHARED.steps = min(SHARED.steps + (number == 0), 3)
    return float(SHARED.steps)


REFUSED = {
    "a number of a size": (
        from_size,
        r"layer 1 .*test_together.py:\d+: `aten::mul.Tensor` is given 52.1\S* there, 0.30",
    ),
    "of an attribute": (without_a_size, r"layer 0 .*is given 2.5 there, 0.5 by itself"),
    "a counter": (by_count, r"layer 0 .*is given 1.\d+ there, 1.\d+"),
    "of the step before": (of_the_step_before, r"layer 0 .*is given \d.\d+ there, \d.\d+"),
    "of the first steps": (growing_to_a_limit, r"layer 0 .*is given 2.0 there, 3.0"),
}


@pytest.mark.parametrize(
    ("name", "meta"), [*((name, False) for name in REFUSED), ("a number of a size", True), ("a counter", True)]
)
def test_a_number_that_is_left_is_refused_with_both_numbers(name: str, meta: bool) -> None:
    factor, said = REFUSED[name]
    model = model_that(factor)
    with pytest.raises(CaptureError, match=said):
        capture(model.to("meta") if meta else model)


def test_a_number_in_a_module_that_counts_its_calls() -> None:
    model = model_that(lambda number, x: 1.0)

    class Counting(Scaled):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x) * self.calls

    model.model.layers[1].mlp.__class__ = Counting
    with pytest.raises(CaptureError, match=r"layer 1 .*`aten::mul.Tensor` is given 4 there, 5 by itself"):
        capture(model)


@pytest.mark.parametrize(
    "read_by", ["lm_head", *(pytest.param(x, marks=pytest.mark.slow) for x in ("model.norm", "model.embed_tokens"))]
)
def test_a_number_that_is_left_for_what_is_around_the_layers(read_by: str) -> None:
    def leaves(number: int, x: Tensor) -> float:
        SHARED.scale = 1.0 + x.shape[1]
        return 1.0

    model = model_that(leaves, layers=1)
    model.get_submodule(read_by).register_forward_hook(lambda module, args, out: out * SHARED.scale)
    with pytest.raises(CaptureError, match=r"what is around the layers of LlamaForCausalLM computes something else"):
        capture(model)


def test_a_number_of_the_model_around_the_layers() -> None:
    model = model_that(lambda number, x: 1.0 + SHARED.steps)

    def counts(module: nn.Module, args: Any, kwargs: Any) -> None:
        SHARED.steps += 1

    model.register_forward_pre_hook(counts, with_kwargs=True)
    with pytest.raises(CaptureError, match=r"layer 0 .*is given 1\d.0 there, 1\d.0 by itself"):
        capture(model)


@pytest.mark.parametrize("of", ["T", "S"])
def test_a_number_that_layers_are_called_with(of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    of_layer, of_model = modeling_llama.LlamaDecoderLayer.forward, modeling_llama.LlamaModel.forward

    def layer(self: Any, *args: Any, factor: float = 1.0, **kwargs: Any) -> Tensor:
        return of_layer(self, *args, **kwargs) * factor

    def whole(self: Any, input_ids: Tensor, **kwargs: Any) -> Any:
        special = input_ids.shape[1] == 1 if of == "T" else kwargs["past_key_values"].get_seq_length() == 0
        return of_model(self, input_ids=input_ids, factor=0.5 if special else 1.0, **kwargs)

    monkeypatch.setattr(modeling_llama.LlamaDecoderLayer, "forward", layer)
    monkeypatch.setattr(modeling_llama.LlamaModel, "forward", whole)
    with pytest.raises(
        CaptureError, match=r"layer 0 \(LlamaDecoderLayer\) is called with 0.5 in a step .* and with 1.0 at B=2, T=3"
    ):
        capture(fresh_gqa("llama"))


def test_beside_a_part_that_no_graph_holds() -> None:
    model = model_that(lambda number, x: 1.0, layers=2)

    class OnData(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2.0 if bool(x.abs().sum() >= 0) else x

    class Around(Scaled):
        def __init__(self, inner: nn.Module, number: int, factor: Leave):
            super().__init__(inner, number, factor)
            self.part = OnData()

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.part(x))

    for number, layer in enumerate(model.model.layers):
        layer.mlp = Around(layer.mlp, number, from_size).eval()
    with pytest.raises(CaptureError, match=r"layer 1 .*is given 52.1\S* there, "):
        capture(model)


def remembered(number: int, x: Tensor) -> float:
    return SHARED.memo.setdefault(x.shape[-1], x.shape[-1] ** -0.25)


def counted_in_vain(number: int, x: Tensor) -> float:
    SHARED.registry["calls"] += 1
    SHARED.length = x.shape[1]
    return 1.0


def always_the_same(number: int, x: Tensor) -> float:
    if number == 0:
        SHARED.scale = 0.5
    return SHARED.scale


def all_of_them(number: int, x: Tensor) -> float:
    return remembered(number, x) * counted_in_vain(number, x) * always_the_same(number, x)


@pytest.mark.parametrize(
    "factor",
    [all_of_them, *(pytest.param(x, marks=pytest.mark.slow) for x in (remembered, counted_in_vain, always_the_same))],
)
def test_what_does_no_harm_is_exact(factor: Leave) -> None:
    model = model_that(factor)
    compiled = helix_compile(model, cp=2, max_seq_len=64, max_batch_size=3, tokens_per_block=2)
    assert len(compiled.plan.bodies) == 1 and not any("not compared" in note for note in compiled.plan.notes)
    assert worst_deviation(model, compiled, [6, 1, 9]) <= 1e-10


def test_a_table_that_is_made_at_the_first_call_is_no_number() -> None:
    model = model_that(lambda number, x: 1.0)

    class Lazy(Scaled):
        table: Tensor | None = None
        width = 0

        def forward(self, x: Tensor) -> Tensor:
            if self.table is None or self.width < x.shape[-1]:
                self.table, self.width = (
                    torch.linspace(1.0, 2.0, x.shape[-1], dtype=x.dtype, device=x.device),
                    x.shape[-1],
                )
            return super().forward(x) * self.table

    for layer in model.model.layers:
        layer.mlp.__class__ = Lazy
    compiled = helix_compile(model, cp=2, max_seq_len=64, max_batch_size=3, tokens_per_block=2)
    assert not [note for note in compiled.plan.notes if "not compared" in note]
    assert worst_deviation(model, compiled, [6, 1, 9]) <= 1e-10
