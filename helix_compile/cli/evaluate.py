"""helix-compile eval: the same questions to the unmodified model and to the compiled one."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from helix_compile.cli.options import Config, Lenient, asked_options, with_options
from helix_compile.cli.options import given as _is_given
from helix_compile.config.options import OPTIONS
from helix_compile.errors import HelixError
from helix_compile.eval.tasks import TASKS
from helix_compile.files import StagedFiles, check_folder

if TYPE_CHECKING:
    from helix_compile.eval.evaluation import Progress

_SVG, _JSON = "scores.svg", "scores.json"
# one sequence of the longest context is run, of the whole model
_DECIDED = ("max_batch_size", "pp", "stage", "pp_split")


@with_options
def evaluate(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="checkpoint folder with a tokenizer")],
    cp: Annotated[int | None, typer.Option(help=f"{OPTIONS['cp'].cli_help}; required, here or in --config")] = None,
    tasks: Annotated[
        str, typer.Option(help="recall, needle, copy, and names of lm-evaluation-harness's (extra: eval), with commas")
    ] = "recall,needle,copy",
    context: Annotated[
        str,
        typer.Option(help="tokens of our tasks: 4K, or 1K,16K, or 1K..128K for steps of four times, the last one too"),
    ] = "1K,4K",
    prefill: Annotated[
        str,
        typer.Option(
            help="whose cache the compiled model goes on from: helix (its own) | model | handover (the model's, through a file)"
        ),
    ] = "helix",
    limit: Annotated[int, typer.Option(help="questions of a task at a context")] = 50,
    seed: Annotated[int, typer.Option(help="of the documents")] = 0,
    include: Annotated[
        Path | None, typer.Option(help="folder with task files of your own for lm-evaluation-harness")
    ] = None,
    config: Config = None,
    lenient: Lenient = False,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, float16 or float64; default: the folder's")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N")] = "cpu",
    out: Annotated[Path | None, typer.Option(help=f"folder for {_JSON} and {_SVG}")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON document on stdout")] = False,
    **options: Any,
) -> None:
    """Score the unmodified MODEL and the compiled one on the same questions. Exit status 1 if a token differs."""
    if limit < 1:
        raise HelixError(f"--limit must be >= 1, got {limit}")
    if not (folder := Path(model)).is_dir():
        raise HelixError(f"MODEL {model!r}: expected a checkpoint folder with a tokenizer: questions are text")
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    ours, theirs = [n for n in names if n in TASKS], [n for n in names if n not in TASKS]
    decided = [name for name in (*_DECIDED, *(() if theirs else ("max_seq_len",))) if _is_given(ctx, name)]
    if decided:
        raise HelixError(
            f"eval: leave {', '.join(f'--{name}'.replace('_', '-') for name in decided)}: it runs one sequence of the longest "
            "--context through the whole model"
        )
    if out is not None:
        check_folder(out)
    compiled_as = asked_options(ctx)
    contexts = contexts_of(context)
    import torch

    from helix_compile.eval.decoders import check_prefill
    from helix_compile.eval.folder import dtype_asked
    from helix_compile.eval.run import Asked, evaluate_folder
    from helix_compile.worlds.world import device_for

    check_harness(theirs, include)
    check_prefill(prefill)
    asked = Asked(ours, contexts, limit, seed, prefill, theirs, include)
    world = options["world"]
    with _bar() as progress:
        evaluation = evaluate_folder(
            folder,
            compiled_as,
            asked,
            world=world,
            dtype=dtype_asked(dtype),
            device=device_for(device, world) or torch.device("cpu"),
            progress=progress,
        )
    if out is not None and evaluation.is_leader:
        with StagedFiles(out, "eval") as files:
            files.write_text(_JSON, evaluation.to_json() + "\n")
            files.write_text(_SVG, evaluation.to_svg())
            files.move()
        print(f"wrote {out / _JSON}, {out / _SVG}", file=sys.stderr)
    if evaluation.is_leader:
        print(evaluation.to_json() if as_json else evaluation)
    raise typer.Exit(0 if evaluation.is_same else 1)


def check_harness(tasks: list[str], include: Path | None) -> None:
    """Raise HelixError where tasks are the harness's and it is not installed, or its folder of tasks is named for nothing."""
    if not tasks:
        if include is not None:
            raise HelixError("--include has no effect: --tasks names none of lm-evaluation-harness's")
        return
    if find_spec("lm_eval") is None:
        raise HelixError(
            f"--tasks: {', '.join(tasks)} is none of ours, and lm-evaluation-harness is not installed; ours are recall, needle, copy, "
            "its own come with: pip install 'helix-compile[eval]'"
        )


def contexts_of(text: str) -> list[int]:
    """Of "4K", "1K,16K" or "1K..128K": the first, four times as many as long as that is less than the last, the last.

    Raises:
        HelixError: anything else.
    """
    from helix_compile.predict.search import count_of

    found = list[int]()
    for part in text.split(","):
        ends = [count_of(end.strip(), "--context") for end in part.split("..")]
        if len(ends) > 2 or ends[0] > ends[-1]:
            raise HelixError(f"--context {text!r}: expected numbers such as 4K, 1K,16K or 1K..128K")
        at = ends[0]
        while at < ends[-1]:
            found.append(at)
            at *= 4
        found.append(ends[-1])
    return sorted(set(found))


@contextmanager
def _bar() -> Iterator[Progress]:
    """A bar on stderr, one line for each task, context and model."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=os.environ.get("RANK", "0") != "0") as bar:
        lines: dict[str, Any] = {}

        def advance(what: str, count: int, total: int) -> None:
            if what not in lines:
                lines[what] = bar.add_task(what, total=total)
            bar.update(lines[what], completed=count)

        yield advance
