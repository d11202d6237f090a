"""The search: every legal layout and batch, what fits, the Pareto front. All of it predicted.

One step of B sequences at a context, on N ranks, takes t: a user gets 1 / t tokens a second, a GPU makes B / (N t). A replica has all
ranks that there are, or a divisor of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from helix_compile.errors import HelixError, LayoutError
from helix_compile.predict.accelerators import Accelerator
from helix_compile.predict.costed import Candidate, CostedModel, Group
from helix_compile.predict.formats import CacheFormat, WeightFormat, read_factor
from helix_compile.predict.overlap import Chunk, StepTime, Time, both, in_parts, rows_of_parts, with_term
from helix_compile.predict.terms import ATTENTION, MATMUL, Term, seen

Batches = NDArray[np.float64]  # for each batch of a goal

PARTS = ("attention", "weights", "other", "exchange", "all_reduce", "fixed")
MOST = 1 << 31  # sequences of a step
_EXCHANGE = PARTS.index("exchange")
TIE = 0.02  # plans this near to each other are equal: the plainer one is taken


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What is asked for.

    Attributes:
        accelerator: on which; so many of them are `ranks`.
        context: tokens of each sequence, the new one included.
        batches: sequences of a step to look at.
        weights, cache: their formats.
        tokens_per_s_per_user: the least that a user must get; 0: no matter.
        pad_heads: may heads and experts be padded?
        fewer_ranks: look at replicas of fewer ranks too.
    """

    accelerator: Accelerator
    ranks: int
    context: int
    batches: tuple[int, ...]
    weights: WeightFormat
    cache: CacheFormat
    tokens_per_s_per_user: float = 0.0
    pad_heads: bool = True
    fewer_ranks: bool = False

    def __post_init__(self) -> None:
        if (
            self.ranks < 1
            or self.context < 2
            or not self.batches
            or not 1 <= min(self.batches) <= max(self.batches) <= MOST
        ):
            raise LayoutError(
                f"plan: ranks >= 1, context >= 2 and batches of 1 to {MOST:,} expected, got {self.ranks}, {self.context}, {self.batches}"
            )

    @property
    def replicas(self) -> list[int]:
        """Ranks that one replica may have: all that there are, as far as the link joins them; with fewer_ranks their divisors too."""
        most = min(self.ranks, self.accelerator.link_ranks)
        divisors = [n for n in range(1, most + 1) if self.ranks % n == 0]
        return divisors if self.fewer_ranks else divisors[-1:]


@dataclass(frozen=True)
class Point:
    """A layout at a batch, predicted.

    Attributes:
        step_us: of one step; parts: the same by PARTS.
        kv_bytes_per_rank: caches of the batch at the context, whole pages.
        bytes_per_rank: with parameters and buffers.
        tokens_that_fit: of all sequences together, in the caches of a replica.
    """

    candidate: Candidate
    batch: int
    step_us: float
    parts: tuple[float, ...]
    kv_bytes_per_rank: int
    params_bytes_per_rank: int
    bytes_per_rank: int
    tokens_that_fit: int
    fits: bool

    @property
    def tokens_per_s_per_user(self) -> float:
        """One user's."""
        return 1e6 / self.step_us

    @property
    def tokens_per_s_per_gpu(self) -> float:
        """One GPU's."""
        return self.batch * 1e6 / (self.step_us * self.candidate.ranks)

    @property
    def time(self) -> StepTime:
        """As inspect has it."""
        attention, weights, other, exchange, all_reduce, fixed = self.parts
        return StepTime(attention + weights + other, exchange, all_reduce, fixed)

    @property
    def parts_by_name(self) -> dict[str, float]:
        """Microseconds of each part."""
        return dict(zip(PARTS, self.parts, strict=True))


@dataclass(frozen=True)
class Held:
    """Bytes of a rank.

    Attributes:
        params: of its parameters.
        kv: of a token in its caches, on average over ranks.
        in_cache: of one sequence in its caches, whole pages on the fullest rank.
        buffer: of the largest activation of a sequence, more or less: what a node moves besides weights and cache.
    """

    params: int
    kv: Fraction
    in_cache: Fraction
    buffer: float


class _GroupTimes(NamedTuple):
    """Microseconds of a group: what counts for PARTS, [part, batch], and the chunks of what is done in parts of the batch."""

    parts: Batches
    chunks: dict[tuple[int, int], Chunk]
    launches: int
    more_launches: int


@dataclass
class _Body:
    """Groups of a body some of which are done in parts."""

    layers: int
    groups: list[_GroupTimes] = field(default_factory=list)

    @property
    def launches(self) -> int:
        """Without overlap."""
        return sum(g.launches for g in self.groups)

    @property
    def more_launches(self) -> int:
        """Of the other parts."""
        return sum(g.more_launches for g in self.groups)

    @property
    def held_us(self) -> Time:
        """What compute of a layer waits for the exchanges of parts, at each batch."""
        chunks: dict[tuple[int, int], Chunk] = {}
        for group in self.groups:
            for place, chunk in group.chunks.items():
                chunks[place] = both(chunks.get(place), chunk)
        steps = [[chunks[p] for p in sorted(chunks) if p[0] == site] for site in sorted({site for site, _ in chunks})]
        return sum(in_parts(own) - sum(sum(step.compute) for step in own) for own in steps)


class Search:
    """Every point of a goal; `model` keeps what it costed, so that another goal on it is quick."""

    def __init__(self, model: CostedModel, goal: Goal):
        self.model, self.goal = model, goal
        self._itemsize = model.captured.dtype.itemsize
        self.read = read_factor(goal.cache, model.sites, self._itemsize)
        weights = goal.weights.bytes
        self.weights = float(weights / self._itemsize) if weights is not None else 1.0
        self._batches = np.array(goal.batches)
        self._times: dict[tuple[int, int], _GroupTimes] = {}
        self._seen: dict[tuple[tuple[str, int], int], int] = {}

    def candidates(self) -> Iterator[Candidate]:
        """Every layout of every size of a replica."""
        for ranks in self.goal.replicas:
            yield from self.model.choices(ranks, self.goal.pad_heads)

    def points(self, candidates: Iterable[Candidate] | None = None) -> list[Point]:
        """Of each candidate at each batch, those that do not fit too."""
        return [p for c in (candidates or self.candidates()) for p in self.of(c)]

    def of(self, candidate: Candidate) -> list[Point]:
        """One candidate at each batch that it can have."""
        parts, held, room = self._parts(candidate), self.held(candidate), self.room
        points = []
        for batch, own in zip(self.goal.batches, parts.T.tolist(), strict=True):
            taken, cached = held.params + int(2 * held.buffer * batch), int(batch * held.in_cache)
            fits = taken + cached <= room
            that_fit = max(0, int((room - taken) / held.kv))
            if batch >= candidate.least_batch:
                bytes_held = cached, held.params, taken + cached, that_fit
                points.append(Point(candidate, batch, sum(own), tuple(own), *bytes_held, fits))
        return points

    def held(self, candidate: Candidate) -> Held:
        """What a rank holds whatever the batch, and for each sequence of it."""
        structure = self.model.structure(candidate)
        weights, others = structure.params_bytes(candidate.layout)
        params = int(weights * Fraction(self.weights).limit_denominator(1 << 12) + others)
        kv = self.kv_bytes(candidate)
        in_cache = kv * candidate.cp * self.model.slots(candidate.cp, self.goal.context)
        return Held(params, kv, in_cache, structure.buffer(candidate.layout))

    def kv_bytes(self, candidate: Candidate) -> Fraction:
        """Bytes of a token in the caches of a rank, on average."""
        if self.goal.cache.option is None:
            return self.model.kv_bytes(candidate, "auto") * Fraction(1, 2 * self._itemsize)
        return self.model.kv_bytes(candidate, self.goal.cache.option)

    @property
    def room(self) -> int:
        """Bytes that a rank has for all of it."""
        return int((self.goal.accelerator.memory_gb - self.goal.accelerator.reserved_gb) * 1e9)

    def _parts(self, candidate: Candidate) -> Batches:
        """Microseconds of a step by PARTS, [part, batch]."""
        parts = np.zeros((len(PARTS), len(self._batches)))
        bodies: dict[int, _Body] = {}
        for group in self.model.structure(candidate).terms(candidate.layout):
            own = self._group(group, candidate.cp)
            parts += group.layers * own.parts
            if group.parts > 1:
                bodies.setdefault(group.body, _Body(group.layers)).groups.append(own)
        for body in bodies.values():
            parts[_EXCHANGE] += body.layers * body.held_us
            parts[-1] += body.layers * self.goal.accelerator.fixed_us_of_more(body.launches, body.more_launches)
        parts[-1] += self.goal.accelerator.fixed_us_per_layer * self.model.layers
        return parts

    def _group(self, group: Group, cp: int) -> _GroupTimes:
        known = group.key, cp if any(t.attends for t in group.terms) else 0
        if known not in self._times:
            self._times[known] = self._timed(group, cp)
        return self._times[known]

    def _timed(self, group: Group, cp: int) -> _GroupTimes:
        """What is done once, and what each part of the batch does of each chunk; exchanges of parts are left to the queues."""
        parts, chunks = np.zeros((len(PARTS), len(self._batches))), dict[tuple[int, int], Chunk]()
        launch, rows = self.goal.accelerator.launch_us, rows_of_parts(self._batches, group.parts)
        for term in group.terms:
            # a term counts by the whole batch: the rows of a part are those of a batch that is so many times as large
            all_rows = term.chunk is None or term.whole
            batches = [self._batches if all_rows else own * group.parts for own in rows[: None if term.chunk else 1]]
            times = tuple(self.term_us(term, cp, own) + launch * term.launches for own in batches)
            if term.chunk is None or not term.is_collective:
                parts[PARTS.index(part_of(term))] += sum(times)
            if term.chunk is not None:
                chunks[term.chunk] = with_term(chunks.get(term.chunk), times, term.is_collective)
        more = (group.parts - 1) * sum(t.launches for t in group.terms if t.chunk)
        return _GroupTimes(parts, chunks, sum(t.launches for t in group.terms), more)

    def term_us(self, term: Term, cp: int, batches: NDArray[np.int64]) -> Batches:
        """Microseconds of one term at each batch."""
        machine = self.goal.accelerator
        if term.is_collective:
            return np.array([machine.collective_us(term.kind, term.peers, term.wire * own) for own in batches.tolist()])
        kind = {ATTENTION: self.goal.cache.peak, MATMUL: self.goal.weights.peak}.get(term.kind, "bf16")
        rows, local = batches.astype(np.float64), self.seen(term.reach, cp)
        return machine.compute_us(term.flops_at(rows, local), term.bytes_at(rows, local, self.weights, self.read), kind)

    def seen(self, reach: tuple[str, int], cp: int) -> int:
        """Tokens of a sequence that a query sees on the fullest rank."""
        if (reach, cp) not in self._seen:
            self._seen[reach, cp] = seen(reach, self.goal.context - 1, cp, self.model.base.tokens_per_block)
        return self._seen[reach, cp]


def part_of(term: Term) -> str:
    """Which of PARTS it counts for."""
    if term.is_collective:
        return "all_reduce" if term.kind == "all_reduce" else "exchange"
    return {ATTENTION: "attention", MATMUL: "weights"}.get(term.kind, "other")


def pareto(points: Iterable[Point]) -> list[Point]:
    """What fits and nothing else beats in both tokens a second: of a user, and of a GPU. The fastest for a user first."""
    front: list[Point] = []
    for point in sorted(
        points, key=lambda p: (-p.tokens_per_s_per_user, -p.tokens_per_s_per_gpu, plainness(p.candidate))
    ):
        if point.fits and (not front or point.tokens_per_s_per_gpu > front[-1].tokens_per_s_per_gpu * (1 + 1e-12)):
            front.append(point)
    return front


def plainness(candidate: Candidate) -> tuple[object, ...]:
    """The plainer of two plans comes first: fewer ranks that share a cache, fewer options that are not the default."""
    return (
        candidate.cp,
        candidate.pad_heads,
        candidate.q_proj != "replicate",
        candidate.merge != "a2a",
        candidate.overlap != "none",
        candidate.tpa,
        -candidate.ep,
        candidate.v_up,
    )


def recommended(points: Iterable[Point], goal: Goal) -> Point | None:
    """The plan to take: most tokens a second of a GPU among those that give a user enough; without such a wish the largest product of both.

    Plans within 2 % of the best are equal, and of these the plainest is taken.
    """
    enough = [p for p in points if p.fits and p.tokens_per_s_per_user >= goal.tokens_per_s_per_user]

    def worth(p: Point) -> float:
        return p.tokens_per_s_per_gpu * (1.0 if goal.tokens_per_s_per_user else p.tokens_per_s_per_user)

    if not enough:
        return None
    best = max(map(worth, enough))
    near = [p for p in enough if worth(p) >= best * (1 - TIE)]
    return min(near, key=lambda p: (*plainness(p.candidate), -worth(p)))


def best_at(points: Iterable[Point], batch: int, ranks: int, exchanges: bool) -> Point | None:
    """The fastest that fits at a batch on so many ranks, with cp > 1 or with cp = 1."""
    own = [
        p
        for p in points
        if p.batch == batch and p.candidate.ranks == ranks and p.fits and (p.candidate.cp > 1) == exchanges
    ]
    return min(own, key=lambda p: (p.step_us, plainness(p.candidate)), default=None)


def batches_of(text: str) -> tuple[int, ...]:
    """Of "1..256" powers of two from the first to the last, both included; of "8" or "1,8,64" these.

    Raises:
        HelixError: anything else.
    """
    try:
        if ".." in text:
            first, last = (int(part) for part in text.split(".."))
            powers = [1 << i for i in range(last.bit_length()) if first < 1 << i < last]
            batches = (first, *powers, last)
        else:
            batches = tuple(int(part) for part in text.split(","))
        if min(batches) < 1 or list(batches) != sorted(batches):
            raise ValueError
    except ValueError:
        raise HelixError(
            f"--batch {text!r}: expected a number, several with commas, or a range such as 1..256"
        ) from None
    return tuple(dict.fromkeys(batches))


def count_of(text: str, option: str) -> int:
    """Of "131072", of "128K" (of 1024) or "1M" (1024 K).

    Raises:
        HelixError: anything else.
    """
    scale = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:].upper(), 1)
    digits = text if scale == 1 else text[:-1]
    try:
        count = Fraction(digits) * scale
        if count < 1 or count.denominator != 1:
            raise ValueError
    except (ValueError, ZeroDivisionError):
        raise HelixError(f"{option} {text!r}: expected tokens, such as 131072, 128K or 1M (of 1024)") from None
    return int(count)


def with_goal(search: Search, **changes: object) -> Search:
    """The same model under another goal."""
    return Search(search.model, replace(search.goal, **changes))  # type: ignore[arg-type]
