"""Seconds and file sizes of exports, of every format that there is, over depth.

    python benchmarks/export.py [--layers 4 16 61] [--cp 4] [--formats onnx ...]

The tiny preset (hidden 128, 8 heads, 8 experts, float32) with more layers, all ranks in one process; each export in a process of its
own, one thread. Seconds are the CPU's: importing, building the model and compiling it are not in them (compile is shown beside).
Weights are what each rank holds, so what is replicated is there as often as there are ranks; the rest of a folder is graphs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import format_machine, print_table

from helix_compile import HelixModule, helix_compile
from helix_compile.export.formats import FORMATS, check_export
from helix_compile.models.presets import build_model, preset_config

_WEIGHTS = (".data", ".safetensors")


def main() -> None:
    """One process a row, then one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 16, 61])
    parser.add_argument("--cp", type=int, default=4)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--one", nargs=2, metavar=("LAYERS", "FORMAT"), help="measure this here and print JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.one is not None:
        layers, format = arguments.one
        print(json.dumps(_measure(int(layers), format, arguments.cp)))
        return
    print(f"{format_machine()}\n")
    rows = []
    for format in arguments.formats:
        for layers in arguments.layers:
            command = [sys.executable, __file__, "--cp", str(arguments.cp), "--one", str(layers), format]
            run = subprocess.run(command, capture_output=True, text=True, check=True)
            rows.append(_row(json.loads(run.stdout.splitlines()[-1])))
    print_table(["format", "layers", "compile", "export", "verify", "files", "graphs", "weights"], rows)


def _measure(layers: int, format: str, cp: int) -> dict[str, Any]:
    warnings.filterwarnings("ignore", category=FutureWarning)  # torch.export's own pytree
    config = preset_config("tiny")
    config.num_hidden_layers = layers
    model = build_model(config)
    compiled, compile_seconds = _timed(lambda: helix_compile(model, cp=cp, lower="reference", max_seq_len=1024))
    assert isinstance(compiled, HelixModule)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "out"
        _, export_seconds = _timed(lambda: compiled.export(folder, format))
        faults, verify_seconds = _timed(lambda: check_export(folder))
        assert faults == [], faults
        sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    weights = sum(size for name, size in sizes.items() if name.endswith(_WEIGHTS))
    return {
        "format": format,
        "layers": layers,
        "compile": compile_seconds,
        "export": export_seconds,
        "verify": verify_seconds,
        "files": len(sizes),
        "graphs": sum(sizes.values()) - weights,
        "weights": weights,
    }


def _timed(act: Callable[[], Any]) -> tuple[Any, float]:
    start = sum(os.times()[:4])  # of processes that were started, too: AOTInductor's compiler
    result = act()
    return result, sum(os.times()[:4]) - start


def _row(measured: dict[str, Any]) -> list[str]:
    seconds = [f"{measured[name]:.1f} s" for name in ("compile", "export", "verify")]
    sizes = [f"{measured[name] / 1e6:.2f} MB" for name in ("graphs", "weights")]
    return [measured["format"], str(measured["layers"]), *seconds, str(measured["files"]), *sizes]


if __name__ == "__main__":
    main()
