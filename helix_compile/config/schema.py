"""JSON Schema of our own configuration file, made from HelixOptions; shipped as options.schema.json for editors.

`python -m helix_compile.config.schema` prints it. What a schema can't say is said by the loader alone: that ep divides
cp * tpa, that stage is less than pp, and that an int is written as one (4.0 is an integer to JSON Schema).
"""

from __future__ import annotations

import json
from dataclasses import MISSING, fields
from typing import Any

from helix_compile.config.options import MAX_COUNT, OPTIONS, HelixOptions


def options_schema() -> dict[str, Any]:
    """The schema as plain data."""
    properties: dict[str, Any] = {}
    for field in fields(HelixOptions):
        choices = OPTIONS[field.name].offered
        count = {"type": "integer", "minimum": OPTIONS[field.name].least, "maximum": MAX_COUNT}
        number = {"type": "boolean"} if OPTIONS[field.name].flag else count
        properties[field.name] = {"enum": [*choices]} if choices else number
        if field.default is not MISSING and field.default is not None:
            properties[field.name]["default"] = field.default
    alone = {name: {"const": o.choices[0]} for name, o in OPTIONS.items() if o.of_exchange}
    one_stage = {"properties": {"pp": {"const": 1}}}
    one_rank = {"properties": {"cp": {"const": 1}, "tpa": {"const": 1}}}
    staged = {f.name: {"const": f.default} for f in fields(HelixOptions) if OPTIONS[f.name].of_stages}
    lonely = {f.name: {"const": f.default} for f in fields(HelixOptions) if OPTIONS[f.name].of_ranks}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "helix_compile options",
        "description": "TOML, YAML or JSON; the keys are the keywords of helix_compile()",
        "type": "object",
        "properties": properties,
        "required": [f.name for f in fields(HelixOptions) if f.default is MISSING],
        "additionalProperties": False,
        "allOf": [
            {"if": {"properties": {"cp": {"const": 1}}}, "then": {"properties": alone}},
            {"if": one_stage, "then": {"properties": staged}},
            {"if": one_rank, "then": {"properties": {"pad_heads": {"const": False}, **lonely}}},
        ],
    }


def schema_text() -> str:
    """What options.schema.json holds."""
    return json.dumps(options_schema(), indent=1) + "\n"


if __name__ == "__main__":
    print(schema_text(), end="")
