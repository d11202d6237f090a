"""Equal layers are run once; a layer that asks for its own number, in whatever way, is run for itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

from helix_compile import helix_compile
from helix_compile.capture.body import probe_layer
from helix_compile.capture.captured import CapturedGraph
from helix_compile.capture.equal import EqualLayers, Watched, differing_numbers
from helix_compile.capture.layers import export_around
from helix_compile.capture.leaves import Probe
from helix_compile.capture.model import capture
from tests.support.driver import worst_deviation
from tests.support.models import SIZES

LAYERS = 4


def model_with(change: Callable[[Tensor, int], Tensor] | None = None) -> Any:
    """Dense layers; `change(attention output, number of the layer)`."""

    class Changed(DeepseekV3Attention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out, weights = super().forward(*args, **kwargs)
            return out if change is None else change(out, self.layer_idx), weights

    config = DeepseekV3Config(**{**SIZES, "num_hidden_layers": LAYERS, "first_k_dense_replace": LAYERS})
    torch.manual_seed(0)
    model: Any = DeepseekV3ForCausalLM(config).double().eval()
    for layer in model.model.layers:
        layer.self_attn.__class__ = Changed
    return model


def captured_runs(model: Any) -> tuple[CapturedGraph, int]:
    """A capture, and how many times a layer was run for it."""
    with patch("helix_compile.capture.leaves.probe_layer", side_effect=probe_layer) as run:
        return capture(model), run.call_count


def test_equal_layers_are_run_once_and_once_more_with_another_number() -> None:
    captured, runs = captured_runs(model_with())
    assert set(captured.bodies) == {"body_0"} and len(captured.layers) == LAYERS
    assert runs == 2


TABLE = [0.5, 1.0, 2.0, 3.0]
ASKING: dict[str, Callable[[Tensor, int], Tensor]] = {
    "equals": lambda x, i: x * 0.5 if i == 3 else x,
    "less": lambda x, i: x * 0.5 if i < 2 else x,
    "greater, from the right": lambda x, i: x * 0.5 if i > 2 else x,
    "odd": lambda x, i: x * 0.5 if i % 2 else x,
    "true": lambda x, i: x * 0.5 if i else x,
    "one of": lambda x, i: x * 0.5 if i in (1, 3) else x,
    "key": lambda x, i: x * {1: 0.5, 3: 0.25}.get(i, 1.0),
    "place in a list": lambda x, i: x * TABLE[i],
    "smaller of two": lambda x, i: x * min(i, 2),
    "text": lambda x, i: x * (0.5 if f"{i}" == "3" else 1.0),
    "root": lambda x, i: x / math.sqrt(i + 1),
    "root, by C": lambda x, i: x * math.sqrt(i),
    "factor, by torch": lambda x, i: x * i,
    "number of a tensor": lambda x, i: x + torch.full((), i, dtype=x.dtype),
    "bit": lambda x, i: x * 0.5 if i & 1 else x,
}


@cache
def usual() -> tuple[Any, Any]:
    """The unchanged model, and how its layers are called."""
    model = model_with()
    return model, export_around(model, model.model.layers)[1]


def found_equal(layers: Any) -> bool:
    """Whether layers 0 and 1 are held for equal without a run of layer 1."""
    model, calls = usual()
    equal = EqualLayers(lambda layer, call: probe_layer(layer, call, model.config)[0])
    equal.add(layers[0], calls[0], Probe(equal.signature_of(layers[0], calls[0]), []))
    return equal.find(layers[1], calls[1]) is not None


@pytest.mark.parametrize("name", ASKING)
def test_a_layer_that_asks_for_its_number_is_run_for_itself(name: str) -> None:
    assert found_equal(model_with().model.layers)
    assert not found_equal(model_with(ASKING[name]).model.layers)


def test_a_model_whose_layers_ask_computes_the_same() -> None:
    model = model_with(ASKING["odd"])
    compiled = helix_compile(model, cp=2, max_seq_len=64, max_batch_size=3, tokens_per_block=2)
    assert len(compiled.plan.bodies) == 2
    assert worst_deviation(model, compiled, [6, 1, 9]) <= 1e-10


def other_epsilon(layer: Any) -> None:
    layer.input_layernorm.variance_epsilon = 1e-2


def private_constant(layer: Any) -> None:
    layer.self_attn._gain = 2.0


def hook(layer: Any) -> None:
    layer.mlp.register_forward_hook(lambda module, args, out: out * 0.5)


def patched(layer: Any) -> None:
    inner = layer.mlp.forward
    layer.mlp.forward = lambda x: inner(x) * 0.5


def other_type(layer: Any) -> None:
    layer.mlp.act_fn = torch.nn.GELU()


def other_stride(layer: Any) -> None:
    weight = layer.self_attn.o_proj.weight
    layer.self_attn.o_proj.weight = torch.nn.Parameter(weight.detach().T.contiguous().T)


def unlike_objects(layer: Any) -> None:
    layer.self_attn.notes = object()


@pytest.mark.parametrize(
    "edit", [other_epsilon, private_constant, hook, patched, other_type, other_stride, unlike_objects]
)
def test_what_differs_in_more_than_numbers_is_run(edit: Callable[[Any], None]) -> None:
    layers = model_with().model.layers
    assert differing_numbers(layers[0], layers[2]) == {("self_attn", "layer_idx")}
    edit(layers[2])
    assert differing_numbers(layers[0], layers[2]) is None
    assert differing_numbers(layers[2], layers[0]) is None


def test_the_number_is_put_back() -> None:
    model = model_with(ASKING["place in a list"])  # its watched run raises
    assert not found_equal(model.model.layers)
    numbers = [layer.self_attn.layer_idx for layer in model.model.layers]
    assert numbers == list(range(LAYERS)) and not any(isinstance(n, Watched) for n in numbers)
