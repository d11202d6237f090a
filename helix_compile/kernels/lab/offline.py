"""Compile kernels for an architecture without a device and say whether they fit it.

    CompileCase -> one process each -> PTX, cubin, TTGIR in DIR/<arch>/ -> KernelRecord

A process each, because LLVM aborts the process on some errors: a case that can't be compiled becomes a record that
doesn't fit, with the compiler's words as the reason. Triton itself never complains about a kernel that is too large for
the hardware, so shared memory, tensor memory, threads and registers are checked here. All figures are static: read off
the binary, not measured.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import multiprocessing
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

from helix_compile.errors import LoweringUnavailable
from helix_compile.kernels.lab.record import KINDS, KernelRecord, StaticFigures, describe
from helix_compile.kernels.registry import CompileCase
from helix_compile.kernels.target import offline_target

TIMEOUT_S = 600.0


PRELOAD = "helix_compile.kernels.catalog"


@dataclass(frozen=True)
class _Job:
    """What a worker needs; a jit function travels by name."""

    module: str
    function: str
    case: CompileCase  # without its function
    capability: int
    scratch: Path  # gets its files; what is whole goes from here to the folder that was asked for
    stem: str  # of its files, such as "sm_90/merge_lse_4_parts"

    @property
    def log(self) -> Path:
        return self.scratch / "compiler.log"


def compile_cases(
    cases: list[CompileCase], arch: str, folder: Path, progress: Callable[[KernelRecord], None] | None = None
) -> list[KernelRecord]:
    """Compile every case for `arch`, write its files below `folder`, and describe it; one record a case, in order.

    Args:
        cases: as the kernels' registrations make them.
        arch: "sm_100", "sm_90", ...
        folder: gets `<arch>/<kernel>-<config>.ptx`, .cubin and .ttgir.
        progress: called with each record when it is there.

    A case that can't be compiled leaves no file, and files are put in place whole: an interrupt leaves none half-written.

    Raises:
        LoweringUnavailable: an unknown arch, or a process in which Triton interprets instead of compiling.
        OSError: the folder can't be written.
    """
    capability = offline_target(arch).capability
    for case in cases:
        if not hasattr(type(case.function), "cache_key"):  # its own would be computed, and may raise
            raise LoweringUnavailable(
                f"kernel {case.kernel} is interpreted in this process and can't be compiled: "
                "TRITON_INTERPRET=1 was set when it was imported; start Python without it"
            )
    (folder / arch).mkdir(parents=True, exist_ok=True)
    records = []
    with tempfile.TemporaryDirectory() as scratch, _workers() as pool:
        jobs = [
            _Job(
                case.function.fn.__module__,
                case.function.fn.__qualname__,
                replace(case, function=None),
                capability,
                Path(scratch) / str(i),
                f"{arch}/{stem}",
            )
            for i, (case, stem) in enumerate(zip(cases, _stems(cases), strict=True))
        ]
        for case, job, outcome in zip(cases, jobs, pool.map(_isolated, jobs), strict=True):
            records.append(_record(case, arch, job, outcome))
            if isinstance(outcome, StaticFigures):
                _put(job, folder)
            if progress is not None:
                progress(records[-1])
    return records


@contextlib.contextmanager
def _workers() -> Iterator[ThreadPoolExecutor]:
    """Threads that wait for one compiling process each. An interrupt drops what has not started."""
    pool = ThreadPoolExecutor(max_workers=min(32, os.cpu_count() or 1))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _stems(cases: list[CompileCase]) -> list[str]:
    """File names without suffix: kernel and config, numbered where two are the same."""
    stems: list[str] = []
    for case in cases:
        stem = re.sub(r"[^A-Za-z0-9]+", "_", f"{case.kernel} {case.config}").strip("_")
        same = sum(s == stem or s.startswith(f"{stem}__") for s in stems)
        stems.append(f"{stem}__{same + 1}" if same else stem)
    return stems


def _record(case: CompileCase, arch: str, job: _Job, outcome: StaticFigures | str) -> KernelRecord:
    if isinstance(outcome, StaticFigures):
        return describe(case, arch, job.scratch, job.stem, outcome)
    reason = f"not compiled: {outcome}"
    return KernelRecord(case.kernel, arch, case.config, fallback=case.fallback, reason=reason)


def _put(job: _Job, folder: Path) -> None:
    """Move a kernel's files where they belong: copied beside their places first, which may be on another disk."""
    for kind in KINDS:
        final = folder / f"{job.stem}.{kind}"
        beside = final.with_name(f".{final.name}.part")
        try:
            shutil.copyfile(job.scratch / f"{job.stem}.{kind}", beside)
            beside.replace(final)
        finally:
            beside.unlink(missing_ok=True)


def _isolated(job: _Job) -> StaticFigures | str:
    """Compile in a process of its own; what it says if it fails, or how it died."""
    # not fork: this process may hold CUDA and threads. The server imports the kernels once and forks from there.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([PRELOAD])
    (job.scratch / job.stem).parent.mkdir(parents=True)
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(job, send), daemon=True)
    process.start()
    send.close()
    try:
        outcome = receive.recv() if receive.poll(TIMEOUT_S) else f"took longer than {TIMEOUT_S:g} s"
    except EOFError:
        process.join()
        outcome = f"the compiler died (exit status {process.exitcode})"
    process.kill()
    process.join()
    if isinstance(outcome, str) and (said := _first_error(job.log)) and said not in outcome:
        outcome = f"{outcome}: {said}"
    return outcome


def _first_error(log: Path) -> str:
    """The line of a compiler's output that says most."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    telling = [s for s in lines if re.search(r"error|Assertion|LLVM ERROR|not supported", s)]
    return _without_folders((telling or lines or [""])[0].strip())


def _work(job: _Job, send: Connection) -> None:
    """In the worker: compile, write files, send figures, or the error as text."""
    log = os.open(job.log, os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 2)  # MLIR and LLVM write to the descriptor
    try:
        send.send(_compile(job))
    except Exception as error:  # any: what a compiler can't do is a result here
        send.send(f"{type(error).__name__}: {_short(str(error))}")


def _short(message: str) -> str:
    """First line and the last one that speaks of an error, of a message that quotes source and command lines."""
    lines = [line.strip() for line in message.splitlines() if line.strip(" ^")] or ["no message"]
    telling = [s for s in lines[1:] if "error" in s.lower()] or lines[1:]
    return _without_folders(" ".join([lines[0], *telling[-1:]]))


def _without_folders(text: str) -> str:
    """File names instead of paths: a reason reads the same on every machine."""
    return re.sub(r"(?:/[\w.+-]+)+/([\w.+-]+)", r"\1", text)


def _compile(job: _Job) -> StaticFigures:
    import triton
    from triton.backends.compiler import GPUTarget

    from helix_compile.kernels.mla.probe import case_source

    function = getattr(importlib.import_module(job.module), job.function)
    source = case_source(replace(job.case, function=function))
    # on is Triton's default up to 3.9, which warns that it will change
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    knobs, output = triton.knobs, io.StringIO()
    with (
        knobs.nvidia.scope(),
        knobs.compilation.scope(),
        knobs.cache.scope(),
        tempfile.TemporaryDirectory() as cache,
        contextlib.redirect_stdout(output),
    ):
        knobs.nvidia.dump_ptxas_log = knobs.compilation.always_compile = True
        knobs.cache.dir = cache
        kernel = triton.compile(source, target=GPUTarget("cuda", job.capability, 32), options=job.case.options)
    for kind in KINDS:
        made = kernel.asm[kind]
        file = job.scratch / f"{job.stem}.{kind}"
        file.write_bytes(made if isinstance(made, bytes) else made.encode())
    tmem = getattr(kernel.metadata, "tmem_size", 0) or 0
    return StaticFigures(kernel.metadata.shared, tmem, output.getvalue())
