"""A user's loop through torch.compile(backend="helix"), 200 steps: tokens, recompilations, memory."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import DynamicCache, StaticCache

from tests.support.models import fresh_model

pytestmark = pytest.mark.slow
STEPS, PROMPT = 200, 7


def live_bytes() -> int:
    """Bytes of every storage that a tensor alive in this process holds."""
    gc.collect()
    found = [t for t in gc.get_objects() if type(t) in (Tensor, torch.nn.Parameter)]
    storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in found)}
    return sum(storages.values())


@pytest.mark.parametrize("masked", [False, True], ids=["no_mask", "left_padded"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_two_hundred_steps(kind: str, masked: bool) -> None:
    torch._dynamo.reset(), counters.clear()
    model = fresh_model("plain")
    options = {"cp": 4, "tokens_per_block": 3, "max_seq_len": 256, "max_batch_size": 2}
    compiled = torch.compile(model, backend="helix", fullgraph=True, options=options)
    prompt = torch.randint(0, 97, (2, PROMPT))
    expected = list(tokens(model, prompt, kind, masked))
    graphs, live = [], {}
    for count, ids in enumerate(tokens(compiled, prompt, kind, masked)):
        assert torch.equal(ids, expected[count]), count
        graphs.append(counters["stats"]["unique_graphs"])
        if count in (20, STEPS - 1):
            live[count] = live_bytes()
    assert graphs[2:] == [3 if kind == "dynamic" else 2] * (STEPS - 2)
    # what grows is the user's own mask (two rows of int64) and our copy of it; one latent would be far more
    grown = live[STEPS - 1] - live[20]
    assert 0 <= grown <= (STEPS - 20) * 2 * (2 * 8 + 1), grown
    torch._dynamo.reset()


def tokens(model: Any, ids: Tensor, kind: str, masked: bool) -> Any:
    """Greedy tokens [B, 1] of every step, by a loop as a user writes it."""
    cache: Any = DynamicCache(config=model.config)
    if kind == "static":
        cache = StaticCache(config=model.config, max_cache_len=PROMPT + STEPS)
    mask = torch.ones(2, PROMPT, dtype=torch.int64)
    mask[0, :3] = 0
    for _ in range(STEPS):
        call = {"attention_mask": mask} if masked else {}
        with torch.no_grad():
            out = model(input_ids=ids, past_key_values=cache, use_cache=True, **call)
        ids = out.logits[:, -1:].argmax(-1)
        mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
        yield ids
