"""How the model calls its layers, and what stands around a layer's forward: captured as it is, or refused."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import transformers.models.llama.modeling_llama as modeling_llama
from torch import Tensor, nn
from transformers.integrations.moe import use_experts_implementation
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_torchdynamo_compiling

from helix_compile import CaptureError, helix_compile
from helix_compile.capture.layers import ConcatenatingCache
from helix_compile.ir.leaves import record_call
from tests.support.driver import prompt_deviation
from tests.support.families import fresh_family
from tests.support.gqa_models import fresh_gqa
from tests.support.models import fresh_model

pytestmark = pytest.mark.fresh_capture
SMALL: dict[str, Any] = {"max_seq_len": 64, "max_batch_size": 3, "tokens_per_block": 2}


def test_hooks_for_every_module_are_refused() -> None:
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: None)
    try:
        with pytest.raises(CaptureError, match=r"1 hook\(s\) for every module"):
            helix_compile(fresh_model("short"), cp=2)
    finally:
        handle.remove()


def test_a_call_of_its_own_around_a_forward_is_refused() -> None:
    model = fresh_model("short")
    layer = model.model.layers[0]

    class Doubled(type(layer)):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(*args, **kwargs) * 2

    layer.__class__ = Doubled
    with pytest.raises(CaptureError, match=r"`model\.layers\.0` \(Doubled\) has a __call__ of its own"):
        helix_compile(model, cp=2)


def test_a_layer_that_is_called_twice_is_refused() -> None:
    model = fresh_family("llama")
    stack = model.model.layers
    model.model.layers = Twice(stack)
    with pytest.raises(CaptureError, match="layer 0 is called a second time in one step"):
        helix_compile(model, cp=2)


class Twice(nn.ModuleList):
    """A list whose layers run twice over."""

    def __getitem__(self, index: Any) -> Any:
        return [*self, *self] if isinstance(index, slice) else super().__getitem__(index)


def test_arguments_of_one_name_are_told_apart() -> None:
    given = {"extra": (torch.ones(2), torch.zeros(2)), "extra_1": torch.ones(3)}
    names = record_call((torch.zeros(1, 2, 3),), given).names
    assert len(set(names)) == len(names) == 3


def test_what_a_forward_makes_at_its_first_call_does_not_stay() -> None:
    model = fresh_model("short")
    mlp = model.model.layers[0].mlp
    inner = mlp.forward

    def forward(x: Tensor) -> Tensor:
        if getattr(mlp, "scale", None) is None:
            mlp.scale = x.new_full((), 1.5)
        return inner(x) * 1.5

    mlp.forward = forward
    helix_compile(model, cp=2)
    assert "scale" not in vars(mlp)


def test_a_forward_with_fewer_logits_is_refused() -> None:
    model = fresh_model("short")
    head = model.lm_head.forward
    model.lm_head.forward = lambda hidden: head(hidden[:, -1:])
    with pytest.raises(CaptureError, match="gives logits of 1 column"):
        helix_compile(model, cp=2)


def test_the_length_after_an_update_is_the_new_one() -> None:
    config, past = fresh_model("short").config, torch.zeros(2, 1, 5, 4)
    cache = ConcatenatingCache(config, None, past)
    assert cache.get_seq_length(0) == 5
    cache.update(torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 3, 2), 0)
    assert cache.get_seq_length(0) == 8 and cache.get_seq_length(1) == 5


def test_experts_of_a_registered_function_are_refused() -> None:
    model = fresh_family("deepseek_v3")
    model.config._experts_implementation = "mine"
    with pytest.raises(CaptureError, match="the experts are computed by 'mine'"):
        helix_compile(model, cp=2)


@use_experts_implementation
class OwnExperts(nn.Module):
    """A user's own experts; what the eager form gives is `more` times what the other forms do."""

    def __init__(self, config: Any, inner: Any, more: float):
        super().__init__()
        self.num_experts, self.act_fn, self.more = inner.num_experts, inner.act_fn, more
        self.gate_up_proj, self.down_proj = inner.gate_up_proj, inner.down_proj

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            rows, k = (top_k_index == expert).nonzero(as_tuple=True)
            gate, up = nn.functional.linear(hidden_states[rows], self.gate_up_proj[expert]).chunk(2, -1)
            down = nn.functional.linear(self.act_fn(gate) * up, self.down_proj[expert])
            out.index_add_(0, rows, down * top_k_weights[rows, k, None])
        return out * self.more


@pytest.mark.parametrize(("more", "form"), [(1.0, "eager"), (1.25, "eager"), (1.25, "batched_mm")])
def test_experts_of_ones_own_compute_what_their_eager_form_does(more: float, form: str) -> None:
    model = fresh_gqa("mixtral", num_hidden_layers=1)
    block = model.model.layers[0].mlp
    block.experts = OwnExperts(model.config, block.experts, more).eval()
    model.set_experts_implementation(form)
    if more != 1.0 and form == "eager":
        with pytest.raises(CaptureError, match="in their own eager form something else than 'batched_mm' does"):
            helix_compile(model, cp=2, **SMALL)
    else:  # in its other forms transformers does not call the class's own forward
        assert prompt_deviation(model, helix_compile(model, cp=2, **SMALL)) <= 1e-7


class Asks(nn.Module):
    """A norm that asks whether it is compiled or exported."""

    def __init__(self, norm: nn.Module, asked: Any, factor: float = 1.5):
        super().__init__()
        self.norm, self.asked, self.factor = norm, asked, factor

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) * (self.factor if self.asked() else 1.0)


ASKED = {
    "compiling": lambda: torch.compiler.is_compiling(),
    "exporting": lambda: torch.compiler.is_exporting(),
    "dynamo": lambda: torch._dynamo.is_compiling(),
    "transformers": is_torchdynamo_compiling,
}


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("around", [True, False])
def test_the_graph_is_that_of_eager(asked: str, around: bool) -> None:
    model = fresh_gqa("llama", num_hidden_layers=1)
    owner = model.model if around else model.model.layers[0]
    name = "norm" if around else "input_layernorm"
    setattr(owner, name, Asks(getattr(owner, name), ASKED[asked]).eval())
    with pytest.raises(CaptureError, match=r"computes something else there .* or on torch.compiler.is_compiling"):
        helix_compile(model, cp=2, **SMALL)


def test_who_asks_and_computes_the_same_is_captured() -> None:
    model = fresh_gqa("llama", num_hidden_layers=1)
    model.model.norm = Asks(model.model.norm, torch.compiler.is_compiling, 1.0).eval()
    assert prompt_deviation(model, helix_compile(model, cp=2, **SMALL)) <= 1e-10


def test_a_wrapped_embedding_is_captured() -> None:
    model = fresh_gqa("llama", num_hidden_layers=1)
    model.model.embed_tokens = Asks(model.model.embed_tokens, lambda: False).eval()
    assert prompt_deviation(model, helix_compile(model, cp=2, **SMALL)) <= 1e-10


def test_layers_with_other_index_lists_share_no_body() -> None:
    model = fresh_family("llama")
    width = model.config.hidden_size
    for number, layer in enumerate(model.model.layers):
        inner, order = layer.mlp.forward, [*range(number, width), *range(number)]
        layer.mlp.forward = lambda x, inner=inner, order=order: inner(x)[..., order]
    compiled = helix_compile(model, cp=2, max_seq_len=64, max_batch_size=3, tokens_per_block=2)
    assert len(compiled.plan.bodies) == len(model.model.layers) > 1
    assert prompt_deviation(model, compiled) <= 1e-10


def other_rotation(model: Any, patch: pytest.MonkeyPatch) -> None:
    """A function of the model's file is replaced, as kernels that patch a library do."""
    rotate = modeling_llama.apply_rotary_pos_emb

    def patched(q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        q, k = rotate(q, k, *args, **kwargs)
        return q * 0.7, k

    patch.setattr(modeling_llama, "apply_rotary_pos_emb", patched)


def other_attention(model: Any, patch: pytest.MonkeyPatch) -> None:
    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def patched(module: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        return attend(module, query * 0.7, *args, **kwargs)

    patch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", patched)


def other_number_in_a_partial(model: Any, patch: pytest.MonkeyPatch) -> None:
    model.model.layers[0].mlp.forward.keywords["factor"] = 0.7


@pytest.mark.parametrize(
    "change",
    [other_rotation, *(pytest.param(x, marks=pytest.mark.slow) for x in (other_attention, other_number_in_a_partial))],
)
def test_a_second_compile_sees_what_the_first_did_not(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh_gqa("llama", num_hidden_layers=1)
    mlp = model.model.layers[0].mlp
    mlp.forward = partial(lambda inner, x, factor: inner(x) * factor, mlp.forward, factor=1.0)
    first = helix_compile(model, cp=2, **SMALL)
    assert prompt_deviation(model, first) <= 1e-10
    change(model, monkeypatch)
    assert prompt_deviation(model, first) > 1e-6
    assert prompt_deviation(model, helix_compile(model, cp=2, **SMALL)) <= 1e-10
