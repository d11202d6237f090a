"""The verifier's own references, each against something older than itself or a hand-made case."""

from __future__ import annotations

import math

import pytest
import torch
from torch import fx

from helix_compile import helix_compile
from helix_compile.ir.graph import calls
from helix_compile.ir.stage import copy_module
from helix_compile.layout.ledger import local_slot, owner_rank
from helix_compile.plan.shard import cut_param
from helix_compile.verifier.contract import deal
from helix_compile.verifier.numeric.reference import WidenedIslands
from helix_compile.verifier.numeric.routing import Choices, compare_choices
from helix_compile.verifier.numeric.scratch import Scratch, poisoned_memory
from helix_compile.verifier.numeric.sharpen import need_the_new_token, plant, scores
from helix_compile.verifier.report import Finding, grouped
from helix_compile.verifier.static.graph import COLLECTIVES, same_collectives
from helix_compile.verifier.static.params import part
from tests.support.graphs import captured_tiny
from tests.support.models import tiny_model


@pytest.mark.parametrize(("cp", "tpb"), [(1, 4), (2, 1), (3, 5), (4, 32)])
def test_dealing_agrees_with_the_ledger(cp: int, tpb: int) -> None:
    hands = deal(3 * cp * tpb + 2, cp, tpb)
    for rank, mine in enumerate(hands):
        for slot, position in enumerate(mine):
            assert (owner_rank(position, cp, tpb), local_slot(position, cp, tpb)) == (rank, slot)
    assert sorted(p for mine in hands for p in mine) == list(range(3 * cp * tpb + 2))


def test_slices_agree_with_the_cut_of_every_parameter() -> None:
    compiled = helix_compile(tiny_model(), cp=3, tpa=2, ep=2, q_proj="gather", v_up="after")
    facts, layout = compiled.facts, compiled.plan.layout
    assert any(s.padding(layout, r) for _, s in facts.shards.values() for r in range(6))
    for source, shard in facts.shards.values():
        whole = facts.originals[source]
        for rank in range(6):
            assert torch.equal(part(whole, shard, layout, rank), cut_param(whole, shard, layout, rank))


def test_a_needle_scores_what_it_should() -> None:
    from helix_compile.passes.match.layers import match_layers

    match = match_layers(captured_tiny(), 64)["body_0"].attentions[0]
    torch.manual_seed(1)
    S, H = 40, match.num_heads
    R, r = match.cache.widths
    query = (torch.randn(1, 2, H, R, dtype=torch.float64), torch.randn(1, 2, H, r, dtype=torch.float64))
    latent = torch.randn(1, S, R, dtype=torch.float64)
    k_rope = torch.randn(1, S, r, dtype=torch.float64)
    before = scores(match, query, latent, k_rope)[0, -1, 0].max()
    assert plant(match, query, latent, k_rope, [S]) == 5
    first = scores(match, query, latent, k_rope)[0, -1, 0, 0]
    assert float(first) == pytest.approx(float(before) + math.log(S) / 2 + 4)

    new = (torch.randn(1, 2, R, dtype=torch.float64), torch.zeros(1, 2, r, dtype=torch.float64))
    zeros = torch.zeros_like(k_rope)
    assert need_the_new_token(match, query, new, latent, [S]) == 2
    past = scores(match, query, latent, zeros)[0, -1, -2:].logsumexp(-1)
    own = scores(match, query, new[0][:, -1:], new[1][:, -1:])[0, -1, -2:, 0]
    assert bool((own > past + 2).all())  # the new token outweighs all others together


def test_memory_that_nobody_wrote_is_nan_only_while_open() -> None:
    with poisoned_memory():
        assert bool(torch.empty(3).isnan().all()) and bool(torch.ones(2).new_empty(2).isnan().all())
    assert not torch.are_deterministic_algorithms_enabled()


def test_scratch_pages_are_shuffled_and_poisoned() -> None:
    compiled = helix_compile(tiny_model(), cp=2)
    scratch = Scratch(compiled, compiled.graph, [dict(r.params) for r in compiled.ranks], 2, 900)
    table, cache = scratch.page_table, scratch.caches[0][0]
    assert table.shape == (2, 4) and len(table.unique()) == 8
    assert not torch.equal(table.flatten(), torch.arange(8))
    unused = [p for p in range(len(cache)) if p not in table.flatten().tolist()]
    assert unused and bool(cache[unused].isnan().all()) and bool(cache[table.flatten()].isfinite().all())


def test_widened_keeps_float64_through_casts() -> None:
    x = torch.full((3,), 1 + 1e-12, dtype=torch.float64)
    with WidenedIslands(torch.bfloat16):
        assert torch.equal(x.to(torch.float32), x) and torch.equal(x.to(torch.bfloat16), x)
        assert torch.ones(2, dtype=torch.bfloat16).dtype is torch.float64
    assert x.to(torch.float32).dtype is torch.float32


def test_a_clear_choice_and_a_near_tie() -> None:
    expected, got = Choices(), Choices()
    scores_of = torch.tensor([[3.0, 1.0, 2.0], [2.0, 2.0 - 1e-14, 1.0], [3.0, 2.0, 1.0]], dtype=torch.float64)
    expected.add(scores_of, scores_of.topk(1).indices)
    got.add(None, torch.tensor([[0], [1], [2]]))
    routing = compare_choices(got, expected, 1, 3, torch.float64)
    assert routing.alike.tolist() == [[True, False, False]]
    assert routing.near_tie.tolist() == [[False, True, False]]


def test_chunks_are_joined_in_order_of_tokens() -> None:
    whole, chunks = Choices(), [Choices(), Choices()]
    table = torch.arange(2 * 5).view(2, 5, 1)  # B = 2, T = 5
    for chunk, part_of in zip(chunks, table.split([3, 2], dim=1), strict=True):
        chunk.add(torch.randn(part_of.numel(), 4), part_of.reshape(-1, 1))
    whole.join(chunks, 2)
    assert whole.indices[0].flatten().tolist() == list(range(10)) and len(whole.margins[0]) == 10


def test_ranks_with_other_collectives() -> None:
    graph = helix_compile(tiny_model(), cp=2).graph
    other = copy_module(graph)
    body = other.get_submodule("body_1")
    assert isinstance(body, fx.GraphModule)
    calls(body.graph, *COLLECTIVES)[-1].update_arg(2, "kvp")
    assert same_collectives([graph, graph]) == []
    (finding,) = same_collectives([graph, other])
    assert finding.code == "HX108" and "kvp" in finding.got and "world" in finding.expected


def test_findings_that_differ_in_numbers_are_told_once() -> None:
    many = [Finding("HX201", f"parameter layers.{i}.w", f"rank {i}", "x") for i in range(61)]
    one, other = grouped([*many, Finding("HX202", "parameter layers.0.w", "a", "b")])
    assert one.where == "parameter layers.0.w (and 60 like it)" and other.code == "HX202"


def test_a_widened_island_that_meets_numbers_in_float32() -> None:
    """Frequencies are widened, positions are made in float32: a product takes one dtype alone."""
    frequencies, positions = torch.rand(2, 3, 1, dtype=torch.float64), torch.arange(4).expand(2, 1, 4)
    with WidenedIslands():
        product = frequencies.float() @ positions.float()
    assert product.dtype is torch.float64 and torch.equal(product, frequencies @ positions.double())
