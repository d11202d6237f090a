"""generate() is transformers' own: same tokens, and what can't be right is refused with the reason."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from helix_compile import HelixModule, RuntimeFault, helix_compile
from helix_compile.models.presets import build_model, preset_config
from helix_compile.runtime import generation
from helix_compile.runtime.generation import padded_prompts
from tests.support.driver import left_padded, random_ids
from tests.support.models import tiny_model

MASK = left_padded([5, 17, 11])
GREEDY = {"do_sample": False, "pad_token_id": 0}


def model() -> Any:
    return tiny_model("short", torch.float32, experts="grouped_mm")


def compiled_for(cp: int = 4, **options: Any) -> HelixModule:
    return helix_compile(model(), cp=cp, tokens_per_block=3, max_seq_len=128, **options)


@pytest.mark.parametrize("cp", [2, 4])
def test_64_greedy_tokens_twice_in_a_row(cp: int) -> None:
    compiled = compiled_for(cp)
    for _ in range(2):
        ids = random_ids(model(), 3, 17) * MASK
        options = {**GREEDY, "max_new_tokens": 64}
        expected = model().generate(ids, attention_mask=MASK, **options)
        assert torch.equal(compiled.generate(ids, attention_mask=MASK, **options), expected)


def test_seeded_sampling_of_several_sequences_each() -> None:
    ids = random_ids(model(), 2, 9)
    options = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 24, "pad_token_id": 0, "top_k": 20}
    torch.manual_seed(11)
    expected = model().generate(ids, attention_mask=torch.ones_like(ids), **options)
    torch.manual_seed(11)
    got = compiled_for().generate(ids, **options)
    assert got.shape == (6, 33) and torch.equal(got, expected)


class Collector(BaseStreamer):
    def __init__(self) -> None:
        self.pieces: list[torch.Tensor] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.pieces.append(value)

    def end(self) -> None:
        self.ended = True


def test_a_streamer_sees_prompt_then_tokens() -> None:
    streamer, ids = Collector(), random_ids(model(), 1, 6)
    out = compiled_for().generate(ids, max_new_tokens=7, streamer=streamer, **GREEDY)
    assert torch.equal(torch.cat([p.flatten() for p in streamer.pieces]), out[0])
    assert len(streamer.pieces) == 8 and streamer.ended


class AfterTokens(StoppingCriteria):
    def __init__(self, length: int):
        self.length = length

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


def test_stopping_criteria_and_eos() -> None:
    compiled, ids = compiled_for(), random_ids(model(), 2, 6)
    out = compiled.generate(ids, max_new_tokens=20, stopping_criteria=[AfterTokens(10)], **GREEDY)
    assert out.shape == (2, 10)
    free = compiled.generate(ids, max_new_tokens=20, **GREEDY)
    stop = {**GREEDY, "max_new_tokens": 20, "eos_token_id": int(free[0, 9])}
    expected = model().generate(ids, attention_mask=torch.ones_like(ids), **stop)
    assert torch.equal(compiled.generate(ids, **stop), expected)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"num_beams": 2}, "beam search reorders sequences"),
    ({"past_key_values": object()}, "the sharded cache belongs to the compiled module"),
    ({"inputs_embeds": torch.zeros(1, 1, 1)}, "the compiled graph starts at input_ids"),
    ({"cache_implementation": "static"}, "the cache is the module's own sharded one"),
    ({"use_cache": False}, "without its cache the module has no context"),
    ({"num_return_sequences": 9, "do_sample": True}, "9 sequences > max_batch_size=8"),
    ({"generation_config": GenerationConfig(num_beams=4)}, "num_beams=4 is refused"),
]


@pytest.mark.parametrize(("options", "reason"), REFUSED, ids=[next(iter(o)) for o, _ in REFUSED])
def test_refused_options_leave_the_cache(options: dict[str, Any], reason: str) -> None:
    compiled, ids = compiled_for(), random_ids(model(), 1, 5)
    compiled(ids)
    with pytest.raises(RuntimeFault, match=reason):
        compiled.generate(ids, max_new_tokens=2, **options)
    assert compiled.lengths.tolist() == [5]


def test_every_refusal_has_its_reason() -> None:
    """Each name in the two tables, with a value that is not its default."""
    compiled, ids = compiled_for(), random_ids(model(), 1, 5)
    names = {**generation.REFUSED_ARGUMENTS, **generation.REFUSED_SETTINGS}
    for name, entry in names.items():
        reason = entry if isinstance(entry, str) else entry[1]
        value = False if name == "use_cache" else 2
        with pytest.raises(RuntimeFault) as caught:
            compiled.generate(ids, max_new_tokens=2, **{name: value})
        assert name in str(caught.value) and reason in str(caught.value)


def test_prompts_that_can_not_be_right_are_refused() -> None:
    compiled = compiled_for()
    ids, mask = random_ids(model(), 2, 5), torch.ones(2, 5, dtype=torch.int64)
    right, holes = mask.clone(), mask.clone()
    right[1, 3:], holes[0, 2] = 0, 0
    for prompts, masks, message in (
        (ids[0], None, "must be a tensor [B, S], got [5]"),
        (None, None, "got NoneType"),
        (ids, mask[:, :3], "attention_mask must be [B, S] = [2, 5], got [2, 3]"),
        (ids, right, "rows [1] end in padding"),
        (ids, mask * 0, "rows [0, 1] end in padding"),
        (ids, holes, "zeros between tokens in rows [0]"),
        (ids + 97, None, "token ids must be in [0, 97)"),
    ):
        with pytest.raises(RuntimeFault, match=re.escape(message)):
            compiled.generate(prompts, masks, max_new_tokens=2)
    meta = helix_compile(build_model(preset_config("tiny"), meta=True), cp=2)
    with pytest.raises(RuntimeFault, match="meta device"):
        meta.generate(ids, max_new_tokens=2)


@pytest.mark.parametrize("eos", [None, 96, 0, [96, 0]], ids=str)
def test_a_mask_is_inferred_as_transformers_does(eos: Any) -> None:
    """From pad_token_id, unless that is an end token too; the config's pad token counts as the keyword's."""
    ids, compiled = (random_ids(model(), 3, 17) % 96 + 1) * MASK, compiled_for()
    options = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": eos}
    expected = model().generate(ids, pad_token_id=0, **options)
    assert torch.equal(compiled.generate(ids, pad_token_id=0, **options), expected)
    config = GenerationConfig(pad_token_id=0, **options)
    assert torch.equal(compiled.generate(ids, generation_config=config), expected)
    assert compiled.lengths.tolist() == [24] * 3 if eos in (0, [96, 0]) else [12, 24, 18]


def test_capacity_is_checked_before_anything_runs() -> None:
    """The last token is never put into the cache; padding takes no room, but counts in max_length."""
    compiled = helix_compile(model(), cp=2, max_seq_len=16)
    ids, mask = random_ids(model(), 2, 9), left_padded([9, 4])
    for short, fits in ((ids, 8), (ids[1:, 5:], 13)):
        assert compiled.generate(short, max_new_tokens=fits, **GREEDY).shape[1] == 17
    held = compiled.lengths.tolist()
    for options, needed in (
        ({"max_new_tokens": 9}, "9 prompt tokens + 9 new - 1 = 17 > max_seq_len=16"),
        ({"generation_config": GenerationConfig(max_new_tokens=30)}, "9 prompt tokens + 30 new"),
        ({"max_length": 18}, "9 prompt tokens + 9 new - 1 = 17 > max_seq_len=16"),
    ):
        with pytest.raises(RuntimeFault, match=re.escape(needed)):
            compiled.generate(ids, mask, **{**GREEDY, **options})
        assert compiled.lengths.tolist() == held
    stopped = compiled.generate(ids[:, :5], stopping_criteria=[AfterTokens(7)], **GREEDY)
    assert stopped.shape == (2, 7)
    with pytest.raises(RuntimeFault, match="17 prompt tokens"):
        compiled.generate(random_ids(model(), 1, 17), **GREEDY)


def test_arguments_of_the_wrong_kind() -> None:
    compiled, ids = compiled_for(), random_ids(model(), 2, 5) % 96 + 1
    expected = compiled.generate(ids, max_new_tokens=3, **GREEDY)
    assert torch.equal(compiled.generate(inputs=ids, max_new_tokens=3, **GREEDY), expected)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"input_ids": ids, "inputs": ids}, "both input_ids and inputs"),
        ({"input_ids": ids[:, :0]}, "got [B, T] = [2, 0]"),
        ({"input_ids": ids.float()}, "int64 or int32, got torch.float32"),
        ({"input_ids": ids, "attention_mask": [[1] * 5] * 2}, "attention_mask must be a tensor [B, S], got list"),
        ({"input_ids": ids, "max_new_tokens": 0}, "max_new_tokens must be an int >= 1, got 0"),
        ({"input_ids": ids, "max_length": 5}, "max_length=5 leaves no room for a new token behind 5 columns"),
    ]
    for options, message in wrong:
        with pytest.raises(RuntimeFault, match=re.escape(message)):
            compiled.generate(**options)
    assert compiled.lengths.tolist() == [7, 7]


def test_scores_and_logits_come_along() -> None:
    """What transformers returns beside the tokens; its processors work on our logits."""
    compiled, ids = compiled_for(2), random_ids(model(), 2, 5)
    options = {
        **GREEDY,
        "max_new_tokens": 6,
        "return_dict_in_generate": True,
        "output_logits": True,
        "output_scores": True,
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 2,
    }
    got = compiled.generate(ids, **options)
    expected = model().generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(got.sequences, expected.sequences)
    for a, b in zip((*got.logits, *got.scores), (*expected.logits, *expected.scores), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_prompts_from_text() -> None:
    ids, mask = padded_prompts("1,2,3; 4 5")
    assert ids.tolist() == [[1, 2, 3], [0, 4, 5]] and mask.tolist() == [[1, 1, 1], [0, 1, 1]]
    for text, message in (
        ("1,x", "expected integers"),
        ("1,,2", "prompt 0 has an empty id"),
        ("3;1,2,", "prompt 1 has an empty id"),
        ("1;;2", "prompt 1 is empty"),
    ):
        with pytest.raises(RuntimeFault, match=message):
            padded_prompts(text)
