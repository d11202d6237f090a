"""A long prompt is cut into chunks only where every token is shown to be treated alone; else it runs whole, and is exact."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helix_compile import HelixModule, RuntimeFault, helix_compile
from helix_compile.ir.tokens import mixing_node
from helix_compile.runtime import step
from tests.support.driver import random_ids
from tests.support.gqa_models import fresh_gqa
from tests.support.models import tiny_model


class Behind(nn.Module):
    """An FFN, and something behind it."""

    def __init__(self, ffn: nn.Module, change: Callable[[Tensor], Tensor]):
        super().__init__()
        self.ffn, self.change = ffn, change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self.ffn(x))


MIXING: dict[str, Callable[[Tensor], Tensor]] = {
    "running sum": lambda x: x + 0.3 * x.cumsum(1),
    "mean over tokens": lambda x: x - x.mean(1, keepdim=True),
    "shift": lambda x: x + F.pad(x, (0, 0, 1, 0))[:, :-1],
    "first token": lambda x: x + x[:, :1],
    "number in the call": lambda x: x + 0.1 * torch.arange(x.shape[1], dtype=x.dtype)[:, None],
    "by the size of the call": lambda x: x / x.shape[1],
    "something before the first": lambda x: x + torch.cat([x.new_ones(x.shape[0], 1, x.shape[2]), x], 1)[:, :-1],
    "sort": lambda x: x.sort(1)[0],
    "roll": lambda x: x.roll(1, 1),
    "convolution": lambda x: F.conv1d(
        x.transpose(1, 2), x.new_ones(x.shape[2], 1, 3), padding=1, groups=x.shape[2]
    ).transpose(1, 2),
}
ALONE: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda x: x,
    "norm of a token": lambda x: F.layer_norm(x, x.shape[-1:]),
    "softmax over channels": lambda x: x * x.softmax(-1),
    "top channels": lambda x: x * x.topk(3, -1)[0].sum(-1, keepdim=True),
    "halves of channels": lambda x: torch.cat([x[..., 1:], x[..., :1]], -1),
    "flattened": lambda x: x.reshape(-1, x.shape[-1]).mul(2.0).reshape(x.shape),
}


class Branching(nn.Module):
    """A part that no graph can hold, whose result hangs on the call's other tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.3 * x.cumsum(1) if bool(x.abs().sum() >= 0) else x


@pytest.mark.fresh_capture
def test_a_part_that_stays_the_users_own_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh_gqa("llama", num_hidden_layers=1)
    model.model.layers[0].mlp = nn.Sequential(model.model.layers[0].mlp, Branching()).eval()
    compiled = helix_compile(model, cp=2, tokens_per_block=4, max_seq_len=64)
    assert compiled.plan.leaves and mixing_node(compiled.graph) is not None
    monkeypatch.setattr(step, "MAX_CHUNK", 4)
    ids = random_ids(model, 2, 11)
    with torch.no_grad():
        expected = model(ids).logits
    assert (compiled(ids) - expected).abs().max() <= 1e-10 * expected.abs().max()


def changed(change: Callable[[Tensor], Tensor]) -> Any:
    model = fresh_gqa("llama", num_hidden_layers=1)
    model.model.layers[0].mlp = Behind(model.model.layers[0].mlp, change).eval()
    return model


def runs(compiled: HelixModule) -> list[int]:
    """Appended to: the tokens of each run of the graph."""
    seen: list[int] = []
    run = compiled.world.run

    def counted(graph: Any, inputs: Any, *rest: Any) -> Any:
        seen.append(
            next(t.shape[1] for t in inputs[0] if isinstance(t, Tensor) and t.dim() == 2 and t.dtype == torch.int64)
        )
        return run(graph, inputs, *rest)

    object.__setattr__(compiled.world, "run", counted)
    return seen


IN_CI = (
    "running sum",
    "number in the call",
    "by the size of the call",
    "first token",
    "nothing",
    "norm of a token",
    "flattened",
)
CASES = [n if n in IN_CI else pytest.param(n, marks=pytest.mark.slow) for n in (*MIXING, *ALONE)]


@pytest.mark.fresh_capture
@pytest.mark.parametrize("name", CASES)
def test_a_long_prompt_is_what_the_model_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("helix_compile.runtime.step.MAX_CHUNK", 4)
    model = changed({**MIXING, **ALONE}[name])
    compiled = helix_compile(model, cp=2, tokens_per_block=2, max_seq_len=64)
    seen, ids = runs(compiled), random_ids(model, 2, 11)
    with torch.no_grad():
        expected = model(ids).logits
    assert (compiled(ids) - expected).abs().max() <= 1e-7 * expected.abs().max()  # the model's float32 islands
    assert seen == ([11] if name in MIXING else [4, 4, 3])


@pytest.mark.fresh_capture
def test_experts_of_a_fixed_capacity(monkeypatch: pytest.MonkeyPatch) -> None:
    """How many tokens an expert takes depends on all tokens of the call."""
    monkeypatch.setattr("helix_compile.runtime.step.MAX_CHUNK", 4)
    model = fresh_gqa("mixtral", num_hidden_layers=1)
    gate = model.model.layers[0].mlp.gate
    inner = gate.forward

    def capacity(self: Any, x: Tensor) -> Any:
        logits, weights, ids = inner(x)
        count = F.one_hot(ids, 8).sum(1).cumsum(0)
        return logits, weights * (count.gather(1, ids) <= 3).to(weights.dtype), ids

    gate.forward = types.MethodType(capacity, gate)
    compiled = helix_compile(model, cp=2, tokens_per_block=2, max_seq_len=64)
    node = mixing_node(compiled.graph)
    assert node is not None and "cumsum" in str(node.target)
    ids = random_ids(model, 1, 11)
    with torch.no_grad():
        expected = model(ids).logits
    assert (compiled(ids) - expected).abs().max() <= 1e-7 * expected.abs().max()


@pytest.mark.parametrize("options", [{"cp": 4}, {"cp": 2, "tpa": 2, "merge": "ag_rs", "q_proj": "gather"}], ids=str)
def test_the_usual_models_are_cut(options: dict[str, Any]) -> None:
    assert mixing_node(helix_compile(tiny_model(), max_seq_len=64, **options).graph) is None


MADE: dict[str, Callable[[Tensor], Tensor]] = {
    "padded to T": lambda x: x + F.pad(x.new_ones(1, x.shape[2]), (0, 0, 0, x.shape[1] - 1)),
    "as many as T": lambda x: x + torch.eye(x.shape[1], x.shape[2], dtype=x.dtype),
}


@pytest.mark.parametrize("name", MADE)
def test_a_dim_of_tokens_made_out_of_nothing_is_not_alone(name: str) -> None:
    compiled = helix_compile(changed(MADE[name]), cp=2, tokens_per_block=2, max_seq_len=64)
    assert mixing_node(compiled.graph) is not None


def test_padding_is_refused_where_it_would_be_mixed_in() -> None:
    compiled = helix_compile(changed(MIXING["mean over tokens"]), cp=2, tokens_per_block=2, max_seq_len=64)
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    with pytest.raises(RuntimeFault, match=r"`mean.*padding"):
        compiled(torch.ones(2, 3, dtype=torch.int64), mask)
    assert compiled.lengths.tolist() == []
    compiled(torch.ones(2, 3, dtype=torch.int64))
