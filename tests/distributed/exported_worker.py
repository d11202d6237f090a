"""One rank of an exported folder, in a process that has neither the model nor transformers.

torchrun --nproc-per-node N exported_worker.py FOLDER STEPS OUT [--by-axis]    STEPS: ids_0, mask_0, ids_1, ... [B, T]

Writes OUT/rank_R.safetensors: logits_0, ... and cache_0, ...
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import helix_compile

UNWANTED = ("transformers", "onnx")


def groups_by_axis(rank: int) -> dict[str, dist.ProcessGroup]:
    """Kvp and tpa of cp=2, tpa=2, made here, as a user's engine has them."""
    pairs = {"kvp": ([0, 1], [2, 3]), "tpa": ([0, 2], [1, 3])}
    made = {axis: [dist.new_group(list(ranks)) for ranks in of_axis] for axis, of_axis in pairs.items()}
    mine = {axis: next(g for g, r in zip(made[axis], pairs[axis], strict=True) if rank in r) for axis in pairs}
    return {"world": dist.group.WORLD, **mine}


class Wire(TorchDispatchMode):
    """Which groups c10d is asked to exchange over."""

    def __init__(self) -> None:
        super().__init__()
        self.groups: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "_c10d_functional" and "wait" not in func.__name__:
            self.groups.add(args[-1])
        return func(*args, **(kwargs or {}))


def main(folder: str, steps: str, out: str, by_axis: bool) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    group = groups_by_axis(rank) if by_axis else dist.group.WORLD
    module = helix_compile.load_exported(folder, rank, group)
    given, seen = load_file(steps), {}
    with Wire() as wire:
        for number in range(len(given) // 2):
            seen[f"logits_{number}"] = module(given[f"ids_{number}"], given[f"mask_{number}"]).contiguous()
    if by_axis:
        assert wire.groups == {group[axis].group_name for axis in ("kvp", "world")}
    seen |= {f"cache_{i}": cache for i, cache in enumerate(module.ranks[0].cache)}
    assert not [name for name in UNWANTED if name in sys.modules]
    save_file(seen, Path(out) / f"rank_{rank}.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:4], by_axis="--by-axis" in sys.argv)
