"""A native package: programs compiled by AOTInductor, stepped by two processes that have neither the model nor transformers.

    python examples/06_native_package.py

The ranks are this file again, under torchrun; they import torch and helix_compile.load_exported, and read the folder.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from helix_compile import load_exported

RANKS = 2
STEPS = (6, 1, 3, 1)  # new tokens: a prompt, and what a decoder or drafts add


def rank(folder: str, given: str) -> None:
    """What one process does: load its share, step, leave its logits."""
    started = time.perf_counter()
    dist.init_process_group("gloo")
    module = load_exported(folder, dist.get_rank(), dist.group.WORLD)
    loaded = time.perf_counter() - started
    ids = load_file(given)
    logits = {name: module(ids[name]).contiguous() for name in sorted(ids)}
    there = (
        ", ".join(name for name in ("transformers", "onnx") if name in sys.modules) or "neither transformers nor onnx"
    )
    print(f"rank {dist.get_rank()}: {len(module.code)} programs loaded in {loaded:.1f} s, {there} imported", flush=True)
    save_file(logits, f"{given}.rank{dist.get_rank()}")
    dist.destroy_process_group()


def main(folder: Path, format: str = "aoti") -> float:
    """Export, step with two processes, and return their largest deviation from the model over its largest logit."""
    from helix_compile import helix_compile
    from helix_compile.models.presets import build_model, preset_config

    torch.manual_seed(0)
    config = preset_config("tiny")
    model = build_model(config)
    compiled = helix_compile(model, cp=RANKS, tokens_per_block=2, max_batch_size=2, max_seq_len=64, world="virtual")
    started = time.perf_counter()
    manifest = compiled.export(folder, format=format)
    print(
        f"{folder.name}: {len(manifest['programs'])} programs of {compiled.plan.layout.world_size} ranks, {time.perf_counter() - started:.0f} s"
    )
    for path in sorted(folder.iterdir()):
        print(f"  {path.name:24} {path.stat().st_size:>11,} bytes")

    tokens = torch.randint(0, config.vocab_size, (2, sum(STEPS)))
    given = folder.with_suffix(".ids")
    save_file({f"{n}": part.contiguous() for n, part in enumerate(tokens.split(STEPS, dim=1))}, given)
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(RANKS),
        __file__,
        str(folder),
        str(given),
    ]
    root = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    subprocess.run(launch, check=True, env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"})

    with torch.no_grad():
        expected = model(tokens).logits
    worst = 0.0
    for number in range(RANKS):
        logits = load_file(f"{given}.rank{number}")
        got = torch.cat([logits[name] for name in sorted(logits)], dim=1)
        worst = max(worst, float((got - expected).abs().max() / expected.abs().max()))
    print(f"deviation from the unmodified model: {worst:.1e}")
    return worst


if __name__ == "__main__":
    if len(sys.argv) > 1:
        rank(*sys.argv[1:])
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary) / "native")
