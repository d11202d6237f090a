"""torch.compile(backend="helix") of hybrids: layers of linear attention keep states beside keys and values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import DynamicCache

from helix_compile import RuntimeFault
from tests.support.families import fresh_family

OPTIONS = {"cp": 2, "tokens_per_block": 2, "max_seq_len": 64, "max_batch_size": 2}
KINDS = ["linear_attention", "full_attention"]
ISLANDS = 2e-6  # norms and linear attention compute in float32, on both sides


@pytest.fixture(autouse=True)
def clean() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def hybrid(name: str) -> Any:
    """A layer of linear attention, and one of MLA."""
    dense = {"mlp_layer_types": ["dense"] * 2} if name == "kimi_linear" else {}
    return fresh_family(name, num_hidden_layers=2, layer_types=KINDS, **dense)


def prompt() -> tuple[Tensor, Tensor]:
    """Left-padded ids and mask [2, 7]; rows of 7 and 4 tokens."""
    ids = torch.randint(1, 97, (2, 7), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    return ids, mask


def states(cache: DynamicCache) -> list[Tensor]:
    layer: Any = cache.layers[0]
    return [t for kept in (layer.conv_states, layer.recurrent_states) for t in kept.values()]


@pytest.mark.parametrize("name", ["kimi_linear", pytest.param("bailing_hybrid", marks=pytest.mark.slow)])
def test_a_loop_of_a_hybrid(name: str) -> None:
    model = hybrid(name)
    compiled = torch.compile(model, backend="helix", fullgraph=True, options=OPTIONS)
    with torch.no_grad():
        for _ in range(2):  # the second cache starts over
            (ids, mask), made = prompt(), []
            mine, reference = (DynamicCache(config=model.config) for _ in range(2))
            for _ in range(6):
                got = compiled(ids, attention_mask=mask, past_key_values=mine).logits
                expected = model(ids, attention_mask=mask, past_key_values=reference).logits
                tokens = mask[:, -ids.shape[1] :].bool()
                assert float((got - expected)[tokens].abs().max() / expected.abs().max()) <= ISLANDS
                made.append(counters["stats"]["unique_graphs"])
                ids = expected[:, -1:].argmax(-1)
                mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
            assert made[-1] == made[2]  # none after the prompt, the first and the second step
            held = [s for s in states(mine) if s is not None]
            shapes = [s.shape for s in states(reference) if s is not None]
            assert [s.shape for s in held] == shapes and all(s.isnan().all() for s in held)
        assert mine.get_seq_length() == 12


def test_a_state_that_was_edited_is_refused() -> None:
    model = hybrid("kimi_linear")
    compiled = torch.compile(model, backend="helix", fullgraph=True, options=OPTIONS)
    ids, mask = prompt()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        token = compiled(ids, attention_mask=mask, past_key_values=cache).logits[:, -1:].argmax(-1)
        mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
        cache.layers[0].recurrent_states[0].zero_()
        with pytest.raises(RuntimeFault, match=r"recurrent_states\[0\] of layer 0 was written in place"):
            compiled(token, attention_mask=mask, past_key_values=cache)
