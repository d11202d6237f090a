"""The console script: helix-compile inspect | verify | compare | generate | eval | export | kernels | recipe | plan. JSON goes to stdout alone, progress to stderr.

Exit status: 0 fine, 1 a check failed, 2 wrong use.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from helix_compile.cli.evaluate import evaluate
from helix_compile.cli.kernels import kernels
from helix_compile.cli.options import Config, Lenient, asked_options, with_options
from helix_compile.cli.options import given as _is_given
from helix_compile.cli.plan import plan
from helix_compile.config.engines import ENGINE_NAMES, check_engine
from helix_compile.config.options import OPTIONS, HelixOptions
from helix_compile.errors import HelixError
from helix_compile.files import check_folder
from helix_compile.views.rank_share import RankShare, fake_group, share_of_rank

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Rewrite a decode step for Helix parallelism, look at it, and run it.",
)

_MODEL_HELP = "checkpoint folder, a config.json (random weights), a .pt2 of torch.export.save, or a preset: tiny, deepseek-v3-lite, deepseek-v3"
_SIDE_HELP = (
    "a plan.json or a folder with one, a folder of save(), a folder that HELIX_DUMP_VALUES named, or .safetensors with "
    "another engine's layer_{i}.attn_out"
)
Model = Annotated[str, typer.Argument(help=_MODEL_HELP)]
Cp = Annotated[int | None, typer.Option(help=f"{OPTIONS['cp'].cli_help}; required, here or in --config")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16, float16 or float64")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N; cuda under torchrun: each process its own GPU")]
Meta = Annotated[bool, typer.Option("--meta", help="no weights: shapes only")]
Json = Annotated[bool, typer.Option("--json", help="one JSON document on stdout")]


@app.command()
@with_options
def inspect(
    ctx: typer.Context,
    model: Model,
    cp: Cp = None,
    config: Config = None,
    lenient: Lenient = False,
    dtype: Dtype = None,
    meta: Meta = False,
    out: Annotated[Path | None, typer.Option(help="folder for plan, report and graphs")] = None,
    node: Annotated[str | None, typer.Option(help="explain one node, such as body_0.linear_4")] = None,
    rank: Annotated[int | None, typer.Option(help="what this one rank holds, computes and exchanges")] = None,
    as_json: Json = False,
    **options: Any,
) -> None:
    """Compile MODEL and say what was rewritten, what was not and why, and the bytes of each collective."""
    if node is not None and (out is not None or rank is not None):
        raise HelixError("inspect: --node prints one node's chain and writes no files; leave --out and --rank")
    if rank is not None and (out is not None or options["world"] != "auto"):
        raise HelixError("inspect: --rank looks at one rank of the plan; leave --out and --world")
    if out is not None:
        check_folder(out)
    if rank is not None:
        share = _share_of_rank(ctx, model, dtype, meta, rank)
        print(share.to_json() if as_json else share)
        return
    compiled = _compile(ctx, model, dtype, meta, notes=node is not None)
    if not compiled.world.is_leader:
        compiled.inspect(out)
        return
    if node is not None:
        explanation = compiled.explain_node(node)
        print(json.dumps(explanation.to_json(), indent=1) if as_json else explanation)
        return
    inspection = compiled.inspect(out)
    print(inspection.to_json() if as_json else inspection)
    if out is not None:
        print(f"files in {out}", file=sys.stderr)


@app.command()
@with_options
def generate(
    ctx: typer.Context,
    model: Model,
    prompt_ids: Annotated[str, typer.Option(help="token ids separated by commas or spaces; several prompts by ';'")],
    cp: Cp = None,
    config: Config = None,
    lenient: Lenient = False,
    max_new_tokens: Annotated[int, typer.Option(help="tokens to generate")] = 16,
    dtype: Dtype = None,
    device: Device = "cpu",
    as_json: Json = False,
    **options: Any,
) -> None:
    """Generate greedily from token ids; prints the new ids of each prompt, streaming where there is one."""
    from helix_compile.runtime.generation import TokenPrinter, padded_prompts  # heavy: imports transformers

    if max_new_tokens < 1:
        raise HelixError(f"--max-new-tokens must be >= 1, got {max_new_tokens}")
    ids, mask = padded_prompts(prompt_ids)
    compiled = _compile(ctx, model, dtype, meta=False)
    leads = compiled.world.is_leader  # of several processes one prints
    stream = len(ids) == 1 and not as_json and leads
    new = compiled.generate(
        ids,
        mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=0,
        streamer=TokenPrinter() if stream else None,
    )[:, ids.shape[1] :]
    if as_json and leads:
        print(
            json.dumps(
                {"prompt_ids": [r[m > 0].tolist() for r, m in zip(ids, mask, strict=True)], "new_ids": new.tolist()}
            )
        )
    elif leads and not stream:
        for row in new.tolist():
            print(" ".join(map(str, row)))


@app.command()
@with_options
def export(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help=f"{_MODEL_HELP}; or a folder of save(), without --cp")],
    out: Annotated[Path, typer.Option(help="folder for what each rank runs and manifest.json")],
    format: Annotated[
        str, typer.Option(help="onnx, pt2 (programs of torch.export) or aoti (the same, compiled)")
    ] = "onnx",
    layers: Annotated[str | None, typer.Option(help="of these layers alone, such as 0,3; default: all")] = None,
    collectives: Annotated[
        str,
        typer.Option(help="of onnx: helix (a runtime defines them) or ort-nccl (onnxruntime's own, where these do)"),
    ] = "helix",
    batch: Annotated[int | None, typer.Option(help="of onnx: sequences of every step; default: any number")] = None,
    tokens: Annotated[int | None, typer.Option(help="of onnx: new tokens of every step; default: any number")] = None,
    cp: Cp = None,
    config: Config = None,
    lenient: Lenient = False,
    dtype: Dtype = None,
    as_json: Json = False,
    **options: Any,
) -> None:
    """Write what each rank runs for other runtimes; `verify` OUT reads it back. What is in OUT stays."""
    from helix_compile.export.formats import check_asked

    check_asked(format, collectives, batch, tokens)
    check_folder(out)
    chosen = None if layers is None else _numbers(layers)
    if (Path(model) / "plan.json").is_file():  # of save(): everything is decided
        given = [name for name in (*OPTIONS, "world", "dtype", "config") if name in ctx.params and _is_given(ctx, name)]
        if given:
            raise HelixError(f"export: {model} was saved with its options; leave {', '.join(f'--{n}' for n in given)}")
        from helix_compile.module import HelixModule

        compiled: Any = HelixModule.load(model)
        logical = None
    else:
        compiled, logical = _compiled_and_logical(ctx, model, dtype, format == "onnx")
    manifest = compiled.export(out, format, chosen, logical, collectives, batch, tokens)
    if as_json:
        print(json.dumps(manifest, indent=1))
        return
    size = sum(file["bytes"] for file in manifest["files"].values())
    print(f"{out}: {format}, {manifest['ranks']} ranks, {len(manifest['layers'])} layers, {size:,} bytes")
    if format == "onnx":
        print(
            f"  plan.onnx: {'the step of one device, with shardings' if logical else 'none, a saved module has no cp=1'}"
        )
    else:
        print(
            f"  {len(manifest['programs'])} programs, called as walk.json says; helix_compile.load_exported({str(out)!r}) steps it"
        )
    for needed in manifest["needs"]:
        print(f"  a runtime needs {needed}")


@app.command()
@with_options
def verify(
    ctx: typer.Context,
    model: Annotated[str | None, typer.Argument(help=f"{_MODEL_HELP}, or a folder of export(), without --cp")] = None,
    cp: Cp = None,
    config: Config = None,
    lenient: Lenient = False,
    dtype: Dtype = None,
    device: Device = "cpu",
    float64_too: Annotated[
        bool, typer.Option("--float64-too", help="compile the same plan in float64 and hold it to 1e-10")
    ] = False,
    seed: Annotated[int, typer.Option(help="of tokens, hidden states and needles")] = 0,
    self_test: Annotated[
        bool, typer.Option("--self-test", help="verify the verifier: every known fault must be caught")
    ] = False,
    as_json: Json = False,
    **options: Any,
) -> None:
    """Check that MODEL, rewritten, is MODEL: graph, weights and numbers; that a folder of export() is what it says. Exit status 1 if anything is found."""
    if model is not None and (Path(model) / "manifest.json").is_file() and cp is None and config is None:
        _verify_export(ctx, Path(model), as_json)
    sized = cp is not None or config is not None
    if (model is not None) != sized or (model is None and not self_test):
        raise HelixError(
            "helix-compile verify: give MODEL and --cp N, or --self-test, or all of them (--config FILE may say cp)"
        )
    results = []
    if model is not None:
        asked = {"options": asked_options(ctx), "world": options["world"], "device": _device_asked(ctx)}
        built = _model(model, dtype, meta=False)
        asked["dtype"] = _folder_dtype(built, dtype)
        results.append(_verified(built, asked, float64_too, seed))
    if self_test:
        from helix_compile.verifier.mutants import self_test as tester

        verdicts = tester.self_test_of_all_kinds(_say)
        text, table = tester.to_json(verdicts), tester.format_table(verdicts)
        results.append((all(v.caught for v in verdicts), text, table))
    if as_json:
        documents = [json.loads(text) for _, text, _ in results]
        both = {"ok": all(ok for ok, *_ in results), "verify": documents[0], "self_test": documents[-1]}
        print(json.dumps(documents[0] if len(documents) == 1 else both, indent=1))
    else:
        print("\n\n".join(text for *_, text in results))
    raise typer.Exit(0 if all(ok for ok, *_ in results) else 1)


@app.command()
def compare(
    a: Annotated[str, typer.Argument(help=_SIDE_HELP)],
    b: Annotated[str, typer.Argument(help="as A")],
    html: Annotated[
        Path | None, typer.Option(help="file for a page with the picture of how the deviation grows")
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="of runs: largest deviation over a value's largest element; default: by dtype")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what differs between two plans, saved modules or runs: which value first, on which rank. Exit status 1 if any does."""
    from helix_compile.verifier.compare.compare import compare as compared

    comparison = compared(a, b, tolerance=tolerance)
    if html is not None:
        comparison.write_html(html)
    print(comparison.to_json() if as_json else comparison)
    raise typer.Exit(0 if comparison.equal else 1)


def _compiled_and_logical(ctx: typer.Context, model: str, dtype: str | None, logical_too: bool) -> tuple[Any, Any]:
    """MODEL as it is asked for, and at cp=1 (what the ranks compute together) where that is wanted."""
    options, world = asked_options(ctx), ctx.params["world"]
    from helix_compile.compile import helix_compile

    if world == "distributed":
        raise HelixError("export: one process writes the models of all ranks; leave --world")
    built = _model(model, dtype, meta=False)
    how = {"world": "virtual", "dtype": _folder_dtype(built, dtype)}
    alone = HelixOptions(
        cp=1, max_batch_size=options.max_batch_size, max_seq_len=options.max_seq_len, unmatched=options.unmatched
    )
    asked = helix_compile(built, options=options, **how)
    return asked, helix_compile(built, options=alone, **how) if logical_too else None


def _verify_export(ctx: typer.Context, folder: Path, as_json: bool) -> None:
    """Read an exported folder back; exits."""
    from helix_compile.export.formats import check_export

    if idle := [name for name in ctx.params if name not in ("model", "as_json") and _is_given(ctx, name)]:
        raise HelixError(
            f"verify: {folder} is an export, which has no options; leave {', '.join(f'--{n}' for n in idle)}"
        )
    faults = check_export(folder)
    if as_json:
        print(json.dumps({"ok": not faults, "faults": [vars(fault) for fault in faults]}, indent=1))
    else:
        print("\n".join(map(str, faults)) or f"{folder}: as exported")
    raise typer.Exit(1 if faults else 0)


def _numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise HelixError(
            f"--layers {text!r}: expected numbers of layers with commas between them, such as 0,3"
        ) from None


def _verified(built: Any, asked: dict[str, Any], float64_too: bool, seed: int) -> tuple[bool, str, str]:
    """(ok, JSON, text) of verify() on a model, or on a checkpoint folder against what transformers loads from it."""
    import torch

    from helix_compile.capture.source import load_folder
    from helix_compile.compile import helix_compile
    from helix_compile.verifier.verify import verify as check

    original = built
    notes: tuple[str, ...] = ()
    if isinstance(built, torch.nn.Module):
        built = original = built.to(asked["device"])  # verify() runs both
    compiled = helix_compile(built, **asked)
    if isinstance(built, Path):
        original, notes = load_folder(built, asked["dtype"])
        original = original.to(asked["device"])
    report = check(compiled, original, dtype=torch.float64 if float64_too else None, seed=seed, progress=_say)
    report = replace(report, notes=(*notes, *report.notes))
    return report.ok, report.to_json(), str(report)


app.command()(kernels)
app.command()(plan)
app.command("eval")(evaluate)


@app.command()
@with_options
def recipe(
    ctx: typer.Context,
    model: Model,
    engine: Annotated[str, typer.Option("--for", help=" | ".join(ENGINE_NAMES))],
    cp: Cp = None,
    config: Config = None,
    lenient: Lenient = False,
    dtype: Dtype = None,
    **options: Any,
) -> None:
    """Print the command line, or the YAML, that asks an engine for MODEL's layout; MODEL's weights are not read.

    What the engine can't express stands in comments, which --config reads back.
    """
    if options["world"] != "auto":
        raise HelixError("recipe: nothing is run; leave --world")
    asked = asked_options(ctx)
    check_engine(engine)
    from helix_compile.capture.source import captured_from
    from helix_compile.capture.stage import stage_model
    from helix_compile.compile import plan_model

    captured = captured_from(stage_model(_model(model, dtype, meta=True), asked), None, unmatched=asked.unmatched)
    print(plan_model(captured, asked).plan.to_engine(engine, model), end="")


def _say(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":  # one of torchrun's processes speaks for all
        print(text, file=sys.stderr)


def _compile(ctx: typer.Context, model: str, dtype: str | None, meta: bool, notes: bool = True) -> Any:
    options, world = (
        asked_options(ctx, notes=notes),
        ctx.params["world"],
    )  # first: a model, and the imports for it, may take minutes
    import torch

    from helix_compile.compile import helix_compile
    from helix_compile.worlds.world import errors_told

    device_asked = _device_asked(ctx)
    with errors_told(world, options.cp, options.tpa, device_asked or torch.device("cpu")):
        built = _model(model, dtype, meta)
    return helix_compile(built, options=options, world=world, device=device_asked, dtype=_folder_dtype(built, dtype))


def _device_asked(ctx: typer.Context) -> Any:
    """The device that --device names, checked before a model is built for it; None where a command has no such option."""
    from helix_compile.worlds.world import device_for

    return device_for(ctx.params.get("device"), ctx.params["world"])


def _folder_dtype(built: Any, dtype: str | None) -> Any:
    """The asked dtype where the weights are still to be read; a preset is built in it."""
    import torch

    return getattr(torch, dtype) if dtype is not None and isinstance(built, Path) else None


def _share_of_rank(ctx: typer.Context, model: str, dtype: str | None, meta: bool, rank: int) -> RankShare:
    """Compile as one rank of a world without peers: graphs, shards and shapes are its own, values there are none."""
    options = asked_options(ctx)
    from helix_compile.compile import helix_compile

    with fake_group(rank, options.cp * options.tpa) as group:
        compiled = helix_compile(_model(model, dtype, meta), options=options, world=group)
        return share_of_rank(compiled.plan, compiled.ranks[0], compiled.world.mesh)


def _model(model: str, dtype: str | None, meta: bool) -> Any:
    from helix_compile.checkpoint.named import named_model

    _say(f"compiling {model} ...")
    try:
        return named_model(model, dtype, meta)
    except (KeyError, ValueError, OSError) as error:
        raise HelixError(f"MODEL {model!r}: {error.args[0] if error.args else error}") from error


def main() -> None:
    """Entry point: a HelixError is wrong use (2) and prints its message alone."""
    try:
        app()
    except HelixError as error:
        if not error.is_said:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)
