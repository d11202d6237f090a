"""The options of a command: its defaults, then --config FILE, then what the command line says."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from helix_compile.config.dialects import fields_of_file
from helix_compile.config.options import HelixOptions
from helix_compile.errors import HelixError

Config = Annotated[
    Path | None, typer.Option("--config", help="options from a TOML, YAML or JSON file: ours, TensorRT-LLM's or vLLM's")
]


def given(ctx: typer.Context, name: str) -> bool:
    """Was this option written on the command line (and is not a default)?"""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def merged_options(ctx: typer.Context, names: Iterable[str], idle: tuple[str, ...] = ()) -> dict[str, Any]:
    """Options `names` of this command and whatever --config says; the command line wins over the file.

    Args:
        idle: fields that a file may hold and that change nothing in this command; said on stderr.

    Raises:
        HelixError: a file that is refused, no cp anywhere, or options that contradict each other.
    """
    options = {name: ctx.params[name] for name in names}
    path = ctx.params.get("config")
    if path is not None:
        read = fields_of_file(path)
        options |= {k: v for k, v in read.fields.items() if not (k in options and given(ctx, k))}
        kept = [k for k in read.fields if k in options and given(ctx, k) and read.fields[k] != options[k]]
        unused = [*read.without_effect, *(k for k in idle if k in read.fields)]
        for what, keys in (("no effect here", unused), ("overridden by the command line", kept)):
            if keys:
                print(f"{path} ({read.dialect}): {what}: {', '.join(keys)}", file=sys.stderr)
    if options["cp"] is None:
        raise HelixError(
            "Missing option '--cp': the ranks that share a KV cache by sequence; give it, or --config FILE that says it"
        )
    HelixOptions(**{name: value for name, value in options.items() if name != "world"})
    return options
