"""Which list holds the layers: by what a forward takes, else by what the model's own call hands its cache to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast

from helix_compile import CaptureError, helix_compile
from helix_compile.capture.layers import find_layers
from helix_compile.ir.cache_argument import cache_argument
from tests.support.driver import worst_deviation
from tests.support.gqa_models import fresh_gqa


class ByPlace(nn.Module):
    """Any arguments, handed on."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        return self.layer(*args, **kwargs)


def unnamed(kind: type[ByPlace]) -> Any:
    model = fresh_gqa("llama")
    wrapped = [kind(layer) for layer in model.model.layers]
    model.model.layers = nn.ModuleList(wrapped)
    model.model.side = nn.ModuleList(nn.Linear(4, 4) for _ in range(5))  # longer, and takes no cache
    return model.eval()


def test_a_layer_without_annotation_or_name() -> None:
    model = unnamed(ByPlace)
    assert cache_argument(ByPlace.forward) is None
    before = {n: m.__dict__.get("forward") for n, m in model.named_modules()}
    assert find_layers(model)[0] == "model.layers"
    assert {n: m.__dict__.get("forward") for n, m in model.named_modules()} == before
    compiled = helix_compile(model, cp=4, tokens_per_block=4, max_seq_len=32)
    assert worst_deviation(model, compiled, [7, 3]) < 1e-10


class OwnModel(nn.Module):
    """A causal model of one's own: layers take the cache by place, under a name that nobody knows."""

    class Layer(nn.Module):
        def __init__(self, layer: nn.Module):
            super().__init__()
            self.layer = layer

        def forward(self, x, tables, ids, mask, store):  # type: ignore[no-untyped-def]
            return self.layer(
                x,
                attention_mask=mask,
                position_ids=ids,
                past_key_values=store,
                use_cache=True,
                position_embeddings=tables,
            )

    def __init__(self) -> None:
        super().__init__()
        whole = fresh_gqa("llama")
        self.config, self.embed, self.rotary, self.norm = (
            whole.config,
            whole.model.embed_tokens,
            whole.model.rotary_emb,
            whole.model.norm,
        )
        self.blocks = nn.ModuleList(self.Layer(layer) for layer in whole.model.layers)
        self.extra = nn.ModuleList(nn.Identity() for _ in range(9))
        self.head = whole.lm_head

    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=True):  # type: ignore[no-untyped-def]
        x = self.embed(input_ids)
        ids = position_ids if position_ids is not None else torch.arange(x.shape[1])[None]
        mask = create_causal_mask(self.config, x, attention_mask, past_key_values=past_key_values, position_ids=ids)
        tables = self.rotary(x, ids)
        for block in self.blocks:
            x = block(x, tables, ids, mask, past_key_values)
        for part in self.extra:
            x = part(x)
        return CausalLMOutputWithPast(logits=self.head(self.norm(x)))


def test_the_cache_by_place_under_a_name_of_its_own() -> None:
    model = OwnModel().eval()
    assert cache_argument(OwnModel.Layer.forward) is None
    assert find_layers(model)[0] == "blocks"


def test_what_stops_the_run_on_fakes_comes_too_late() -> None:
    """A number of the data is asked for behind the first layer: that it takes the cache is known by then."""
    model = unnamed(ByPlace)
    model.model.norm.register_forward_pre_hook(lambda module, given: given[0].max().item() < 0 and None)
    assert find_layers(model)[0] == "model.layers"


def test_no_layers_at_all() -> None:
    model = fresh_gqa("llama")
    model.model.layers = nn.ModuleList([nn.Identity()])
    model.model.forward = lambda **given: model.model.norm(model.model.embed_tokens(given["input_ids"]))
    with pytest.raises(
        CaptureError, match=r"no list of layers whose forward takes a cache .* that the model's call fills"
    ):
        find_layers(model)
