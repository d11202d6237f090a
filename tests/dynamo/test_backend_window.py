"""torch.compile(backend="helix") with caches of limited length: layers with a sliding window, and StaticCache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import TorchRuntimeError
from torch._dynamo.utils import counters
from transformers import DynamicCache, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM, StaticCache

from helix_compile import RuntimeFault
from tests.support.gqa_models import SIZES, fresh_gqa

WINDOW = 12  # also the capacity: a window that never starts, by one token
OPTIONS = {"cp": 2, "tokens_per_block": 3, "max_seq_len": WINDOW, "max_batch_size": 2}


@pytest.fixture(autouse=True)
def clean() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def all_windows(window: int = WINDOW) -> Any:
    return built(MistralForCausalLM, MistralConfig(**SIZES, sliding_window=window))


def some_windows(window: int = WINDOW) -> Any:
    """Layer 0 sees all, layer 1 a window."""
    sizes = {k: v for k, v in SIZES.items() if k != "head_dim"} | {"hidden_size": 48}
    return built(
        Qwen2ForCausalLM, Qwen2Config(**sizes, use_sliding_window=True, sliding_window=window, max_window_layers=1)
    )


def built(kind: Any, config: Any) -> Any:
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    return kind(config).to(torch.float64).eval()


@pytest.mark.slow
def test_windows_that_every_rank_holds() -> None:
    model = some_windows(5)
    compiled, ours, own = (
        compile_(model, window="replicate", max_seq_len=64),
        new_cache("dynamic", model),
        new_cache("dynamic", model),
    )
    for ids in (prompt(9), prompt(1), prompt(3), prompt(1)):
        check(step(compiled, ids, ours), step(model, ids, own))


def new_cache(kind: str, model: Any, length: int = WINDOW) -> Any:
    if kind == "static":
        return StaticCache(config=model.config, max_cache_len=length)
    return DynamicCache(config=model.config)


def prompt(length: int = 5) -> Tensor:
    return torch.randint(0, 97, (2, length), generator=torch.Generator().manual_seed(0))


def compile_(model: Any, **options: Any) -> Any:
    return torch.compile(model, backend="helix", fullgraph=True, options={**OPTIONS, **options})


def step(model: Any, ids: Tensor, cache: Any = None) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, past_key_values=cache).logits


def check(got: Tensor, expected: Tensor) -> None:
    assert (got - expected).abs().max() <= 1e-7 * expected.abs().max()


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (all_windows, "dynamic"),
        pytest.param(some_windows, "dynamic", marks=pytest.mark.slow),
        pytest.param(some_windows, "static", marks=pytest.mark.slow),
        pytest.param(all_windows, "static", marks=pytest.mark.slow),
    ],
)
def test_a_window_that_never_starts(make: Any, kind: str) -> None:
    model = make()
    compiled = compile_(model)
    counters.clear()
    graphs = []
    mine, reference, ids = new_cache(kind, model), new_cache(kind, model), prompt()
    for count in range(WINDOW - 4):
        got, expected = step(compiled, ids, mine), step(model, ids, reference)
        check(got, expected)
        ids = expected[:, -1:].argmax(-1)
        assert int(mine.get_seq_length()) == 5 + count
        for layer, other in zip(mine.layers, reference.layers, strict=True):
            assert layer.keys.shape == other.keys.shape and layer.values.shape == other.values.shape
            assert layer.keys.untyped_storage().nbytes() == 8
        graphs.append(counters["stats"]["unique_graphs"])
    # prompt, one token, and where the length is a shape or an int a token at any length; near the end some layers are full
    assert graphs[2:6] == [graphs[2]] * 4 and graphs[2] <= 3
    # a layer of StaticCache that is full would shift its keys: Dynamo itself sees that a stand-in can't be written
    with pytest.raises(
        TorchRuntimeError if kind == "static" else RuntimeFault,
        match="written-to tensor" if kind == "static" else "13 tokens > max_seq_len=12",
    ):
        step(compiled, ids, mine)
    check(step(compiled, prompt(6)), step(model, prompt(6)))  # without a cache


@pytest.mark.parametrize("make", [some_windows, pytest.param(all_windows, marks=pytest.mark.slow)])
def test_a_window_that_starts(make: Any) -> None:
    """Prompt and steps far behind it, against the model with its own cache, which keeps 4 columns of a window of 5."""
    model = make(5)
    compiled = compile_(model, max_seq_len=64)
    mine, reference, ids = new_cache("dynamic", model), new_cache("dynamic", model), prompt(7)
    for _ in range(12):
        got, expected = step(compiled, ids, mine), step(model, ids, reference)
        check(got, expected)
        ids = expected[:, -1:].argmax(-1)
        for layer, other in zip(mine.layers, reference.layers, strict=True):
            assert layer.keys.shape == other.keys.shape and layer.values.shape == other.values.shape


@pytest.mark.slow
def test_columns_of_padding_may_go_on_behind_the_window() -> None:
    """10 tokens and 4 columns of padding: the layers keep fewer columns than were fed."""
    model = all_windows()
    compiled = compile_(model)
    mine, reference, ids = new_cache("dynamic", model), new_cache("dynamic", model), prompt(7)
    for count in range(8):
        mask = torch.ones(2, 7 + count, dtype=torch.int64)
        mask[:, :4] = 0
        call = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]}
        with torch.no_grad():
            got, expected = (
                m(input_ids=ids, past_key_values=c, **call).logits[:, -1:]
                for m, c in ((compiled, mine), (model, reference))
            )
        check(got, expected)
        ids = expected.argmax(-1)
    assert mine.layers[0].keys.shape == reference.layers[0].keys.shape


@pytest.mark.slow
def test_an_edited_length_and_an_emptied_layer_are_refused() -> None:
    model = some_windows()
    compiled = compile_(model)
    mine, reference = new_cache("dynamic", model), new_cache("dynamic", model)
    for ids in (prompt(), prompt(1), prompt(1)):
        check(step(compiled, ids, mine), step(model, ids, reference))
    window = mine.layers[1]
    window.cumulative_length -= 1
    with pytest.raises(RuntimeFault, match=r"different lengths \[6, 7\]"):
        step(compiled, prompt(1), mine)
    window.cumulative_length += 1
    kept = window.keys, window.values
    window.reset()
    with pytest.raises(RuntimeFault, match=r"different lengths \[0, 7\]"):
        step(compiled, prompt(1), mine)
    window.keys, window.values = kept
    window.is_initialized, window.cumulative_length = True, 7
    mine.layers[0].reset()
    with pytest.raises(RuntimeFault, match=r"(keys|values) of layer 0 is missing"):
        step(compiled, prompt(1), mine)


def test_a_static_cache_that_is_full_is_refused() -> None:
    model = fresh_gqa("llama")
    compiled = compile_(model, max_seq_len=64)
    mine, reference = new_cache("static", model, 8), new_cache("static", model, 8)
    for ids in (prompt(7), prompt(1)):
        check(step(compiled, ids, mine), step(model, ids, reference))
    with pytest.raises(IndexError):
        step(model, prompt(1), reference)
    with pytest.raises(RuntimeFault, match=r"max_cache_len=8 columns, 8 are in it.*brings 1"):
        step(compiled, prompt(1), mine)
    for length in (9, 10):  # Dynamo makes one graph of these
        mine = new_cache("static", model, length)
        step(compiled, prompt(7), mine)
        assert [layer.keys.shape[2] for layer in mine.layers] == [length] * 2
    with pytest.raises(RuntimeFault, match=r"max_cache_len=6 columns, 0 are in it.*brings 7"):
        step(compiled, prompt(7), new_cache("static", model, 6))
