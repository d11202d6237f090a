"""HOP-B: what attention and exchange in parts of the batch take, and whether that is predicted to pay. Predicted.

    compute   attend 0 | attend 1 |          | wait 0, merge 0 | wait 1, merge 1
    link               | exchange 0          | exchange 1

Each part pays for its own collectives' latency and its own launches. The rule is that of schedule.py, which walks the graph itself,
and for one step of equal parts that of roofline.hopb_time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import fx

from helix_compile.ir.graph import PART
from helix_compile.predict.accelerators import longer

HOPB = "hopb"
Rows = TypeVar("Rows", int, NDArray[np.int64])
Time = float | NDArray[np.float64]  # one, or one for each batch


@dataclass(frozen=True)
class Chunk:
    """One step of a site's parts: compute up to a collective and that collective, or what follows the last one.

    Attributes:
        compute: time of each part.
        exchange: time of each part on the link; () where nothing is started.
    """

    compute: tuple[Time, ...]
    exchange: tuple[Time, ...] = ()


def both(one: Chunk | None, other: Chunk) -> Chunk:
    """What two groups of nodes do of the same step."""
    if one is None:
        return other
    return Chunk(_sums(one.compute, other.compute), _sums(one.exchange, other.exchange))


def with_term(chunk: Chunk | None, times: tuple[Time, ...], on_link: bool) -> Chunk:
    """A step with one more node, of so long in each part."""
    return both(chunk, Chunk((0.0,) * len(times), times) if on_link else Chunk(times))


def _sums(one: tuple[Time, ...], other: tuple[Time, ...]) -> tuple[Time, ...]:
    return tuple(a + b for a, b in zip(one, other, strict=True)) if one and other else one or other


def rows_of_parts(batch: Rows, parts: int) -> tuple[Rows, ...]:
    """Sequences of each part, as the pass cuts them."""
    return tuple(batch * (i + 1) // parts - batch * i // parts for i in range(parts))


def in_parts(steps: Sequence[Chunk]) -> Time:
    """Time from the first part's attention to the last part's merge; the order is that of passes/rewrite/overlap.py."""
    parts = len(steps[0].compute)
    compute: Any = 0.0
    link: Any = 0.0
    arrives: list[Any] = [0.0] * parts
    for time in range(parts + len(steps) - 1):
        for late, step in enumerate(steps):
            part = time - late
            if not 0 <= part < parts:
                continue
            compute = longer(compute, arrives[part]) + step.compute[part]
            if step.exchange:
                link = longer(link, compute) + step.exchange[part]
                arrives[part] = link
    return longer(compute, link)


def part_of_node(node: fx.Node) -> tuple[int, int, int] | None:
    """(site, part, parts) of a node that is of one part of a batch."""
    found = node.meta.get(PART)
    return None if found is None else (found[0], found[1], found[2])


@dataclass(frozen=True)
class StepTime:
    """A step in microseconds, predicted: what computes, what compute waits for (exchanges, sums over ranks), what is fixed."""

    compute: float
    exchange: float
    all_reduce: float
    fixed: float

    @property
    def total(self) -> float:
        """Of the step."""
        return self.compute + self.exchange + self.all_reduce + self.fixed

    def __add__(self, other: StepTime) -> StepTime:
        return StepTime(*(getattr(self, n) + getattr(other, n) for n in ("compute", "exchange", "all_reduce", "fixed")))

    def times(self, layers: int) -> StepTime:
        """Of so many."""
        return StepTime(*(layers * x for x in (self.compute, self.exchange, self.all_reduce, self.fixed)))


@dataclass(frozen=True)
class Verdict:
    """A step with overlap="hopb" against the same without."""

    without: StepTime
    hopb: StepTime
    batch: int
    context: int
    accelerator: str

    @property
    def gain(self) -> float:
        """Share of the step that overlap saves; below 0 it costs that."""
        return 1 - self.hopb.total / self.without.total

    @property
    def loses(self) -> bool:
        """Is it no faster?"""
        return self.gain <= 0

    @property
    def text(self) -> str:
        """In words."""
        verdict = f"predicted to lose {-self.gain:.1%}" if self.loses else f"predicted to gain {self.gain:.1%}"
        return (
            f"overlap=hopb: {verdict}: {self.hopb.total:,.1f} us a step against {self.without.total:,.1f}, of {self.batch} sequences at "
            f"{self.context:,} tokens on {self.accelerator}: compute waits {self.hopb.exchange:,.1f} us for exchanges in place of "
            f"{self.without.exchange:,.1f}, computing in parts takes {self.hopb.compute - self.without.compute:,.1f} us more, launches of the "
            f"other parts {self.hopb.fixed - self.without.fixed:,.1f} (the fitted time of a layer goes with its launches)"
        )

    def facts(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "loses": self.loses,
            "gain": self.gain,
            "microseconds_without": asdict(self.without),
            "microseconds_hopb": asdict(self.hopb),
            "text": self.text,
        }
