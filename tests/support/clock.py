"""What ranks' clocks would say of steps that the virtual world runs, where attention and exchanges take given times and all else none.

The clock sees what ranks really do, in their order, with the tensors that they have; of schedules and predicted costs it knows nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from helix_compile import HelixModule
from helix_compile.ir.collectives import COLLECTIVES, WAIT
from helix_compile.ir.graph import helix_op
from helix_compile.ir.stage import OUTER, body_of
from helix_compile.predict.costs import NodeSizes, Workload, predict_costs
from helix_compile.predict.schedule import run_queues
from helix_compile.worlds.walk import Pending

ATTENTION = ("mla_decode", "gqa_decode", "mla_decode_slots")


@dataclass(frozen=True)
class Durations:
    """Seconds: of attention for each sequence; of an exchange whatever its size, and for each byte that leaves a rank. Sums take none."""

    row: float
    latency: float
    byte: float

    def compute(self, node: fx.Node, value: Any) -> float:
        """Of a node that was run."""
        return self.row * value[0].shape[0] if helix_op(node) in ATTENTION else 0.0

    def exchange(self, op: str, sent: float) -> float:
        """Of a collective."""
        return 0.0 if op == "all_reduce" else self.latency + self.byte * sent

    def predicted(
        self, compiled: HelixModule, batch: int, real: Mapping[str, Mapping[str, float]] | None = None
    ) -> float:
        """Of a step of `batch` sequences, one token each, by the product's rule of queues on its lowered graphs.

        Args:
            real: what each node takes besides, by body; of the graph around them too.
        """
        step, layout, real = Workload(batch, 1, 1), compiled.plan.layout, real or {}
        sizes, total = (
            NodeSizes(step, layout, compiled.plan.options.tokens_per_block),
            sum(real.get(OUTER, {}).values()),
        )
        for body in compiled.plan.bodies:
            graph = body_of(compiled.graph, body.name).graph
            costs = predict_costs(graph, step, layout, compiled.plan.options.tokens_per_block)
            seconds = {n: self.exchange(c.collective, c.wire_bytes) for n, c in costs.items() if c.is_collective}
            seconds |= {n.name: self.row * sizes.shapes(n)[0][0] for n in graph.nodes if helix_op(n) in ATTENTION}
            for name, took in real.get(body.name, {}).items():
                seconds[name] = seconds.get(name, 0.0) + took
            ends = (start + took for _, _, _, start, took, _ in run_queues(graph, [seconds], lambda axis, rank: (0,)))
            total += len(body.layers) * max(ends)
        return total


Key = tuple[str, tuple[int, ...], int]


class Clock:
    """Of the ranks of a virtual world. Every step that is run from now on counts from 0."""

    def __init__(self, compiled: HelixModule, durations: Durations):
        self._durations, run = durations, compiled.world.run
        self._clear(compiled)

        def seen(graphs: Any, inputs: Any, hook: Any = None, agreed: Mapping[str, Tensor] | None = None) -> list[Any]:
            assert hook is None
            self._clear(compiled)
            return run(graphs, inputs, self._saw, agreed)

        compiled.world.run = seen  # type: ignore[method-assign]

    def _clear(self, compiled: HelixModule) -> None:
        self._logs: list[list[tuple[str, Any]]] = [[] for _ in compiled.world.ranks]
        self._bytes: dict[tuple[int, fx.Node], int] = {}
        self._started: dict[tuple[int, fx.Node], Key] = {}
        self._seconds: dict[Key, float] = {}

    def _saw(self, rank: int, node: fx.Node, value: Any) -> None:
        if isinstance(value, Pending):
            op, key = value.op, value.ticket
            sent = COLLECTIVES[op].egress(len(key[1]), self._bytes[rank, node.args[0]])
            self._seconds[key] = self._durations.exchange(op, float(sent))
            self._started[rank, node] = key
            self._logs[rank].append(("start", key))
        elif node.target is WAIT:
            self._logs[rank].append(("wait", self._started[rank, node.args[0]]))
        elif took := self._durations.compute(node, value):
            self._logs[rank].append(("busy", took))
        if isinstance(value, Tensor):
            self._bytes[rank, node] = value.nbytes

    @property
    def elapsed(self) -> list[float]:
        """When each rank was done with the last step."""
        now, place = [0.0] * len(self._logs), [0] * len(self._logs)
        last: list[Key | None] = [None] * len(self._logs)
        self._ready: dict[Key, dict[int, tuple[float, Key | None]]] = defaultdict(dict)
        self._ends: dict[Key, float] = {}
        while moved := any(place[r] < len(log) for r, log in enumerate(self._logs)):
            moved = False
            for rank, log in enumerate(self._logs):
                while place[rank] < len(log):
                    what, of = log[place[rank]]
                    if what == "busy":
                        now[rank] += of
                    elif what == "start":
                        self._ready[of][rank], last[rank] = (now[rank], last[rank]), of
                    elif (end := self._end(of)) is None:
                        break
                    else:
                        now[rank] = max(now[rank], end)
                    place[rank] += 1
                    moved = True
            assert moved, "ranks wait for each other"
        return now

    def _end(self, key: Key) -> float | None:
        """When a collective is over; None: some rank has not started it, or something before it."""
        if key not in self._ends:
            if len(self._ready[key]) < len(key[1]):
                return None
            begins = 0.0
            for ready, before in self._ready[key].values():  # a rank's link carries one after the other
                free = 0.0 if before is None else self._end(before)
                if free is None:
                    return None
                begins = max(begins, ready, free)
            self._ends[key] = begins + self._seconds[key]
        return self._ends[key]
