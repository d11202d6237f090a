"""window="replicate": every rank holds the last tokens by itself and exchanges nothing; against the unmodified model.

Caches are poisoned with NaN. A ring of a window of 5 has three pages of 128 tokens: longer rows begin it again.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from helix_compile import HelixModule, LayoutError, PlanError, RuntimeFault, helix_compile, verify
from helix_compile.ir.graph import helix_op, inputs_of
from helix_compile.ir.stage import bodies_of
from helix_compile.plan.helix_plan import HelixPlan
from helix_compile.plan.ring import first_held, longest_step, ring_pages, ring_table
from helix_compile.predict.costs import Workload, predict_costs
from helix_compile.verifier.mutants.self_test import awkward_windows
from helix_compile.verifier.numeric.reference import WidenedIslands
from tests.support.driver import Reference, deviation, left_padded, random_ids, worst_deviation
from tests.support.families import fresh_family
from tests.support.fp8 import CacheRounding, poison, rounded_reference
from tests.support.gqa_models import tiny_gqa
from tests.support.numerics import LIMIT
from tests.whole.test_windows import Recomputed, poisoned, windowed

SLOW = pytest.mark.slow
EXACT = LIMIT[torch.float64]
ALONE: dict[str, Any] = {"window": "replicate"}
WRAPS: dict[str, Any] = {"max_seq_len": 700}
STEPS = (1, 3, 1, 5, 1)


def check_exact(
    model: Any, compiled: HelixModule, prompt: list[int], reach: int = 0, more: tuple[int, ...] = ()
) -> None:
    """Steps of one token feed the greedy one."""
    reference, mask = (Recomputed if reach == 1 else Reference)(model), left_padded(prompt)
    torch.manual_seed(1)
    ids = random_ids(model, *mask.shape)
    for tokens in (*STEPS, *more, 0):
        with WidenedIslands():
            got, expected = compiled(ids, mask), reference.step(ids, mask)
        assert deviation(got, expected, mask) <= EXACT
        last = expected[:, -1].argmax(-1)
        assert torch.equal(got[:, -1].argmax(-1), last)
        mask = torch.ones(len(prompt), tokens, dtype=torch.int64)
        ids = last[:, None] if tokens == 1 else random_ids(model, len(prompt), tokens)


QUICK = [
    ("mistral", 5, {"cp": 4, **WRAPS}, [390, 2, 131]),
    ("gemma3", 7, {"cp": 2, "tpa": 2, "merge": "ag_rs", "tokens_per_block": 8}, [5, 2, 13]),
]
MANY = [
    (name, reach, plan, prompt)
    for name in ("mistral", "gemma3", "olmo3", "llama4")
    for reach, lengths, prompt in (
        (1, {}, [5, 2, 13]),
        (2, {}, [5, 2, 13]),
        (5, WRAPS, [5, 2, 250]),
        (23, {}, [5, 2, 41]),
        (130, WRAPS, [500, 3, 129]),
    )
    for plan in ({"cp": 2, **lengths}, {"cp": 4, "tokens_per_block": 1, **lengths}, {"cp": 2, "tpa": 2, **lengths})
    if name != "olmo3" or "tpa" not in plan  # its norms of q and k mix the heads
]


@pytest.mark.parametrize(
    ("name", "reach", "plan", "prompt"), [*QUICK, *(pytest.param(*m, marks=SLOW) for m in MANY)], ids=str
)
def test_fp64(name: str, reach: int, plan: dict[str, Any], prompt: list[int]) -> None:
    """Shorter than a block, than the prompt, than a page and not; T of 1, 3, 5, and of more than is left of a page."""
    model = windowed(name, reach)
    more = (120, 1, 2) if plan.get("max_seq_len") and max(prompt) < 500 else ()
    check_exact(model, poisoned(model, **plan, **ALONE), prompt, reach, more)


FAMILIES_TOO = [
    ("dots3_note", "", {"sliding_window": 6}, {"cp": 4, **WRAPS}),
    ("dots3_note", "", {"sliding_window": 5}, {"cp": 2, "tpa": 2, "v_up": "before"}),
    ("dots3_note", "sliding", {"sliding_window": 5}, {"cp": 4, "tokens_per_block": 1}),
    ("gpt_oss", "", {}, {"cp": 2, "tpa": 2, "merge": "ag_rs", "unmatched": "keep"}),
    ("gpt_oss", "", {"num_attention_heads": 8, "num_key_value_heads": 2}, {"cp": 4, "unmatched": "keep"}),
    ("granite_swa", "", {}, {"cp": 2, **WRAPS}),
    ("gemma4", "", {"sliding_window": 5}, {"cp": 4, **WRAPS}),
    ("gemma4", "", {"sliding_window": 3}, {"cp": 2, "tpa": 2}),
    ("gemma3n", "", {}, {"cp": 2}),
]


@pytest.mark.parametrize(
    ("name", "variant", "changes", "plan"),
    [("gemma4", "", {"sliding_window": 5}, {"cp": 2, "tpa": 2}), *(pytest.param(*f, marks=SLOW) for f in FAMILIES_TOO)],
    ids=str,
)
def test_other_kinds_of_site(name: str, variant: str, changes: dict[str, Any], plan: dict[str, Any]) -> None:
    """Latents, sinks, K and V that a later layer reads; one KV head that several ranks have."""
    model = fresh_family(name, variant, **changes)
    compiled = poisoned(model, **plan, **ALONE)
    sites = [a for body in compiled.plan.bodies for a in body.attentions]
    assert all(bool(a.ring) == bool(a.window) for a in sites) and any(a.ring for a in sites)
    check_exact(model, compiled, [390, 2, 131] if "max_seq_len" in plan else [5, 2, 13])


@SLOW
@pytest.mark.parametrize("fp8", [{"cache_dtype": "fp8_e4m3", "cache_scale": (0.01, 0.002)}], ids=str)
def test_a_cache_in_fp8(fp8: dict[str, Any]) -> None:
    model, rounding = awkward_windows(torch.float64), CacheRounding((0.01, 0.002))
    compiled = helix_compile(model, cp=2, max_seq_len=256, unmatched="keep", **fp8, **ALONE)
    poison(compiled)
    assert worst_deviation(model, compiled, [6, 11, 30], (1, 2, 5, 1), rounded_reference(model, rounding)) <= EXACT


def test_pages_of_a_ring_are_distinct_while_they_are_read() -> None:
    """By counting pages of every step that is allowed, with what it may take back; and one token more is one too many."""
    for reach in (1, 2, 5, 127, 128, 129, 130, 300, 1024):
        pages, room = ring_pages(reach, 10_000), 10_000
        most = longest_step(pages, reach, room)
        assert most >= 128
        for tokens, fits in ((most, True), (most + 1, False)):
            spans = {(p + tokens - 1) // 128 - max(0, p - reach + 1) // 128 + 1 for p in range(2000, 2000 + 256)}
            assert (max(spans) <= pages) == fits, (reach, tokens)
        for deepest in (1, pages * 128, pages * 128 + 1, 5000):
            assert first_held(deepest, pages) == max(0, ((deepest - 1) // 128 - pages + 1) * 128)
        table = ring_table(2, pages, room)
        assert table[0, pages] == table[0, 0] and len(table[:, :pages].unique()) == 2 * pages
    assert ring_pages(5000, 600) == 5 and longest_step(5, 5000, 600) == 600  # no larger than the capacity


def test_what_is_taken_back_is_as_if_it_had_never_been() -> None:
    """Drafts behind a ring that has begun again; what it has forgotten is refused, and nothing changes."""
    model = windowed("mistral", 5)
    compiled, reference = poisoned(model, cp=2, **WRAPS, **ALONE), Reference(model)
    ids = random_ids(model, 2, 400)
    ones = torch.ones_like(ids)
    with WidenedIslands():
        compiled(ids), reference.step(ids, ones)
        for drafts, kept in ((3, 1), (120, 0), (4, 4)):
            compiled(random_ids(model, 2, drafts) if kept < drafts else ids[:, :drafts])
            length = compiled.lengths[0] - drafts
            if kept == drafts:
                reference.step(ids[:, :drafts], ones[:, :drafts])
            else:
                compiled.truncate(int(length))
            probe = random_ids(model, 2, 1)
            assert deviation(compiled(probe), reference.step(probe, ones[:, :1]), ones[:, :1]) <= EXACT
        lengths = compiled.lengths
        with pytest.raises(
            RuntimeFault, match=r"truncate: sequence 1 of 100 tokens: .* from 96 on, .* keeps those from 256 on"
        ):
            compiled.truncate(torch.tensor([400, 100]))
        assert torch.equal(compiled.lengths, lengths)
        compiled.truncate(0)
        fresh, again = Reference(model), ids[:, :9]
        assert deviation(compiled(again), fresh.step(again, ones[:, :9]), ones[:, :9]) <= EXACT


def test_a_step_that_was_interrupted_behind_what_is_kept_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model = windowed("mistral", 5)
    compiled = poisoned(model, cp=2, **WRAPS, **ALONE)
    ids, runs = random_ids(model, 1, 600), list[int]()
    compiled(ids[:, :10])
    run = type(compiled.world).run

    def interrupted(*args: Any) -> Any:
        runs.append(1)
        if len(runs) == 3:
            raise KeyboardInterrupt
        return run(*args)

    monkeypatch.setattr(type(compiled.world), "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compiled(ids)
    assert compiled.lengths.tolist() == [10]
    with pytest.raises(RuntimeFault, match=r"a step: sequence 0 of 10 tokens: .*reset"):
        compiled(ids[:, :1])
    compiled.reset()
    compiled(ids[:, :1])


def test_a_cache_comes_in_and_leaves_while_it_is_whole() -> None:
    model = windowed("mistral", 5)
    compiled, ids = poisoned(model, cp=2, **WRAPS, **ALONE), random_ids(model, 2, 440)
    mask = left_padded([440, 300])
    whole, forgetful = Reference(model), Reference(model)
    whole.cache = DynamicCache()  # without a config: all tokens of every layer
    with WidenedIslands():
        whole.step(ids, mask), forgetful.step(ids, mask)
        compiled.import_cache(whole.cache, mask=mask)
        probe, ones = random_ids(model, 2, 3), torch.ones(2, 3, dtype=torch.int64)
        assert deviation(compiled(probe, ones), forgetful.step(probe, ones), ones) <= EXACT
        with pytest.raises(RuntimeFault, match=r'export: sequence 0 has 443 tokens, .* from 128 on.*window="shard"'):
            compiled.export_cache()
        compiled.reset()
        first = compiled(ids[:, :300])
        entries = compiled.export_cache()
        sharded = poisoned(model, cp=4, **WRAPS)
        sharded.import_cache(*entries)
        assert deviation(sharded(probe), compiled(probe), ones) <= EXACT and first.isfinite().all()
        compiled.import_cache(*sharded.export_cache())
        assert deviation(compiled(probe), sharded(probe), ones) <= EXACT


def test_generate_and_a_saved_module(tmp_path: Any) -> None:
    model = windowed("gemma3", 7)
    compiled = helix_compile(model, cp=2, tokens_per_block=3, max_batch_size=2, max_seq_len=64, **ALONE)
    compiled.save(tmp_path / "module")
    loaded = HelixModule.load(tmp_path / "module")
    assert loaded.plan == compiled.plan
    ids = random_ids(model, 1, 9)
    settings = {"max_new_tokens": 12, "do_sample": False}
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    for module in (compiled, loaded):
        assert torch.equal(module.generate(ids, **settings), expected)
        assert torch.equal(module.generate(ids, prompt_lookup_num_tokens=3, **settings), expected)


@functools.cache
def replicated() -> tuple[Any, HelixModule]:
    model = windowed("gemma3", 7)
    return model, helix_compile(model, cp=4, tokens_per_block=3, max_batch_size=3, max_seq_len=600, **ALONE)


def test_the_plan_says_what_it_holds_and_the_world_counts_the_same() -> None:
    """One of two layers has a window: it exchanges nothing, and its cache is no part of what a token takes."""
    model, compiled = replicated()
    plan = compiled.plan
    window, whole = (body.attentions[0] for body in plan.bodies)
    assert (window.ring, whole.ring) == (3, 0) and window.cached_heads(plan.layout) == 1
    assert [c.op for c in plan.bodies[0].collectives] == ["all_reduce", "all_reduce"]
    (said,) = (dict(d.inputs) for d in plan.decisions if d.name == "window 7")
    ring = 3 * 128 * (10 + 10) * 8
    assert said["bytes_of_a_sequence_per_rank"] == plan.ring_bytes_per_sequence_per_rank == ring
    assert plan.kv_bytes_per_token_per_rank == 4 * (10 + 10) * 8 / 4
    assert compiled.ranks[0].cache[0].numel() * 8 == 3 * ring
    compiled.reset()
    compiled.world.reset_counters()
    compiled(random_ids(model, 2, 9))
    assert compiled.world.sent_bytes == [plan.egress_bytes_per_rank_per_token * 18] * 4
    assert HelixPlan.from_json(plan.to_json()) == plan
    facts, text = compiled.inspect().facts, " ".join(str(compiled.inspect()).split())
    assert "the last 384 tokens on each of 4 ranks" in text
    assert f"{ring:,} bytes of a sequence's last tokens" in text
    assert facts["memory_per_rank"]["kv_cache_bytes"] == sum(c.numel() * 8 for c in compiled.ranks[0].cache)
    body = bodies_of(compiled.graph)["body_0"].graph
    assert [input_of.meta["input"][1] for input_of in inputs_of(body, "cache")] == ["ring_cache_0"]
    assert not any(helix_op(n) in ("pack_heads", "merge_lse") for n in body.nodes)
    costs = [predict_costs(b.graph, Workload(2, 1, 400), plan.layout, 3, 1) for b in bodies_of(compiled.graph).values()]
    assert costs[0]["gqa_decode"].flops == 2 * 2 * 3 * 7 * 20  # sequences, own heads, tokens, K and V


def test_a_sound_one_is_accepted() -> None:
    model, compiled = replicated()
    report = verify(compiled, model)
    assert report.ok, str(report)


def test_where_it_has_no_effect_or_cannot_be_it_is_refused() -> None:
    plain = tiny_gqa("llama")
    with pytest.raises(PlanError, match="no attention of this model has a sliding window"):
        helix_compile(plain, cp=2, **ALONE)
    with pytest.raises(PlanError, match="window='replicate' has no effect at cp=1"):
        helix_compile(plain, cp=1, **ALONE)
    model = windowed("mistral", 5)
    with pytest.raises(
        PlanError, match=r'layer 0: .*4 KV heads, and of cp\*tpa = 6 ranks .* nearest that works: window="auto"'
    ):
        helix_compile(model, cp=6, **ALONE)
    with pytest.raises(PlanError, match="merge='ag_rs' has no effect at window='replicate'"):
        helix_compile(model, cp=2, merge="ag_rs", **ALONE)
    with pytest.raises(LayoutError):
        helix_compile(model, cp=5, window="auto")


@pytest.mark.parametrize(
    ("plan", "ring"),
    [
        ({"cp": 4, "tokens_per_block": 32, "max_seq_len": 4096}, True),  # two blocks of four ranks, 3 pages for 8
        ({"cp": 4, "tokens_per_block": 1, "max_seq_len": 4096}, False),  # every rank has some of the window
        ({"cp": 4, "tokens_per_block": 32, "max_seq_len": 256}, True),  # a quarter of the heads for twice the pages
        ({"cp": 6, "tokens_per_block": 32, "max_seq_len": 4096}, False),
    ],
    ids=str,
)
def test_auto(plan: dict[str, Any], ring: bool) -> None:
    compiled = helix_compile(windowed("mistral", 5), window="auto", **plan)
    assert [bool(a.ring) for body in compiled.plan.bodies for a in body.attentions] == [ring]
