"""One rank of tests/gpu/test_models_gpu.py: FOLDER BACKEND; nccl on a card of its own, gloo on the first card."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from helix_compile import helix_compile
from tests.distributed.steps import OPTIONS, run_steps
from tests.support.models import fresh_model


def main() -> None:
    """Steps of run_steps(), logits to FOLDER/seen_<rank>.safetensors; replayed the second time."""
    folder, backend = Path(sys.argv[1]), sys.argv[2]
    if backend == "gloo":  # given: the world makes nccl for cards
        dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    model = fresh_model("short", torch.float32)
    size = int(os.environ["WORLD_SIZE"])
    device = "cuda" if backend == "nccl" else "cuda:0"
    compiled = helix_compile(model, cp=size, world="distributed", device=device, **OPTIONS)
    assert dist.get_backend() == backend
    first, again = run_steps(compiled), run_steps(compiled)
    assert compiled.replays is not None
    tape = compiled.replays.recordings[-1]
    assert (tape.apart_calls == 0) == (backend == "nccl"), (tape.pieces, tape.apart_calls)
    assert (again - first).abs().max() <= 2e-5 * first.abs().max()
    save_file({"logits": again.cpu()}, folder / f"seen_{dist.get_rank()}.safetensors")


if __name__ == "__main__":
    main()
