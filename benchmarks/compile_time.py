"""Capture to plan of real DeepSeek-V3 layers on the meta device: CPU seconds and peak memory, no weights.

    python benchmarks/compile_time.py [--layers 4 16 61]

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

import torch
from measuring import MB, format_machine, peak_bytes, print_table
from transformers import DeepseekV3Config

from helix_compile import helix_compile
from helix_compile.capture import capture
from helix_compile.models.presets import build_model, preset_config
from helix_compile.options import HelixOptions
from helix_compile.passes.match_layers import match_layers
from helix_compile.planning import plan_helix


def main() -> None:
    """One process a depth, then one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 16, 61])
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
    header = ["layers", "parameters", "bodies", "capture", "match", "plan", "capture to plan"]
    print_table([*header, "peak memory", "whole compile again, capture memoised"], rows)


def _measure(layers: int) -> dict[str, float]:
    warnings.filterwarnings("ignore", category=FutureWarning)  # torch.export's own pytree
    config: DeepseekV3Config = preset_config("deepseek-v3")
    config.num_hidden_layers = layers
    model = build_model(config, dtype=torch.bfloat16, meta=True)
    clock = [time.process_time()]
    captured = capture(model)
    clock.append(time.process_time())
    options = HelixOptions(cp=4)
    matches = match_layers(captured, options.max_seq_len)
    clock.append(time.process_time())
    plan_helix(captured, matches, options)
    clock.append(time.process_time())
    peak = peak_bytes()
    helix_compile(model, cp=4)
    return {
        "layers": layers,
        "parameters": sum(p.numel() for p in model.parameters()),
        "bodies": len(captured.bodies),
        "capture": clock[1] - clock[0],
        "match": clock[2] - clock[1],
        "plan": clock[3] - clock[2],
        "total": clock[3] - clock[0],
        "peak": peak,
        "again": time.process_time() - clock[3],
    }


def _row(measured: dict[str, float]) -> list[str]:
    seconds = [f"{measured[k]:.1f} s" for k in ("capture", "match", "plan", "total")]
    again = f"{measured['again']:.1f} s"
    counts = [
        str(measured["layers"]),
        f"{measured['parameters'] / 1e9:.1f} B",
        str(measured["bodies"]),
    ]
    return [*counts, *seconds, f"{measured['peak'] / MB:.0f} MB", again]


if __name__ == "__main__":
    main()
