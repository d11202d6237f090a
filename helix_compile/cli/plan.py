"""helix-compile plan: which layout, and is Helix worth it. Reads no weights; every figure that it prints is predicted."""

from __future__ import annotations

import math
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from helix_compile.cli.options import Config, Lenient
from helix_compile.config.dialects import fields_of_file
from helix_compile.config.options import HelixOptions
from helix_compile.errors import HelixError
from helix_compile.files import StagedFiles, check_folder

if TYPE_CHECKING:
    from helix_compile.predict.costed import CostedModel


def plan(
    model: Annotated[str, typer.Argument(help="as of inspect; weights are not read")],
    ranks: Annotated[
        int, typer.Option(help="accelerators; one replica takes all of them, as far as their link reaches")
    ],
    context: Annotated[str, typer.Option(help="tokens of a sequence: 131072, 128K, 1M (of 1024)")],
    gpu: Annotated[str, typer.Option(help="h100 | h200 | b200 | gb200 | b300 | gb300 | gb200-paper")] = "gb200",
    batch: Annotated[str, typer.Option(help="sequences of a step: 8, 1,8,64, or 1..256 for powers of two")] = "1..256",
    kv_dtype: Annotated[
        str | None, typer.Option(help="auto | fp8 | fp8_ds_mla | fp4; default: as --config says, else auto")
    ] = None,
    weights: Annotated[str, typer.Option(help="auto | bf16 | fp8 | nvfp4 | mxfp4 | fp4")] = "auto",
    min_tokens_per_s: Annotated[float, typer.Option(help="tokens/s that a user must get at least")] = 0.0,
    pad_heads: Annotated[
        bool, typer.Option(help="may heads and experts that do not divide be padded with zeros?")
    ] = True,
    fewer_ranks: Annotated[
        bool, typer.Option("--fewer-ranks", help="look at several replicas of fewer ranks too, divisors of --ranks")
    ] = False,
    config: Config = None,
    lenient: Lenient = False,
    dtype: Annotated[str | None, typer.Option(help="of the model: bfloat16 (default), float16, float32")] = None,
    gpu_file: Annotated[Path | None, typer.Option(help="TOML, YAML or JSON: figures in place of the preset's")] = None,
    calibrate: Annotated[Path | None, typer.Option(help="measured.json: fit the fixed terms to measured steps")] = None,
    out: Annotated[Path | None, typer.Option(help="file for the plan that wins, such as plan.json")] = None,
    html: Annotated[
        Path | None, typer.Option(help="file for a page on which context, batch, link and cache move")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON document on stdout")] = False,
) -> None:
    """Say which cp, tpa, ep and batch MODEL should run with, what that is predicted to give, and where Helix is not worth it. Exit status 1 if nothing fits."""
    from helix_compile.predict.accelerators import accelerator
    from helix_compile.predict.calibration import calibrated
    from helix_compile.predict.formats import cache_format, weight_format
    from helix_compile.predict.planner import Planned, held_in, plan_text
    from helix_compile.predict.search import Goal, batches_of, count_of

    if not 0 <= min_tokens_per_s < math.inf:
        raise HelixError(f"--min-tokens-per-s: got {min_tokens_per_s}, expected a number >= 0")
    _check_files(out, html)
    stated, where = _stated(config, lenient)
    machine, tokens = accelerator(gpu, gpu_file), count_of(context, "--context")
    goal = Goal(
        accelerator=machine,
        ranks=ranks,
        context=tokens,
        batches=batches_of(batch),
        weights=weight_format(weights),
        cache=cache_format(kv_dtype or stated.get("cache_dtype", "auto")),
        tokens_per_s_per_user=min_tokens_per_s,
        pad_heads=pad_heads,
        fewer_ranks=fewer_ranks,
    )
    if out is not None:
        held_in(goal)
    costed = _costed(model, dtype, stated, goal.context, max(goal.batches))
    calibration = calibrated(calibrate, costed, goal) if calibrate is not None else None
    if calibration is not None:
        goal = replace(goal, accelerator=calibration.accelerator)
    planned = Planned(costed, goal, calibration, stated.get("cache_scale", 1.0), _configured(stated, where))
    written = [path for path in (out if planned.best else None, html) if path is not None]
    if out is not None and planned.best:
        _write(out, plan_text(planned))
    if html is not None:
        from helix_compile.views.plan_page import format_plan_page

        _write(html, format_plan_page(planned))
    if as_json:
        print(planned.to_json())
    else:
        from helix_compile.views.plan_text import format_plan

        print(format_plan(planned))
    for path in written:
        print(f"wrote {path}", file=sys.stderr)
    if out is not None and out not in written:
        print(f"did not write {out}: {planned.reasons[0]}", file=sys.stderr)
    raise typer.Exit(0 if planned.best else 1)


def _check_files(out: Path | None, html: Path | None) -> None:
    """Before minutes of search: what is written last can be."""
    for option, path in (("--out", out), ("--html", html)):
        if path is not None:
            check_folder(path.parent, option)
            if path.is_dir():
                raise HelixError(f"{option} {path}: is a folder; expected the name of a file in one")
    if out is not None and html is not None and out.absolute() == html.absolute():
        raise HelixError(f"--out and --html: got {out} for both, expected two files")


def _write(path: Path, text: str) -> None:
    with StagedFiles(path.parent, f"plan-{path.name}") as files:
        files.write_text(path.name, text if text.endswith("\n") else f"{text}\n")
        files.move()


def _stated(config: str | None, lenient: bool) -> tuple[dict[str, Any], str]:
    """Options that --config says, and where."""
    if config is None:
        if lenient:
            raise HelixError("--lenient has no effect without --config: it says how that is read")
        return {}, ""
    read = fields_of_file(config, lenient)
    for note in read.recipe.said_apart():
        print(f"{read.where} ({read.dialect}): note: {note}", file=sys.stderr)
    return read.fields, f"{read.where} ({read.dialect})"


_SEARCHED = (
    "cp",
    "tpa",
    "ep",
    "merge",
    "q_proj",
    "v_up",
    "pad_heads",
    "overlap",
    "max_batch_size",
    "max_seq_len",
    "cache_dtype",
    "cache_scale",
)


def _configured(stated: dict[str, Any], where: str) -> tuple[HelixOptions, str] | None:
    """The layout of --config, to be set beside what is recommended."""
    names = {field.name for field in fields(HelixOptions)}
    own = {k: v for k, v in stated.items() if k in names}
    return (HelixOptions(**own), where) if "cp" in own else None


def _costed(model: str, dtype: str | None, stated: dict[str, Any], context: int, batch: int) -> CostedModel:
    """The model up to its matches, and the options that are not searched."""
    from helix_compile.capture.source import captured_from
    from helix_compile.checkpoint.named import named_model
    from helix_compile.compile import match_model
    from helix_compile.predict.costed import CostedModel

    kept = {k: v for k, v in stated.items() if k not in _SEARCHED}
    base = HelixOptions(**{**kept, "cp": 2, "max_batch_size": batch, "max_seq_len": context})
    print(f"reading {model} ...", file=sys.stderr)
    try:
        built = named_model(model, dtype, meta=not model.endswith(".pt2"))
    except (KeyError, ValueError, OSError) as error:
        raise HelixError(f"MODEL {model!r}: {error.args[0] if error.args else error}") from error
    captured, matches = match_model(captured_from(built, None, unmatched=base.unmatched), base)
    if any(a.selection for match in matches.values() for a in match.attentions) and base.topk_exchange == "auto":
        base = replace(base, topk_exchange="gather")  # "auto" goes by the batch; one graph is costed for all of them
    return CostedModel(captured, matches, base)
