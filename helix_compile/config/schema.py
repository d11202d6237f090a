"""JSON Schema of our own configuration file, made from HelixOptions; shipped as options.schema.json for editors.

`python -m helix_compile.config.schema` prints it. What a schema can't say is said by the loader alone: that ep divides
cp * tpa, that stage is less than pp, how many scales there are, and that an int is written as one (4.0 is an integer to JSON Schema).
"""

from __future__ import annotations

import json
from dataclasses import MISSING, fields
from typing import Any

from helix_compile.config.options import FP8_E4M3, LEAST, MAX_COUNT, MOST, OPTIONS, HelixOptions


def options_schema() -> dict[str, Any]:
    """The schema as plain data."""
    properties: dict[str, Any] = {}
    for field in fields(HelixOptions):
        choices = OPTIONS[field.name].choices
        count: dict[str, Any] = {"type": "integer", "minimum": OPTIONS[field.name].least, "maximum": MAX_COUNT}
        number: dict[str, Any] = {"type": "boolean"} if OPTIONS[field.name].flag else count
        if OPTIONS[field.name].numbers:
            number = {"anyOf": [one := {"type": "number", "minimum": LEAST, "maximum": MOST}, _several(one)]}
        properties[field.name] = {"enum": [*choices]} if choices else number
        if field.default is not MISSING and field.default is not None:
            properties[field.name]["default"] = field.default
    alone = {name: {"const": o.choices[0]} for name, o in OPTIONS.items() if o.of_exchange}
    one_stage = {"properties": {"pp": {"const": 1}}}
    one_rank = {"properties": {"cp": {"const": 1}, "tpa": {"const": 1}}}
    staged = {f.name: {"const": f.default} for f in fields(HelixOptions) if OPTIONS[f.name].of_stages}
    lonely = {f.name: {"const": f.default} for f in fields(HelixOptions) if OPTIONS[f.name].of_ranks}
    scaled = {"properties": {"cache_dtype": {"const": FP8_E4M3}}, "required": ["cache_dtype"]}
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
            {"if": {"not": scaled}, "then": {"properties": {"cache_scale": {"const": 1.0}}}},
            {"if": one_rank, "then": {"properties": {"pad_heads": {"const": False}, **lonely}}},
        ],
    }


def _several(one: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": one, "minItems": 1}


def schema_text() -> str:
    """What options.schema.json holds."""
    return json.dumps(options_schema(), indent=1) + "\n"


if __name__ == "__main__":
    print(schema_text(), end="")
