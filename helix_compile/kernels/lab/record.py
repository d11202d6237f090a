"""The record of a compiled kernel: what can be read off its binary, and whether a device could launch it.

Registers come from cuobjdump -res-usage, spills from ptxas' log, shared and tensor memory from Triton's metadata, the
rest from the SASS. Nothing is estimated.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import helix_compile.kernels.lab.sass as sass_count
from helix_compile.kernels.registry import CompileCase

KINDS = ("ptx", "cubin", "ttgir")  # of files


REGISTER_FILE = 65536  # 32-bit registers of a multiprocessor


REGISTER_STEP = 8  # a warp gets registers in such steps per thread


MAX_THREADS = 1024


SMALL_BODY = 64


@dataclass(frozen=True)
class ArchLimits:
    """What one CTA may use.

    Attributes:
        shared_bytes: of shared memory, opted in.
        tmem_columns: of tensor memory; 0: there is none.
    """

    shared_bytes: int
    tmem_columns: int


LIMITS = {"sm_100": ArchLimits(232448, 512), "sm_90": ArchLimits(232448, 0), "sm_80": ArchLimits(166912, 0)}


@dataclass(frozen=True)
class KernelRecord:
    """What is known of one kernel on one architecture without running it. A figure is None where nothing was compiled.

    Attributes:
        kernel, config, fallback: of the CompileCase.
        arch: such as "sm_100".
        registers: per thread at launch (cuobjdump -res-usage).
        spills: bytes of spill stores and of spill loads together, as ptxas reports them for the whole kernel.
        shared_bytes: of a CTA, with the dynamic part.
        tmem_columns: of a CTA.
        threads: of a CTA, with all warp partitions.
        tensor_core: "tcgen05", "wgmma", "mma" or "none": what the SASS holds.
        tma: the SASS moves tensors by TMA.
        instructions_per_kv_token: of all warps of all CTAs that share the token; None: not an attention kernel.
        loops: the hot loops that were counted.
        ptx, cubin, ttgir: files, relative to the folder.
        fits: it was compiled, and can be launched on that architecture.
        reason: why it does not fit, with the numbers.
    """

    kernel: str
    arch: str
    config: str
    registers: int | None = None
    spills: int | None = None
    shared_bytes: int | None = None
    tmem_columns: int | None = None
    threads: int | None = None
    tensor_core: str = "none"
    tma: bool = False
    instructions_per_kv_token: float | None = None
    loops: tuple[sass_count.HotLoop, ...] = ()
    ptx: str | None = None
    cubin: str | None = None
    ttgir: str | None = None
    fallback: bool = False
    fits: bool = False
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, texts, lists and dicts."""
        return asdict(self)


@dataclass(frozen=True)
class StaticFigures:
    """What the compiler says beside the files.

    Attributes:
        shared_bytes, tmem_columns: of Triton's metadata.
        ptxas_log: of ptxas --verbose.
    """

    shared_bytes: int
    tmem_columns: int
    ptxas_log: str


def describe(case: CompileCase, arch: str, folder: Path, stem: str, figures: StaticFigures) -> KernelRecord:
    """Read the record of a compiled case off its files, `folder`/`stem`.ptx, .cubin and .ttgir."""
    names = {kind: f"{stem}.{kind}" for kind in KINDS}
    cubin, ptx = folder / names["cubin"], (folder / names["ptx"]).read_text()
    instructions = sass_count.parse_sass(cuobjdump(cubin, "-sass"))
    record = KernelRecord(
        kernel=case.kernel,
        arch=arch,
        config=case.config,
        registers=_numbers(r"\bREG:(\d+)", cuobjdump(cubin, "-res-usage"))[0],
        spills=sum(_numbers(r"(\d+) bytes spill (?:stores|loads)", figures.ptxas_log)),
        shared_bytes=figures.shared_bytes,
        tmem_columns=figures.tmem_columns,
        threads=_numbers(r"\.reqntid (\d+)", ptx)[0],
        tensor_core=sass_count.tensor_core(instructions),
        tma=sass_count.uses_tma(instructions),
        ptx=names["ptx"],
        cubin=names["cubin"],
        ttgir=names["ttgir"],
        fallback=case.fallback,
    )
    if case.kv_tokens_per_step is not None:
        loops = _loops(instructions, cubin, (folder / names["ttgir"]).read_text())
        count = sass_count.warp_instructions_per_token(loops, case.kv_tokens_per_step, case.ctas_per_kv_token)
        record = replace(record, loops=tuple(loops), instructions_per_kv_token=count if loops else None)
    reasons = over_limits(record, LIMITS[arch])
    # a kernel that needs more tensor memory than there is gets this body
    if len(instructions) <= SMALL_BODY and re.search(r"^\s*trap;", ptx, re.MULTILINE):
        reasons.append(f"the body is only a trap ({len(instructions)} instructions)")
    return replace(record, fits=not reasons, reason="; ".join(reasons))


def _loops(instructions: list[sass_count.Instruction], cubin: Path, ttgir: str) -> list[sass_count.HotLoop]:
    own_warps, partitions = sass_count.partition_warps(ttgir)
    table = sass_count.parse_jump_table(cuobjdump(cubin, "-elf")) if partitions else []
    return sass_count.hot_loops(instructions, own_warps, partitions, table)


def _numbers(pattern: str, text: str) -> list[int]:
    found = re.findall(pattern, text)
    assert found, f"no {pattern} in {text[:200]!r}"
    return list(map(int, found))


def over_limits(record: KernelRecord, limits: ArchLimits) -> list[str]:
    """What a launch would fail for, each with got and limit."""
    assert record.registers is not None and record.threads is not None
    rounded = -(-record.registers // REGISTER_STEP) * REGISTER_STEP
    checks = [
        ("shared memory", record.shared_bytes, limits.shared_bytes, "B"),
        ("tensor memory", record.tmem_columns, limits.tmem_columns, "columns"),
        ("threads", record.threads, MAX_THREADS, "a CTA"),
        (f"registers ({rounded} x {record.threads} threads)", rounded * record.threads, REGISTER_FILE, ""),
    ]
    return [
        f"{what} {got:,} > {limit:,} {unit}".strip()
        for what, got, limit, unit in checks
        if got is not None and got > limit
    ]


def cuobjdump(cubin: Path, *options: str) -> str:
    """Output of the cuobjdump that Triton's wheel ships."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    done = subprocess.run([tool, *options, cubin], capture_output=True, text=True, check=True)
    return done.stdout
