"""What the folders of all formats have in common: manifest.json, and what is checked when it is read back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from helix_compile.errors import ExportError
from helix_compile.layout.degrees import HelixMesh
from helix_compile.plan.helix_plan import HelixPlan

MANIFEST, VERSION = "manifest.json", 1
EXPORT_ID = "helix_export"  # metadata of each file: which export it is a part of


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong with an exported folder.

    Attributes:
        code: one of those of docs/exports.md, stable.
        where: file, or file and what in it.
        what: got and expected.
    """

    code: str
    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.code}: {self.where}: {self.what}"


def facts_of_plan(plan: HelixPlan, layers: Collection[int] | None) -> dict[str, Any]:
    """What every manifest says of the plan."""
    layout = plan.layout
    return {
        "model": plan.model,
        "dtype": plan.dtype,
        "ranks": layout.world_size,
        "layout": asdict(layout),
        "groups": {axis: [list(g) for g in groups] for axis, groups in HelixMesh(layout).groups.items()},
        "layers": sorted(layers) if layers is not None else sorted(n for b in plan.bodies for n in b.layers),
        "ledger": {"cp": layout.kvp, "tokens_per_block": plan.options.tokens_per_block},
        "max_seq_len": plan.options.max_seq_len,
        "max_batch_size": plan.options.max_batch_size,
        "plan": json.loads(plan.to_json()),
    }


def sha256_of(path: Path) -> str:
    """Of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def described_file(path: Path) -> dict[str, Any]:
    """What a manifest says of a file."""
    return {"sha256": sha256_of(path), "bytes": path.stat().st_size}


def read_manifest(folder: Path) -> dict[str, Any]:
    """manifest.json of an exported folder.

    Raises:
        ExportError: it can't be read, or is of a version that is not known here.
    """
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        _, version = manifest["format"], manifest["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{path}: not the manifest of an export: {type(error).__name__}: {error}") from error
    if version != VERSION:
        raise ExportError(f"{path}: version {version!r}, expected {VERSION}")
    return manifest


def check_files(folder: Path, manifest: dict[str, Any]) -> list[Fault]:
    """Each file that the manifest names is there, as it was written."""
    faults = []
    for name, stated in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            faults.append(Fault("missing_file", name, "the manifest has it, the folder has not"))
        elif path.stat().st_size != stated["bytes"]:
            faults.append(Fault("changed_file", name, f"{path.stat().st_size} bytes, written were {stated['bytes']}"))
        elif sha256_of(path) != stated["sha256"]:
            faults.append(Fault("changed_file", name, "its sha256 is not the manifest's"))
    return faults


def check_tensors(where: str, rank: int, found: dict[str, str], manifest: dict[str, Any]) -> list[Fault]:
    """The digests of what a rank's file holds against those that its weights had when they were cut."""
    faults, left = [], dict(found)
    for weight, digests in manifest["weights"].items():
        if weight not in left:
            faults.append(Fault("weights", f"{where}, {weight}", "the file has no such weight"))
        elif (digest := left.pop(weight)) != digests[rank]:
            others = [r for r, of_rank in enumerate(digests) if of_rank == digest]
            what = f"it is rank {others[0]}'s" if others else "its values are not those that were exported"
            faults.append(Fault("weights", f"{where}, {weight}", what))
    return faults + [Fault("weights", f"{where}, {weight}", "the manifest has no such weight") for weight in left]
