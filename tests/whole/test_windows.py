"""Sliding windows and chunks against the unmodified model with its own cache, which forgets; caches poisoned with NaN."""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from helix_compile import HelixModule, PlanError, RuntimeFault, helix_compile, verify
from helix_compile.ir.graph import node_named
from helix_compile.ir.stage import bodies_of
from helix_compile.plan.helix_plan import HelixPlan
from helix_compile.predict.costs import Workload, predict_costs
from helix_compile.verifier.numeric.reference import WidenedIslands
from tests.support.decoders import tiny_decoder
from tests.support.driver import Reference, deviation, left_padded, random_ids, worst_deviation
from tests.support.gqa_models import fresh_gqa, tiny_gqa
from tests.support.numerics import LIMIT

SLOW = pytest.mark.slow
EXACT = LIMIT[torch.float64]
BOTH = ("sliding_attention", "full_attention")
# NoPE layers of llama4 scale q by the column that a token stands in, padding included, where that is not turned off
CHUNKS = {"moe_layers": [], "attn_temperature_tuning": False, "no_rope_layers": [1, 0], "intermediate_size_mlp": 40}


@functools.cache
def windowed(name: str, reach: int) -> Any:
    if name == "llama4":
        return fresh_gqa(name, attention_chunk_size=reach, **CHUNKS)
    kinds = {"layer_types": list(BOTH)} if name != "mistral" else {}
    return fresh_gqa(name, sliding_window=reach, **kinds)


def poisoned(model: Any, **plan: Any) -> HelixModule:
    sizes = {"tokens_per_block": 3, "max_batch_size": 3, "max_seq_len": 64}
    compiled = helix_compile(model, **{**sizes, **plan})
    for rank in compiled.ranks:
        for cache in rank.cache:
            cache.fill_(torch.nan)
    return compiled


class Recomputed(Reference):
    """The model over all its tokens at every step. Of a window of one token transformers' cache keeps `[-0:]`, which is all."""

    ids: Tensor | None = None

    def step(self, ids: Tensor, mask: Tensor) -> Tensor:
        self.ids = ids if self.ids is None else torch.cat([self.ids, ids], dim=1)
        self.cache, before = DynamicCache(config=self.model.config), self.mask
        whole = mask if before is None else torch.cat([before, mask], dim=1)
        self.mask = None
        logits = super().step(self.ids, whole)
        return logits[:, -ids.shape[1] :]


def check_exact(model: Any, compiled: HelixModule, prompt: list[int], reach: int = 0) -> None:
    """Steps of one token feed the greedy one."""
    reference, mask = (Recomputed if reach == 1 else Reference)(model), left_padded(prompt)
    torch.manual_seed(1)
    ids = random_ids(model, *mask.shape)
    for tokens in (1, 3, 1, 1, 3, 1, 0):
        with WidenedIslands():
            got, expected = compiled(ids, mask), reference.step(ids, mask)
        assert deviation(got, expected, mask) <= EXACT
        last = expected[:, -1].argmax(-1)
        assert torch.equal(got[:, -1].argmax(-1), last)
        mask = torch.ones(len(prompt), tokens, dtype=torch.int64)
        ids = last[:, None] if tokens == 1 else random_ids(model, len(prompt), tokens)


# shorter than a block, than a shard, than the prompt; longer than the prompt; of one token
QUICK = [
    ("mistral", 5, {"cp": 4}),
    ("gemma3", 7, {"cp": 2, "tpa": 2, "merge": "ag_rs"}),
    ("llama4", 6, {"cp": 4, "tokens_per_block": 2}),
]
MANY = [
    (name, reach, plan)
    for name in ("mistral", "gemma3", "olmo3", "llama4")
    for reach in (1, 2, 5, 11, 23)
    for plan in ({"cp": 1}, {"cp": 2}, {"cp": 4, "tokens_per_block": 1}, {"cp": 2, "tpa": 2, "tokens_per_block": 8})
    if name != "olmo3" or "tpa" not in plan  # its norms of q and k mix the heads
]


@pytest.mark.parametrize(("name", "reach", "plan"), [*QUICK, *(pytest.param(*m, marks=SLOW) for m in MANY)], ids=str)
def test_fp64(name: str, reach: int, plan: dict[str, Any]) -> None:
    model = windowed(name, reach)
    check_exact(model, poisoned(model, **plan), [5, 2, 13], reach)


def test_what_lies_before_every_window_is_not_read() -> None:
    """Entries that all queries to come have forgotten may be NaN; one that is just seen may not."""
    model = windowed("mistral", 5)
    results = []
    for spoiled in (0, 8, 9):  # of 12 tokens; the next one sees positions 8 to 12
        compiled = poisoned(model, cp=2)
        torch.manual_seed(2)
        compiled(random_ids(model, 2, 12))
        for rank in compiled.ranks:
            for position in range(spoiled):
                if position // 3 % 2 == rank.rank:
                    slot = position // 6 * 3 + position % 3
                    for cache in rank.cache:
                        cache[compiled.page_table[:, 0], slot] = torch.nan
        results.append(compiled(random_ids(model, 2, 1)))
    assert torch.equal(results[0], results[1])
    assert not torch.isfinite(results[2]).any()


def _late(start: int) -> Any:
    """Every window begins `start` slots late (early, where that is negative)."""

    def edit(compiled: HelixModule) -> None:
        for body in bodies_of(compiled.graph).values():
            decode = node_named(body.graph, "gqa_decode")
            first = decode.kwargs.get("first")
            if first is None:
                continue
            with body.graph.inserting_before(decode):
                moved = body.graph.call_function(torch.ops.aten.add.Tensor, (first, start))
                moved = body.graph.call_function(torch.ops.aten.clamp.default, (moved, 0))
            decode.kwargs = {"first": moved}
            body.recompile()

    return edit


def _window_of_another(compiled: HelixModule) -> None:
    """The layer with the window sees all."""
    body = bodies_of(compiled.graph)["body_0"]
    node_named(body.graph, "gqa_decode").kwargs = {}
    body.recompile()


def _one_more(compiled: HelixModule) -> None:
    first = next(n for n in compiled.graph.graph.nodes if n.name.startswith("first_visible"))
    first.args = (*first.args[:4], first.args[4] + 1, 0)
    compiled.graph.recompile()


@pytest.mark.parametrize("fault", [_late(1), _late(-1), _window_of_another, _one_more])
def test_broken_windows_are_rejected(fault: Any) -> None:
    model = windowed("gemma3", 7)
    compiled = helix_compile(model, cp=2, tokens_per_block=3, max_batch_size=3, max_seq_len=64)
    fault(compiled)
    report = verify(compiled, model)
    assert {f.check for f in report.findings} == {"static", "numeric"}, str(report)


def test_a_sound_one_is_accepted_and_told() -> None:
    model = windowed("gemma3", 7)
    compiled = helix_compile(model, cp=4, tokens_per_block=3, max_batch_size=3, max_seq_len=64)
    report = verify(compiled, model)
    assert report.ok, str(report)
    text = str(compiled.inspect())
    assert "attention (window of 7)" in text and "at most 3 of 4 ranks hold what a query sees" in re.sub(
        r"\s+", " ", text
    )
    assert [x["windows"] for x in compiled.inspect().facts["layers"]] == [[7], [0]]
    assert HelixPlan.from_json(compiled.plan.to_json()) == compiled.plan
    check_costs(compiled, context=1000)
    check_what_sharding_costs(compiled)


def check_what_sharding_costs(compiled: HelixModule) -> None:
    """One of two layers has a window of 7: one rank of four only exchanges, once a step."""
    (said,) = (dict(d.inputs) for d in compiled.plan.decisions if d.name == "window 7")
    partial_o_and_lse = 12 * (10 + 1) * 8 * 3 / 4
    assert said["ranks_that_only_exchange"] == 1 and said["layers"] == said["exchanges_per_step"] == 1
    assert said["exchange_bytes_per_rank_per_token"] == partial_o_and_lse
    assert said["bytes_of_W_tokens_if_on_every_rank"] == 7 * 4 * (10 + 10) * 8


def check_costs(compiled: HelixModule, context: int) -> None:
    """A decode step of the layer with the window reads the slots of 7 tokens, of the other all."""
    (windowed, whole), plan = bodies_of(compiled.graph).values(), compiled.plan
    for rank in range(4):
        costs = []
        for body in (windowed, whole):
            predicted = predict_costs(body.graph, Workload(2, 1, context), plan.layout, 3, rank)
            costs.append(predicted["gqa_decode"])
        seen, held = (sum(p // 3 % 4 == rank for p in range(start, context + 1)) for start in (context - 6, 0))
        a_token = 2 * 4 * (10 + 10) * 8  # sequences, KV heads, K and V, float64
        assert costs[1].hbm_bytes - costs[0].hbm_bytes == (held - seen) * a_token
        assert costs[0].flops * held == costs[1].flops * seen


def test_plans_of_before_there_were_windows_are_read() -> None:
    plan = helix_compile(tiny_gqa("llama"), cp=2, max_seq_len=64).plan
    text = re.sub(r',\s*"(window|chunk)": 0(?=\s*[,}])', "", plan.to_json())
    assert '"chunk"' not in text and HelixPlan.from_json(text) == plan


def masks(*rows: list[list[int]]) -> list[Tensor]:
    return [torch.tensor(step) for step in zip(*rows, strict=True)]


GAPS = {
    "idle row": masks([[1] * 6, [0], [1]], [[1] * 6, [1], [1]]),
    "padding behind the prompt": masks([[1, 1, 1, 1, 0, 0], [1], [1]], [[1] * 6, [1], [1]]),
    "padding before later tokens": masks([[1] * 6, [1], [0, 1]], [[1] * 6, [1], [1, 1]]),
}


@pytest.mark.parametrize("name", GAPS)
def test_padding_between_tokens_is_refused_where_a_window_would_count_it(name: str) -> None:
    """Transformers' windows count columns; where the step is taken all the same, nobody has forgotten anything yet."""
    model = windowed("mistral", 5)
    compiled, reference = poisoned(model, cp=2), Reference(model)
    steps, taken = GAPS[name], 0
    with pytest.raises(
        RuntimeFault, match=r"row 0: \d columns? of padding stand between its \d tokens, .* forgets what is 5"
    ):
        for mask in steps:
            ids = random_ids(model, *mask.shape)
            got = compiled(ids, mask)
            taken += 1
            assert deviation(got, reference.step(ids, mask), mask) <= 1e-7
    before = compiled.lengths
    wide = windowed("mistral", 23)  # the same steps before a window begins
    free = poisoned(wide, cp=2)
    reference = Reference(wide)
    for mask in steps:
        ids = random_ids(wide, *mask.shape)
        assert deviation(free(ids, mask), reference.step(ids, mask), mask) <= 1e-7
    assert taken and torch.equal(compiled.lengths, before)


def test_what_truncate_takes_back_leaves_no_gap() -> None:
    """Ragged drafts: padding behind a row's tokens goes with them; each row is then as by itself."""
    model = windowed("mistral", 5)
    compiled, rows = poisoned(model, cp=2), [Reference(model) for _ in range(2)]
    prompt = random_ids(model, 2, 7)
    compiled(prompt)
    for row, reference in enumerate(rows):
        reference.step(prompt[row : row + 1], torch.ones(1, 7, dtype=torch.int64))
    for kept in ((2, 0), (1, 4), (0, 3)):
        mask = (torch.arange(4) < torch.tensor([3, 4])[:, None]).long()
        ids, lengths = random_ids(model, 2, 4), compiled.lengths
        with WidenedIslands():
            compiled(ids, mask)
            compiled.truncate(lengths + torch.tensor(kept))
            probe = random_ids(model, 2, 1)
            got = compiled(probe)
            for row, (reference, stay) in enumerate(zip(rows, kept, strict=True)):
                alone = torch.cat([ids[row, :stay], probe[row]])[None]
                expected = reference.step(alone, torch.ones_like(alone))
                assert deviation(got[row : row + 1], expected[:, -1:], torch.ones(1, 1)) <= EXACT


def test_a_prefilled_cache_goes_on_and_a_forgetful_one_is_refused() -> None:
    model = windowed("mistral", 5)
    compiled, ids = poisoned(model, cp=2), random_ids(model, 2, 12)
    mask = left_padded([12, 7])
    forgetful, whole = Reference(model), Reference(model)
    whole.cache = DynamicCache()  # without a config: all tokens of every layer
    with WidenedIslands():
        forgetful.step(ids, mask), whole.step(ids, mask)
        with pytest.raises(
            RuntimeFault, match=r"a DynamicSlidingWindowLayer, expected .*DynamicCache\(\), which without"
        ):
            compiled.import_cache(forgetful.cache, mask=mask)
        compiled.import_cache(whole.cache, mask=mask)
        compiled.import_cache(*compiled.export_cache())
        short = Reference(model)  # a window's layer keeps 4 columns of a window of 5: here all
        short.step(ids[:, :4], mask[:, -4:])
        other = poisoned(model, cp=2)
        other.import_cache(short.cache, mask=mask[:, -4:])
        longer = random_ids(model, 2, 2)
        pair = torch.ones_like(longer)
        assert deviation(other(longer, pair), short.step(longer, pair), pair) <= EXACT
        probe, ones = random_ids(model, 2, 3), torch.ones(2, 3, dtype=torch.int64)
        assert deviation(compiled(probe, ones), forgetful.step(probe, ones), ones) <= EXACT


def test_generate_and_a_saved_module(tmp_path: Any) -> None:
    model = windowed("gemma3", 7)
    compiled = helix_compile(model, cp=2, tokens_per_block=3, max_batch_size=2, max_seq_len=64)
    compiled.save(tmp_path / "module")
    loaded = HelixModule.load(tmp_path / "module")
    ids = random_ids(model, 1, 9)
    settings = {"max_new_tokens": 12, "do_sample": False}
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    for module in (compiled, loaded):
        assert torch.equal(module.generate(ids, **settings), expected)
        assert torch.equal(module.generate(ids, prompt_lookup_num_tokens=3, **settings), expected)


@SLOW
def test_a_window_longer_than_a_page_and_a_long_prompt_in_chunks() -> None:
    model = windowed("mistral", 300)
    compiled = helix_compile(model, cp=2, max_batch_size=2, max_seq_len=2048)
    assert worst_deviation(model, compiled, [1400, 900], (1, 3, 1)) <= EXACT


def test_a_cache_that_forgets_what_its_mask_shows_is_refused() -> None:
    """Moshi's window is the cache's alone: a prompt is seen whole, a step the last five tokens. No graph says so."""
    model = tiny_decoder("MoshiForCausalLM")
    with pytest.raises(
        PlanError, match=r"layer 0: .*DynamicSlidingWindowLayer.* forgets tokens behind 5 by itself, while the"
    ):
        poisoned(model, cp=2)
    with pytest.raises(PlanError, match="forgets tokens behind 5"):
        poisoned(model, cp=2, unmatched="keep")  # a layer that is kept would forget nothing
    compiled, reference = poisoned(model, cp=2, max_seq_len=5), Reference(model)
    for tokens in (3, 1, 1):
        ids, mask = random_ids(model, 2, tokens), torch.ones(2, tokens, dtype=torch.int64)
        with WidenedIslands():
            assert deviation(compiled(ids, mask), reference.step(ids, mask), mask) <= EXACT
