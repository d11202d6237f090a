"""Two ranks that take steps with overlap="none" and "hopb" over links that are slowed and with attention that takes longer, by turns.

torchrun --nproc-per-node 2 overlap_worker.py FOLDER: medians of steps in seconds, as JSON; and of each node of steps that are not slowed,
which is what else those steps do on this machine (an interruption would be in a mean of every step, and is in no median of them).
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from helix_compile import HelixModule, helix_compile
from helix_compile.ir.collectives import COLLECTIVES, WAIT
from helix_compile.ir.stage import graphs_of
from tests.distributed.steps import OVERLAP, OVERLAP_BATCH, SLOWED
from tests.support.clock import Durations
from tests.support.models import fresh_model

REPEATS = 3


class SlowWorld:
    """What stands in a module's world: a collective is over no earlier than its start, behind those before it, and its time; attention
    sleeps for its time. Between, the seconds of every node are noted, but for waits.
    """

    def __init__(self, compiled: HelixModule):
        self.durations = Durations(0.0, 0.0, 0.0)
        self.real: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        self._bodies = {graph.graph: name for name, graph in graphs_of(compiled.graph)}
        self._world: Any = compiled.world
        self._start, self._wait, self._run = self._world._start, self._world._wait, self._world.run
        self._due: dict[int, float] = {}
        self._free = self._last = 0.0
        self._world._start, self._world._wait, self._world.run = self.start, self.wait, self.run

    def start(self, op: str, args: tuple, where: str, tape: Any) -> Any:
        started = self._start(op, args, where, tape)
        sent = COLLECTIVES[op].egress(len(self._world.mesh.members(args[-1], self._world.rank)), args[0].nbytes)
        self._free = max(self._free, time.monotonic()) + self.durations.exchange(op, float(sent))
        self._due[id(started)] = self._free
        return started

    def wait(self, started: Any, where: str, tape: Any) -> Any:
        value = self._wait(started, where, tape)
        time.sleep(max(0.0, self._due.pop(id(started)) - time.monotonic()))
        return value

    def run(self, graphs: Any, inputs: Any, hook: Any = None, agreed: Any = None) -> Any:
        self._last = time.monotonic()
        return self._run(graphs, inputs, self._after, agreed)

    def _after(self, rank: int, node: Any, value: Any) -> None:
        now = time.monotonic()
        if self.durations == Durations(0.0, 0.0, 0.0) and node.target is not WAIT and node.op == "call_function":
            self.real[self._bodies[node.graph]][node.name].append(now - self._last)
        time.sleep(self.durations.compute(node, value))
        self._last = time.monotonic()


def main(folder: Path) -> None:
    """Each of them by turns, so that what else the machine does falls on all alike."""
    model = fresh_model("short", torch.float32)
    compiled = {how: helix_compile(model, overlap=how, **OVERLAP) for how in ("none", "hopb")}
    worlds = {how: SlowWorld(module) for how, module in compiled.items()}
    ids = torch.arange(OVERLAP_BATCH)[:, None]
    took: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for _ in range(REPEATS):
        for name, durations in {"nothing": Durations(0.0, 0.0, 0.0), **SLOWED}.items():
            logits = {}
            for how, module in compiled.items():
                worlds[how].durations = durations
                module.reset()
                begun = time.monotonic()
                logits[how] = module(ids)
                took[name][how].append(time.monotonic() - begun)
            assert torch.equal(logits["none"], logits["hopb"])
    said = {
        "steps": {name: {how: statistics.median(own) for how, own in each.items()} for name, each in took.items()},
        "real": {
            how: {
                body: {node: statistics.median(own) for node, own in nodes.items()}
                for body, nodes in world.real.items()
            }
            for how, world in worlds.items()
        },
    }
    (rank,) = compiled["none"].world.ranks
    (folder / f"{rank}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
