"""What HELIX_DUMP_VALUES wrote, read again: a plan, and of each step every rank's values."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from helix_compile.errors import HelixError
from helix_compile.layout.degrees import HelixMesh
from helix_compile.plan.helix_plan import HelixPlan
from helix_compile.runtime.values import VERSION, ValueEntry, cut_of, file_stem, kept_places, sampled_places


class Key(NamedTuple):
    """Which value: "outer" or a layer, and the node."""

    place: str
    name: str


@dataclass(frozen=True)
class Value:
    """One value of one rank.

    Attributes:
        entry: its node, shape, norm and so on.
        elements: [n] at `places`.
        places: [n] flat indices, ascending; those of kept_places().
        tensor: all of it, where it is of another engine.
    """

    entry: ValueEntry
    elements: Tensor
    places: Tensor
    tensor: Tensor | None = None


@dataclass(frozen=True)
class Step:
    """One step: mask [B, T] with 1 = token (None: not known), and by rank the values in the order they were computed."""

    number: int
    mask: Tensor | None
    ranks: list[dict[Key, Value]]


@dataclass
class Dump:
    """A folder of a run.

    Attributes:
        numbers: the steps that every rank has written.
        notes: what was left out.
    """

    folder: Path
    plan: HelixPlan
    numbers: list[int]
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        d = self.plan.layout
        return (
            f"{self.folder}: {self.plan.model} ({self.plan.dtype}), cp={d.kvp}, tpa={d.tpa}, ep={d.ep}, tpf={d.tpf}; "
            f"steps {', '.join(map(str, self.numbers))}"
        )

    def steps(self) -> Iterator[Step]:
        """One after the other: a step of many layers and ranks is large.

        Raises:
            HelixError: names the file that is damaged or missing, or ranks that say different masks.
        """
        for number in self.numbers:
            heads, ranks, mesh = [], [], HelixMesh(self.plan.layout)
            for rank in range(self.plan.layout.world_size):
                head, values = _read(self.folder / file_stem(rank, number), rank, mesh)
                heads.append(head["mask"])
                ranks.append(values)
            if odd := [rank for rank, mask in enumerate(heads) if mask != heads[0]]:
                raise HelixError(f"{self.folder}: step {number}: ranks {odd} and rank 0 were given other tokens")
            yield Step(number, torch.tensor(heads[0]), ranks)


_STEP = re.compile(file_stem(r"(\d+)", r"(\d+)") + r"\.json")


def is_dump(folder: Path) -> bool:
    """Does the folder hold a step's values?"""
    return any(_STEP.fullmatch(path.name) for path in folder.glob("rank_*.json"))


def open_dump(folder: Path) -> Dump:
    """A dump's plan and steps; values are read by steps().

    Raises:
        HelixError: no plan, or a rank without a step.
    """
    try:
        plan = HelixPlan.from_json((folder / "plan.json").read_text())
    except OSError as error:
        raise HelixError(f"{folder}: a dump without its plan.json: {error.strerror}") from error
    found: dict[int, set[int]] = {}
    for path in folder.glob("rank_*.json"):
        if match := _STEP.fullmatch(path.name):
            found.setdefault(int(match[1]), set()).add(int(match[2]))
    world = range(plan.layout.world_size)
    if missing := [rank for rank in world if rank not in found]:
        raise HelixError(
            f"{folder}: ranks {missing} of {len(world)} have written nothing here; bring the files of all machines into one folder"
        )
    numbers = sorted(set.intersection(*(found[rank] for rank in world)))
    some = sorted(set.union(*found.values()) - set(numbers))
    if not numbers:
        raise HelixError(f"{folder}: no step that every rank has written, only {some} of some")
    notes = [f"{folder}: steps {some} are not of every rank: left out"] if some else []
    return Dump(folder, plan, numbers, notes)


def _read(stem: Path, rank: int, mesh: HelixMesh) -> tuple[Mapping[str, Any], dict[Key, Value]]:
    text, tensors = stem.with_suffix(".json"), stem.with_suffix(".safetensors")
    try:
        head = json.loads(text.read_text())
        if head["version"] not in (1, VERSION):
            raise HelixError(f"{text}: version {head['version']!r}, expected {VERSION} or 1")
        names = {f.name for f in fields(ValueEntry)} - ({"through"} if head["version"] == 1 else set())
        entries = [ValueEntry(**{name: entry[name] for name in names}) for entry in head["values"]]
        elements = load_file(tensors)
        values = {}
        for entry in entries:
            kept = elements[f"{entry.place}.{entry.name}"]
            shape = tuple(entry.shape)
            places = sampled_places(shape)
            if head["version"] > 1:
                places = kept_places(shape, cut_of(entry.layout, rank, mesh))
            if len(kept) != len(places):
                raise ValueError(f"{entry.place}.{entry.name} has {len(kept)} elements")
            values[Key(entry.place, entry.name)] = Value(entry, kept, places)
        return head, values
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise HelixError(f"{stem}: damaged, or not of one dump: {type(error).__name__}: {error}") from error
