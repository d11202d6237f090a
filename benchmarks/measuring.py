"""What the benchmarks share: medians of interleaved runs, peak memory, and a line that says where it was measured."""

from __future__ import annotations

import ctypes
import gc
import platform
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

MB = 2**20
_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_CPUINFO = Path("/proc/cpuinfo")


def format_machine() -> str:
    """Processor, threads and versions: no figure means anything without them."""
    model = platform.processor() or platform.machine()
    if _CPUINFO.exists():
        names = [x.split(":")[1].strip() for x in _CPUINFO.read_text().splitlines() if "model name" in x]
        model = f"{len(names)} x {names[0]}" if names else model
    return (
        f"{model} ({platform.machine()}), {torch.get_num_threads()} thread(s), no GPU used; "
        f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    )


def median_ms(
    functions: dict[str, Callable[[], object]],
    repeats: int,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median milliseconds of each function, wall time by default. They take turns, so that a busy machine slows all of them."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(warmup + repeats):
        for name, function in functions.items():
            start = clock()
            function()
            if number >= warmup:
                times[name].append((clock() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def extra_peak_bytes(function: Callable[[], object]) -> int:
    """How far resident memory rises above its present level while `function` runs (Linux, glibc)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that is still resident would hide what is taken
    _CLEAR_REFS.write_text("5")  # sets the high-water mark to the present level
    before = _status_bytes("VmRSS")
    function()
    return max(0, _status_bytes("VmHWM") - before)


def peak_bytes() -> int:
    """High-water mark of resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _status_bytes(field: str) -> int:
    line = next(x for x in _STATUS.read_text().splitlines() if x.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """A Markdown table, as docs/benchmarks.md holds it."""
    for cells in (header, ["---"] * len(header), *rows):
        print("| " + " | ".join(cells) + " |", flush=True)
