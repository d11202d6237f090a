"""What a config.json says of rope: two tables and keys beside them become one table, or are refused where they disagree.

transformers takes `rope_scaling` and drops `rope_parameters` where both are stated, lets `rope_type` win over `type`, and
fills in defaults: each of these would change the angles without a word.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from helix_compile.errors import CheckpointError

Table = dict[str, Any]

TABLES = ("rope_scaling", "rope_parameters")
# rope types that releases still state by the name that they had before
OLD_ROPES = {"su": "longrope"}
# keys of a table that older releases state beside it
_BESIDE = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
# a type says what these do; the default one does nothing with them
_SCALING = tuple(
    [
        "factor",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "short_factor",
        "long_factor",
        "low_freq_factor",
        "high_freq_factor",
    ]
)
_POSITIVE = ("factor", "rope_theta", "original_max_position_embeddings")
_BY_LENGTH = ("yarn", "longrope", "llama3")  # types whose table holds the length before scaling


def rope_of(file: Path, values: Table, notes: list[str]) -> None:
    """Leave one table in `values`, under the name that was stated (rope_parameters if both were).

    Raises:
        CheckpointError: what is stated twice is not the same, a factor without a type, or numbers that no angle has.
    """
    if values.get("rope_scaling", ...) is None:  # it says nothing, and transformers warns where a class has no rope
        values.pop("rope_scaling")
    stated = {name: values[name] for name in TABLES if isinstance(values.get(name), dict) and values[name]}
    tables = {name: _typed(file, name, table, notes) for name, table in stated.items()}
    if len(tables) == 2:
        tables = {"rope_parameters": _joined(file, *tables.values())}
        values.pop("rope_scaling")
        if stated["rope_scaling"] != stated["rope_parameters"]:
            notes.append("rope_scaling and rope_parameters are read as one table")
    for name, table in tables.items():
        nested = {key: inner for key, inner in table.items() if isinstance(inner, dict)}
        for where, inner in (nested or {"": table}).items():
            _check(file, f"{name}.{where}" if where else name, inner)
        _check_beside(file, name, list(nested.values()) or [table], values)
        if not nested and table.get("rope_type") in _BY_LENGTH and values.get("original_max_position_embeddings"):
            table.setdefault("original_max_position_embeddings", values["original_max_position_embeddings"])
        values[name] = table
    _check_numbers(file, "", values, ("rope_theta",))


def _typed(file: Path, name: str, table: Table, notes: list[str]) -> Table:
    """A table, and those in it by kind of layer, with its type under one name, by its name today."""
    made: Table = {}
    for key, value in table.items():
        made[key] = _typed(file, f"{name}.{key}", value, notes) if isinstance(value, dict) else value
        if key in ("type", "rope_type") and isinstance(value, str) and value in OLD_ROPES:
            made[key] = OLD_ROPES[value]
            notes.append(f"{name}: {key} {value!r} is read as {OLD_ROPES[value]!r}, its name today")
    kinds = {key: made.pop(key) for key in ("rope_type", "type") if key in made}
    said = {key: kind for key, kind in kinds.items() if kind is not None}
    if len(set(map(str, said.values()))) > 1:
        raise _differ(file, {f"{name}.{key}": kind for key, kind in said.items()})
    if said:
        made["rope_type"] = next(iter(said.values()))
    return made


def _joined(file: Path, scaling: Table, parameters: Table) -> Table:
    """What either of two tables says; what both say must be the same."""
    if any(scaling[key] != parameters[key] for key in scaling.keys() & parameters.keys()) or any(
        isinstance(inner, dict) for table in (scaling, parameters) for inner in table.values() if scaling != parameters
    ):
        raise _differ(file, {"rope_parameters": parameters, "rope_scaling": scaling})
    return {**scaling, **parameters}


def _check(file: Path, name: str, table: Table) -> None:
    if "rope_type" not in table and (scaling := [key for key in table if key in _SCALING]):
        raise CheckpointError(
            f"{file}: {name} states {', '.join(scaling)} and no rope_type; expected one, such as yarn or linear"
        )
    _check_numbers(file, f"{name}.", table, _POSITIVE)


def _check_numbers(file: Path, where: str, table: Table, keys: tuple[str, ...]) -> None:
    for key in keys:
        number = table.get(key)
        if isinstance(number, (int, float)) and not (math.isfinite(number) and number > 0):
            raise CheckpointError(f"{file}: {where}{key} is {number!r}, expected a number > 0")


def _check_beside(file: Path, name: str, tables: list[Table], values: Table) -> None:
    """A key beside the table says what one in it says; where there is a table for each kind of layer, one of them."""
    for key in _BESIDE:
        inside = [table[key] for table in tables if table.get(key) is not None]
        beside = values.get(key)
        if beside is not None and len(inside) == len(tables) and beside not in inside:
            raise _differ(file, {key: beside, f"{name}.{key}": inside[0] if len(inside) == 1 else inside})


def _differ(file: Path, said: dict[str, Any]) -> CheckpointError:
    told = ", ".join(f"{key}={json.dumps(value, sort_keys=True)}" for key, value in said.items())
    return CheckpointError(f"{file}: {told}: of one meaning, but not the same")
