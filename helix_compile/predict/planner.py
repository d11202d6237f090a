"""Which plan, and is Helix worth it: the search's answer with reasons, what would change it, and all that was assumed. Predicted."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from helix_compile.config.options import FP8_E4M3, HelixOptions, default_ep
from helix_compile.errors import HelixError
from helix_compile.passes.decide.plan_helix import plan_helix
from helix_compile.predict.calibration import Calibration
from helix_compile.predict.costed import SEARCHED, CostedModel
from helix_compile.predict.formats import CACHES
from helix_compile.predict.overlap import HOPB, Verdict
from helix_compile.predict.search import TIE, Goal, Point, Search, best_at, pareto, plainness, recommended, with_goal

DO_NOT = "do not use Helix here"


@dataclass(frozen=True)
class Contest:
    """The best plans with cp = 1 and with cp > 1 at a batch, on as many ranks; None: none fits, or there is no such layout (`exist`)."""

    batch: int
    ranks: int
    plain: Point | None
    helix: Point | None
    exist: tuple[bool, bool] = (True, True)

    @property
    def winner(self) -> str:
        """One of "cp=1", "cp>1", "equal" (within 2 %) and "none fits"."""
        if self.plain is None or self.helix is None:
            return "none fits" if self.plain is self.helix else "cp>1" if self.plain is None else "cp=1"
        gain = self.plain.step_us / self.helix.step_us
        return "cp>1" if gain > 1 + TIE else "cp=1" if gain < 1 - TIE else "equal"

    @property
    def text(self) -> str:
        """In words."""
        where = f"batch {self.batch} on {counted(self.ranks, 'rank')}"
        if self.winner == "none fits":
            return f"{where}: nothing fits"
        if self.plain is None:
            return f"{where}: {'cp=1 does not fit' if self.exist[0] else 'there is no layout with cp=1'}"
        if self.helix is None:
            return f"{where}: {'no plan with cp > 1 fits' if self.exist[1] else 'there is no layout with cp > 1'}"
        plain, helix = self.plain, self.helix
        moves = helix.parts_by_name["exchange"]
        saves = plain.parts_by_name["attention"] - helix.parts_by_name["attention"]
        figures = (
            f"{where}: predicted {plain.step_us:,.0f} us with cp=1, {helix.step_us:,.0f} us with "
            f"cp={helix.candidate.cp}, whose attention saves {saves:,.0f} us and whose exchanges take {moves:,.0f} us"
        )
        if self.winner == "equal":
            return f"{DO_NOT}: {figures}: within 2 % they are equal, and cp=1 is the plainer one"
        return figures if self.winner == "cp>1" else f"{DO_NOT}: {figures}"


@dataclass(frozen=True)
class Planned:
    """The answer. print() it by views/plan_text.py; `facts` is what --json prints."""

    model: CostedModel
    goal: Goal
    calibration: Calibration | None = None
    cache_scale: Any = 1.0
    configured: tuple[HelixOptions, str] | None = None

    @cached_property
    def as_configured(self) -> Point | None:
        """The layout that a configuration says, at its batch; None: there is none, or this model can't have it."""
        if self.configured is None:
            return None
        own = self.configured[0]
        ranks = own.cp * own.tpa
        if ranks > self.goal.accelerator.link_ranks:
            return None
        ep = own.ep or default_ep(ranks, math.gcd(*self.model.experts) if self.model.experts else 0)
        asked: dict[str, Any] = {"cp": own.cp, "tpa": own.tpa, "ep": ep}
        if own.cp > 1:
            asked |= {"merge": own.merge, "q_proj": own.q_proj, "overlap": own.overlap}
            asked["v_up"] = self.model.v_up(own.max_batch_size) if own.v_up == "auto" else own.v_up
        candidates = [c for c in self.model.choices(ranks) if all(getattr(c, k) == v for k, v in asked.items())]
        points = with_goal(self.search, batches=(own.max_batch_size,)).points(candidates) if candidates else []
        return min(points, key=lambda p: p.step_us, default=None)

    @cached_property
    def search(self) -> Search:
        """Of the goal."""
        return Search(self.model, self.goal)

    @cached_property
    def points(self) -> list[Point]:
        """Everything that was looked at."""
        return self.search.points()

    @cached_property
    def front(self) -> list[Point]:
        """What fits and is beaten by nothing."""
        return pareto(self.points)

    @cached_property
    def best(self) -> Point | None:
        """The plan to take; None if nothing fits, or gives users enough."""
        return recommended(self.points, self.goal)

    @cached_property
    def contests(self) -> list[Contest]:
        """Cp = 1 against cp > 1 at each batch, on as many ranks as the best plan has, or on all."""
        ranks = self.best.candidate.ranks if self.best else self.goal.replicas[-1]
        if ranks == 1:
            ranks = self.goal.replicas[-1]
        cps = {p.candidate.cp for p in self.points if p.candidate.ranks == ranks}
        exist = 1 in cps, max(cps, default=0) > 1
        return [
            Contest(b, ranks, best_at(self.points, b, ranks, False), best_at(self.points, b, ranks, True), exist)
            for b in self.goal.batches
        ]

    @cached_property
    def reasons(self) -> list[str]:
        """Why this plan."""
        if self.best is None:
            return [self._why_none()]
        best, cand = self.best, self.best.candidate
        parts = ", ".join(f"{name.replace('_', '-')} {us:,.0f}" for name, us in best.parts_by_name.items())
        wish = self.goal.tokens_per_s_per_user
        rule = (
            f"most tokens/s a GPU of what gives a user at least {wish:g} tokens/s"
            if wish
            else "the largest product of tokens/s a user and tokens/s a GPU; --min-tokens-per-s says what a user must get instead"
        )
        found = [
            f"chosen by: {rule}; plans within 2 % are equal, the plainest wins",
            f"a predicted step of {best.step_us:,.0f} us: {parts}",
        ]
        if beyond := self.outside(best):
            found.append(f"an extrapolation beyond the calibration: {'; '.join(beyond)}")
        contest = next(c for c in self.contests if c.batch == best.batch)
        found.append(contest.text)
        if verdict := self.overlap_of(best):
            found.append(verdict.text)
        one = next(
            (
                p
                for p in self.points
                if p.batch == best.batch and p.candidate.ranks == cand.ranks and p.candidate.cp == 1
            ),
            None,
        )
        if one is not None and cand.cp > 1:
            found.append(
                f"capacity: {best.tokens_that_fit:,} tokens fit in the caches of these {counted(cand.ranks, 'rank')}, {one.tokens_that_fit:,} "
                f"with cp=1, tpa={one.candidate.tpa}"
            )
        if self.configured is not None:
            own, where = self.as_configured, self.configured[1]
            said = (
                self._why_not_as_configured()
                if own is None
                else (
                    f"cp={own.candidate.cp}, tpa={own.candidate.tpa}, ep={own.candidate.ep}, batch {own.batch}: predicted "
                    f"{own.tokens_per_s_per_user:,.1f} tokens/s a user, {own.tokens_per_s_per_gpu:,.1f} a GPU{'' if own.fits else '; does not fit'}"
                )
            )
            found.append(f"as {where} says it: {said}")
            if own is not None and own.candidate.overlap != "none" and (verdict := self.overlap_of(own)):
                found.append(f"of {where}: {verdict.text}")
        return found

    def _why_not_as_configured(self) -> str:
        own, machine = self.configured[0], self.goal.accelerator  # type: ignore[index] # there is one
        if (ranks := own.cp * own.tpa) > machine.link_ranks:
            return f"{ranks} ranks; the link of {machine.name} joins {machine.link_ranks}, and layouts of more are not costed"
        return "no layout of this model"

    def overlap_of(self, point: Point) -> Verdict | None:
        """What overlap makes of a layout at its batch; None where it can't have any."""
        if point.candidate.cp == 1:
            return None
        search = with_goal(self.search, batches=(point.batch,))
        without, hopb = (search.of(replace(point.candidate, overlap=overlap)) for overlap in ("none", HOPB))
        if not hopb:
            return None
        times = (without[0].time, hopb[0].time)
        return Verdict(*times, point.batch, self.goal.context, self.goal.accelerator.name)

    def _why_none(self) -> str:
        fitting = [p for p in self.points if p.fits]
        if fitting:
            most = max(p.tokens_per_s_per_user for p in fitting)
            return f"no plan gives a user {self.goal.tokens_per_s_per_user:g} tokens/s; the most that is predicted is {most:,.1f}"
        least = min(self.points, key=lambda p: (p.bytes_per_rank, plainness(p.candidate)))
        room = self.goal.accelerator.memory_gb - self.goal.accelerator.reserved_gb
        return (
            f"nothing fits: the least memory is {least.bytes_per_rank / 1e9:,.1f} GB a rank (cp={least.candidate.cp}, "
            f"tpa={least.candidate.tpa}, ep={least.candidate.ep}, batch {least.batch}), of {room:,.1f} GB"
        )

    @cached_property
    def sensitivity(self) -> list[dict[str, Any]]:
        """What another figure makes of the answer, on as many ranks."""
        if self.best is None:
            return []
        machine, best = self.goal.accelerator, self.best.candidate
        changes: list[tuple[str, dict[str, Any]]] = [
            ("context / 4", {"context": max(2, self.goal.context // 4)}),
            ("context x 4", {"context": self.goal.context * 4}),
            ("link / 4", {"accelerator": replace(machine, link_gb_s=machine.link_gb_s / 4)}),
            ("collectives' latency x 3", {"accelerator": replace(machine, latency_us=_slower(machine.latency_us, 3))}),
            ("memory's bandwidth x 1.5", {"accelerator": replace(machine, hbm_tb_s=machine.hbm_tb_s * 1.5)}),
            ("fixed time of a layer 0", {"accelerator": replace(machine, fixed_us_per_layer=0.0)}),
        ]
        other = "auto" if self.goal.cache.name != "auto" else "fp8"
        changes.append((f"cache in {other}", {"cache": CACHES[other]}))
        candidates = list(self.model.choices(best.ranks, self.goal.pad_heads))
        found = []
        for what, change in changes:
            search = with_goal(self.search, **change)
            now = recommended(search.points(candidates), search.goal)
            found.append(
                {"if": what, "recommended": point_facts(now) if now else None, "changes": _differs(now, self.best)}
            )
        return found

    @cached_property
    def assumptions(self) -> list[str]:
        """All of them."""
        goal, machine = self.goal, self.goal.accelerator
        base = self.model.base
        latencies = "; ".join(
            f"{op} " + ", ".join(f"{n}: {_range(low, high)}" for n, low, high in rows)
            for op, rows in machine.latency_us.items()
        )
        said = [
            f"accelerator {machine.name}: {machine.hbm_tb_s:g} TB/s x {machine.hbm_efficiency:g}, {machine.memory_gb:g} GB of which "
            f"{machine.reserved_gb:g} are the runtime's; TFLOP/s in BF16 {machine.bf16_tflops:g}, FP8 {machine.fp8_tflops:g}, FP4 "
            f"{machine.fp4_tflops:g}, x {machine.flops_efficiency:g}; link {machine.link_gb_s:g} GB/s one way, among {machine.link_ranks} ranks",
            f"source: {machine.source}",
            f"collectives: latency + bytes / link; us before bytes count, by ranks (4 KB-128 KB): {latencies}; behind the last number of "
            "ranks all-to-all stays flat, the others grow as in the last doubling",
            f"fixed: {machine.fixed_us_per_layer:g} us a layer and {machine.launch_us:g} us a node: fitted, not predicted (--calibrate fits them)",
            "a node takes the longer of its flops and its bytes; nodes run one after the other and nothing is fused; with overlap=hopb a part's "
            "exchange runs beside the next part's attention and slows neither, and the fixed time of a layer grows with its launches",
            f"weights: {goal.weights.meaning}; embedding, head, router and norms stay in the model's dtype",
            f"cache: {goal.cache.meaning}; what ranks exchange is in the model's dtype, lse in float32",
            f"{goal.context:,} tokens in each sequence, one new token each; rank 0, which holds the most, sets the pace; blocks of "
            f"{base.tokens_per_block} tokens go round",
            f"replicas of {' or '.join(map(str, goal.replicas))} rank{'s' * (goal.replicas != [1])}, which share nothing; no pipeline stages, no data-parallel attention",
            "memory of a rank: parameters, caches of the whole batch in pages of 128, twice the largest activation",
        ]
        if self.goal.replicas[-1] < self.goal.ranks:
            said.append(
                f"the link joins {machine.link_ranks} ranks: replicas of more than {self.goal.replicas[-1]} are not costed"
            )
        if self.model.experts:
            said.append("tokens spread evenly over routed experts; the weights of those that some token chose are read")
        if any(a.selection for a in self.model.sites):
            said.append(
                "an indexer's best keys lie evenly over the ranks of cp; its index keys stay in the model's dtype; ranks gather all candidates"
            )
        if any(a.window or a.chunk for a in self.model.sites):
            said.append("windows and chunks: their cache is sharded as any; only what a query sees is read")
        if self.model.captured.leaves:
            said.append("layers that stay the user's own modules cost no time here: their memory alone is counted")
        if self.calibration is not None:
            said += self.calibration.said(self.goal)
        return said

    @cached_property
    def facts(self) -> dict[str, Any]:
        """As JSON."""
        goal = self.goal
        return {
            "predicted": True,
            "model": self.model.captured.model_name,
            "dtype": str(self.model.captured.dtype).removeprefix("torch."),
            "gpu": goal.accelerator.name,
            "ranks": goal.ranks,
            "context": goal.context,
            "batches": list(goal.batches),
            "weights": goal.weights.name,
            "kv_dtype": goal.cache.name,
            "recommended": self._row(self.best) if self.best else None,
            "reasons": self.reasons,
            "configured": point_facts(self.as_configured) if self.as_configured else None,
            "pareto": [self._row(p) for p in self.front],
            "by_batch": [self._contest_facts(c) for c in self.contests],
            "sensitivity": self.sensitivity,
            "assumptions": self.assumptions,
            "looked_at": {"plans": len(self.points), "fit": sum(p.fits for p in self.points)},
            "calibration": self.calibration.facts() if self.calibration else None,
        }

    def outside(self, point: Point) -> list[str]:
        """How a point lies beyond what a calibration measured."""
        return self.calibration.outside(point, self.goal.context) if self.calibration else []

    def _row(self, point: Point) -> dict[str, Any]:
        return point_facts(point) | ({"extrapolated": self.outside(point)} if self.calibration else {})

    def _contest_facts(self, contest: Contest) -> dict[str, Any]:
        return {
            "batch": contest.batch,
            "ranks": contest.ranks,
            "winner": contest.winner,
            "cp_1": point_facts(contest.plain) if contest.plain else None,
            "helix": point_facts(contest.helix) if contest.helix else None,
            "exist": list(contest.exist),
            "text": contest.text,
        }

    def to_json(self) -> str:
        """The facts as one document."""
        return json.dumps(self.facts, indent=1)


def point_facts(point: Point) -> dict[str, Any]:
    """A point as plain data; every time in it is predicted."""
    own = asdict(point.candidate)
    return {
        **{name: own.pop(name) for name in ("cp", "tpa", "ep", "tpf")},
        "batch": point.batch,
        "tokens_per_s_per_user": point.tokens_per_s_per_user,
        "tokens_per_s_per_gpu": point.tokens_per_s_per_gpu,
        "kv_bytes_per_rank": point.kv_bytes_per_rank,
        "fits": point.fits,
        "ranks": point.candidate.ranks,
        **own,
        "step_us": point.step_us,
        "parts_us": point.parts_by_name,
        "params_bytes_per_rank": point.params_bytes_per_rank,
        "bytes_per_rank": point.bytes_per_rank,
        "tokens_that_fit": point.tokens_that_fit,
    }


def plan_text(planned: Planned) -> str:
    """The plan that wins, as helix_compile(plan=...) and inspect read it: --out.

    Raises:
        HelixError: nothing to write, or a cache that no plan can hold.
    """
    best, goal = planned.best, planned.goal
    if best is None:
        raise HelixError(f"--out: there is no plan to write: {planned.reasons[0]}")
    cache_dtype = held_in(goal)
    options = best.candidate.options(
        planned.model.base,
        max_batch_size=best.batch,
        max_seq_len=goal.context,
        cache_dtype=cache_dtype,
        cache_scale=planned.cache_scale if cache_dtype == FP8_E4M3 else 1.0,
    )
    return plan_helix(planned.model.captured, planned.model.matches, options).to_json()


def held_in(goal: Goal) -> str:
    """The cache_dtype of a plan that holds the goal's cache.

    Raises:
        HelixError: no plan can.
    """
    if goal.cache.option is None:
        raise HelixError(f"--out: no plan holds its cache in {goal.cache.name}; nearest that works: --kv-dtype fp8")
    return goal.cache.option


def counted(n: int, what: str) -> str:
    """So many of them, as 1 rank or 8 ranks."""
    return f"{n} {what}{'s' * (n != 1)}"


def _slower(latencies: Any, times: float) -> dict[str, Any]:
    return {op: tuple((n, low * times, high * times) for n, low, high in rows) for op, rows in latencies.items()}


def _differs(now: Point | None, best: Point) -> str:
    if now is None:
        return "nothing fits"
    names: Iterable[str] = ("cp", "tpa", "ep", *(n for n in SEARCHED if n not in ("cp", "tpa", "ep")))
    changed = [
        f"{n} {getattr(best.candidate, n)} -> {getattr(now.candidate, n)}"
        for n in names
        if getattr(best.candidate, n) != getattr(now.candidate, n)
    ]
    if now.batch != best.batch:
        changed.append(f"batch {best.batch} -> {now.batch}")
    return ", ".join(changed)


def _range(low: float, high: float) -> str:
    return f"{low:g}" if low == high else f"{low:g}-{high:g}"
