"""Two plans in words: layout, options, decisions, bytes, and the fields that follow; of two saved modules also graphs and weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from helix_compile.errors import HelixError
from helix_compile.plan.helix_plan import HelixPlan, number

ABSENT = "absent"


@dataclass(frozen=True)
class PlanDifference:
    """What is not the same: a path in plan.json, graphs.json or the weights, and both values."""

    about: str
    where: str
    a: Any
    b: Any

    def __str__(self) -> str:
        return f"{self.where}: {_short(self.a)} -> {_short(self.b)}"


@dataclass
class PlansCompared:
    """The differences, by what they are about: "model", "layout", "options", "decisions", "bytes", "bodies", "graphs", "weights"."""

    differences: list[PlanDifference]
    notes: list[str] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        """Nothing differs."""
        return not self.differences


def compare_plans(a: HelixPlan, b: HelixPlan) -> list[PlanDifference]:
    """Every field, those that decide before those that follow."""
    mine, theirs = json.loads(a.to_json()), json.loads(b.to_json())
    found: list[PlanDifference] = []
    for plan, text in ((a, mine), (b, theirs)):
        text["decisions"] = {
            d["name"]: {"result": d["result"], "rule": d["rule"], **dict(d["inputs"])} for d in text["decisions"]
        }
        text["not_rewritten"] = dict(text["not_rewritten"])
        text["leaves"] = dict(text["leaves"])
        text["bodies"] = {body["name"]: body for body in text["bodies"]}
        text["egress_bytes_per_rank_per_token"] = number(plan.egress_bytes_per_rank_per_token)
    bytes_of = [name for name in mine if "_bytes_" in name]
    groups = {
        "model": ["model", "dtype", "version", "leaves", "not_rewritten"],
        "layout": ["layout"],
        "options": ["options"],
        "decisions": ["decisions"],
        "bytes": bytes_of,
        "bodies": ["bodies"],
    }
    known = {name for names in groups.values() for name in names}
    groups["notes"] = [name for name in mine if name not in known]
    for about, names in groups.items():
        for name in names:
            found += [PlanDifference(about, *d) for d in _differences(name, mine[name], theirs[name])]
    return found


def compare_saved(a: Path, b: Path) -> list[PlanDifference]:
    """Graphs node by node, weights rank by rank, of two saved modules with equal plans.

    Raises:
        HelixError: names the file that can't be read.
    """
    return [*_graphs(a, b), *_weights(a, b)]


def _graphs(a: Path, b: Path) -> Iterator[PlanDifference]:
    sides = [_json(folder / "graphs.json")["stages"]["lowered"] for folder in (a, b)]
    graphs = [{"outer": side["outer"], **side["bodies"]} for side in sides]
    for name in graphs[0].keys() & graphs[1].keys():
        mine, theirs = (side[name] for side in graphs)
        nothing: dict[str, Any] = {}
        for x, y in zip_longest(mine, theirs, fillvalue=nothing):
            computed = [{k: v for k, v in node.items() if k != "meta"} for node in (x, y)]
            if computed[0] != computed[1]:  # later nodes only move then
                node = x.get("name") or y.get("name")
                yield PlanDifference("graphs", f"{name}, first at node {node}", _text(x), _text(y))
                break


def _text(node: dict[str, Any]) -> str:
    return f"{node['target']}{json.dumps(node['args'])}" if node else ABSENT


def _weights(a: Path, b: Path) -> Iterator[PlanDifference]:
    mine, theirs = (_json(folder / "views.json") for folder in (a, b))
    for rank in sorted(mine, key=int):
        for name, view in mine[rank].items():
            other = theirs.get(rank, {}).get(name)
            if other is None:
                yield PlanDifference("weights", f"rank {rank}, {name}", "there", ABSENT)
                continue
            x, y = _tensor(a, view), _tensor(b, other)
            if x.shape != y.shape or x.dtype != y.dtype:
                yield PlanDifference(
                    "weights", f"rank {rank}, {name}", f"{x.dtype} {list(x.shape)}", f"{y.dtype} {list(y.shape)}"
                )
            elif not torch.equal(x, y):
                apart = int((x != y).sum())
                yield PlanDifference(
                    "weights", f"rank {rank}, {name}", f"norm {_norm(x)}", f"norm {_norm(y)}, {apart} elements differ"
                )


def _norm(tensor: Tensor) -> str:
    return f"{float(tensor.double().norm()):.6g}"


def _tensor(folder: Path, view: dict[str, Any]) -> Tensor:
    path = folder / view["file"]
    try:
        with safe_open(path, framework="pt") as opened:
            whole = opened.get_tensor(view["storage"])
        return whole.as_strided(view["shape"], view["stride"], view["offset"])
    except (OSError, SafetensorError, RuntimeError, KeyError) as error:
        raise HelixError(f"{path}: {view.get('storage')!r} can't be read: {error}") from error


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise HelixError(f"{path}: not of a saved module: {error}") from error


def _differences(path: str, a: Any, b: Any) -> Iterator[tuple[str, Any, Any]]:
    """(path, mine, theirs); lists of named things are matched by name."""
    if isinstance(a, list) and isinstance(b, list):
        named = [{_name_of(x, i): x for i, x in enumerate(side)} for side in (a, b)]
        if len(named[0]) == len(a) and len(named[1]) == len(b) and any(isinstance(x, dict) for x in (*a, *b)):
            a, b = named
    if isinstance(a, dict) and isinstance(b, dict):
        for key in dict.fromkeys((*a, *b)):
            yield from _differences(f"{path}.{key}", a.get(key, ABSENT), b.get(key, ABSENT))
    elif a != b:
        yield path, a, b


def _name_of(item: Any, number: int) -> str:
    if not isinstance(item, dict):
        return str(number)
    return str(item.get("name") or item.get("kind") or item.get("what") or item.get("site", number))


def _short(value: Any) -> str:
    text = (
        value
        if isinstance(value, str)
        else f"{value:,}"
        if isinstance(value, (int, float)) and not isinstance(value, bool)
        else json.dumps(value)
    )
    return text if len(text) <= 60 else f"{text[:45]} ... ({len(text)} characters)"
