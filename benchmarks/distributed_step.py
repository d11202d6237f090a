"""One decode step by four processes over gloo, by the virtual world, and by one process alone (cp=1), in one run.

    torchrun --nproc-per-node 4 benchmarks/distributed_step.py [--repeats 30]

Each rank holds a shard of the tiny preset on gloo, once for each way to compare what ranks are given (check="every",
"deferred", "off"); rank 0 also holds all four virtual ranks, and the model at cp=1. They take turns, and while rank 0 runs
one of the last two the others wait at a barrier, which leaves it the machine. A step of gloo counts from a barrier to the end
of rank 0's step, comparison of the inputs through the store included. The last column is that alone: the same world runs a
graph that computes nothing, 20 steps after a barrier.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from measuring import format_machine, print_table
from torch import fx

from helix_compile import HelixModule, helix_compile
from helix_compile.models.presets import build_model, preset_config

RANKS = 4
WARMUP = 2
CHECKS = ("every", "deferred", "off")
PAIRS = (("deferred", "every"), ("deferred", "off"), ("deferred", "cp=1"), ("deferred", "virtual"), ("virtual", "cp=1"))
TOKEN = torch.tensor([[7]])


def main() -> None:
    """One row a context; rank 0 prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=30)
    repeats = parser.parse_args().repeats
    if os.environ.get("WORLD_SIZE") != str(RANKS):
        raise SystemExit(f"start it by torchrun --nproc-per-node {RANKS}; WORLD_SIZE is {os.environ.get('WORLD_SIZE')}")
    torch.set_num_threads(1)
    rows = [_row(S, repeats) for S in (64, 2048)]
    if dist.get_rank() == 0:
        print(f"{format_machine()}; load {os.getloadavg()[0]:.1f}\n")
        header = ["context", *(f"gloo, {check}" for check in CHECKS), "virtual, 4 ranks", "cp=1"]
        ratios = [f"{a} / {b}" for a, b in PAIRS]
        print_table([*header, *ratios, "collectives a step", f"compare alone: {', '.join(CHECKS)}"], rows)


def _row(S: int, repeats: int) -> list[str]:
    model = build_model(preset_config("tiny"))
    modules = {check: _filled(model, S, RANKS, "distributed", check=check) for check in CHECKS}
    gloo = modules["deferred"]
    if gloo.world.is_leader:
        modules |= {"virtual": _filled(model, S, RANKS, "virtual"), "cp=1": _filled(model, S, 1, "virtual")}
    times: dict[str, list[float]] = {name: [] for name in (*CHECKS, "virtual", "cp=1")}
    for _ in range(WARMUP + repeats):
        for name, taken in times.items():
            dist.barrier()
            if name in modules:
                taken.append(_seconds(lambda name=name: modules[name](TOKEN)))
    alone = [_seconds_to_compare(modules[check], repeats) for check in CHECKS]
    if not gloo.world.is_leader:
        return []
    _check(modules)
    ms = {n: statistics.median(taken[WARMUP:]) * 1e3 for n, taken in times.items()}
    compare = ", ".join(f"{seconds * 1e3:.2f} ms" for seconds in alone)
    count = sum(gloo.world.num_collectives.values()) / (WARMUP + repeats)
    return [
        str(S),
        *(f"{t:.1f} ms" for t in ms.values()),
        *(f"{ms[a] / ms[b]:.2f}" for a, b in PAIRS),
        f"{count:g}",
        compare,
    ]


def _filled(model: torch.nn.Module, S: int, cp: int, world: str, **options: str) -> HelixModule:
    """Compiled, with one sequence of S random latents; the same on every rank."""
    compiled = helix_compile(model, cp=cp, world=world, max_batch_size=1, max_seq_len=S + 256, **options)
    layers, R, r = (getattr(model.config, k) for k in ("num_hidden_layers", "kv_lora_rank", "qk_rope_head_dim"))
    random = torch.Generator().manual_seed(0)
    latents, k_ropes = ([torch.randn(1, S, width, generator=random) for _ in range(layers)] for width in (R, r))
    compiled.import_cache(latents, k_ropes, [S])
    return compiled


def _seconds_to_compare(compiled: HelixModule, repeats: int) -> float:
    """Of a step in which nothing is computed."""
    graph = fx.Graph()
    ids = graph.placeholder("input_ids")
    ids.meta["input"] = ["input", "input_ids"]
    graph.output(ids)
    empty = fx.GraphModule(torch.nn.Module(), graph)
    compiled.world.run(empty, [[TOKEN]])  # a first step waits in any case
    taken = []
    for _ in range(repeats):
        dist.barrier()
        taken.append(_seconds(lambda: [compiled.world.run(empty, [[TOKEN]]) for _ in range(20)]) / 20)
    return statistics.median(taken)


def _check(modules: dict[str, HelixModule]) -> None:
    """After equal steps all hold sequences of equal length."""
    lengths = {name: module.lengths.tolist() for name, module in modules.items()}
    assert len({tuple(length) for length in lengths.values()}) == 1, lengths


def _seconds(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
