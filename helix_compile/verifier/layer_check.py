"""One layer at a time on identical inputs, with needle keys and unequal shards: attention, layer output, cache.

Four comparisons, each by a reference of its own:

    choice      where an indexer chooses: the ranks' keys by the contract, and the original's choice      (HX410)
    attention   dense attention in fp64 over what the ranks' caches hold, with the ranks' own q and keys     (HX402)
    layer       the captured layer of the original in fp64, on the same hidden state, past and keys      (HX403)
    cache       past entries bit by bit, new ones against the original's latent, k_rope and index key     (HX404)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from helix_compile.plan.cache_row import CacheRow
from helix_compile.plan.matches import AttentionMatch, HandedSelection, LayerMatch, Selection
from helix_compile.verifier.bisect.walk import Located, body_twins, first_deviation
from helix_compile.verifier.contract import deal
from helix_compile.verifier.numeric import choice_check
from helix_compile.verifier.numeric.attention_check import check_attention
from helix_compile.verifier.numeric.cache_check import check_cache
from helix_compile.verifier.numeric.handed import drawn_keys
from helix_compile.verifier.numeric.index_needles import index_keys, score_sizes
from helix_compile.verifier.numeric.indexers import Indexers, by_position
from helix_compile.verifier.numeric.layer_run import CapturedReference, LayerInputs, LayerRun, hidden_shape, run_layer
from helix_compile.verifier.numeric.routing import NEAR_TIE, Choices, RecordTopK
from helix_compile.verifier.numeric.scratch import Scratch
from helix_compile.verifier.numeric.sharpen import background, need_the_new_token, plant
from helix_compile.verifier.numeric.site_terms import (
    Past,
    empty_past,
    entries_of,
    given_as,
    given_length,
    new_entries,
    past_of,
    terms_of,
)
from helix_compile.verifier.numeric.steps import RATIO, Pool, limit_of
from helix_compile.verifier.report import Coverage, Finding, fault, numeric_finding

# tokens of the long context, and what bounds it: the original expands every key and value to fp64
LONG, EXPANDED_BYTES = 2048, 2 * 2**30


@dataclass(frozen=True)
class LayerCase:
    """Past tokens of each sequence and new tokens T of each."""

    lengths: tuple[int, ...]
    T: int


def cases(compiled: Any, match: LayerMatch) -> list[LayerCase]:
    """Nearly empty shards, a step over a block boundary, and one context as long as memory and capacity allow."""
    options, cp = compiled.plan.options, compiled.plan.layout.kvp
    tpb, a = options.tokens_per_block, match.attentions[0]
    turn = cp * tpb
    a_key = a.num_heads * (a.q_head_dim + a.v_head_dim) * 8 * 4
    bound = min(options.max_seq_len, LONG + turn, EXPANDED_BYTES // (a_key * 2))
    room = options.max_seq_len
    found = []
    if room >= 4:
        near = min(turn + tpb - 1, room - 2)
        found.append(LayerCase(_rows(options, (near, min(3, room - 2))), 2))
    if bound > turn + 8 or not found:
        far = max(0, min(bound, room) - 3) if bound > 4 else 0
        found.append(LayerCase(_rows(options, (far, max(1, far // 2) if far else 0)), min(3, room - far)))
    # where a window or chunks begin to forget, and a block or so further on
    for reach in sorted({a.window or a.chunk for a in match.attentions} - {0}):
        behind = min(reach + tpb + 1, room - 3)
        if reach <= behind <= EXPANDED_BYTES // (a_key * 2):
            found.append(LayerCase(_rows(options, (behind, reach - 1)), 3))
    return found


def _rows(options: Any, lengths: tuple[int, ...]) -> tuple[int, ...]:
    return lengths[: options.max_batch_size]


@dataclass
class LayerOutcome:
    """What the checks of one layer showed; `locate` follows the last run to the first value that deviates."""

    locate: Callable[[], Located | None] | None = None
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    pool: Pool = field(default_factory=Pool)


def check_layer(
    scratch: Scratch,
    reference: CapturedReference,
    own: CapturedReference | None,
    layer: int,
    case: LayerCase,
    layouts: dict[str, Any],
    coverage: Coverage,
    outcome: LayerOutcome,
    seed: int,
) -> None:
    """Run one layer on one case; appends findings to `outcome`.

    Args:
        scratch: empty, with room for the case.
        own: the captured layer in the module's dtype: the yardstick in 16 bits.
        layouts: node name -> layout in the lowered body, as the static check inferred them.
    """
    plan = scratch.compiled.plan
    dtype = getattr(torch, plan.dtype)
    body = str(reference.call(layer).target)
    match = reference.matches[body]
    where = f"layer {layer} ({body}), context {list(case.lengths)} + {case.T}"
    given = _inputs(scratch, reference, match, layer, case, seed, coverage)
    mask = torch.ones(len(case.lengths), case.T, dtype=torch.int64)
    sites, rounds = reference.sites(layer), scratch.format.rounds
    for site, past in zip(sites, given.pasts, strict=True):
        entries = _rows_of(past, scratch.compiled.facts.caches[site])
        fresh = entries.shape[1] - max(case.lengths)  # tokens that an earlier layer has cached already
        for row, n in enumerate(case.lengths):
            scratch.fill(site, row, entries[row, entries.shape[1] - n - fresh :])
    scratch.lengths = list(case.lengths)
    before = [[c.clone() for c in caches] for caches in scratch.caches]
    choices, own_choice = Choices(), Indexers(given.mask)
    with RecordTopK(choices):
        expected = reference.layer(layer, _as(given, torch.float64), own_choice)
    try:
        run = run_layer(scratch, layer, given, mask)
    except Exception as error:  # whatever breaks in the module under test is a finding
        outcome.findings.append(fault(error, where))
        return
    chosen = _chosen(run, match, scratch, given, case, own_choice, expected, where, coverage)
    found = chosen.findings
    outcome.notes += chosen.notes
    if chosen.turned and not found:  # near ties: what follows is compared given the ranks' keys
        choices = Choices()
        with RecordTopK(choices):
            expected = reference.layer(layer, _as(given, torch.float64), Indexers(given.mask, chosen.told))
    for number, attention in enumerate(match.attentions):
        keys = chosen.keys.get(number)
        found += check_attention(run, attention, scratch, sites[number], reference, layer, where, keys)
        found += check_cache(attention, scratch, sites[number], expected, before, case.lengths, case.T, where)
    cached: dict[str, Tensor] = {}
    if rounds and not found:  # what is cached was compared: what follows from it is, given that
        for number, attention in enumerate(match.attentions):
            cached |= _cached(attention, scratch, sites[number], case)
        choices = Choices()
        with RecordTopK(choices):
            told = Indexers(given.mask, chosen.told)
            expected = reference.layer(layer, _as(given, torch.float64), told, cached)
    turned = _turned(run, match, expected)
    near = _near_ties(choices, turned, dtype)
    if bool((turned & ~near).any()):
        got = f"{int((turned & ~near).sum())} of {len(turned)} tokens choose other experts, by a clear margin"
        found.append(numeric_finding("HX408", where, got, "the original's choice"))
    elif bool(turned.any()):
        outcome.notes.append(f"{where}: {int(turned.sum())} of {len(turned)} near-tied router choices turned")
    if not found:
        narrow = _as(given, dtype)
        mine = own.layer(layer, narrow, Indexers(given.mask, chosen.told), cached) if own is not None else None
        found = _output(run, expected, mine, limit_of(plan), turned, outcome, where)
    graph = scratch.graph.get_submodule(body).graph
    joined = choice_check.joined_values(chosen.results)
    outcome.locate = lambda: first_deviation(
        graph.nodes, run.values, body_twins(graph, match, expected), layouts, plan.layout, dtype, mask, match, joined
    )
    if found:
        first = outcome.locate()
        found = [first.named(f) if first else f for f in found]
    outcome.findings += found
    coverage.longest_context = max(coverage.longest_context, max(case.lengths) + case.T)
    for n in case.lengths:
        coverage.count_shards([len(h) for h in deal(n, plan.layout.kvp, plan.options.tokens_per_block)])


def _rows_of(past: Past, row: CacheRow) -> Tensor:
    """Entries [B, S, *] as a cache holds them; an earlier layer's cache may have index keys behind what is read of it."""
    entries = torch.cat(entries_of(past), dim=-1)
    missing = sum(row.widths) - entries.shape[-1]
    return torch.nn.functional.pad(entries, (0, missing)) if missing else entries


@dataclass
class _Choice:
    """What became of a layer's choices of keys.

    Attributes:
        keys: number of the attention -> the ranks' keys [B, T, n].
        told: those of the sites that choose, in order.
        turned: some are not the original's own.
        results: (nodes, the ranks' choice, its comparison with the original) of each site that chooses.
    """

    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    keys: dict[int, Tensor] = field(default_factory=dict)
    told: list[Tensor] = field(default_factory=list)
    turned: bool = False
    results: list[tuple[choice_check.ChoiceNodes, choice_check.Chosen, choice_check.Compared]] = field(
        default_factory=list
    )


def _chosen(
    run: LayerRun,
    match: LayerMatch,
    scratch: Scratch,
    given: LayerInputs,
    case: LayerCase,
    own: Indexers,
    expected: dict[str, Any],
    where: str,
    coverage: Coverage,
) -> _Choice:
    """Which keys the ranks chose, and whether these are the original's."""
    plan, outcome = scratch.compiled.plan, _Choice()
    dtype = getattr(torch, plan.dtype)
    mask = torch.ones(len(case.lengths), case.T, dtype=torch.int64)
    queries = choice_check.Queries(case.lengths, mask, plan.layout, plan.options.tokens_per_block)
    found = choice_check.choice_nodes(scratch.graph.get_submodule(match.body).graph)
    originals = iter(own.choices)
    for number, attention in enumerate(match.attentions):
        selection, nodes = attention.selection, found.get(number)
        if selection is None:
            continue
        if nodes is None or nodes.chooses != isinstance(selection, Selection):
            what = "attends to all keys" if nodes is None else f"`{nodes.name}` says which keys are seen"
            wanted = "attention to the keys that an indexer chose"
            outcome.findings.append(numeric_finding("HX410", f"{where}, attention {number}", what, wanted))
            continue
        chosen = choice_check.ranks_choice(nodes, run.values, queries, selection.top_k)
        outcome.findings += chosen.finding(where)
        outcome.keys[number] = chosen.keys
        if isinstance(selection, HandedSelection):
            handed = given.handed[selection.indices]
            outcome.findings += choice_check.handed_finding(
                chosen.keys, handed, nodes, queries, where, "were handed to the layer"
            )
            continue
        sizes = by_position(score_sizes(attention, expected, given.pasts[number][2]), given.mask, 0.0)
        original = replace(next(originals), sizes=sizes)
        compared = choice_check.compare_with_original(chosen, original, queries, dtype)
        outcome.told.append(chosen.keys)
        outcome.turned |= bool(compared.turned.any())
        outcome.results.append((nodes, chosen, compared))
        outcome.findings += choice_check.scores_finding(compared, nodes, queries, where)
        outcome.findings += choice_check.turned_finding(compared, nodes, queries, where)
        coverage.choices += int(mask.sum())
    if not outcome.findings:
        outcome.notes += choice_check.near_tie_note(where, [compared for *_, compared in outcome.results])
    return outcome


def _cached(attention: AttentionMatch, scratch: Scratch, site: int, case: LayerCase) -> dict[str, Tensor]:
    """What the ranks hold of the new tokens, as the original's nodes have it."""
    held = [scratch.entries(site, row, n + case.T)[n:] for row, n in enumerate(case.lengths)]
    return given_as(attention, torch.stack(held))


def _as(given: LayerInputs, dtype: torch.dtype) -> LayerInputs:
    pasts = tuple(tuple(part.to(dtype) for part in past) for past in given.pasts)
    return replace(given, hidden=given.hidden.to(dtype), pasts=pasts)


def _inputs(
    scratch: Scratch,
    reference: CapturedReference,
    match: LayerMatch,
    layer: int,
    case: LayerCase,
    seed: int,
    coverage: Coverage,
) -> LayerInputs:
    """Hidden states, and pasts with needles for the queries that these hidden states make."""
    plan = scratch.compiled.plan
    dtype, kvp, tpb = getattr(torch, plan.dtype), plan.layout.kvp, plan.options.tokens_per_block
    generator = torch.Generator().manual_seed(seed)
    B, S, T = len(case.lengths), max(case.lengths), case.T
    body = reference.captured.bodies[match.body].graph
    hidden = torch.randn(hidden_shape(body, B, T), generator=generator, dtype=torch.float64).to(dtype)
    mask = torch.tensor([[0] * (S - n) + [1] * (n + T) for n in case.lengths])
    positions = torch.stack([torch.arange(n, n + T) for n in case.lengths])
    empty = tuple(empty_past(a, B, given_length(a, S, T)) for a in match.attentions)
    handed = drawn_keys(match, list(case.lengths), T, torch.Generator().manual_seed(seed))
    probe = _as(LayerInputs(hidden, mask, positions, empty, handed), torch.float64)
    values = reference.layer(layer, probe)
    prefix = reference.prefix(layer)
    pasts = []
    for attention in match.attentions:
        query = terms_of(attention).query_parts(values, reference.tensors, prefix)
        latent, k_rope = background(attention, query, given_length(attention, S, T), generator)
        if S:
            # the new tokens' entries are the layer's own, or an earlier layer's, at the end of what is given
            new = (latent[:, S:], k_rope[:, S:]) if attention.shared else new_entries(attention, values)
            coverage.needles += need_the_new_token(attention, query, new, latent[:, :S], list(case.lengths))
            coverage.needles += plant(attention, query, latent[:, :S], k_rope[:, :S], list(case.lengths))
        parts = [latent, k_rope]
        if isinstance(attention.selection, Selection):
            hands = [deal(n, kvp, tpb) for n in case.lengths]
            index, ties = index_keys(attention, values, list(case.lengths), S, hands, generator)
            coverage.tied_choices += ties
            parts.append(index)
        parts = [part.to(dtype) for part in parts]
        if scratch.format.rounds:
            site = reference.sites(layer)[match.attentions.index(attention)]
            rounded = scratch.format.rounded(site, torch.cat(parts, dim=-1))
            parts = [*rounded.split([part.shape[-1] for part in parts], dim=-1)]
        pasts.append(past_of(attention, *parts))
    return LayerInputs(hidden, mask, positions, tuple(pasts), handed)


def _turned(run: LayerRun, match: LayerMatch, expected: dict[str, Any]) -> Tensor:
    """Tokens [B * T] whose experts are not those of the original, on any rank."""
    turned = torch.zeros(expected["output"].shape[:2].numel(), dtype=torch.bool)
    for moe in match.moes:
        wanted = expected[moe.expert_ids].sort(-1).values
        for values in run.values:
            got = values.get(moe.expert_ids)
            if isinstance(got, Tensor) and got.shape == wanted.shape:
                turned |= (got.sort(-1).values != wanted).any(-1).view(-1)
    return turned


def _near_ties(choices: Choices, turned: Tensor, dtype: torch.dtype) -> Tensor:
    """Tokens for which one of the original's top-ks is so close that rounding may turn it."""
    near = torch.zeros_like(turned)
    for margins in choices.margins:
        if len(margins) % len(turned) == 0:
            near |= margins.view(len(turned), -1).amin(dim=-1) < NEAR_TIE[dtype]
    return near


def _output(
    run: LayerRun,
    expected: dict[str, Any],
    own: dict[str, Any] | None,
    limit: float | None,
    turned: Tensor,
    outcome: LayerOutcome,
    where: str,
) -> list[Finding]:
    wanted = expected["output"]
    kept = ~turned.view(wanted.shape[:2])
    for rank, output in enumerate(run.outputs):
        if output.shape != wanted.shape:
            got, expected_shape = f"{tuple(output.shape)}", f"{tuple(wanted.shape)}"
            return [numeric_finding("HX403", f"{where}, rank {rank}", got, expected_shape)]
        if not torch.isfinite(output).all():
            got = "NaN or inf in the layer's output"
            return [numeric_finding("HX406", f"{where}, rank {rank}", got, "finite values", 5)]
        error = (output.double() - wanted).abs().flatten(2).amax(-1) * kept
        if limit is not None:
            off = float(error.max()) / float(wanted.abs().max())
            if off > limit:
                b, t = divmod(int(error.flatten().argmax()), wanted.shape[1])
                at = f"{where}, rank {rank}, sequence {b}, new token {t}"
                got = f"off by {off:.2e} of the largest"
                return [numeric_finding("HX403", at, got, f"at most {limit:.0e}")]
    if own is not None:
        outcome.pool.add(run.outputs[0][kept], own["output"][kept], wanted[kept])
    return []


def pooled_finding(outcome: LayerOutcome, where: str, draws: int) -> list[Finding]:
    """In 16 bits: a layer's outputs over all draws may be RATIO times as far from fp64 as the original's own."""
    pool = outcome.pool
    if not pool.own_error or pool.error <= RATIO**2 * pool.own_error:
        return []
    finding = numeric_finding("HX403", where, pool.text(draws), f"at most {RATIO} times")
    located = outcome.locate() if outcome.locate is not None else None
    return [located.named(finding) if located else finding]


def layers_to_check(reference: CapturedReference) -> list[int]:
    """First and last layer of each body."""
    found: list[int] = []
    for body in reference.captured.bodies:
        layers = reference.captured.layers_of(body)
        found += [layers[0].index] + ([layers[-1].index] if len(layers) > 1 else [])
    return sorted(found)
