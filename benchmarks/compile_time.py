"""Capture to the graphs of 8 ranks of real DeepSeek-V3 layers on the meta device: CPU seconds, peak memory, no weights.

    python benchmarks/compile_time.py [--layers 4 16 61 256]

61 layers of the class's default configuration are the 671 B model. Each depth runs in a process of its own, one
thread, bf16; imports and building the model are not in the seconds, but are in the memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from measuring import MB, format_machine, peak_bytes, print_table
from transformers import DeepseekV3Config

from helix_compile import helix_compile
from helix_compile.capture.model import capture
from helix_compile.config.options import HelixOptions
from helix_compile.models.presets import build_model, preset_config
from helix_compile.passes.decide.plan_helix import plan_helix
from helix_compile.passes.match.layers import match_layers

CP = 8


def main() -> None:
    """One process a depth, then one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 16, 61, 256])
    parser.add_argument("--one", type=int, help="measure this depth here and print JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.one is not None:
        print(json.dumps(_measure(arguments.one)))
        return
    print(f"{format_machine()}\n")
    rows = []
    for layers in arguments.layers:
        command = [sys.executable, __file__, "--one", str(layers)]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append(_row(json.loads(run.stdout.splitlines()[-1])))
    header = ["layers", "parameters", "bodies", "capture", "match", "plan"]
    whole = ["match to graphs of 8 ranks", "capture to graphs of 8 ranks", "peak memory"]
    print_table([*header, *whole], rows)


def _measure(layers: int) -> dict[str, float]:
    warnings.filterwarnings("ignore", category=FutureWarning)  # torch.export's own pytree
    config: DeepseekV3Config = preset_config("deepseek-v3")
    config.num_hidden_layers = layers
    model = build_model(config, dtype=torch.bfloat16, meta=True)
    seconds: dict[str, float] = {}
    options = HelixOptions(cp=CP)
    with _timed(seconds, "capture"):
        captured = capture(model)
    with _timed(seconds, "match"):
        matches = match_layers(captured, options.max_seq_len)
    with _timed(seconds, "plan"):
        plan_helix(captured, matches, options)
    with _timed(seconds, "again"):  # match and plan are made again
        compiled = helix_compile(captured, cp=CP)
    assert len(compiled.ranks) == CP
    return {
        "layers": layers,
        "parameters": sum(p.numel() for p in model.parameters()),
        "bodies": len(captured.bodies),
        **seconds,
        "total": seconds["capture"] + seconds["again"],
        "peak": peak_bytes(),
    }


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.process_time()
    yield
    seconds[name] = time.process_time() - start


def _row(measured: dict[str, float]) -> list[str]:
    seconds = [f"{measured[k]:.1f} s" for k in ("capture", "match", "plan", "again", "total")]
    counts = [str(measured["layers"]), f"{measured['parameters'] / 1e9:.1f} B", str(measured["bodies"])]
    return [*counts, *seconds, f"{measured['peak'] / MB:.0f} MB"]


if __name__ == "__main__":
    main()
