"""Each option is stated once, as a field of HelixOptions; helix_compile takes it as a keyword or all as `options`."""

from __future__ import annotations

import inspect
import re
from dataclasses import MISSING, fields
from typing import Any

import pytest
import typer.main

from helix_compile import HelixError, helix_compile
from helix_compile.cli.commands import app
from helix_compile.config.options import OPTIONS, HelixOptions
from helix_compile.models.presets import build_model, preset_config


def test_the_signature_has_every_field_with_its_default_and_type() -> None:
    parameters = dict(inspect.signature(helix_compile).parameters)
    assert list(parameters)[:2] == ["model", "cp"]
    assert {"model", "world", "device", "dtype", "options", "builder", "plan"} == parameters.keys() - OPTIONS.keys()
    for field in fields(HelixOptions):
        required = field.default is MISSING  # beside options= nothing is
        stated = (None, f"{field.type} | None") if required else (field.default, field.type)
        parameter = parameters[field.name]
        assert (parameter.default, parameter.annotation) == stated, f"helix_compile({field.name}) in compile.py"


def test_help_has_a_line_for_each_field() -> None:
    text = " ".join((helix_compile.__doc__ or "").split())
    assert all(f"{name}: {option.meaning}" in text for name, option in OPTIONS.items())


@pytest.mark.parametrize("command", ["inspect", "generate", "verify"])
def test_the_commands_have_every_field(command: str) -> None:
    parameters = {p.name: p for p in typer.main.get_command(app).commands[command].params}  # type: ignore[attr-defined]
    for field in fields(HelixOptions):
        default = None if field.default is MISSING else field.default
        assert parameters[field.name].default == default
        assert OPTIONS[field.name].cli_help in parameters[field.name].help


def test_options_or_keywords() -> None:
    model = build_model(preset_config("tiny"), meta=True)
    options = HelixOptions(cp=2, tpa=2, tokens_per_block=8, merge="ag_rs")
    ways: list[dict[str, Any]] = [
        {"options": options},
        {"cp": 2, "tpa": 2, "tokens_per_block": 8, "merge": "ag_rs"},
        options.to_json(),
    ]
    plans = [helix_compile(model, world="virtual", **way).plan for way in ways]
    plans.append(helix_compile(model, 2, tpa=2, tokens_per_block=8, merge="ag_rs").plan)
    assert all(plan.to_json() == plans[0].to_json() for plan in plans) and plans[0].options == options


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "got neither cp nor options; give cp=N"),
        ({"tpa": 2}, "got neither cp nor options"),
        (
            {"options": HelixOptions(cp=2), "cp": 2, "tpa": 1},
            "got options and the keywords cp, tpa, expected one or the other; leave the keywords out, or give "
            "options=dataclasses.replace(options, cp=2, tpa=1)",
        ),
        ({"options": {"cp": 2}}, "options must be a HelixOptions, got {'cp': 2} (dict)"),
        ({"cp": None}, "cp must be an int >= 1, got None"),
    ],
    ids=["nothing", "no cp", "both", "a dict", "None"],
)
def test_refusals(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(HelixError, match=re.escape(message)):
        helix_compile("nowhere", **asked)


@pytest.mark.parametrize("kind", [TypeError, HelixError])
def test_an_unknown_keyword_is_a_type_error(kind: type[Exception]) -> None:
    with pytest.raises(kind, match=r"unknown keyword 'mrege'.* the nearest is merge"):
        helix_compile("nowhere", cp=2, mrege="a2a")  # type: ignore[call-arg]
