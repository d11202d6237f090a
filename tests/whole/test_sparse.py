"""Sparse attention (an indexer chooses top_k cached tokens): exact against the unmodified model, whose ties go by position."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from helix_compile import HelixModule, HelixOptions, helix_compile
from helix_compile.capture.captured import CapturedGraph
from helix_compile.capture.model import capture
from helix_compile.compile import plan_model
from helix_compile.errors import PlanError
from helix_compile.verifier.numeric.reference import WidenedIslands
from tests.support.driver import Reference, deviation, left_padded, random_ids
from tests.support.families import fresh_family
from tests.support.sparse import TiesByPosition, sparse_deviation

STEPS = (1, 2, 3, 5, 1)
LIMIT = 1e-10


@cache
def captured_model(name: str, top_k: int, ties: bool = False) -> tuple[Any, CapturedGraph]:
    """24 heads; `ties`: all scores of the first layer are 0, so that they tie across all ranks."""
    model = fresh_family(name, index_topk=top_k, num_attention_heads=24, num_key_value_heads=24)
    if ties:
        with torch.no_grad():
            model.model.layers[0].self_attn.indexer.weights_proj.weight.zero_()
    return model, capture(model)


def compiled_sparse(graph: CapturedGraph, **plan: Any) -> HelixModule:
    """Caches are poisoned: what is not written may not be read."""
    compiled = helix_compile(graph, **{"max_batch_size": 3, "max_seq_len": 64, **plan})
    for rank in compiled.ranks:
        for tensor in rank.cache:
            tensor.fill_(torch.nan)
    return compiled


# cp, tpa, tokens_per_block, prompt lengths; top_k is 7: below, at and above it, empty shards
PLANS = [(3, 2, 3, [7, 1, 41]), (4, 1, 1, [6, 8, 7]), (8, 1, 32, [41, 3, 6])]
MORE = [
    (1, 1, 32, [5, 2, 41]),
    (2, 2, 1, [5, 2, 17]),
    (8, 3, 1, [3, 1, 2]),
    (3, 1, 2, [6, 7, 8]),
    (2, 1, 3, [40, 1, 7]),
]
CASES = [("axk2", PLANS[0], "owner"), ("glm_moe_dsa", PLANS[1], "gather"), ("deepseek_v32", PLANS[2], "owner")]


@pytest.mark.parametrize(("name", "plan", "exchange"), CASES, ids=str)
def test_exact(name: str, plan: tuple[int, int, int, list[int]], exchange: str) -> None:
    cp, tpa, tokens_per_block, lengths = plan
    model, graph = captured_model(name, 7)
    compiled = compiled_sparse(graph, cp=cp, tpa=tpa, tokens_per_block=tokens_per_block, topk_exchange=exchange)
    assert sparse_deviation(model, compiled, lengths, STEPS) <= LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("top_k", [1, 7, 16, 64])
@pytest.mark.parametrize("plan", [*PLANS, *MORE], ids=str)
@pytest.mark.parametrize("name", ["deepseek_v32", "glm_moe_dsa", "axk2"])
def test_every_plan(name: str, plan: tuple[int, int, int, list[int]], top_k: int) -> None:
    cp, tpa, tokens_per_block, lengths = plan
    model, graph = captured_model(name, top_k, ties=top_k == 16)
    exchange = (
        {"merge": "ag_rs" if cp == 3 else "a2a", "topk_exchange": "gather" if tpa == 1 else "owner"} if cp > 1 else {}
    )
    compiled = compiled_sparse(graph, cp=cp, tpa=tpa, tokens_per_block=tokens_per_block, **exchange)
    assert sparse_deviation(model, compiled, lengths, STEPS) <= LIMIT


def test_scores_that_all_tie_across_ranks() -> None:
    """Every key of the first layer scores 0: the earliest top_k are chosen, by every rank alike."""
    model, graph = captured_model("deepseek_v32", 7, ties=True)
    compiled = compiled_sparse(graph, cp=4, tokens_per_block=2)
    assert sparse_deviation(model, compiled, [19, 3, 8], STEPS) <= LIMIT


def test_a_union_of_local_choices_is_another_algorithm() -> None:
    """What one engine shipped: each rank attends to its own best keys. The steps above must tell the two apart."""
    model, graph = captured_model("deepseek_v32", 7)
    compiled = compiled_sparse(graph, cp=4, tokens_per_block=1)
    chosen = 0
    for body in (child for name, child in compiled.graph.named_children() if name.startswith("body")):
        for node in [n for n in body.graph.nodes if n.target is torch.ops.helix.kth_candidate.default]:
            own = next(n for n in body.graph.nodes if n.target is torch.ops.helix.topk_candidates.default)
            with body.graph.inserting_before(node):
                node.args = (body.graph.call_function(torch.ops.aten.unsqueeze.default, (own, 0)), node.args[1])
            chosen += 1
        body.recompile()
    assert chosen
    assert sparse_deviation(model, compiled, [5, 2, 41], STEPS) > 1e-3


@cache
def _prefilled() -> Any:
    model, graph = captured_model("glm_moe_dsa", 7)
    return model, compiled_sparse(graph, cp=3, tokens_per_block=2)


def _prompt(model: Any) -> Reference:
    torch.manual_seed(5)
    reference, mask = Reference(model), left_padded([5, 2, 19])
    ids = random_ids(model, *mask.shape)
    with WidenedIslands(), TiesByPosition(*ids.shape):
        reference.step(ids, mask)
    return reference


def _next_step(model: Any, reference: Reference, compiled: HelixModule) -> float:
    ids, mask = random_ids(model, 3, 2), torch.ones(3, 2, dtype=torch.int64)
    with WidenedIslands():
        got = compiled(ids, mask)
        with TiesByPosition(*ids.shape):
            return deviation(got, reference.step(ids, mask), mask)


def test_index_keys_are_handed_over() -> None:
    """From transformers' own cache, out of ours into one of another cp, and back to a shorter length."""
    model, compiled = _prefilled()
    reference = _prompt(model)
    compiled.import_cache(reference.cache, mask=left_padded([5, 2, 19]))
    assert _next_step(model, reference, compiled) <= LIMIT
    other = compiled_sparse(captured_model("glm_moe_dsa", 7)[1], cp=4, tokens_per_block=3)
    other.import_cache(*compiled.export_cache())
    assert _next_step(model, reference, other) <= LIMIT
    compiled(random_ids(model, 3, 3))
    compiled.truncate([7, 4, 21])
    reference = _prompt(model)
    compiled.import_cache(reference.cache, mask=left_padded([5, 2, 19]))
    compiled(random_ids(model, 3, 3))
    compiled.truncate([5, 2, 19])
    assert _next_step(model, reference, compiled) <= LIMIT


def test_index_keys_as_tensors_of_their_own() -> None:
    model, compiled = _prefilled()
    reference = _prompt(model)
    layers = reference.cache.layers
    latents, ropes = ([getattr(x, part).squeeze(1) for x in layers] for part in ("keys", "values"))
    index_keys = [x.indexer_keys for x in layers]
    assert [k is None for k in index_keys] == [False, True, False, True]  # shared layers have no indexer
    mask = left_padded([5, 2, 19])
    compiled.import_cache(latents, ropes, [5, 2, 19], mask, index_keys=index_keys)
    assert _next_step(model, reference, compiled) <= LIMIT
    with pytest.raises(Exception, match=r"attention 1: index keys \(3, 19, 16\), expected None"):
        compiled.import_cache(latents, ropes, [5, 2, 19], mask, index_keys=[index_keys[0]] * 4)
    with pytest.raises(Exception, match=r"widths 20 and 6; expected R = 20 and r = 22"):
        compiled.import_cache(latents, ropes, [5, 2, 19], mask)


def test_saved_and_loaded(tmp_path: Any) -> None:
    model, compiled = _prefilled()
    compiled.reset()
    compiled.save(tmp_path / "module")
    loaded = HelixModule.load(tmp_path / "module")
    assert sparse_deviation(model, loaded, [5, 2, 19], (1, 2)) <= LIMIT


def test_the_plan_says_what_is_cached_and_sent() -> None:
    _, graph = captured_model("glm_moe_dsa", 7)
    plan = compiled_sparse(graph, cp=4, tokens_per_block=3).plan
    # latents, roped keys, and index keys of two layers of four; float64, but the model's scores are float32
    assert plan.kv_bytes_per_token_per_rank * 4 == 8 * (4 * (20 + 6) + 2 * 16)
    candidates = [c for body in plan.bodies for c in body.collectives if c.what == "top-k candidates"]
    assert [c.egress_bytes_per_rank_per_token for c in candidates] == [3 * 7 * 8] * 2  # score and position, to 3 others
    assert [a.top_k for body in plan.bodies for a in body.attentions] == [7, 0, 7]
    assert type(plan).from_json(plan.to_json()) == plan


def test_owners_send_less_and_are_chosen_where_that_pays() -> None:
    _, graph = captured_model("deepseek_v32", 7)
    plan = compiled_sparse(graph, cp=4, tokens_per_block=3, topk_exchange="owner").plan
    exchange = [c for c in plan.bodies[0].collectives if c.what in ("top-k candidates", "k-th keys")]
    # three of four owners are others, and each tells its share of the answers to three others
    assert [c.egress_bytes_per_rank_per_token for c in exchange] == [7 * 8 * 3 / 4, 8 / 4 * 3]
    assert [c.tokens_rounded_to for c in exchange] == [4, 4]
    assert compiled_sparse(graph, cp=4).plan.topk_exchange == "gather"
    # no cache of that size is made
    many = plan_model(graph, HelixOptions(cp=8, max_batch_size=2**15, max_seq_len=8)).plan
    assert many.topk_exchange == "owner"
    (decided,) = [d for d in many.decisions if d.name == "topk_exchange"]
    k, tokens = 7, 2**15
    assert dict(decided.inputs)["gather_bytes"] == 7 * k * 8 * tokens
    assert dict(decided.inputs)["owner_bytes"] == (7 * k * 8 / 8 + 7 * 8 / 8) * tokens


@pytest.mark.parametrize("exchange", ["gather", "owner"])
def test_what_is_sent_is_what_the_plan_says_of_any_number_of_tokens(exchange: str) -> None:
    """As the model computes: its islands in float32. 1 to 6 queries, dealt to 4 owners."""
    _, graph = captured_model("deepseek_v32", 7)
    compiled = compiled_sparse(graph, cp=4, topk_exchange=exchange)
    for B, T in ((1, 1), (3, 1), (2, 2), (1, 5), (3, 2)):
        compiled.reset()
        compiled.world.reset_counters()
        compiled(torch.zeros(B, T, dtype=torch.int64))
        assert compiled.world.sent_bytes == [compiled.plan.egress_bytes_per_rank(B * T)] * 4
    one, per_token = compiled.plan.egress_bytes_per_rank(1), compiled.plan.egress_bytes_per_rank_per_token
    assert (one > per_token) == (exchange == "owner") and compiled.plan.egress_bytes_per_rank(8) == 8 * per_token


def test_an_exchange_without_choices_has_no_effect() -> None:
    with pytest.raises(PlanError, match="topk_exchange='owner' has no effect: no layer of this model chooses"):
        helix_compile(capture(fresh_family("youtu")), cp=2, topk_exchange="owner")
