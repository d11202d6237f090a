"""The options of a command: its defaults, then --config FILE, then what the command line says."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import Annotated, Any, get_type_hints

import typer

from helix_compile.config.dialects import fields_of_file
from helix_compile.config.options import OPTIONS, HelixOptions
from helix_compile.config.recipe import Recipe
from helix_compile.errors import HelixError

Config = Annotated[
    str | None,
    typer.Option(
        "--config",
        help="options from a TOML, YAML, JSON or text file, or a launch command in quotes: ours, TensorRT-LLM's, vLLM's or SGLang's",
    ),
]
Lenient = Annotated[
    bool, typer.Option("--lenient", help="of --config: leave out unknown keys and what a plan can't hold, and say so")
]


def given(ctx: typer.Context, name: str) -> bool:
    """Was this option written on the command line (and is not a default)?"""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command, whose **options become, before --dtype, one for each field of HelixOptions but cp, and --world."""
    own = dict(inspect.signature(command, eval_str=True).parameters)
    del own["options"]
    types = get_type_hints(HelixOptions)
    added = []
    for field in fields(HelixOptions):
        if field.name not in own:
            parser = _numbers if OPTIONS[field.name].numbers else None
            kind = float if parser else types[field.name]
            added.append(_parameter(field.name, kind, field.default, OPTIONS[field.name].cli_help, parser))
        if field.name == "lower":  # both say how it runs
            added.append(_parameter("world", str, "auto", "auto | virtual | distributed (under torchrun)"))
    at = list(own).index("dtype")
    parameters = [*own.values()][:at] + added + [*own.values()][at:]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # typer reads both
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def _parameter(name: str, kind: Any, default: Any, text: str, parser: Any = None) -> inspect.Parameter:
    option = typer.Option(default, help=text, parser=parser)
    return inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=option, annotation=kind)


def _numbers(given: Any) -> Any:
    """What stands on the command line for numbers: "0.5", or "0.5,0.25"."""
    if not isinstance(given, str):  # the default
        return given
    try:
        numbers = [float(text) for text in given.split(",")]
    except ValueError:
        raise typer.BadParameter(f"got {given!r}, expected a number, or several with commas between them") from None
    return numbers if len(numbers) > 1 else numbers[0]


def asked_options(ctx: typer.Context, idle: tuple[str, ...] = (), notes: bool = True) -> HelixOptions:
    """The options that this command has, and whatever --config says; the command line wins over the file.

    Args:
        idle: fields that a file may hold and that change nothing in this command; said on stderr.
        notes: say the file's notes on stderr too; else the command prints the plan, which has them.

    Raises:
        HelixError: a file that is refused, no cp anywhere, or options that contradict each other.
    """
    options = {name: ctx.params[name] for name in OPTIONS if name in ctx.params}
    source, lenient = ctx.params.get("config"), bool(ctx.params.get("lenient"))
    if lenient and source is None:
        raise HelixError("--lenient has no effect without --config: it says how that is read")
    recipe = Recipe()
    if source is not None:
        read = fields_of_file(source, lenient)
        recipe = read.recipe
        options |= {k: v for k, v in read.fields.items() if not (k in options and given(ctx, k))}
        kept = [k for k in read.fields if k in options and given(ctx, k) and read.fields[k] != options[k]]
        unused = [*read.without_effect, *(k for k in idle if k in read.fields)]
        for what, keys in (("no effect here", unused), ("overridden by the command line", kept)):
            if keys:
                print(f"{read.where} ({read.dialect}): {what}: {', '.join(keys)}", file=sys.stderr)
        for note in recipe.said_apart() if notes else ():
            print(f"{read.where} ({read.dialect}): note: {note}", file=sys.stderr)
    if options["cp"] is None:
        raise HelixError(
            "Missing option '--cp': the ranks that share a KV cache by sequence; give it, or --config FILE that says it"
        )
    return HelixOptions(**options, recipe=recipe)
