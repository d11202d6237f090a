"""Layers share a body only if they compute the same: each is run with its own number, and its whole dataflow compared."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

from helix_compile import helix_compile
from helix_compile.capture.body import probe_layer
from helix_compile.capture.layers import export_around
from tests.support.driver import worst_deviation
from tests.support.models import SIZES

LAYERS = 4
TABLE = [0.5, 1.0, 2.0, 3.0]
Change = Callable[[Tensor, int], Tensor]
# change of the attention's output by the layer's number -> layers that compute the same
BY_NUMBER: dict[str, tuple[Change, list[list[int]]]] = {
    "nothing": (lambda x, i: x, [[0, 1, 2, 3]]),
    "equals": (lambda x, i: x * 0.5 if i == 3 else x, [[0, 1, 2], [3]]),
    "less": (lambda x, i: x * 0.5 if i < 2 else x, [[0, 1], [2, 3]]),
    "odd": (lambda x, i: x * 0.5 if i % 2 else x, [[0, 2], [1, 3]]),
    "one of": (lambda x, i: x * 0.5 if i in (1, 3) else x, [[0, 2], [1, 3]]),
    "key": (lambda x, i: x * {1: 0.5, 3: 0.25}.get(i, 1.0), [[0, 2], [1], [3]]),
    "place in a list": (lambda x, i: x * TABLE[i], [[0], [1], [2], [3]]),
    "smaller of two": (lambda x, i: x * min(i, 2), [[0], [1], [2, 3]]),
    "text": (lambda x, i: x * (0.5 if f"{i}" == "3" else 1.0), [[0, 1, 2], [3]]),
    "type": (lambda x, i: x * 0.5 if type(i) is int and i > 2 else x, [[0, 1, 2], [3]]),
    "greatest common divisor, by C": (lambda x, i: x * (2.0 if math.gcd(i, 4) == 2 else 1.0), [[0, 1, 3], [2]]),
    "the middle third": (lambda x, i: x * 2 if 0.25 < 1.0 * i / LAYERS < 0.75 else x, [[0, 1, 3], [2]]),
    "root, by C": (lambda x, i: x * math.sqrt(i), [[0], [1], [2], [3]]),
    "factor, by torch": (lambda x, i: x * i, [[0], [1], [2], [3]]),
    "number of a tensor": (lambda x, i: x + torch.full((), i, dtype=x.dtype), [[0], [1], [2], [3]]),
    "a tensor made of it": (lambda x, i: x * torch.tensor(float(i)), [[0], [1], [2], [3]]),
    "an array made of it": (lambda x, i: x * torch.from_numpy(np.full(1, i)), [[0], [1], [2], [3]]),
    "roll": (lambda x, i: x.roll(i, -1), [[0], [1], [2], [3]]),
    # the same ops in the same order, wired otherwise
    "other wiring": (lambda x, i: _wired(x, i == 2), [[0, 1, 3], [2]]),
}


def _wired(x: Tensor, other: bool) -> Tensor:
    y = x * 2.0
    return y - x if other else x - y


def model_with(change: Change) -> Any:
    """Dense layers; `change(attention output, number of the layer)`."""

    class Changed(DeepseekV3Attention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out, weights = super().forward(*args, **kwargs)
            return change(out, self.layer_idx), weights

    config = DeepseekV3Config(**{**SIZES, "num_hidden_layers": LAYERS, "first_k_dense_replace": LAYERS})
    torch.manual_seed(0)
    model: Any = DeepseekV3ForCausalLM(config).double().eval()
    for layer in model.model.layers:
        layer.self_attn.__class__ = Changed
    return model


@cache
def usual_calls() -> Any:
    """How the layers of such a model are called."""
    model = model_with(lambda x, i: x)
    return export_around(model, model.model.layers)[2]


def groups(model: Any) -> list[list[int]]:
    """Numbers of the layers by signature."""
    found: dict[str, list[int]] = {}
    for i, layer in enumerate(model.model.layers):
        found.setdefault(probe_layer(layer, usual_calls()[i], model.config)[0], []).append(i)
    return list(found.values())


@pytest.mark.parametrize("name", BY_NUMBER)
def test_layers_that_compute_the_same_have_one_signature_and_no_others(name: str) -> None:
    change, expected = BY_NUMBER[name]
    assert groups(model_with(change)) == expected


@pytest.mark.fresh_capture
@pytest.mark.parametrize(
    "name",
    [
        "greatest common divisor, by C",
        pytest.param("the middle third", marks=pytest.mark.slow),
        pytest.param("other wiring", marks=pytest.mark.slow),
    ],
)
def test_a_model_whose_layers_ask_computes_the_same(name: str) -> None:
    model = model_with(BY_NUMBER[name][0])
    compiled = helix_compile(model, cp=2, max_seq_len=64, max_batch_size=3, tokens_per_block=2)
    assert [list(b.layers) for b in compiled.plan.bodies] == BY_NUMBER[name][1]
    assert worst_deviation(model, compiled, [6, 1, 9]) <= 1e-10


def other_epsilon(layer: Any) -> None:
    layer.input_layernorm.variance_epsilon = 1e-2


def hook(layer: Any) -> None:
    layer.mlp.register_forward_hook(lambda module, args, out: out * 0.5)


def patched(layer: Any) -> None:
    inner = layer.mlp.forward
    layer.mlp.forward = lambda x: inner(x) * 0.5


def other_type(layer: Any) -> None:
    layer.mlp.act_fn = torch.nn.GELU()


def cached_otherwise(layer: Any) -> None:
    """What is computed stays, what is cached does not."""
    inner = layer.self_attn.kv_a_layernorm.forward
    layer.self_attn.kv_a_layernorm.forward = lambda x: inner(x).flip(-1).flip(-1).flip(-1)


@pytest.mark.parametrize("edit", [other_epsilon, hook, patched, other_type, cached_otherwise])
def test_a_layer_that_is_its_own_has_its_own_signature(edit: Callable[[Any], None]) -> None:
    model = model_with(lambda x, i: x)
    edit(model.model.layers[2])
    assert groups(model) == [[0, 1, 3], [2]]
