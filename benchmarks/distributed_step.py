"""One decode step by four processes over gloo, by the virtual world, and by one process alone (cp=1), in one run.

    torchrun --nproc-per-node 4 benchmarks/distributed_step.py [--repeats 30]

Each rank holds a shard of the tiny preset on gloo; rank 0 also holds all four virtual ranks, and the model at cp=1. The
three take turns, and while rank 0 runs one of the last two the others wait at a barrier, which leaves it the machine. A
step of gloo counts from a barrier to the end of rank 0's step, comparison of the inputs through the store included.
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

from helix_compile import HelixModule, helix_compile
from helix_compile.models.presets import build_model, preset_config

RANKS = 4
WARMUP = 2
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
        header = ["context", "gloo, 4 processes", "virtual, 4 ranks", "cp=1"]
        ratios = ["gloo / cp=1", "gloo / virtual", "virtual / cp=1"]
        print_table([*header, *ratios, "collectives a step"], rows)


def _row(S: int, repeats: int) -> list[str]:
    model = build_model(preset_config("tiny"))
    gloo = _filled(model, S, RANKS, "distributed")
    modules = {"gloo": gloo}
    if gloo.world.is_leader:
        modules |= {"virtual": _filled(model, S, RANKS, "virtual"), "one": _filled(model, S, 1, "virtual")}
    times: dict[str, list[float]] = {"gloo": [], "virtual": [], "one": []}
    for _ in range(WARMUP + repeats):
        for name, taken in times.items():
            dist.barrier()
            if name in modules:
                taken.append(_seconds(lambda name=name: modules[name](TOKEN)))
    if not gloo.world.is_leader:
        return []
    _check(modules)
    ms = {n: statistics.median(taken[WARMUP:]) * 1e3 for n, taken in times.items()}
    pairs = (("gloo", "one"), ("gloo", "virtual"), ("virtual", "one"))
    count = sum(gloo.world.num_collectives.values()) / (WARMUP + repeats)
    return [str(S), *(f"{t:.1f} ms" for t in ms.values()), *(f"{ms[a] / ms[b]:.1f}" for a, b in pairs), f"{count:g}"]


def _filled(model: torch.nn.Module, S: int, cp: int, world: str) -> HelixModule:
    """Compiled, with one sequence of S random latents; the same on every rank."""
    compiled = helix_compile(model, cp=cp, world=world, max_batch_size=1, max_seq_len=S + 256)
    layers, R, r = (getattr(model.config, k) for k in ("num_hidden_layers", "kv_lora_rank", "qk_rope_head_dim"))
    random = torch.Generator().manual_seed(0)
    latents, k_ropes = ([torch.randn(1, S, width, generator=random) for _ in range(layers)] for width in (R, r))
    compiled.import_cache(latents, k_ropes, [S])
    return compiled


def _check(modules: dict[str, HelixModule]) -> None:
    """After equal steps the three hold sequences of equal length."""
    lengths = {name: module.lengths.tolist() for name, module in modules.items()}
    assert lengths["gloo"] == lengths["virtual"] == lengths["one"], lengths


def _seconds(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
