"""Two ranks that take steps with overlap="none" and "hopb" over links that are slowed and with attention that takes longer, by turns.

torchrun --nproc-per-node 2 overlap_worker.py FOLDER: medians of steps in seconds, as JSON.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from helix_compile import HelixModule, helix_compile
from helix_compile.ir.collectives import COLLECTIVES
from tests.distributed.steps import OVERLAP, OVERLAP_BATCH, SLOWED
from tests.support.clock import Durations
from tests.support.models import fresh_model

REPEATS = 5


def slow(compiled: HelixModule, durations: Durations) -> None:
    """A collective is over no earlier than its start, behind those before it, and its time; attention sleeps for its time."""
    world: Any = compiled.world
    start, wait, run = type(world)._start, type(world)._wait, type(world).run
    due: dict[int, float] = {}
    free = 0.0

    def slow_start(op: str, args: tuple, where: str, tape: Any) -> Any:
        nonlocal free
        started = start(world, op, args, where, tape)
        sent = COLLECTIVES[op].egress(len(world.mesh.members(args[-1], world.rank)), args[0].nbytes)
        free = max(free, time.monotonic()) + durations.exchange(op, float(sent))
        due[id(started)] = free
        return started

    def slow_wait(started: Any, where: str, tape: Any) -> Any:
        value = wait(world, started, where, tape)
        time.sleep(max(0.0, due.pop(id(started)) - time.monotonic()))
        return value

    def slow_run(graphs: Any, inputs: Any, hook: Any = None, agreed: Any = None) -> Any:
        return run(world, graphs, inputs, lambda _, node, value: time.sleep(durations.compute(node, value)), agreed)

    world._start, world._wait, world.run = slow_start, slow_wait, slow_run


def main(folder: Path) -> None:
    """Each setting by turns, so that what else the machine does falls on both."""
    model = fresh_model("short", torch.float32)
    compiled = {how: helix_compile(model, overlap=how, **OVERLAP) for how in ("none", "hopb")}
    ids = torch.arange(OVERLAP_BATCH)[:, None]
    seen: dict[str, dict[str, float]] = {}
    for name, durations in SLOWED.items():
        took: dict[str, list[float]] = {how: [] for how in compiled}
        logits = {}
        for _ in range(REPEATS):
            for how, module in compiled.items():
                slow(module, durations)
                module.reset()
                begun = time.monotonic()
                logits[how] = module(ids)
                took[how].append(time.monotonic() - begun)
        assert torch.equal(logits["none"], logits["hopb"])
        seen[name] = {how: statistics.median(own) for how, own in took.items()}
    (rank,) = compiled["none"].world.ranks
    (folder / f"{rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
