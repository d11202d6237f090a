"""One rank that replays a step of two collectives as on a card, without one; in its fifth step something on rank 1 goes wrong.

torchrun --nproc-per-node 2 replay_worker.py KIND

A fake recorder holds gloo's collectives in its graph, as CUDA graphs hold NCCL's; "none": nothing goes wrong. Else the host of rank 0
goes on, and waits for a device that never ends. "device": so does rank 1. "host": rank 1 never comes back from its replay. "late":
it does not come at all.
"""

from __future__ import annotations

import sys
import time
from unittest.mock import PropertyMock, patch

import torch

from helix_compile.layout.degrees import HelixLayout, HelixMesh
from helix_compile.runtime.replays import ReplayedSteps
from helix_compile.worlds.distributed import DistributedWorld
from helix_compile.worlds.program import Program
from helix_compile.worlds.world import open_world
from tests.distributed.fault_worker import two_collectives
from tests.support.recording import FakeGraphs, RecordedCalls

FAULTY, STEP = 1, 5
as_recorded = RecordedCalls.replay
now = {"replay": as_recorded}


def main(kind: str) -> None:
    """Six steps of one shape: launched, recorded, replayed."""
    layout = HelixLayout(kvp=2, tpa=1, ep=1, tpf=2)
    world = open_world(HelixMesh(layout), "distributed", torch.device("cpu"), "deferred")
    rank, fake = world.ranks[0], FakeGraphs()
    world.start({})
    stage = two_collectives(torch.ops.aten.neg.default)
    _, x = (n for n in stage.graph.nodes if n.op == "placeholder")
    programs = [Program(rank, stage, {x: torch.ones(4, 3) * (rank + 1)}, lambda call: call.segment)]
    replays, step = ReplayedSteps(fake, world), {"input_ids": torch.ones(2, 1, dtype=torch.int64)}
    RecordedCalls.replay = lambda piece: now["replay"](piece)  # type: ignore[method-assign]
    with patch.object(DistributedWorld, "host_collectives", PropertyMock(return_value="")):
        for number in range(1, 7):
            if number == STEP:
                strike(kind, rank, fake)
            (total,) = replays.run(programs, "", step, step)
            assert number == STEP or bool((total == -6).all()), total
            if number == STEP and kind != "none":
                time.sleep(600)  # the host reads a value, somewhere
    (tape,) = replays.recordings
    assert (tape.pieces, tape.apart_calls, fake.pieces[0].replays) == (1, 0, 5)
    print(f"rank {rank} done", flush=True)


def strike(kind: str, rank: int, fake: FakeGraphs) -> None:
    """What goes wrong from here on."""
    if kind == "late" and rank == FAULTY:
        time.sleep(600)
    if kind == "host" and rank == FAULTY:
        now["replay"] = lambda piece: time.sleep(600)
    elif kind != "none":
        now["replay"] = lambda piece: None
        fake.mark = lambda: lambda: False  # type: ignore[method-assign]


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
