"""One rank that loads each saved module in FOLDER, runs the steps, and writes its logits, its node and its cp group.

torchrun --nproc-per-node 8 load_worker.py FOLDER
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from helix_compile import HelixModule
from tests.distributed.steps import run_steps


def main(folder: Path) -> None:
    """Logits by folder name."""
    seen = {}
    for saved in sorted(path for path in folder.iterdir() if path.is_dir()):
        loaded = HelixModule.load(saved)
        seen[saved.name] = run_steps(loaded).contiguous()
    rank = loaded.ranks[0].rank
    place = {"node": os.environ["GROUP_RANK"], "kvp": str(loaded.world.mesh.members("kvp", rank))}
    save_file(seen, folder / f"seen_{rank}.safetensors", metadata=place)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
