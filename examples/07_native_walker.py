"""A native package stepped by C++ alone: a walker of 150 lines, built with torch's own headers, each rank one of its threads.

    python examples/07_native_walker.py         # wants g++ (or what CXX names) that knows C++20

In the folder beside: walker.cpp (the walk), exchange.h (collectives between threads; an engine would have NCCL there), helix_ops.cpp (what
a walk calls beside programs), files.h (JSON and safetensors). Python makes the package, and compares.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

SOURCES = Path(__file__).with_suffix("")


def build(walker: Path) -> None:
    """Compile and link it, to this file."""
    torchs = Path(torch.__file__).parent
    headers = [f"-isystem{torchs / 'include' / folder}" for folder in ("", "torch/csrc/api/include")]
    libraries = [
        f"-L{torchs / 'lib'}",
        f"-Wl,--no-as-needed,-rpath,{torchs / 'lib'}",
        "-ltorch",
        "-ltorch_cpu",
        "-lc10",
    ]
    command = [
        os.environ.get("CXX", "g++"),
        "-std=c++20",
        "-O1",
        *headers,
        *map(str, SOURCES.glob("*.cpp")),
        "-o",
        str(walker),
    ]
    subprocess.run([*command, *libraries, "-pthread"], check=True)


def stepped(walker: Path, folder: Path, steps: Sequence[tuple[Tensor, Tensor]]) -> list[list[Tensor]]:
    """Logits [B, T, vocab] of each rank, of each step. A step is (ids, mask) [B, T]; mask 0 is padding, or a row that idles."""
    lengths, given = torch.zeros(len(steps[0][0]), 1, dtype=torch.int64), dict[str, Tensor]()
    for number, (ids, mask) in enumerate(steps):
        positions = torch.where(mask > 0, mask.cumsum(1) - 1 + lengths, -1)
        lengths = lengths + mask.sum(1, keepdim=True)
        given |= {f"ids.{number}": ids.contiguous(), f"positions.{number}": positions.contiguous()}
    with tempfile.TemporaryDirectory() as temporary:
        asked, answer = Path(temporary) / "steps.safetensors", Path(temporary) / "logits.pt"
        save_file(given, asked)
        # nothing of Python's is inherited: what runs is the file
        subprocess.run([str(walker), str(folder), str(asked), str(answer)], check=True, env={"OMP_NUM_THREADS": "1"})
        logits: list[list[Tensor]] = torch.load(answer, weights_only=False)
    return logits


def main(folder: Path) -> float:
    """Export, build, step, and return the largest deviation of any rank from the model over its largest logit."""
    from helix_compile import helix_compile
    from helix_compile.models.presets import build_model, preset_config

    torch.manual_seed(0)
    config = preset_config("tiny")
    model = build_model(config)
    compiled = helix_compile(model, cp=2, tokens_per_block=2, max_batch_size=2, max_seq_len=64, world="virtual")
    compiled.export(folder / "native", format="aoti")
    started = time.perf_counter()
    build(folder / "walker")
    print(f"walker built in {time.perf_counter() - started:.0f} s")
    tokens = torch.randint(0, config.vocab_size, (2, 11))
    steps = [(part, torch.ones_like(part)) for part in tokens.split((6, 1, 3, 1), dim=1)]
    logits = stepped(folder / "walker", folder / "native", steps)
    with torch.no_grad():
        expected = model(tokens).logits
    worst = max(float((torch.cat(of_rank, dim=1) - expected).abs().max() / expected.abs().max()) for of_rank in logits)
    print(f"{len(logits)} ranks in C++: deviation from the unmodified model {worst:.1e}")
    return worst


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        assert main(Path(temporary)) <= 1e-5
