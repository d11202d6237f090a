"""helix-compile kernels: compile what a plan selects for an architecture, with no device, and say whether it fits.

JSON goes to stdout alone, progress to stderr. Exit status: 0 all fit, 1 one does not, 2 wrong use.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
from datetime import date
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from helix_compile.cli.options import Config, Lenient, asked_options
from helix_compile.config.options import OPTIONS, HelixOptions
from helix_compile.errors import HelixError, LoweringUnavailable
from helix_compile.files import check_folder
from helix_compile.kernels.lab.record import KINDS, KernelRecord
from helix_compile.kernels.target import KernelTarget, offline_target

ARCHS = ("sm_100", "sm_90")
TABLE_WIDTH = 150
References = list[tuple[str, str, str, str]]  # (arch, body, op, reason) of what no kernel computes


def kernels(
    ctx: typer.Context,
    model: Annotated[
        str, typer.Argument(help="preset, config.json or checkpoint folder; no weights are loaded")
    ] = "deepseek-v3",
    cp: Annotated[int, typer.Option(help=OPTIONS["cp"].cli_help)] = 4,
    tpa: Annotated[int, typer.Option(help=OPTIONS["tpa"].cli_help)] = 1,
    ep: Annotated[int | None, typer.Option(help=OPTIONS["ep"].cli_help)] = None,
    config: Config = None,
    lenient: Lenient = False,
    max_batch_size: Annotated[
        int, typer.Option("--batch", "--max-batch-size", help=OPTIONS["max_batch_size"].cli_help)
    ] = 8,
    max_seq_len: Annotated[int, typer.Option(help=OPTIONS["max_seq_len"].cli_help)] = 131072,
    cache_dtype: Annotated[str, typer.Option(help=OPTIONS["cache_dtype"].cli_help)] = "auto",
    dtype: Annotated[str | None, typer.Option(help="default: the config's, else bfloat16")] = None,
    arch: Annotated[list[str] | None, typer.Option(help="may be repeated; default: sm_100 and sm_90")] = None,
    out: Annotated[Path | None, typer.Option(help="folder for PTX, cubin and TTGIR")] = None,
    every: Annotated[
        bool, typer.Option("--all", help="also what the plan would fall back to, and the FP8 form")
    ] = False,
    tune: Annotated[
        bool, typer.Option("--tune", help="measure on this GPU, print a table for kernels/mla/tuning.py")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON document on stdout")] = False,
) -> None:
    """Compile the kernels that MODEL's plan selects, without a GPU: registers, spills, memory, instructions, and fit."""
    options = asked_options(ctx, idle=("lower", "pp", "stage", "pp_split"))
    targets = [offline_target(name) for name in dict.fromkeys(arch or ARCHS)]
    if tune:
        ignored = {"--all": every, "--arch": arch, "--out": out, "--json": as_json}
        if given := [name for name, value in ignored.items() if value]:
            raise HelixError(
                f"kernels: --tune takes no {given[0]}: the card is the architecture, the table goes to stdout"
            )
        import torch

        if not torch.cuda.is_available():
            raise LoweringUnavailable(
                "kernels: --tune measures on a CUDA device, and torch finds none; the entries of kernels/mla/tuning.py rest "
                "on static tables until a card has measured them"
            )
        _check_triton()
        print(_tuned(_captured(model, dtype), options), end="")
        return
    if out is None:
        raise HelixError("kernels: give --out DIR, the folder for PTX, cubin and TTGIR")
    _check_folders(out, targets)
    _check_triton()
    records, references = _compiled(_captured(model, dtype), options, targets, out, every)
    if as_json:
        print(json.dumps(document(model, options, records, references), indent=1))
    else:
        print(format_table(records, references), end="")
        print(f"files in {out}", file=sys.stderr)
    raise typer.Exit(0 if all(r.fits for r in records if not r.fallback) else 1)


def _tuned(captured: Any, options: HelixOptions) -> str:
    """Every candidate's time as comments, then the table, for this card and the attention of the plan."""
    import torch

    from helix_compile.cli.kernel_cases import attention_site
    from helix_compile.compile import plan_model
    from helix_compile.kernels.lab.tune import TuneSizes, fits_card, replacement, table_text, trials_text, tune
    from helix_compile.kernels.lab.tune_child import ChildTrials
    from helix_compile.kernels.target import device_target

    device = torch.device("cuda", torch.cuda.current_device())
    target = device_target(device)
    site = attention_site(plan_model(captured, options), target)
    sizes = TuneSizes.of(site)
    with contextlib.closing(ChildTrials(target, sizes, device)) as measured:
        trials = tune(target, sizes, partial(fits_card, target), measured, _say)
    table = replacement(trials, sizes, torch.cuda.get_device_name(device), date.today())
    return trials_text(trials) + table_text(table)


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def document(model: str, options: HelixOptions, records: list[KernelRecord], references: References) -> dict[str, Any]:
    """What --json prints."""
    import triton

    names = ("arch", "body", "op", "reason")
    return {
        "triton": triton.__version__,
        "model": model,
        "options": options.to_json(),
        "kernels": [r.to_json() for r in records],
        "references": [dict(zip(names, line, strict=True)) for line in references],
    }


def format_table(records: list[KernelRecord], references: References) -> str:
    """One line a kernel; below, why kernels do not fit and which ops have none."""
    import triton

    console = Console(file=StringIO(), width=TABLE_WIDTH, highlight=False, no_color=True)
    table = Table(box=box.ASCII2, show_edge=False, pad_edge=False, collapse_padding=True)
    for column in ("kernel", "arch", "config"):
        table.add_column(column, overflow="fold")
    for column in ("regs", "threads", "spills B", "shared B", "TMEM", "tensor core", "TMA", "instr/token", "fits"):
        table.add_column(column, justify="right", no_wrap=True)
    for r in records:
        name = f"{r.kernel} (fallback)" if r.fallback else r.kernel
        figures = [_text(n) for n in (r.registers, r.threads, r.spills, r.shared_bytes, r.tmem_columns)]
        used = [r.tensor_core, "yes" if r.tma else "-"]
        table.add_row(
            name, r.arch, r.config, *figures, *used, _text(r.instructions_per_kv_token), "yes" if r.fits else "NO"
        )
    console.print(table)
    console.print(
        f"Triton {triton.__version__}. Static figures, nothing was run: instr/token are SASS instructions of all warps of "
        "all CTAs that share a KV token, not speed.",
        markup=False,
    )
    for r in (r for r in records if not r.fits):
        console.print(f"does not fit: {r.kernel} ({r.config}) on {r.arch}: {r.reason}", markup=False)
    for arch, body, op, reason in references:
        console.print(f"no kernel on {arch}: {op} of {body}: {reason}", markup=False)
    output = console.file
    assert isinstance(output, StringIO)
    return "\n".join(line.rstrip() for line in output.getvalue().splitlines()) + "\n"


def _text(figure: float | None) -> str:
    if figure is None:
        return "-"
    return f"{figure:.1f}" if isinstance(figure, float) else f"{figure:,}"


def _check_folders(out: Path, targets: list[KernelTarget]) -> None:
    """DIR can be written, and each of its folders is new or holds what this command writes: a new run replaces that."""
    check_folder(out)
    for folder in (out / target.arch for target in targets if (out / target.arch).exists()):
        check_folder(folder)
        strangers = sorted(p.name for p in folder.iterdir() if p.suffix.lstrip(".") not in KINDS)
        if strangers:
            raise HelixError(
                f"--out {out}: {folder} holds {strangers[0]}, which this command does not write; choose another folder"
            )


def _check_triton() -> None:
    """Triton is there, and compiles in this process."""
    if importlib.util.find_spec("triton") is None:
        raise LoweringUnavailable("kernels: needs the triton package (3.6 or newer): pip install triton")
    import triton

    if triton.knobs.runtime.interpret:
        raise LoweringUnavailable(
            "kernels: TRITON_INTERPRET=1 is set, and interpreted kernels can't be compiled; start without it"
        )


def _captured(model: str, dtype: str | None) -> Any:
    """MODEL on the meta device, captured."""
    from helix_compile.capture.source import captured_from
    from helix_compile.checkpoint.named import named_model

    print(f"capturing {model} ...", file=sys.stderr)
    try:
        return captured_from(named_model(model, dtype, meta=True), None)
    except (KeyError, ValueError, OSError) as error:
        raise HelixError(f"MODEL {model!r}: {error.args[0] if error.args else error}") from error


def _compiled(
    captured: Any, options: HelixOptions, targets: list[KernelTarget], out: Path, every: bool
) -> tuple[list[KernelRecord], References]:
    """Records of every target's cases, and the ops that have no kernel."""
    from helix_compile.cli.kernel_cases import selected_cases
    from helix_compile.compile import plan_model
    from helix_compile.kernels.lab.offline import compile_cases

    model = plan_model(captured, options)
    records: list[KernelRecord] = []
    references: References = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for target in targets:
            selection = selected_cases(model, target)
            references += [(target.arch, *line) for line in selection.references]
            cases = [c for c in selection.cases if every or not c.fallback]
            bar = progress.add_task(target.arch, total=len(cases))
            try:
                records += compile_cases(cases, target.arch, out, partial(lambda bar, _: progress.advance(bar), bar))
            except OSError as error:
                raise HelixError(f"--out {out}: {error.strerror or error}") from error
    return records, references
