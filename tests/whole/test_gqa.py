"""Grouped-query attention: Llama, Qwen3 and Mixtral, unmodified, compute what they compute on one device."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from transformers import DynamicCache

from helix_compile import HelixModule, PlanError, RuntimeFault, helix_compile, verify
from helix_compile.ir.graph import node_named
from helix_compile.verifier.numeric.reference import WidenedIslands
from tests.support.driver import left_padded, random_ids, worst_deviation
from tests.support.gqa_models import fresh_gqa, tiny_gqa
from tests.support.numerics import LIMIT

RAGGED = [6, 11, 9]  # left-padded; with blocks of two tokens the steps cross several
SLOW = pytest.mark.slow
RUNS: list[Any] = [
    ("llama", {"cp": 1}),
    ("llama", {"cp": 2}),
    ("llama", {"cp": 4}),
    ("llama", {"cp": 2, "tpa": 2}),
    ("llama", {"cp": 1, "tpa": 4}),
    ("llama", {"cp": 3, "tpa": 2, "q_proj": "gather", "merge": "ag_rs"}),
    ("llama", {"cp": 2, "merge": "ag_rs"}),
    ("qwen3", {"cp": 4}),
    ("qwen3", {"cp": 2, "tpa": 2, "q_proj": "gather"}),
    ("glm4", {"cp": 2, "tpa": 2}),
    ("gemma3", {"cp": 2, "tpa": 2}),
    ("cohere", {"cp": 2, "tpa": 2}),
    ("ernie", {"cp": 2, "tpa": 2}),
    pytest.param("glm", {"cp": 2, "tpa": 2, "q_proj": "gather"}, marks=SLOW),
    ("mixtral", {"cp": 4}),
    ("mixtral", {"cp": 2, "tpa": 2, "ep": 2}),
    pytest.param("mixtral", {"cp": 2, "tpa": 3, "ep": 1}, marks=SLOW),
    pytest.param("llama_biased", {"cp": 4, "tpa": 3}, marks=SLOW),
    pytest.param("llama_mha", {"cp": 2, "tpa": 6}, marks=SLOW),
    pytest.param("llama_mqa", {"cp": 12}, marks=SLOW),
]


def compiled_gqa(name: str = "llama", dtype: torch.dtype = torch.float64, **plan: Any) -> Any:
    sizes = {"tokens_per_block": 2, "max_batch_size": 3, "max_seq_len": 64}
    return helix_compile(tiny_gqa(name, dtype), **{**sizes, **plan})


@pytest.mark.parametrize(("name", "plan"), RUNS, ids=str)
def test_fp64(name: str, plan: dict[str, Any]) -> None:
    model, compiled = tiny_gqa(name), compiled_gqa(name, **plan)
    assert worst_deviation(model, compiled, RAGGED) <= LIMIT[torch.float64]


@SLOW
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_eager_attention(name: str) -> None:
    model = fresh_gqa(name, attention="eager")
    compiled = helix_compile(model, cp=2, tpa=2, tokens_per_block=2, max_seq_len=64)
    assert worst_deviation(model, compiled, RAGGED) <= LIMIT[torch.float64]


def test_greedy_tokens_and_where_a_token_lives() -> None:
    model, compiled = tiny_gqa(), compiled_gqa(cp=2, tpa=2)
    ids = random_ids(model, 2, 7)
    greedy = {"max_new_tokens": 9, "do_sample": False}
    assert torch.equal(compiled.generate(ids, **greedy), model.generate(ids, **greedy))
    # tpa rank 0 has KV heads 0 and 1, blocks of two tokens go round two ranks
    assert [r.cache[0].shape[2:] for r in compiled.ranks] == [(2, 20)] * 4
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), WidenedIslands():
        compiled.reset()
        compiled(ids)
        model(ids, past_key_values=cache)
    keys, values = cache.layers[1].keys, cache.layers[1].values
    page = int(compiled.page_table[1, 0])
    for rank, heads in zip(compiled.ranks, (slice(0, 2), slice(0, 2), slice(2, 4), slice(2, 4)), strict=True):
        position = 4 if rank.rank % 2 == 0 else 6  # the third and fourth block's first token
        held = rank.cache[1][page, 2]
        wanted = torch.cat([keys[1, heads, position], values[1, heads, position]], dim=-1)
        torch.testing.assert_close(held, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "plan", [{"cp": 4}, {"cp": 2, "tpa": 2, "merge": "ag_rs", "q_proj": "gather"}, {"cp": 1, "tpa": 4}], ids=str
)
def test_the_plan_states_what_is_sent_and_held(plan: dict[str, Any]) -> None:
    model, compiled = tiny_gqa(), compiled_gqa(**plan)
    for T in (5, 1, 3):
        compiled(random_ids(model, 3, T))
    expected = compiled.plan.egress_bytes_per_rank_per_token * 27
    assert expected > 0 and compiled.world.sent_bytes == [expected] * compiled.plan.layout.world_size
    rank = compiled.ranks[0]
    slots = rank.cache[0].shape[0] * rank.cache[0].shape[1]
    per_token = sum(c.numel() * c.itemsize for c in rank.cache) // slots
    cp = compiled.plan.layout.kvp
    assert compiled.plan.kv_bytes_per_token_per_rank * cp == per_token
    held = sum(t.numel() * t.itemsize for t in rank.params.values())
    assert compiled.plan.params_bytes_per_rank == held


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"cp": 1, "tpa": 3},
        PlanError,
        "4 KV heads can't be divided over tpa=3 (4 % 3 = 1): each rank of tpa caches whole KV heads; choose tpa from [1, 2, 4]",
    ),
    ({"cp": 1, "tpa": 12}, PlanError, "4 KV heads can't be divided over tpa=12"),
    (
        {"cp": 2, "v_up": "before"},
        PlanError,
        "option v_up='before' has no effect: no attention of this model has a W_UV",
    ),
    ({"cp": 2, "v_up": "after"}, PlanError, "option v_up='after' has no effect"),
]


@pytest.mark.parametrize(("plan", "error", "message"), REFUSED, ids=str)
def test_plans_that_are_refused(plan: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        compiled_gqa(**plan)


def test_a_window_is_seen_even_where_it_looks_causal() -> None:
    """Mixtral's own window of 100 tokens hides nothing near position 0."""
    model = fresh_gqa("mixtral", num_hidden_layers=1, sliding_window=100)
    for capacity, window in ((128, 100), (64, 0)):
        plan = helix_compile(model, cp=2, max_seq_len=capacity).plan
        assert [a.window for body in plan.bodies for a in body.attentions] == [window]


def test_a_norm_with_a_weight_per_head_stays_whole() -> None:
    """Cohere's use_qk_norm: heads can't be cut, so q, K and V are whole on every rank, or the plan is refused."""
    model = fresh_gqa("cohere", use_qk_norm=True)
    compiled = helix_compile(model, cp=4, tokens_per_block=2, max_batch_size=3, max_seq_len=64)
    assert worst_deviation(model, compiled, RAGGED) <= LIMIT[torch.float64]
    assert verify(compiled, model).ok
    with pytest.raises(
        PlanError,
        match=r"layer 0: tpa=2 cuts q by heads, but rows 0.* `add_\d+` \(modeling_cohere.py:\d+\)\. nearest that works: tpa=1",
    ):
        helix_compile(model, cp=2, tpa=2)
    with pytest.raises(
        PlanError, match=r"layer 0: q_proj=\"gather\" cuts q by heads.* nearest that works: q_proj=\"replicate\""
    ):
        helix_compile(model, cp=2, q_proj="gather")


def swap_keys_of_tpa(compiled: HelixModule) -> None:
    """Ranks of tpa 0 and 1 hold each other's K rows."""
    name = "model.layers.1.self_attn.k_proj.weight"
    for rank in (0, 1):
        a, b = compiled.ranks[rank].params, compiled.ranks[rank + 2].params
        a[name], b[name] = b[name], a[name]


def values_read_keys(compiled: HelixModule) -> None:
    """V is read one channel off."""
    _edit(compiled, "v_cache", lambda n: setattr(n, "args", (n.args[0], 3, 9, 19)))


def wrong_scale(compiled: HelixModule) -> None:
    _edit(compiled, "gqa_decode", lambda n: setattr(n, "args", (*n.args[:5], n.args[5] * 1.01)))


def _edit(compiled: HelixModule, name: str, change: Callable[[fx.Node], None]) -> None:
    body: Any = compiled.graph.get_submodule("body_0")
    change(node_named(body.graph, name))
    body.recompile()


@pytest.mark.parametrize("fault", [swap_keys_of_tpa, values_read_keys, wrong_scale])
def test_broken_modules_are_rejected(fault: Callable[[HelixModule], None]) -> None:
    model, compiled = tiny_gqa(), compiled_gqa(cp=2, tpa=2)
    fault(compiled)
    report = verify(compiled, model)
    assert not report.ok and any(f.code in ("HX401", "HX402", "HX403", "HX404", "HX201") for f in report.findings)
    assert worst_deviation(model, compiled, RAGGED) > 1e-4


@pytest.mark.parametrize("name", ["llama", "ernie", *(pytest.param(n, marks=SLOW) for n in ("cohere", "glm"))])
def test_verify_accepts_a_sound_one(name: str) -> None:
    report = verify(compiled_gqa(name, cp=2, tpa=2), tiny_gqa(name))
    assert report.ok, str(report)
    assert report.coverage.needles > 0 and report.coverage.empty_shards > 0


def prefilled(model: Any) -> tuple[Tensor, Tensor, DynamicCache]:
    """(ids, mask, the unmodified model's cache) of a left-padded prompt."""
    mask, cache = left_padded([2, 5, 3]), DynamicCache(config=model.config)
    ids = random_ids(model, *mask.shape)
    with torch.no_grad(), WidenedIslands():
        model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), past_key_values=cache)
    return ids, mask, cache


def test_the_cache_goes_to_other_degrees_and_back(tmp_path: Path) -> None:
    """Export, import, a transformers cache, truncate, rows that start over, save and load: the next step is the same."""
    model = tiny_gqa()
    one, other = compiled_gqa(cp=2, tpa=2), compiled_gqa(cp=4, tokens_per_block=3)
    ids, mask, cache = prefilled(model)
    more = random_ids(model, 3, 3)
    with WidenedIslands():
        one(ids, mask)
        entries = one.export_cache()
        assert [t.shape for t in entries.latents] == [(3, 5, 40)] * 2
        wanted = one(more)
        one.save(tmp_path / "saved")
        for start in (lambda m: m.import_cache(*entries), lambda m: m.import_cache(cache, mask=mask)):
            for module in (other, one, HelixModule.load(tmp_path / "saved")):
                start(module)
                torch.testing.assert_close(module(more), wanted, rtol=1e-10, atol=1e-10)
        one.truncate([2, 5, 3])
        torch.testing.assert_close(one(more), wanted, rtol=1e-10, atol=1e-10)
        one.reset(rows=[1])
        one(ids, torch.stack([torch.zeros(5), mask[1], torch.zeros(5)]).long())
        one.truncate([2, 5, 3])
        torch.testing.assert_close(one(more), wanted, rtol=1e-10, atol=1e-10)
    back = other.export_cache()
    for a, b in zip((*entries.latents, *entries.k_ropes), (*back.latents, *back.k_ropes), strict=True):
        torch.testing.assert_close(
            a, b[:, :5] * (torch.arange(5) < entries.lengths[:, None])[..., None], rtol=1e-10, atol=1e-10
        )


def test_caches_that_do_not_fit() -> None:
    compiled = compiled_gqa(cp=2)
    entries = [torch.zeros(1, 3, 4, 10, dtype=torch.float64)] * 2
    with pytest.raises(RuntimeFault, match=r"latents must be \[B, S, R\]"):
        compiled.import_cache(entries, entries, [3])
    with pytest.raises(RuntimeFault, match=r"expected R = 40 and r = 40"):
        compiled.import_cache([torch.zeros(1, 3, 10)] * 2, [torch.zeros(1, 3, 10)] * 2, [3])
    cache = DynamicCache(config=tiny_gqa().config)
    for layer in range(2):
        cache.update(torch.zeros(1, 1, 3, 10), torch.zeros(1, 1, 3, 10), layer)
    with pytest.raises(RuntimeFault, match=r"expected \[B, 4, S, width\]: 4 KV heads"):
        compiled.import_cache(cache)


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs kernels on the device")
def test_the_whole_model_by_kernels() -> None:
    compiled = compiled_gqa(dtype=torch.float32, cp=2, tpa=2, lower="triton")
    body: Any = compiled.graph.get_submodule("body_0")
    chosen = {str(n.target).split(".", 1)[0] for n in body.graph.nodes if "kernel" in n.meta}
    assert chosen == {"helix_triton"}
    assert worst_deviation(tiny_gqa(dtype=torch.float32), compiled, [5, 1], (1, 3)) <= 2e-5


@SLOW
def test_a_users_own_loop_by_torch_compile() -> None:
    model = fresh_gqa("qwen3")
    torch._dynamo.reset()
    options = {"cp": 2, "tpa": 2, "max_seq_len": 64, "max_batch_size": 2, "tokens_per_block": 2}
    fast = torch.compile(model, backend="helix", fullgraph=True, options=options)
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    ids = random_ids(model, 2, 7)
    with torch.no_grad():
        for _ in range(6):
            got, wanted = (
                m(input_ids=ids, past_key_values=c, use_cache=True).logits
                for m, c in zip((fast, model), caches, strict=True)
            )
            assert (got - wanted).abs().max() <= 1e-7 * wanted.abs().max()
            ids = wanted[:, -1:].argmax(-1)
    assert caches[0].layers[0].keys.stride() == (0, 0, 0, 0)
    torch._dynamo.reset()
