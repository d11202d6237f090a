"""What a step checks before it runs (is the model still what it was?), as a share of the step itself, in one run.

    python benchmarks/step_checks.py [--repeats 200]

The tiny preset on four virtual ranks, B=2, T=1, one thread: the smallest step there is, so the largest share.
"""

from __future__ import annotations

import argparse

import torch
from measuring import format_machine, median_ms, print_table

from helix_compile import helix_compile
from helix_compile.models.presets import build_model, preset_config
from helix_compile.runtime.rank import follow_edits


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=200)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    compiled = helix_compile(build_model(preset_config("tiny")), cp=4)
    ids = torch.randint(0, 256, (2, 1))

    def step() -> None:
        compiled.reset()
        compiled(ids)

    def checks() -> None:
        follow_edits(compiled.plan, compiled.graph, compiled.ranks, compiled.facts)

    step()
    times = median_ms({"step": step, "its checks": checks}, repeats)
    rows = [[name, f"{ms:.3f}", f"{ms / times['step']:.2%}"] for name, ms in times.items()]
    print(format_machine())
    print_table(["tiny, cp=4", "ms", "share"], rows)


if __name__ == "__main__":
    main()
