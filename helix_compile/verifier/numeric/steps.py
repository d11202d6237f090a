"""Whole steps against the original in fp64: ragged prompts, then steps over block and page boundaries, on every stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, fx

from helix_compile.config.options import PAGE_SIZE
from helix_compile.errors import HelixError
from helix_compile.kernels.exchange import codec_of
from helix_compile.passes.pipeline import STAGES
from helix_compile.plan.helix_plan import HelixPlan
from helix_compile.runtime.rank import params_of_stage
from helix_compile.verifier.contract import deal
from helix_compile.verifier.numeric import choice_check
from helix_compile.verifier.numeric.indexers import SiteChoice
from helix_compile.verifier.numeric.reference import EagerReference
from helix_compile.verifier.numeric.routing import Choices, compare_choices, topk_hook
from helix_compile.verifier.numeric.scratch import Scratch
from helix_compile.verifier.report import Coverage, Finding, fault, numeric_finding

# largest deviation over the largest value; None: pooled rel-RMSE at most RATIO times the original's own
LIMIT: dict[torch.dtype, float] = {torch.float64: 1e-10, torch.float32: 1e-5}
RATIO = 1.25


def limit_of(plan: HelixPlan) -> float | None:
    """LIMIT of a plan's dtype, and what its exchange may add; None: by RATIO."""
    limit = LIMIT.get(getattr(torch, plan.dtype))
    return None if limit is None else limit + codec_of(plan.options).noise


FLIPS = 0.05  # share of tokens that the rewrite alone may route otherwise in 16 bits, beyond the original's own
# so few near ties may all fall to one side by chance: of four, one time in sixteen
FEW = 4
DECODE = (1, 1, 3, 1, 4, 1)
FLOPS = 5e10  # of the fp64 reference in one draw of a scenario; the prompts of a large model are cut to this


@dataclass(frozen=True)
class Scenario:
    """A ragged left-padded prompt and the steps after it; with `idle`, row 0 sits out the second step."""

    name: str
    lengths: tuple[int, ...]
    steps: tuple[int, ...]
    capacity: int
    idle: bool = False


def scenarios(compiled: Any, parameters: int) -> tuple[list[Scenario], list[str]]:
    """What to run for this plan, and notes on what was cut to the budget."""
    options, cp = compiled.plan.options, compiled.plan.layout.kvp
    tpb = options.tokens_per_block
    notes: list[str] = []
    affordable = int(FLOPS / (2 * parameters))  # tokens of all sequences together
    turn = cp * tpb
    decode: tuple[int, ...] = DECODE
    # an empty shard; a step over the first block boundary; unequal shards and a boundary on the next turn
    wanted: tuple[int, ...] = (1, max(1, tpb - 1), turn + max(1, tpb - 1))[-min(3, options.max_batch_size) :]
    if affordable < sum(wanted) + len(wanted) * sum(decode):
        wanted, decode = wanted[-2:], (1, 3, 1)
        longest = max(2, affordable - 2 * sum(decode) - 1)
        wanted = tuple(min(n, longest) for n in (1, *wanted[-1:]))[-min(2, options.max_batch_size) :]
        notes.append(f"prompt cut to {max(wanted)} tokens: {parameters:,} parameters in float64")
    room = options.max_seq_len - sum(decode)
    if room < 1:
        steps = (1,) * max(0, min(sum(decode), options.max_seq_len - 1))
        return [Scenario("short", (1,), steps, options.max_seq_len)], notes
    lengths = tuple(min(n, room) for n in wanted)
    reach = compiled.plan.shortest_reach
    # a row that sits out is padding between its tokens, which a window would count
    found = [Scenario("ragged", lengths, decode, options.max_seq_len, idle=len(lengths) > 1 and not reach)]
    # longer than a page on every rank, and then to the last slot
    # and until a ring of the last tokens has begun again
    full = max(cp * PAGE_SIZE + turn, PAGE_SIZE * (max(compiled.plan.rings, default=0) + 1)) + 1
    full = min(options.max_seq_len, full)
    if full > affordable:
        notes.append(f"a cache of {full} tokens was not filled step by step: {parameters:,} parameters")
    elif full > 9:
        rows = (full - 8, 2)[: min(2, options.max_batch_size)]
        found.append(Scenario("full", rows, (3, 1, 4), full))
    longest = max(max(s.lengths) + sum(s.steps) for s in found)
    if reach >= longest:
        notes.append(
            f"whole steps were run to {longest} tokens: windows of {reach} begin later, and were checked layer by layer"
        )
    return found, notes


@dataclass
class Pool:
    """Sums for rel-RMSE over all tokens of a run."""

    error: float = 0.0
    own_error: float = 0.0
    norm: float = 0.0

    def add(self, got: Tensor, own: Tensor, expected: Tensor) -> None:
        """Add tokens: the module's logits, the original's own in the same dtype, the fp64 ones."""
        self.error += float((got.double() - expected).square().sum())
        self.own_error += float((own.double() - expected).square().sum())
        self.norm += float(expected.square().sum())

    @property
    def ratio(self) -> float:
        """rel-RMSE over that of the original in its own dtype."""
        return (self.error / self.own_error) ** 0.5 if self.own_error else float("inf")

    @property
    def rel_rmse(self) -> float:
        """rel-RMSE of the module."""
        return (self.error / self.norm) ** 0.5 if self.norm else 0.0

    def text(self, draws: int) -> str:
        """Both, for a finding."""
        return f"rel-RMSE {self.rel_rmse:.2e}, {self.ratio:.2f} times the original's own, over {draws} draws"


@dataclass
class Outcome:
    """What a scenario showed."""

    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    worst: float = 0.0
    failing_step: int | None = None


@dataclass(frozen=True)
class Batch:
    """Tokens of a step and which are real."""

    ids: Tensor
    mask: Tensor


def batches(scenario: Scenario, vocab_size: int, seed: int, most: int | None = None) -> list[Batch]:
    """The prompt (left-padded) and the steps of a scenario; `most`: tokens that a step may have, of a longer prompt the columns in turn."""
    generator = torch.Generator().manual_seed(seed)
    width, rows = max(scenario.lengths), len(scenario.lengths)
    mask = torch.tensor([[0] * (width - n) + [1] * n for n in scenario.lengths])
    made = []
    for number, T in enumerate((width, *scenario.steps)):
        if number:
            mask = torch.ones(rows, T, dtype=torch.int64)
        if scenario.idle and number == 2:
            mask[0] = 0
        ids = torch.randint(0, vocab_size, (rows, T), generator=generator)
        cuts = range(0, T, most or T)
        made += [Batch(ids[:, c : c + (most or T)], mask[:, c : c + (most or T)]) for c in cuts]
    return made


class Stepper(Protocol):
    """The original, or what stands for it: logits [B, T, vocab] in fp64 of a step, its top-ks recorded.

    Attributes:
        selections: what its indexers chose, or would have chosen, in the last step.
        follows: it attends to the keys that it is told.
    """

    selections: list[SiteChoice]
    follows: ClassVar[bool]

    def step(self, ids: Tensor, mask: Tensor, choices: Choices | None = None, told: Sequence[Tensor] = ()) -> Tensor:
        """Append ids [B, T] with mask [B, T]; attend to the keys `told` [B, T, n], one of each indexer."""
        ...


def both(*hooks: Callable[[int, fx.Node, Any], None]) -> Callable[[int, fx.Node, Any], None]:
    """One hook that calls them in order."""

    def hook(rank: int, node: fx.Node, value: Any) -> None:
        for each in hooks:
            each(rank, node, value)

    return hook


def run_scenario(
    scratch: Scratch,
    reference: Stepper,
    own: EagerReference | None,
    steps: list[Batch],
    where: str,
    coverage: Coverage,
    pool: Pool,
    limit: float | None = None,
    sources: Mapping[int, int] | None = None,
) -> Outcome:
    """Run a scenario on the module and on the reference, step by step, until something is wrong.

    Args:
        own: the original in the module's own dtype, needed where the limit is a ratio.
        where: stage and scenario, for findings.
        limit: largest deviation over the largest logit; by default that of the dtype.
        sources: layer -> the layer that chose keys for it.
    """
    outcome, sources = Outcome(), sources or {}
    plan = scratch.compiled.plan
    dtype = getattr(torch, scratch.compiled.plan.dtype)
    excluded = torch.zeros(scratch.rows, dtype=torch.bool)
    flips, own_flips, tokens = 0, 0, 0
    turned_keys, own_turned, queries_seen = 0, 0, 0
    for number, batch in enumerate(steps):
        B, T = batch.ids.shape
        expected_choices, choices, own_choices = Choices(), Choices(), Choices()
        before = list(scratch.lengths)
        recorder = choice_check.ChoiceRecorder(scratch.graph, len(scratch.params))
        at = f"{where}, step {number}"
        try:
            logits = scratch.step(batch.ids, batch.mask, both(topk_hook(choices), recorder))
        except Exception as error:
            outcome.findings.append(fault(error, at))
            outcome.failing_step = number
            return outcome
        queries = choice_check.Queries(tuple(before), batch.mask, plan.layout, plan.options.tokens_per_block)
        results = choice_check.step_choices(recorder.sites, recorder.layers, queries, plan, sources)
        if wrong := choice_check.step_findings(results, queries, sources, at):
            outcome.findings += wrong  # another choice: all that follows is other than the original's
            outcome.failing_step = number
            return outcome
        chosen = [(site, c) for site, c in results if site.nodes.chooses]
        told = [c.keys for _, c in chosen]
        expected = reference.step(batch.ids, batch.mask, expected_choices, told)
        if len(reference.selections) != len(chosen):
            got, as_many = f"{len(chosen)} choices of keys in the step", f"{len(reference.selections)}, as the original"
            outcome.findings.append(numeric_finding("HX410", at, got, as_many))
            outcome.failing_step = number
            return outcome
        compared = [
            choice_check.compare_with_original(c, original, queries, dtype)
            for (_, c), original in zip(chosen, reference.selections, strict=True)
        ]
        coverage.choices += len(compared) * int(batch.mask.sum())
        routing = compare_choices(choices, expected_choices, B, T, dtype)
        kept = batch.mask.bool()
        if own is not None:
            own_logits = own.step(batch.ids, batch.mask, own_choices, told)
            for mine, theirs, original in zip(compared, own.selections, reference.selections, strict=True):
                by_own = choice_check.compare_with_original(
                    choice_check.Chosen(theirs.keys, None), original, queries, dtype
                )
                turned_keys += int((mine.turned & ~by_own.turned).sum())
                own_turned += int((by_own.turned & ~mine.turned).sum())
                queries_seen += int(batch.mask.sum())
            own_routing = compare_choices(own_choices, expected_choices, B, T, dtype)
            flips += int((~routing.alike & own_routing.alike & kept).sum())
            own_flips += int((routing.alike & ~own_routing.alike & kept).sum())
            tokens += int(kept.sum())
            alike = kept & routing.alike & own_routing.alike
            pool.add(logits[0][alike], own_logits[alike], expected[alike])
        _count(coverage, scratch, before, batch)
        found = check_ranks(logits, kept, where, number, scratch.params)
        if routing.unpaired:
            found.append(numeric_finding("HX408", at, routing.unpaired, "the same top-ks on both sides"))
        if own is None:
            for (site, _), mine in zip(chosen, compared, strict=True):
                found += choice_check.turned_finding(mine, site.nodes, queries, f"{at}, layer {site.layer}")
            outcome.notes += choice_check.near_tie_note(at, compared) if not found else []
            if not reference.follows:
                excluded |= sum((c.turned for c in compared), torch.zeros_like(kept)).any(dim=1)
            turned = ~routing.alike & kept
            if bool((turned & ~routing.near_tie).any()):
                found.append(_router_finding(turned & ~routing.near_tie, before, where, number))
            newly = (turned & routing.near_tie).any(dim=1) & ~excluded
            if bool(newly.any()):
                rows = newly.nonzero().flatten().tolist()
                outcome.notes.append(
                    f"{where}, step {number}: a near-tied router choice turned in sequences {rows}; "
                    "they are not compared from there on"
                )
                excluded |= newly
            kept = kept & ~excluded[:, None]
            allowed = limit_of(scratch.compiled.plan) if limit is None else limit
            assert allowed is not None, "16 bits are compared with the original's own rounding, or by a limit"
            deviation, finding = _compare(logits[0], expected, kept, allowed, before, where, number)
            outcome.worst = max(outcome.worst, deviation)
            found += [finding] if finding else []
        elif not torch.isfinite(logits[0][kept]).all():
            found.append(_not_finite(logits[0], kept, before, where, number))
        if found:
            outcome.findings += found
            outcome.failing_step = number
            return outcome
    if own is not None and turned_keys > 3 * own_turned + max(FEW, FLIPS * queries_seen):
        got = f"{turned_keys} of {queries_seen} queries choose other keys than in fp64 by the module alone"
        usual_text = f"about {own_turned}, as by the original in its own dtype"
        outcome.findings.append(numeric_finding("HX410", where, got, usual_text))
        outcome.failing_step = 0
    elif turned_keys or own_turned:
        outcome.notes.append(
            f"{where}: near ties of the k-th score: {turned_keys} of {queries_seen} queries choose other keys than in fp64 "
            f"by the module alone, {own_turned} by the original alone; both are compared given the module's keys"
        )
    if own is not None and flips > 3 * own_flips + max(FEW, FLIPS * tokens):
        got = f"{flips} of {tokens} tokens are routed otherwise than in fp64 by the module alone"
        usual = f"about {own_flips}, as by the original in its own dtype"
        outcome.findings.append(numeric_finding("HX408", where, got, usual))
        outcome.failing_step = 0
    elif flips or own_flips:
        outcome.notes.append(
            f"{where}: near-tied routers: {flips} of {tokens} tokens are routed otherwise than in fp64 by the "
            f"module alone, {own_flips} by the original alone; logits are compared where all agree"
        )
    return outcome


def place(index: list[int], before: list[int], kept: Tensor) -> str:
    """Sequence and absolute position of column `t` of row `b`."""
    b, t = index
    position = before[b] + int(kept[b, :t].sum())
    return f"sequence {b}, position {position}"


def check_ranks(
    logits: list[Tensor], kept: Tensor, where: str, number: int, params: list[dict[str, Tensor]]
) -> list[Finding]:
    """All ranks must return the same bits, but for the order of sums where their parameters have unlike strides."""
    first = logits[0]
    for rank, other in enumerate(logits[1:], 1):
        if other.shape != first.shape:
            got = f"rank {rank} {tuple(other.shape)}, rank 0 {tuple(first.shape)}"
            return [numeric_finding("HX405", f"{where}, step {number}", got, "equal shapes")]
        mine, wanted = other[kept].nan_to_num(1e9).double(), first[kept].nan_to_num(1e9).double()
        gap = float((mine - wanted).abs().max()) if len(mine) else 0.0
        allowed = _rounding(params[0], params[rank], first.dtype)
        if gap > allowed * float(wanted.abs().max() if len(wanted) else 0.0):
            got = f"rank {rank} deviates from rank 0 by up to {gap:.2e}"
            expected = f"at most {allowed:.0e} of the largest" if allowed else "the same bits"
            return [numeric_finding("HX405", f"{where}, step {number}", got, expected, 10)]
    return []


def _rounding(mine: dict[str, Tensor], other: dict[str, Tensor], dtype: torch.dtype) -> float:
    """How far two ranks' logits may be apart, over the largest: 0.0 where all their parameters lie alike in memory.

    A matmul sums K products in the order that the strides suggest. What layers add is summed over the ranks and then the
    same on each, so only the last product, with the output embedding, can differ: by a rounding of the result in the
    dtype on each side, and by sqrt(K) roundings in what sums are kept in (float32 for 16 bits; errors of a sum grow as a
    random walk).
    """
    sizes = [
        max(t.shape)
        for name, t in mine.items()
        if name in other and t.shape == other[name].shape and t.stride() != other[name].stride()
    ]
    if not sizes:
        return 0.0
    kept_in = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    return torch.finfo(dtype).eps + max(sizes) ** 0.5 * kept_in


def _not_finite(logits: Tensor, kept: Tensor, before: list[int], where: str, number: int) -> Finding:
    bad = (~torch.isfinite(logits)).any(dim=-1) & kept
    at = place(bad.nonzero()[0].tolist(), before, kept)
    got = f"{int(bad.sum())} of {int(kept.sum())} tokens have NaN or inf logits"
    return numeric_finding("HX406", f"{where}, step {number}, {at}", got, "finite logits", 5)


def _router_finding(wrong: Tensor, before: list[int], where: str, number: int) -> Finding:
    at = place(wrong.nonzero()[0].tolist(), before, torch.ones_like(wrong))
    got = f"{int(wrong.sum())} tokens choose other experts, by a clear margin"
    return numeric_finding("HX408", f"{where}, step {number}, {at}", got, "the original's choice")


def _compare(
    got: Tensor, expected: Tensor, kept: Tensor, limit: float, before: list[int], where: str, number: int
) -> tuple[float, Finding | None]:
    if not bool(kept.any()):
        return 0.0, None
    if not torch.isfinite(got[kept]).all():
        return float("inf"), _not_finite(got, kept, before, where, number)
    error = (got.double() - expected).abs().amax(dim=-1).masked_fill(~kept, 0)
    largest = float(expected[kept].abs().max())
    deviation = float(error.max()) / largest
    if deviation <= limit:
        return deviation, None
    at = place((error > limit * largest).nonzero()[0].tolist(), before, kept)
    said = f"logits off by {deviation:.2e} of the largest"
    return deviation, numeric_finding("HX401", f"{where}, step {number}, {at}", said, f"at most {limit:.0e}")


def _count(coverage: Coverage, scratch: Scratch, before: list[int], batch: Batch) -> None:
    plan = scratch.compiled.plan
    cp, tpb = plan.layout.kvp, plan.options.tokens_per_block
    coverage.steps += 1
    coverage.tokens += int(batch.mask.sum())
    for row, (old, new) in enumerate(zip(before, scratch.lengths, strict=True)):
        shards = [len(hand) for hand in deal(new, cp, tpb)]
        coverage.count_shards(shards)
        coverage.block_boundaries += (new - 1) // tpb - max(old - 1, 0) // tpb if new > old else 0
        was = [len(hand) for hand in deal(old, cp, tpb)]
        coverage.page_boundaries += sum(
            max(n - 1, 0) // PAGE_SIZE > max(o - 1, 0) // PAGE_SIZE for n, o in zip(shards, was, strict=True)
        )
        real = int(batch.mask[row].sum())
        coverage.idle_rows += real == 0
        coverage.padded_rows += 0 < real < batch.mask.shape[1]
        coverage.longest_context = max(coverage.longest_context, new)
        coverage.full_cache |= new == scratch.capacity


def stage_params(compiled: Any, stage: fx.GraphModule, name: str) -> list[dict[str, Tensor]]:
    """Each rank's parameters for a stage: what the ranks hold for the last one, else cut from the originals."""
    if name == STAGES[-1]:
        return [dict(rank.params) for rank in compiled.ranks]
    facts = compiled.facts
    if not facts.originals:
        raise HelixError(f"stage {name!r}: a reloaded module has no weights for it")
    return [
        dict(params_of_stage(stage, facts.originals, facts.shards, compiled.plan.layout, r.rank))
        for r in compiled.ranks
    ]
