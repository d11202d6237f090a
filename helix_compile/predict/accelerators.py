"""Accelerators for the planner: peaks, latencies of collectives, fixed times; presets, each with its source, and a user's file.

node          max(flops / peak, bytes / bandwidth)          peaks times an efficiency
collective    latency(op, ranks, size) + bytes / link
layer         a fixed time: launches, gaps, what nobody counts; fitted, never predicted
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import yaml
from numpy.typing import NDArray

from helix_compile.config.files import nearest
from helix_compile.errors import HelixError
from helix_compile.ir.collectives import COLLECTIVES

SMALL, LARGE = 4 * 1024, 128 * 1024  # bytes for which latencies are stated
Times = TypeVar("Times", float, NDArray[np.float64])  # one figure, or one for each batch
Latency = tuple[tuple[int, float, float], ...]  # (ranks, us up to SMALL bytes, us at LARGE and more)


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """One accelerator of many on a link, dense figures of one.

    Attributes:
        hbm_tb_s, memory_gb: of its memory, 10^12 and 10^9.
        bf16_tflops, fp8_tflops, fp4_tflops: peaks of matmuls; 0: it has none, and the next wider one is used.
        link_gb_s: to the other ranks, one direction.
        link_ranks: ranks that this link joins; plans of more are not costed.
        latency_us: collective -> what it takes before bytes count; see Latency.
        hbm_efficiency, flops_efficiency: share of the peaks that kernels reach.
        fixed_us_per_layer, launch_us: added for each layer, and for each node that takes time.
        reserved_gb: of the memory, for the runtime and its graphs.
        source: where the figures are from.
    """

    name: str
    hbm_tb_s: float
    memory_gb: float
    bf16_tflops: float
    fp8_tflops: float = 0.0
    fp4_tflops: float = 0.0
    link_gb_s: float
    link_ranks: int
    latency_us: Mapping[str, Latency]
    hbm_efficiency: float = 0.8
    flops_efficiency: float = 0.6
    fixed_us_per_layer: float = 47.0
    launch_us: float = 0.0
    reserved_gb: float = 4.0
    source: str

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type in ("float", "int"):
                least_open = field.name in (
                    "fp8_tflops",
                    "fp4_tflops",
                    "fixed_us_per_layer",
                    "launch_us",
                    "reserved_gb",
                )
                kinds = (int, float) if field.type == "float" else int
                good = isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)
                if not good or value < 0 or (value == 0 and not least_open):
                    raise HelixError(
                        f"accelerator {self.name!r}: {field.name}={value!r}; expected a {'whole ' * (field.type == 'int')}number {'>= 0' if least_open else '> 0'}"
                    )
        if self.hbm_efficiency > 1 or self.flops_efficiency > 1:
            raise HelixError(f"accelerator {self.name!r}: an efficiency is a share of the peak, 1 at most")
        if set(self.latency_us) != set(COLLECTIVES):
            raise HelixError(
                f"accelerator {self.name!r}: latency_us: got {sorted(self.latency_us)}, expected each of {sorted(COLLECTIVES)}"
            )

    def flops_per_us(self, kind: str) -> float:
        """Of "bf16", "fp8" or "fp4"; where there is none, of the next wider."""
        peak = self.bf16_tflops
        if kind != "bf16":
            peak = self.fp8_tflops or peak
        if kind == "fp4":
            peak = self.fp4_tflops or peak
        return peak * 1e6 * self.flops_efficiency

    @property
    def bytes_per_us(self) -> float:
        """Of its memory."""
        return self.hbm_tb_s * 1e6 * self.hbm_efficiency

    def compute_us(self, flops: Times, nbytes: Times, peak: str = "bf16") -> Times:
        """What a node takes that does so many flops, at one of the peaks, and moves so many bytes of memory."""
        return longer(flops / self.flops_per_us(peak), nbytes / self.bytes_per_us)

    def collective_us(self, op: str, ranks: int, wire_bytes: float) -> float:
        """What a collective takes of which so many bytes leave a rank."""
        return self.latency_of(op, ranks, wire_bytes) + wire_bytes / (self.link_gb_s * 1e3)

    def fixed_us_of_more(self, launches: int, more: int) -> float:
        """What is fixed of a layer grows with its launches: of a layer that has so many, and in parts of the batch `more`."""
        return self.fixed_us_per_layer * more / launches

    def latency_of(self, op: str, ranks: int, wire_bytes: float) -> float:
        """Before bytes count: by log2 of ranks and of size; behind the last stated number of ranks by its last doubling."""
        rows = sorted(self.latency_us[op])
        small, large = (_at_ranks([(r[0], r[i]) for r in rows], ranks, op) for i in (1, 2))
        if wire_bytes <= SMALL:
            return small
        share = min(1.0, math.log2(wire_bytes / SMALL) / math.log2(LARGE / SMALL))
        return small + share * (large - small)


def longer(one: Times, other: Times) -> Times:
    """The longer of two, for each batch."""
    return np.maximum(one, other) if isinstance(one, np.ndarray) or isinstance(other, np.ndarray) else max(one, other)


def _at_ranks(rows: list[tuple[int, float]], ranks: int, op: str) -> float:
    """An all-to-all stays flat behind the last: 11 to 14 us from 2 to 64 ranks are reported of GB200."""
    if ranks <= rows[0][0] or len(rows) == 1:
        return rows[0][1] if ranks <= rows[0][0] else rows[-1][1]
    for (before, low), (after, high) in pairwise(rows):
        if ranks <= after:
            return low + (high - low) * math.log2(ranks / before) / math.log2(after / before)
    (before, low), (last, high) = rows[-2:]
    if op == "all_to_all_single":
        return high
    return high + max(0.0, high - low) * math.log2(ranks / last) / math.log2(last / before)


def _flat(us: float) -> Latency:
    return ((2, us, us),)


def _latencies(to_all: Latency, gather: list[float], scatter: list[float], reduce: list[float]) -> dict[str, Latency]:
    def rows(values: list[float]) -> Latency:
        return tuple((2 << i, us, us) for i, us in enumerate(values))

    return {
        "all_to_all_single": to_all,
        "all_gather_into_tensor": rows(gather),
        "reduce_scatter_tensor": rows(scatter),
        "all_reduce": rows(reduce),
    }


_HOPPER = _latencies(
    ((2, 6.5, 14.0), (4, 6.5, 12.5), (8, 7.4, 9.7)), [5.2, 7.1, 10.1], [5.1, 7.2, 10.2], [2.8, 3.2, 3.6]
)
_B200 = _latencies(
    ((2, 9.2, 15.6), (4, 10.2, 15.8), (8, 10.6, 15.0)), [8.8, 11.2, 16.1], [8.6, 11.1, 16.1], [5.0, 5.3, 5.8]
)
_GB200 = _latencies(((2, 9.8, 16.2), (4, 10.7, 15.6)), [9.4, 11.6], [9.4, 11.8], [3.8, 4.9])
_SHEETS = "peaks: system files of ai-dynamo/aiconfigurator (commit 095f58a), NVLink one way; "
_LATENCIES = (
    "latencies: its tables of nccl-tests 2.29.2 (all-to-all, all-gather, reduce-scatter) and of TensorRT-LLM's all-reduce in a "
    "CUDA graph; 0.8 of the memory's peak is its derating, 0.6 of the flops about what its decode-MLA table reaches; "
    "47 us a layer: fitted to arXiv 2507.07120"
)
_SOURCE = _SHEETS + _LATENCIES
_PAPER = (
    "arXiv 2507.07120 as fitted: full peaks, 3 us a collective, 186 GB, 47 us fixed a layer: chosen after seeing its figures, so "
    "a fit and no prediction"
)


def _preset(
    name: str,
    hbm: float,
    gb: float,
    bf16: float,
    fp8: float,
    fp4: float,
    link: float,
    ranks: int,
    latency: Any,
    **more: Any,
) -> Accelerator:
    own = {"source": _SOURCE} | more
    return Accelerator(
        name=name,
        hbm_tb_s=hbm,
        memory_gb=gb,
        bf16_tflops=bf16,
        fp8_tflops=fp8,
        fp4_tflops=fp4,
        link_gb_s=link,
        link_ranks=ranks,
        latency_us=latency,
        **own,
    )


PRESETS = {
    a.name: a
    for a in (
        _preset("h100", 3.35, 80, 989, 1979, 0, 450, 8, _HOPPER),
        _preset("h200", 4.8, 141, 989, 1979, 0, 450, 8, _HOPPER),
        _preset("b200", 7.7, 180, 2250, 4500, 9000, 900, 8, _B200),
        _preset("gb200", 8.0, 198.7, 2500, 5000, 10000, 900, 72, _GB200),
        _preset("b300", 7.75, 288, 2250, 4500, 14000, 900, 8, _B200),
        _preset("gb300", 8.0, 298, 2500, 5000, 15000, 900, 72, _GB200),
        _preset(
            "gb200-paper",
            8.0,
            186,
            2500,
            5000,
            10000,
            900,
            64,
            {op: _flat(3.0) for op in COLLECTIVES},
            hbm_efficiency=1.0,
            flops_efficiency=1.0,
            reserved_gb=0.0,
            source=_PAPER,
        ),
    )
}


def accelerator(name: str, file: str | Path | None = None) -> Accelerator:
    """A preset, or one of them with what a file says in place of its figures.

    The file (TOML, YAML or JSON) has fields of Accelerator; latency_us: {collective: us, or [[ranks, us small, us large], ...]}.

    Raises:
        HelixError: an unknown name or field, a value of another kind.
    """
    if name not in PRESETS:
        raise HelixError(f"--gpu {name!r} is unknown; expected one of {', '.join(PRESETS)}{_hint(name, list(PRESETS))}")
    preset = PRESETS[name]
    return preset if file is None else _overridden(preset, Path(file))


def _overridden(preset: Accelerator, path: Path) -> Accelerator:
    stated = read_mapping(path, "--gpu-file")
    known = [field.name for field in fields(Accelerator)]
    for key in stated:
        if key not in known:
            raise HelixError(
                f"--gpu-file {path}: {key!r} is no field; expected some of {', '.join(known)}{_hint(key, known)}"
            )
    own = {"name": path.stem, "source": f"{path.name}; what it does not say: {preset.name}, {preset.source}"} | stated
    if "latency_us" in own:
        if not isinstance(own["latency_us"], Mapping):
            raise HelixError(
                f"--gpu-file {path}: latency_us: got {own['latency_us']!r}, expected a table of collectives"
            )
        own["latency_us"] = {**preset.latency_us, **{op: _rows(path, op, v) for op, v in own["latency_us"].items()}}
    return replace(preset, **own)


def _rows(path: Path, op: str, value: Any) -> Latency:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf:
        return _flat(float(value))
    try:
        rows = tuple((int(ranks), float(small), float(large)) for ranks, small, large in value)
    except (TypeError, ValueError):
        rows = ()
    if not rows or not all(ranks >= 1 and 0 <= us < math.inf for ranks, *both in rows for us in both):
        raise HelixError(
            f"--gpu-file {path}: latency_us.{op}: got {value!r}, expected us, or rows [ranks, us small, us large]"
        )
    return rows


def read_mapping(path: Path, option: str) -> dict[str, Any]:
    """A TOML, YAML or JSON file that holds one table.

    Raises:
        HelixError: no such file, or something else in it.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".toml":
            found: Any = tomllib.loads(text)
        else:
            found = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise HelixError(f"{option} {path}: can't be read: {error}") from error
    if not isinstance(found, dict):
        raise HelixError(f"{option} {path}: got {type(found).__name__}, expected a table of names and values")
    return found


def _hint(name: str, known: list[str]) -> str:
    return f"; nearest: {nearest(name, known)}"
