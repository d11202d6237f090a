"""Guards of expert ids that a top-k can't need are taken out; any other clamp or mask stays."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from helix_compile.capture.choices import drop_idle_guards
from helix_compile.capture.layers import export_functional

SCORES = torch.zeros(5, 8)


def targets(function: Callable[[Tensor], Tensor]) -> list[str]:
    class Of(nn.Module):
        def forward(self, scores: Tensor) -> Tensor:
            return function(scores)

    graph: fx.Graph = export_functional(Of(), (SCORES,), None)[0].graph
    drop_idle_guards(graph)
    graph.eliminate_dead_code()
    return [str(n.target) for n in graph.nodes if n.op == "call_function"]


def clamped(low: int, high: int) -> Callable[[Tensor], Tensor]:
    return lambda scores: scores.topk(3)[1].reshape(-1).clamp(low, high) * 2


def masked(limit: int) -> Callable[[Tensor], Tensor]:
    def function(scores: Tensor) -> Tensor:
        ids, order = scores.topk(3)[1].reshape(-1).sort()
        return order.masked_fill((ids >= limit).unsqueeze(-1).squeeze(-1), 0) * 2

    return function


@pytest.mark.parametrize("function", [clamped(0, 7), clamped(-1, 9), masked(8)])
def test_what_can_not_happen_is_not_guarded(function: Callable[[Tensor], Tensor]) -> None:
    left = targets(function)
    assert not [t for t in left if "clamp" in t or "masked_fill" in t or "ge.Scalar" in t]


@pytest.mark.parametrize(
    ("function", "kept"),
    [
        (clamped(0, 6), "clamp"),
        (clamped(1, 7), "clamp"),
        (masked(7), "masked_fill"),
        (lambda scores: scores.sum(-1).long().clamp(0, 7), "clamp"),
        (lambda scores: (scores.topk(3)[1] + 1).clamp(0, 7), "clamp"),
    ],
)
def test_what_can_happen_stays(function: Callable[[Tensor], Tensor], kept: str) -> None:
    assert [t for t in targets(function) if kept in t]
