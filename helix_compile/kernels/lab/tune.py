"""Measure the candidates of each class of tuning.MLA_DECODE on a card, and print the table that replaces it.

    classes_of(arch) -> candidates -> those that compile and fit (offline) -> agree with the reference -> time -> best

A candidate is launched only if the offline compiler says that it fits: one that needs more tensor memory than there is
compiles to a trap, and takes the CUDA context with it. A time is taken only of a kernel whose output is right.
"""

from __future__ import annotations

import datetime
import itertools
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.testing import do_bench_cudagraph

from helix_compile.kernels.lab.offline import compile_cases
from helix_compile.kernels.mla.decode import mla_decode_triton
from helix_compile.kernels.mla.launch import decode_case
from helix_compile.kernels.mla.tuning import (
    MLA_DECODE,
    POINTER,
    ROWS,
    STATIC,
    TRANSPOSED,
    MlaConfig,
    MlaEntry,
    MlaShape,
    family,
    form_runs,
)
from helix_compile.kernels.reference import mla_decode_reference
from helix_compile.kernels.reference_fp8 import FP8, quantize
from helix_compile.kernels.registry import CompileCase, Site
from helix_compile.kernels.target import INTERPRETER, KernelTarget

WIDEST_ROWS = 128  # what a class without an upper bound is measured with: all heads of DeepSeek-V3


CHECKED_SLOTS = 512  # of the call that is compared with the reference


# of the largest value: bfloat16's own rounding of weights and of the output, and float32's
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-5}


Timer = Callable[[Callable[[], object]], float]  # a call -> its milliseconds


Fits = Callable[[Sequence[CompileCase]], list[str | None]]  # cases -> why each can't be launched


Trials = Callable[[MlaEntry, MlaConfig], "Trial"]


@dataclass(frozen=True)
class TuneSizes:
    """What is measured.

    Attributes:
        B: sequences.
        slots: of one sequence on one rank, all visible.
        R, r, page_size: of the cache.
        dtype: of q, and of a cache without scales.
    """

    B: int
    slots: int
    R: int
    r: int
    page_size: int
    dtype: torch.dtype

    @staticmethod
    def of(site: Site) -> TuneSizes:
        """Those of a site of mla_decode, its shard full."""
        q, q_rope, cache = site.args[:3]
        slots = site.capacity.max_slots
        return TuneSizes(q.shape[0], slots, q.shape[3], q_rope.shape[3], cache.shape[1], q.dtype)

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return f"B {self.B}, {self.slots:,} slots, {self.R} + {self.r} channels, {name}"


@dataclass(frozen=True)
class Trial:
    """One candidate of one class: its time, or why it has none; `faulted`: it may have broken the process it ran in."""

    entry: MlaEntry
    config: MlaConfig
    ms: float | None = None
    reason: str = ""
    faulted: bool = False


def classes_of(target: KernelTarget, sizes: TuneSizes) -> list[MlaEntry]:
    """The table's classes that a call of these sizes can meet on `target`, under the target's own name; each once."""
    classes: dict[tuple[int | None, bool, bool], MlaEntry] = {}
    for entry in MLA_DECODE:
        if entry.arch in ("", family(target)) and entry.itemsize in (None, sizes.dtype.itemsize):
            key = (entry.max_rows, bool(entry.scaled), entry.config.form == POINTER)
            classes.setdefault(key, replace(entry, arch=family(target)))
    return list(classes.values())


def candidates(entry: MlaEntry, sizes: TuneSizes, target: KernelTarget) -> list[MlaConfig]:
    """Configs that can run a class: pointer loads alone for a class of these, else both TMA forms; the present one first."""
    rows = rows_of(entry)
    small = target.arch == INTERPRETER
    heights = [h for h in (16, 32, 64, 128) if h <= max(16, triton.next_power_of_2(rows))]
    steps = (16, 32) if small else (32, 64, 128)
    forms = [POINTER] if entry.config.form == POINTER else [ROWS, TRANSPOSED]
    found = [entry.config]
    for form, block_h, block_n, warps, stages in itertools.product(
        forms, heights, steps, (4,) if small else (4, 8), (2,) if small else (1, 2, 3)
    ):
        plain = MlaConfig(form, block_h, block_n, warps, stages)
        found.append(plain)
        if form == POINTER:
            continue
        found.append(replace(plain, parts=2))
        if 100 <= target.capability < 110:
            special = [replace(c, warp_specialize=True) for c in (plain, replace(plain, parts=2))]
            found += [*special, *(replace(c, packed=True) for c in special)]
    shape = _shape(entry, sizes)
    return [c for c in dict.fromkeys(found) if form_runs(c, shape)]


def rows_of(entry: MlaEntry) -> int:
    """Query rows that a class is measured with: the most that it holds."""
    return entry.max_rows or WIDEST_ROWS


def _shape(entry: MlaEntry, sizes: TuneSizes) -> MlaShape:
    return MlaShape(rows_of(entry), sizes.R, sizes.r, sizes.page_size, sizes.dtype.itemsize, tma=True)


def tune(
    target: KernelTarget, sizes: TuneSizes, fits: Fits, measured: Trials, progress: Callable[[str], None] | None = None
) -> list[Trial]:
    """Every candidate of every class, measured or refused.

    Args:
        target: of the card, or the interpreter.
        sizes: what is measured.
        fits: says of each case why it can't be launched, or None.
        measured: the trial of a candidate that fits.
        progress: called with a line for each class.
    """
    trials = []
    for entry in classes_of(target, sizes):
        configs = candidates(entry, sizes, target)
        if progress is not None:
            progress(f"{_class_text(entry)}: {len(configs)} candidates")
        reasons = fits([_case(config, entry, sizes, target) for config in configs])
        trials += [
            Trial(entry, config, reason=reason) if reason else measured(entry, config)
            for config, reason in zip(configs, reasons, strict=True)
        ]
    return trials


def cudagraph_ms(call: Callable[[], object]) -> float:
    """Median of a call that is captured and replayed."""
    ms: float = do_bench_cudagraph(call, rep=50, return_mode="median")
    return ms


def fits_card(target: KernelTarget, cases: Sequence[CompileCase]) -> list[str | None]:
    """By the offline compiler: None, or why a case can't be launched on the card."""
    with tempfile.TemporaryDirectory() as folder:
        records = compile_cases(list(cases), family(target), Path(folder))
    return [None if record.fits else record.reason for record in records]


def _checked(sizes: TuneSizes) -> TuneSizes:
    return replace(sizes, B=1, slots=min(sizes.slots, CHECKED_SLOTS))


class LocalTrials:
    """Trials in this process: a candidate is compared with the reference, then timed.

    Args:
        target: of `device`.
        sizes: what is measured.
        device: a card, or the CPU where Triton interprets.
        timer: milliseconds of a call that launches kernels.
    """

    def __init__(self, target: KernelTarget, sizes: TuneSizes, device: torch.device, timer: Timer):
        self.target, self.sizes, self.device, self.timer = target, sizes, device, timer
        self._entry: MlaEntry | None = None

    def __call__(self, entry: MlaEntry, config: MlaConfig) -> Trial:
        """Its time, or why it has none."""
        try:
            self._prepare(entry)
            got = self._check(config)[0].double()
            deviation = float((got - self._expected).abs().max() / self._expected.abs().max())
            if not deviation <= TOLERANCE[self.sizes.dtype]:
                reason = f"wrong: off by {deviation:.1e} of the largest value"
                return Trial(entry, config, reason=reason)
            return Trial(entry, config, self.timer(lambda: self._call(config)))
        except (RuntimeError, triton.TritonError) as error:  # a launch that the card refuses
            reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            return Trial(entry, config, reason=reason, faulted=isinstance(error, RuntimeError))

    def _prepare(self, entry: MlaEntry) -> None:
        """Inputs of a class, kept while its candidates are tried."""
        if entry == self._entry:
            return
        self._call = _Call(entry, self.sizes, self.device)
        self._check = _Call(entry, _checked(self.sizes), self.device)
        self._expected = self._check.reference()
        self._entry = entry


def _case(config: MlaConfig, entry: MlaEntry, sizes: TuneSizes, target: KernelTarget) -> CompileCase:
    scaled = bool(entry.scaled)
    return decode_case(
        config,
        rows_of(entry),
        sizes.R,
        sizes.r,
        sizes.page_size,
        sizes.dtype,
        FP8 if scaled else sizes.dtype,
        scaled=scaled,
        interpreted=target.arch == INTERPRETER,
    )


class _Call:
    """One decode step of a class, on random values: split, decode, merge."""

    def __init__(self, entry: MlaEntry, sizes: TuneSizes, device: torch.device):
        self.sizes, H = sizes, rows_of(entry)
        draw = torch.Generator(device).manual_seed(0)
        B, pages = sizes.B, -(-sizes.slots // sizes.page_size)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=draw, device=device).to(sizes.dtype)

        self.q, self.q_rope = normal(B, 1, H, sizes.R), normal(B, 1, H, sizes.r)
        self.cache = normal(B * pages, sizes.page_size, sizes.R + sizes.r)
        self.table = torch.randperm(B * pages, generator=draw, device=device).view(B, pages)
        self.visible = torch.full((B, 1), sizes.slots, dtype=torch.int32, device=device)
        self.scale = (sizes.R + sizes.r) ** -0.5
        self.cache_scale: Tensor | None = None
        if entry.scaled:
            self.cache_scale = torch.tensor(0.01, device=device)
            self.cache = quantize(self.cache, self.cache_scale)

    def __call__(self, config: MlaConfig) -> tuple[Tensor, Tensor]:
        step = self.q, self.q_rope, self.cache, self.table, self.visible, self.scale
        return mla_decode_triton(*step, config=config, cache_scale=self.cache_scale)

    def reference(self) -> Tensor:
        """Output in float64, of the same cache."""
        q, q_rope = self.q.double(), self.q_rope.double()
        step = q, q_rope, self.cache, self.table, self.visible, self.scale
        return mla_decode_reference(*step, cache_scale=self.cache_scale)[0]


def replacement(trials: list[Trial], sizes: TuneSizes, card: str, date: datetime.date) -> list[MlaEntry]:
    """The table with the fastest candidate of each measured class; classes without a time, and other cards', as they were.

    An entry that was made for any card stays behind the new one.
    """
    best: dict[MlaEntry, tuple[float, MlaConfig]] = {}
    for trial in trials:
        if trial.ms is not None and trial.ms < best.get(trial.entry, (math.inf, trial.config))[0]:
            best[trial.entry] = trial.ms, trial.config
    table: list[MlaEntry] = []
    for entry in MLA_DECODE:
        for old, (ms, config) in list(best.items()):
            if replace(old, arch=entry.arch) == entry and entry.arch in ("", old.arch):
                evidence = f"{card}, {date.isoformat()}, Triton {triton.__version__}: {1e3 * ms:.1f} us, {sizes}"
                table.append(replace(old, config=config, evidence=evidence))
                del best[old]
                break
        else:
            table.append(entry)
            continue
        if entry.arch == "":
            table.append(entry)
    return table


def table_text(entries: Sequence[MlaEntry]) -> str:
    """Source of MLA_DECODE, in the names of tuning.py."""
    lines = ["MLA_DECODE = ("]
    for e in entries:
        c = e.config
        built = f"MlaConfig({c.form.upper()}, {c.block_h}, {c.block_n}, {c.num_warps}, {c.num_stages}, {c.parts}, {c.warp_specialize}, {c.packed})"
        arch = "INTERPRETER" if e.arch == INTERPRETER else f'"{e.arch}"'
        evidence = "STATIC" if e.evidence == STATIC else f'"{e.evidence}"'
        lines.append(f"    MlaEntry({arch}, {e.max_rows}, {e.itemsize}, {built}, {evidence}, {e.scaled}),")
    return "\n".join([*lines, ")", ""])


def trials_text(trials: list[Trial]) -> str:
    """A comment line for each candidate, fastest first in each class."""
    lines = []
    for entry in dict.fromkeys(t.entry for t in trials):
        lines.append(f"# {_class_text(entry)}")
        own = [t for t in trials if t.entry == entry]
        for t in sorted(own, key=lambda t: (t.ms is None, t.ms or 0.0)):
            result = t.reason if t.ms is None else f"{1e3 * t.ms:.1f} us"
            lines.append(f"#   {t.config}{', packed' if t.config.packed else ''}: {result}")
    return "\n".join([*lines, ""])


def _class_text(entry: MlaEntry) -> str:
    loads = "pointer loads" if entry.config.form == POINTER else "TMA"
    cache = "FP8 cache" if entry.scaled else "cache of q's dtype"
    return f"mla_decode on {entry.arch}, {rows_of(entry)} rows, {cache}, {loads}"
