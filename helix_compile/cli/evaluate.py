"""helix-compile eval: the same questions to the unmodified model and to the compiled one, or to a server."""

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
# with --endpoint the rest is the server's affair
_OF_ENDPOINTS = ("endpoint", "timeout", "in_flight")
_WITH_ENDPOINT = (*_OF_ENDPOINTS, "model", "tasks", "context", "limit", "seed", "dtype", "device", "out", "as_json")


@with_options
def evaluate(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="checkpoint folder with a tokenizer")],
    cp: Annotated[
        int | None, typer.Option(help=f"{OPTIONS['cp'].cli_help}; required, here or in --config, without --endpoint")
    ] = None,
    endpoint: Annotated[
        str | None,
        typer.Option(
            help="http://host:port of a server of OpenAI's API that serves MODEL (extra: serve): it answers instead of a compiled model"
        ),
    ] = None,
    timeout: Annotated[float, typer.Option(help="seconds that an answer of --endpoint may take")] = 600.0,
    in_flight: Annotated[int, typer.Option(help="requests to --endpoint at a time")] = 8,
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
    """Score the unmodified MODEL and the compiled one, or a server, on the same questions. Exit status 1 if a token differs."""
    if limit < 1:
        raise HelixError(f"--limit must be >= 1, got {limit}")
    if not (folder := Path(model)).is_dir():
        raise HelixError(f"MODEL {model!r}: expected a checkpoint folder with a tokenizer: questions are text")
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    ours, theirs = [n for n in names if n in TASKS], [n for n in names if n not in TASKS]
    if out is not None:
        check_folder(out)
    contexts = contexts_of(context)
    _check_given(ctx, endpoint, theirs, timeout, in_flight)
    compiled_as = asked_options(ctx) if endpoint is None else None
    import torch

    from helix_compile.eval.decoders import check_prefill
    from helix_compile.eval.folder import dtype_asked
    from helix_compile.eval.run import Asked, evaluate_endpoint, evaluate_folder
    from helix_compile.worlds.world import device_for

    check_harness(theirs, include)
    check_prefill(prefill)
    asked = Asked(ours, contexts, limit, seed, prefill, theirs, include)
    world, chosen = options["world"], dtype_asked(dtype)
    on = device_for(device, world) or torch.device("cpu")
    with _bar() as progress:
        if compiled_as is None:
            from helix_compile.eval.endpoint import Endpoint

            server = Endpoint.find(str(endpoint), folder, timeout, in_flight)
            evaluation = evaluate_endpoint(folder, server, asked, dtype=chosen, device=on, progress=progress)
        else:
            evaluation = evaluate_folder(
                folder, compiled_as, asked, world=world, dtype=chosen, device=on, progress=progress
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


def _check_given(ctx: typer.Context, endpoint: str | None, theirs: list[str], timeout: float, in_flight: int) -> None:
    """Raise HelixError for options that say what is decided here, or that would have no effect."""
    if endpoint is None:
        if idle := [name for name in _OF_ENDPOINTS if _is_given(ctx, name)]:
            raise HelixError(f"eval: {_flags(idle)} can have no effect without --endpoint")
        if decided := [name for name in (*_DECIDED, *(() if theirs else ("max_seq_len",))) if _is_given(ctx, name)]:
            raise HelixError(
                f"eval: leave {_flags(decided)}: it runs one sequence of the longest --context through the whole model"
            )
        return
    if idle := [name for name in ctx.params if name not in _WITH_ENDPOINT and _is_given(ctx, name)]:
        raise HelixError(f"eval: leave {_flags(idle)}: with --endpoint nothing is compiled, the server answers")
    if theirs:
        raise HelixError(
            f"--tasks: {', '.join(theirs)} is none of ours, and --endpoint is asked ours alone: recall, needle, copy; "
            "lm-evaluation-harness asks servers itself (lm_eval run --model local-completions)"
        )
    if not (0 < timeout < float("inf")):
        raise HelixError(f"--timeout must be > 0 and finite, got {timeout:g}")
    if in_flight < 1:
        raise HelixError(f"--in-flight must be >= 1, got {in_flight}")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise HelixError("eval: --endpoint is asked by one process; run it without torchrun")
    if find_spec("aiohttp") is None:
        raise HelixError("eval: --endpoint needs aiohttp: pip install 'helix-compile[serve]'")


def _flags(names: list[str]) -> str:
    return ", ".join(f"--{name}".replace("_", "-") for name in names)


def check_harness(tasks: list[str], include: Path | None) -> None:
    """Raise HelixError where tasks are nobody's, or the harness's and it is not installed, or its folder of tasks is named for nothing."""
    if not tasks:
        if include is not None:
            raise HelixError("--include has no effect: --tasks names none of lm-evaluation-harness's")
        return
    if find_spec("lm_eval") is None:
        raise HelixError(
            f"--tasks: {', '.join(tasks)} is none of ours, and lm-evaluation-harness is not installed; ours are recall, needle, copy, "
            "its own come with: pip install 'helix-compile[eval]'"
        )
    from helix_compile.eval.harness_rows import manager_of

    manager_of(tasks, include)  # before weights are loaded: a name may be mistyped


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
