"""The planner's costs are those of the compiled graph: one cost function, and sizes that are scaled as compiling scales them."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from helix_compile import HelixError, helix_compile
from helix_compile.ir.graph import is_param, placeholders
from helix_compile.ir.stage import body_of
from helix_compile.predict.costed import Candidate, CostedModel
from helix_compile.predict.costs import Workload, predict_costs
from helix_compile.predict.overlap import rows_of_parts
from helix_compile.predict.scaling import is_weight
from helix_compile.predict.schedule import predict_step
from helix_compile.predict.search import Search
from helix_compile.predict.terms import Term, seen
from tests.support.families import fresh_family
from tests.support.planned import CONTEXT, costed, goal, tiny_costed

BATCH = 12  # a multiple of each cp below, so that no rank's share of the tokens is rounded
RANKS = (1, 2, 3, 4, 6, 8, 12, 16)
Sums = tuple[float, float, float, float, float]


def drawn(model: CostedModel, count: int) -> list[Candidate]:
    every = [c for n in RANKS for c in model.choices(n)]
    return random.Random(20).sample(every, count)


def of_planner(model: CostedModel, candidate: Candidate, layout: Any = None) -> Sums:
    """Flops, bytes, of these weights and cache, and wire bytes of a step, all layers."""
    found = [0.0] * 5
    for group in model.structure(candidate).terms(layout or candidate.layout):
        for term, batch in ((t, b) for t in group.terms for b in batches_of(t, group.parts)):
            local = seen(term.reach, CONTEXT - 1, candidate.cp, model.base.tokens_per_block)
            hit = 1 - (1 - term.routed[0] / term.routed[1]) ** BATCH if term.routed else 1.0
            own = (
                term.flops_at(batch, local),
                term.bytes_at(batch, local),
                hit * term.weights,
                term.cached * batch * local,
                term.wire * batch,
            )
            found = [a + group.layers * b for a, b in zip(found, own, strict=True)]
    return tuple(found)  # type: ignore[return-value]


def batches_of(term: Term, parts: int) -> list[int]:
    """Of what is done once for each part, the batch that each part is a part of; with all rows, all of them."""
    if term.chunk is None:
        return [BATCH]
    return [BATCH if term.whole else rows * parts for rows in rows_of_parts(BATCH, parts)]


def of_graph(compiled: Any) -> Sums:
    """The same of what was compiled, as inspect counts it; embedding and head are no weights that a format changes."""
    plan, found = compiled.plan, [0.0] * 5
    parts = [(len(b.layers), body_of(compiled.graph, b.name).graph, True) for b in plan.bodies]
    for layers, graph, formats in [*parts, (1, compiled.graph.graph, False)]:
        costs = predict_costs(graph, Workload(BATCH, 1, CONTEXT - 1), plan.layout, plan.options.tokens_per_block)
        # what does something else with its weight too, as a cast of them, keeps it as it is
        kept = {u.name for n in placeholders(graph) if is_param(n) and not is_weight(n) for u in n.users}
        for name, cost in costs.items():
            weights = cost.weight_bytes if formats and name not in kept else 0.0
            own = (cost.flops, cost.hbm_bytes, weights, cost.cache_bytes, cost.wire_bytes)
            found = [a + layers * b for a, b in zip(found, own, strict=True)]
    return tuple(found)  # type: ignore[return-value]


def check(model: CostedModel, candidate: Candidate) -> None:
    compiled = helix_compile(model.captured, options=candidate.options(model.base), world="virtual")
    assert of_planner(model, candidate) == pytest.approx(of_graph(compiled), rel=1e-12), candidate
    assert sum(model.structure(candidate).params_bytes(candidate.layout)) == compiled.plan.params_bytes_per_rank
    assert model.kv_bytes(candidate) == compiled.plan.kv_bytes_per_token_per_rank
    sent = compiled.plan.egress_bytes_per_rank_per_token
    assert of_planner(model, candidate)[-1] == pytest.approx(float(sent) * BATCH, rel=1e-12)
    asked = goal(batches=(BATCH,))
    (point,) = Search(model, asked).of(candidate)
    step = predict_step(compiled.plan, compiled.graph, Workload(BATCH, 1, CONTEXT - 1), asked.accelerator)
    assert point.step_us == pytest.approx(step.total, rel=1e-9)  # as inspect says it


@pytest.mark.parametrize("count", [6, pytest.param(20, marks=pytest.mark.slow)])
def test_drawn_layouts_cost_what_their_compiled_graphs_do(count: int) -> None:
    model = tiny_costed()
    layouts = drawn(model, count)
    assert {True, False} == {c.pad_heads for c in layouts} and {"a2a", "ag_rs"} == {c.merge for c in layouts}
    assert {"none", "hopb"} == {c.overlap for c in layouts}
    for candidate in layouts:
        check(model, candidate)


def test_sizes_of_another_layout_are_seen() -> None:
    """What the check above must reject: the sizes that the graph was lowered for, a floor in place of a ceil, peers of another cp."""
    model = tiny_costed()
    wanted = Candidate(cp=8, tpa=1, ep=8, tpf=1, v_up="after")
    right = of_planner(model, wanted)
    structure = model.structure(wanted)
    lowered_for = of_planner(model, wanted, structure.plan.layout)
    flops, read, weights, _, wire = (a != b for a, b in zip(right, lowered_for, strict=True))
    assert flops and read and weights and wire  # a latent's bytes go by the context of a rank alone
    other_cp = of_planner(model, wanted, Candidate(cp=4, tpa=2, ep=8, tpf=1).layout)
    assert other_cp[-1] != right[-1] and other_cp[2] != right[2]


@pytest.mark.slow
@pytest.mark.parametrize("heads", [(12, 4), (8, 8), (6, 1)], ids=str)
def test_grouped_attention(heads: tuple[int, int]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=96,
        intermediate_size=150,
        num_hidden_layers=2,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        head_dim=12,
        max_position_embeddings=1 << 16,
    )
    with torch.device("meta"):
        llama = LlamaForCausalLM(config).eval()
    model = costed(llama, head="shard")
    for candidate in drawn(model, 12):
        check(model, candidate)


@pytest.mark.parametrize(
    ("name", "variant", "kinds"),
    [
        pytest.param("deepseek_v32", "", {"all", "top"}, marks=pytest.mark.slow, id="deepseek_v32"),
        pytest.param("mistral", "window", {"window"}, id="mistral"),
        pytest.param("llama4", "dense", {"all", "chunk"}, marks=pytest.mark.slow, id="llama4"),
    ],
)
def test_sparse_and_windowed_attention(name: str, variant: str, kinds: set[str]) -> None:
    """What an indexer chooses, what a window and what a chunk lets a query see."""
    options = {"topk_exchange": "gather"} if name == "deepseek_v32" else {}
    model = costed(fresh_family(name, variant, dtype=torch.bfloat16).to("meta"), **options)
    every = [c for n in (1, 2, 4, 6) for c in model.choices(n)]
    layouts = random.Random(1).sample(every, min(6, len(every)))
    for candidate in layouts:
        check(model, candidate)
    terms = [t for c in layouts for g in model.structure(c).terms(c.layout) for t in g.terms if t.kind == "attention"]
    assert {t.reach[0] for t in terms} == kinds
    if kinds != {"all", "top"}:  # another cache and another exchange: refused by name
        with pytest.raises(
            HelixError, match="window='replicate': caches of the last tokens on every rank are not costed"
        ):
            CostedModel(model.captured, model.matches, replace(model.base, window="replicate"))
