"""What planning a published configuration costs: CPU time of the process, so that a busy machine doesn't matter.

    python benchmarks/plan_releases.py [RELEASE ...] [--cp 8]

Each is built on the meta device at its published sizes, captured, matched, planned for cp ranks, rewritten and typed; no weights.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from measuring import format_machine, print_table

from helix_compile import helix_compile
from helix_compile.checkpoint.named import named_model

FOLDER = Path(__file__).resolve().parents[1] / "tests" / "data" / "releases"
SPARSE = ["DeepSeek-V3.2", "GLM-5-FP8", "GLM-5.2", "dots3-note-text", "Mistral-Large-4-text"]


def main() -> None:
    """Plan each release and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("releases", nargs="*", default=SPARSE)
    parser.add_argument("--cp", type=int, default=8)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{format_machine()}\n")
    rows = []
    for release in arguments.releases:
        start = time.process_time()
        model = named_model(str(FOLDER / f"{release}.json"), meta=True)
        built = time.process_time()
        plan = helix_compile(model, cp=arguments.cp).plan
        done = time.process_time()
        layers = sum(len(body.layers) for body in plan.bodies)
        print(f"{release}: {done - start:.1f} s", file=sys.stderr, flush=True)
        rows.append([release, str(layers), str(len(plan.bodies)), f"{built - start:.1f} s", f"{done - built:.1f} s"])
    print_table(["release", "layers", "bodies", "built, CPU", "captured to rewritten, CPU"], rows)


if __name__ == "__main__":
    main()
