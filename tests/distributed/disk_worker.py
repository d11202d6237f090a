"""One rank of four whose rank 2 has a full disk and does not catch the error: FOLDER save | cache.

torchrun --nproc-per-node 4 disk_worker.py FOLDER KIND
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path

import torch

from helix_compile import helix_compile
from helix_compile.cache.file import write_cache
from tests.distributed.steps import OPTIONS, prompts
from tests.support.disk import full_after
from tests.support.handover import random_entries
from tests.support.models import fresh_model


def main(folder: Path, kind: str) -> None:
    """A save of all, or a cache that rank 2 alone writes between two steps."""
    compiled = helix_compile(fresh_model("short", torch.float32), cp=4, **OPTIONS)
    rank = compiled.ranks[0].rank
    ids, mask = prompts()
    compiled(ids, mask)
    with full_after(1000) if rank == 2 else nullcontext():
        if kind == "save":
            compiled.save(folder / "saved")
        elif rank == 2:
            write_cache(folder / "cache.safetensors", random_entries([40], [20] * 2, [6] * 2))
    compiled(ids[:, :1])
    print(f"rank {rank} done", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2])
