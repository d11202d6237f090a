"""Prompt lookup and assisted decoding through generate(): the greedy tokens, in fewer steps, in the same room."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from helix_compile import HelixModule, RuntimeFault, helix_compile
from helix_compile.runtime.drafts import CroppedCache, within_room
from tests.support.driver import random_ids
from tests.support.models import fresh_model, tiny_model

NEW = 24
GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": NEW}


def model() -> Any:
    return tiny_model("short", dtype=torch.float32, experts="grouped_mm")


def prompt() -> Tensor:
    """17 tokens that repeat, none of them 0."""
    return (random_ids(model(), 1, 7) % 96 + 1).repeat(1, 3)[:, :17]


class Counted:
    """A module whose steps [T] and rollbacks [tokens taken back] are written down."""

    def __init__(self, cp: int, max_seq_len: int = 17 + NEW - 1):
        self.module: HelixModule = helix_compile(
            model(), cp=cp, tokens_per_block=3, max_batch_size=2, max_seq_len=max_seq_len
        )
        self.steps: list[int] = []
        self.taken_back: list[int] = []
        forward, truncate = self.module.forward, self.module.truncate

        def counted_forward(ids: Tensor, *given: Any, **named: Any) -> Tensor:
            self.steps.append(ids.shape[1])
            return forward(ids, *given, **named)

        def counted_truncate(lengths: Any) -> None:
            self.taken_back.append(int((self.module.lengths - lengths).sum()))
            truncate(lengths)

        self.module.forward, self.module.truncate = counted_forward, counted_truncate


def assistant() -> Any:
    """The model itself with a little noise: some of its drafts are right, some are not."""
    draft = fresh_model("short", dtype=torch.float32, experts="grouped_mm")
    with torch.no_grad():
        for name, weight in draft.named_parameters():
            if "proj" in name:
                weight.add_(torch.randn_like(weight) * weight.std() * 0.15)
    draft.generation_config.num_assistant_tokens = 5
    return draft


@pytest.mark.parametrize("cp", [1, 4])
@pytest.mark.parametrize("drafts", [{"prompt_lookup_num_tokens": 6}, {"assistant_model": True}], ids=str)
def test_the_greedy_tokens_in_fewer_steps(cp: int, drafts: dict[str, Any]) -> None:
    """Also with padding before the prompt; the cache has room for the plain loop and not a token more."""
    counted = Counted(cp)
    if "assistant_model" in drafts:
        drafts = {"assistant_model": assistant()}
    ids = prompt()
    expected = model().generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.int64), ids], dim=1)
    for row in (ids, padded):
        counted.steps.clear()
        got = counted.module.generate(row, **GREEDY, **drafts)
        assert torch.equal(got[:, -expected.shape[1] :], expected)
        assert counted.module.lengths.tolist() == [17 + NEW - 1]
        assert len(counted.steps) < NEW  # drafts were right
        assert counted.steps[0] >= row.shape[1] and max(counted.steps[1:]) > 1
    assert max(counted.taken_back) > 0  # and some were wrong


def test_another_family_drafts() -> None:
    """A Llama that knows nothing: every draft is taken back, and the tokens stay."""
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=None,
        eos_token_id=None,
    )
    counted, ids = Counted(2), prompt()
    expected = model().generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)
    got = counted.module.generate(ids, assistant_model=LlamaForCausalLM(config).eval(), **GREEDY)
    assert torch.equal(got, expected) and sum(counted.taken_back) >= NEW // 2


def test_end_tokens_scores_and_logits_come_along() -> None:
    counted, ids = Counted(2), prompt()
    free = counted.module.generate(ids, **GREEDY)
    options = {
        **GREEDY,
        "eos_token_id": int(free[0, 17 + 9]),
        "return_dict_in_generate": True,
        "output_logits": True,
        "output_scores": True,
        "repetition_penalty": 1.1,
    }
    expected = model().generate(ids, attention_mask=torch.ones_like(ids), **options)
    got = counted.module.generate(ids, prompt_lookup_num_tokens=4, **options)
    assert torch.equal(got.sequences, expected.sequences)
    for a, b in zip((*got.logits, *got.scores), (*expected.logits, *expected.scores), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_seeded_sampling_with_drafts_is_that_of_transformers() -> None:
    counted, ids = Counted(2), prompt()
    options = {**GREEDY, "do_sample": True, "prompt_lookup_num_tokens": 4}
    torch.manual_seed(5)
    expected = model().generate(ids, attention_mask=torch.ones_like(ids), **options)
    torch.manual_seed(5)
    assert torch.equal(counted.module.generate(ids, **options), expected)


def test_refused_before_anything_is_written() -> None:
    compiled = Counted(2).module
    one, two = prompt(), prompt().repeat(2, 1)
    small = LlamaForCausalLM(
        LlamaConfig(vocab_size=50, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    )
    compiled(one)
    wrong: list[tuple[Tensor, dict[str, Any], str]] = [
        (two, {"prompt_lookup_num_tokens": 3}, "one sequence at a time, got 2 prompts x num_return_sequences=1"),
        (
            one,
            {"prompt_lookup_num_tokens": 3, "num_return_sequences": 2, "do_sample": True},
            "got 1 prompts x num_return_sequences=2",
        ),
        (one, {"prompt_lookup_num_tokens": 0}, "prompt_lookup_num_tokens must be an int >= 1, got 0"),
        (one, {"prompt_lookup_num_tokens": True}, "must be an int >= 1, got True"),
        (one, {"assistant_model": model(), "prompt_lookup_num_tokens": 3}, "both given"),
        (one, {"assistant_model": torch.nn.Linear(1, 1)}, "a transformers model that can generate, got Linear"),
        (one, {"assistant_model": compiled}, "a transformers model that can generate, got HelixModule"),
        (one, {"assistant_model": small}, "a vocabulary of 50 tokens, expected the module's 97"),
        (one, {"assistant_model": model(), "assistant_tokenizer": object()}, "assistant_tokenizer is refused"),
        (one, {"assistant_model": model(), "num_beams": 2}, "beam search reorders sequences"),
        (one, {"assistant_early_exit": 1}, "it stops at an inner layer"),
        (one, {"use_mtp": True}, "its heads read the last hidden state"),
        (one, {"speculation_type": "dflash"}, "its drafts read hidden states"),
    ]
    for ids, options, message in wrong:
        with pytest.raises(RuntimeFault, match=re.escape(message)):
            compiled.generate(ids, max_new_tokens=2, **options)
        assert compiled.lengths.tolist() == [17]


def test_the_cache_that_transformers_crops() -> None:
    compiled = Counted(2).module
    cache = CroppedCache(compiled)
    assert cache.get_seq_length() == 0
    compiled(prompt())
    cache.crop(0)
    assert cache.get_seq_length() == 17
    cache.crop(-3)
    assert cache.get_seq_length() == 14 and compiled.lengths.tolist() == [14]
    for wrong, message in ((1, "expected a negative int"), (-15, "got length -1, expected 0 to 14")):
        with pytest.raises(RuntimeFault, match=re.escape(message)):
            cache.crop(wrong)
    assert compiled.lengths.tolist() == [14]


def test_drafts_are_cut_to_the_room() -> None:
    """Ids [1, n] with 4 drafts behind them and logits for each; two columns of the prompt are padding."""

    def drafts(ids: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([ids, ids[:, :4]], dim=1), torch.zeros(1, 4, 97)

    ids = torch.arange(10)[None]
    for capacity, kept in ((99, 4), (12, 4), (11, 3), (9, 1), (8, 0), (7, 0)):
        candidates, logits = within_room(drafts, 2, capacity)(ids)
        assert candidates.shape == (1, 10 + kept) and logits is not None
        assert logits.shape == (1, kept, 97)
