"""Two modules run the same code if nothing but the values of their tensors differs; what can't be told is not the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helix_compile import capture
from helix_compile.capture.structure import alike_but_values
from helix_compile.ir.graph import input_ref, placeholders
from tests.support.gqa_models import fresh_gqa

SHARED = object()


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(5, 7), nn.ReLU())
        self.register_buffer("table", torch.ones(3))
        self.number, self.names, self.object = 1, ["a", ("b", 2.0)], SHARED

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.number


def other_values(part: Any) -> None:
    with torch.no_grad():
        part.inner[0].weight.add_(1.0)
    part.table = torch.zeros(3)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "number": lambda part: setattr(part, "number", 2),
    "type of a number": lambda part: setattr(part, "number", True),
    "item of a list": lambda part: part.names.__setitem__(1, ("b", 3.0)),
    "one attribute more": lambda part: setattr(part, "seen", None),
    "object": lambda part: setattr(part, "object", object()),
    "function": lambda part: setattr(part, "act", lambda x: x),
    "forward": lambda part: setattr(part, "forward", lambda x: x),
    "hook": lambda part: part.inner.register_forward_hook(lambda module, given, out: out * 2),
    "mode": lambda part: part.inner.train(),
    "child": lambda part: part.inner.__setitem__(1, nn.GELU()),
    "child that is none": lambda part: part.register_module("more", None),
    "child in a list": lambda part: setattr(part, "hidden", [nn.ReLU()]),
    "shape": lambda part: setattr(part, "table", torch.ones(4)),
    "dtype": lambda part: part.double(),
    "stride": lambda part: setattr(part.inner[0], "weight", nn.Parameter(torch.ones(5, 7).t())),
    "no bias": lambda part: setattr(part.inner[0], "bias", None),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_differs_but_values_is_seen(change: str) -> None:
    one, other = Part().eval(), Part().eval()
    other_values(other)
    assert alike_but_values(one, other)
    CHANGES[change](other)
    assert not alike_but_values(one, other) and not alike_but_values(other, one)


def test_captures_that_tests_share_know_the_dtype_of_a_buffer() -> None:
    """A loader leaves the rotary table in float32, `.to(bfloat16)` casts it: two graphs."""
    for dtype in (torch.float32, torch.bfloat16):
        model = fresh_gqa("llama", torch.bfloat16, num_hidden_layers=1)
        model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq.to(dtype)
        graph = capture(model).graph
        (table,) = [n for n in placeholders(graph.graph) if input_ref(n).name == "model.rotary_emb.inv_freq"]
        assert table.meta["val"].dtype is dtype
