"""One rank that runs a two-collective graph step after step; a fault happens on rank 2. No model: it starts fast.

torchrun --nproc-per-node 4 fault_worker.py KIND [CHECK] [program]      program: a flat list of calls, as compiled steps are
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, fx

from helix_compile.layout.degrees import HelixLayout, HelixMesh
from helix_compile.worlds.program import Program
from helix_compile.worlds.world import open_world

c10d = torch.ops._c10d_functional
FAULTY, STEP = 2, 3


def main(kind: str, check: str = "deferred", how: str = "") -> None:
    """Five steps; KIND strikes rank 2 inside its third, or before it."""
    layout = HelixLayout(kvp=2, tpa=2, ep=1, tpf=4)
    world = open_world(HelixMesh(layout), "distributed", torch.device("cpu"), check)
    rank = world.ranks[0]
    odd = rank == FAULTY
    world.start(
        {
            "option cp": lambda: "4" if odd and kind == "plan" else "2",
            "weights": lambda: "0a1b" if odd and kind == "weights" else "77ff",
        }
    )
    step = 0

    def strike(value: Tensor) -> Tensor:
        if step == STEP and kind.startswith("inside-"):
            all_have_come(rank)
            if odd:
                hit(kind.removeprefix("inside-"))
        return value

    graph = two_collectives(strike)
    _, x = (node for node in graph.graph.nodes if node.op == "placeholder")
    programs = [Program(rank, graph, {x: torch.ones(4, 3) * rank}, lambda call: call.segment)]
    for step in range(1, 6):
        if odd and step == STEP and kind.startswith("before-"):
            hit(kind.removeprefix("before-"))
        length = 2 if odd and step == STEP and kind == "shape" else 1
        ids = torch.ones(2, length, dtype=torch.int64)
        if how == "program":
            world.run_programs(programs, {"input_ids": ids})
        else:
            world.run(graph, [[ids, torch.ones(4, 3) * rank]])
    print(f"rank {rank} done", flush=True)


def all_have_come(rank: int) -> None:
    """The faulty rank goes on when all are here: gloo may still hold what it sent in a collective that it has left."""
    store = dist.group.WORLD.get_group_store()
    store.set(f"past the first sum/{rank}", "")
    if rank == FAULTY:
        store.wait([f"past the first sum/{other}" for other in range(4)])


def hit(kind: str) -> None:
    """What goes wrong on the faulty rank."""
    match kind:
        case "exception":
            raise ValueError("weights of layer 7 are NaN")
        case "exit":
            os._exit(3)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "hang":
            time.sleep(600)
        case _:
            raise AssertionError(kind)


def two_collectives(strike: Callable[..., object]) -> fx.GraphModule:
    """Sum over kvp, strike, sum over the world."""
    graph = fx.Graph()
    ids, x = graph.placeholder("input_ids"), graph.placeholder("x")
    ids.meta["input"], x.meta["input"] = ["input", "input_ids"], ["param", "x"]
    part = graph.call_function(c10d.all_reduce.default, (x, "sum", "kvp"))
    part = graph.call_function(c10d.wait_tensor.default, (part,))
    part = graph.call_function(strike, (part,))
    total = graph.call_function(c10d.all_reduce.default, (part, "sum", "world"))
    graph.output(graph.call_function(c10d.wait_tensor.default, (total,)))
    return fx.GraphModule(torch.nn.Module(), graph)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
