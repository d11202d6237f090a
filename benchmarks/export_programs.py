"""Seconds, bytes and peak memory of exporting programs (format pt2) of a model without weights, and of loading them again.

    python benchmarks/export_programs.py [--preset deepseek-v3] [--cp 4] [--out FOLDER] [--json]

A program is exported for each distinct segment, so depth shows in walk.json alone. Seconds are those of the clock and of the CPU;
the peak is the process's high-water mark above what it held when the model was compiled.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measuring import MB, extra_peak_bytes, format_machine, print_table

from helix_compile import helix_compile, load_exported
from helix_compile.checkpoint.named import named_model


def timed(act: Callable[[], Any]) -> tuple[Any, float, float]:
    """What it returns, seconds of the clock, seconds of the CPU."""
    clock, cpu = time.perf_counter(), time.process_time()
    result = act()
    return result, time.perf_counter() - clock, time.process_time() - cpu


def measure(preset: str, cp: int, folder: Path) -> dict[str, float]:
    """Export and load."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # torch.export's own pytree
    compiled = helix_compile(named_model(preset, None, meta=True), cp=cp, world="virtual")
    found: dict[str, Any] = {}

    def export() -> None:
        found["manifest"], found["export_s"], found["export_cpu_s"] = timed(
            lambda: compiled.export(folder, format="pt2")
        )

    def load() -> None:
        found["module"], found["load_s"], found["load_cpu_s"] = timed(lambda: load_exported(folder, device="meta"))

    extra = {"export_extra": extra_peak_bytes(export), "load_extra": extra_peak_bytes(load)}
    manifest = found["manifest"]
    seconds = {name: value for name, value in found.items() if name.endswith("_s")}
    counted = {"layers": len(manifest["layers"]), "programs": len(manifest["programs"])}
    return {**counted, **seconds, **extra, "bytes": sum(path.stat().st_size for path in folder.iterdir())}


def main() -> None:
    """Measure and print one row, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="deepseek-v3")
    parser.add_argument("--cp", type=int, default=4)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        result = measure(arguments.preset, arguments.cp, arguments.out or Path(temporary) / "out")
    if arguments.json:
        print(json.dumps(result))
        return
    print(format_machine())
    row = [
        f"{value / MB:,.1f} MB" if "extra" in name or name == "bytes" else f"{value:,.1f}"
        for name, value in result.items()
    ]
    print_table([*result], [row])


if __name__ == "__main__":
    main()
