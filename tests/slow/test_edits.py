"""A model that is edited at random is never silently wrong: what is computed is what it computes now, or an error says why not."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helix_compile import HelixError, HelixModule, helix_compile
from helix_compile.verifier.numeric.reference import WidenedIslands
from tests.support.driver import random_ids
from tests.support.families import fresh_family
from tests.support.gqa_models import fresh_gqa

pytestmark = [pytest.mark.slow, pytest.mark.fresh_capture]
LIMIT = 1e-10
# 2,000 in all, by what a case costs: a step 0.03 CPU seconds, a compile of one small layer 2.5
STEP_CASES, COMPILE_CASES, PARTS = 1700, 300, 5


class Box:
    """An object with a number that a layer reads."""

    def __init__(self) -> None:
        self.factor = 1.0


class Act(nn.Module):
    """An activation that hangs on an attribute, an object, a list and a global."""

    def __init__(self, box: Box):
        super().__init__()
        self.box, self.shift, self.wide, self.listed = box, 0.0, torch.ones(1, dtype=torch.float64), [torch.ones(1)]

    def forward(self, x: Tensor) -> Tensor:
        scaled = nn.functional.silu(x * self.box.factor) * GLOBAL["factor"] + self.shift
        return scaled * self.wide * self.listed[0].to(x.dtype)


GLOBAL = {"factor": 1.0}


def llama(layers: int) -> Any:
    model = fresh_gqa("llama", num_hidden_layers=layers)
    box = Box()
    for layer in model.model.layers:
        layer.mlp.act_fn = Act(box)
    return model.eval()


def weights(model: Any) -> list[nn.Parameter]:
    return list(model.parameters())


Edit = Callable[[Any, random.Random], None]


def scale(model: Any, rng: random.Random) -> None:
    with torch.no_grad():
        rng.choice(weights(model)).mul_(rng.uniform(0.5, 1.5))


def add_through_data(model: Any, rng: random.Random) -> None:
    p = rng.choice(weights(model))
    p.data += 0.01 * torch.randn_like(p)


def one_element(model: Any, rng: random.Random) -> None:
    rng.choice(weights(model)).data.view(-1)[-1] += 0.1


def other_storage(model: Any, rng: random.Random) -> None:
    p = rng.choice(weights(model))
    p.data = p.data.clone() * 0.9


def state_dict(model: Any, rng: random.Random) -> None:
    factor = rng.uniform(0.8, 1.2)
    model.load_state_dict({k: v * factor for k, v in model.state_dict().items()})


def assigned_state_dict(model: Any, rng: random.Random) -> None:
    factor = rng.uniform(0.8, 1.2)
    model.load_state_dict({k: v * factor for k, v in model.state_dict().items()}, assign=True)


def other_parameter(model: Any, rng: random.Random) -> None:
    norm = rng.choice(model.model.layers).input_layernorm
    norm.weight = nn.Parameter(norm.weight.detach() * rng.uniform(0.5, 1.5))


def other_module(model: Any, rng: random.Random) -> None:
    mlp = rng.choice(model.model.layers).mlp
    up = mlp.up_proj
    mlp.up_proj = nn.Linear(up.in_features, up.out_features, bias=False, dtype=torch.float64).eval()


def hook(model: Any, rng: random.Random) -> None:
    factor = rng.uniform(0.5, 1.5)
    rng.choice(model.model.layers).mlp.register_forward_hook(lambda module, given, out: out * factor)


def attribute_in_place(model: Any, rng: random.Random) -> None:
    act = getattr(rng.choice(model.model.layers).mlp, "act_fn", None)
    if isinstance(act, Act):
        rng.choice([act.wide, act.listed[0]]).mul_(rng.uniform(0.5, 1.5))


def other_attribute(model: Any, rng: random.Random) -> None:
    act = getattr(rng.choice(model.model.layers).mlp, "act_fn", None)
    if isinstance(act, Act):
        act.wide = act.wide * rng.uniform(0.5, 1.5)


FOLLOWED: list[Edit] = [scale, scale, add_through_data, one_element, attribute_in_place, state_dict]
REFUSED: list[Edit] = [other_storage, assigned_state_dict, other_parameter, other_module, hook, other_attribute]


def box(model: Any, rng: random.Random) -> None:
    model.model.layers[0].mlp.act_fn.box.factor = rng.uniform(0.5, 1.5)


def number(model: Any, rng: random.Random) -> None:
    rng.choice(model.model.layers).mlp.act_fn.shift = rng.uniform(-0.1, 0.1)


def global_number(model: Any, rng: random.Random) -> None:
    GLOBAL["factor"] = rng.uniform(0.5, 1.5)


def epsilon(model: Any, rng: random.Random) -> None:
    rng.choice(model.model.layers).input_layernorm.variance_epsilon = rng.uniform(1e-3, 1e-1)


BETWEEN_COMPILES: list[Edit] = [*FOLLOWED, *REFUSED, box, number, global_number, epsilon]


def deviation(model: Any, compiled: HelixModule) -> float:
    ids = random_ids(model, 2, 5)
    compiled.reset()
    with WidenedIslands(), torch.no_grad():
        expected = model(input_ids=ids).logits
        got = compiled(ids)
    return float((got - expected).abs().max() / expected.abs().max())


MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: llama(2),
    "padded MLA": lambda: fresh_family("youtu", num_hidden_layers=1),  # its FFN width is padded, its W_UK gathered
}


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("kind", MODELS)
def test_between_compile_and_step(kind: str, part: int) -> None:
    rng, stale = random.Random(part), 0
    model: Any = None
    compiled: Any = None
    for case in range(STEP_CASES // len(MODELS) // PARTS):
        torch.manual_seed(1000 * part + case)
        if compiled is None:
            model = MODELS[kind]()
            compiled = helix_compile(model, cp=4, tokens_per_block=4, max_seq_len=32)
        edits = rng.choices(FOLLOWED, k=rng.randint(1, 3))
        if case % 40 == 39:  # each costs a compile
            edits.append(rng.choice(REFUSED))
        for edit in edits:
            edit(model, rng)
        try:
            assert deviation(model, compiled) <= LIMIT, (case, [e.__name__ for e in edits])
        except HelixError as error:
            assert "changed since compile" in str(error)
            stale, compiled = stale + 1, None
        if compiled is not None and not all(p.abs().max() < 50 for p in model.parameters()):
            compiled = None
    assert 0 < stale <= STEP_CASES // len(MODELS) // PARTS // 40


@pytest.mark.parametrize("part", range(PARTS))
def test_between_two_compiles(part: int) -> None:
    rng = random.Random(part)
    model = llama(1)
    GLOBAL["factor"] = 1.0
    for case in range(COMPILE_CASES // PARTS):
        torch.manual_seed(1000 * part + case)
        edits = rng.choices(BETWEEN_COMPILES, k=rng.randint(1, 3))
        for edit in edits:
            edit(model, rng)
        compiled = helix_compile(model, cp=2, tokens_per_block=4, max_seq_len=32)
        assert deviation(model, compiled) <= LIMIT, (case, [e.__name__ for e in edits])
