"""What the folders of all formats have in common: manifest.json, and what is checked when it is read back."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from helix_compile.errors import ExportError, HelixError
from helix_compile.layout.degrees import HelixMesh
from helix_compile.plan.helix_plan import HelixPlan

MANIFEST, VERSION = "manifest.json", 2
EXPORT_ID = "helix_export"  # metadata of each file: which export it is a part of
SEAL = "sha256"  # of the manifest: digest of all else in it
_OURS = re.compile(
    r"(rank\d+|plan)\.onnx(\.data)?|rank\d+\.safetensors|walk\.json|(outer|body_\d+)_segment_\d+\.pt2"
)  # names that an export writes


OTHER_VALUES = "its values, dtype or sizes are not those that were exported"


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
        "layers": sorted(set(layers) if layers is not None else (n for b in plan.bodies for n in b.layers)),
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


def format_manifest(facts: dict[str, Any]) -> str:
    """Text of manifest.json; seals `facts`."""
    facts[SEAL] = _seal_of(facts)
    return json.dumps(facts, indent=1)


def _seal_of(manifest: dict[str, Any]) -> str:
    said = json.loads(json.dumps({key: value for key, value in manifest.items() if key != SEAL}))
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def is_sealed(manifest: dict[str, Any]) -> bool:
    """True for one in which nothing was edited after it was written."""
    return manifest.get(SEAL) == _seal_of(manifest)


def plan_of(manifest: dict[str, Any]) -> HelixPlan:
    """Its plan; HelixError where it has none."""
    return HelixPlan.from_json(json.dumps(manifest["plan"]))


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


def check_manifest(manifest: dict[str, Any]) -> list[Fault]:
    """It is as it was written, and says what follows from the plan in it: who exchanges with whom, what each rank counts."""
    faults = []
    if not is_sealed(manifest):
        faults.append(Fault("changed_file", MANIFEST, f"its {SEAL} is not that of what stands in it"))
    try:
        plan, layers = plan_of(manifest), manifest["layers"]
        known = {n for body in plan.bodies for n in body.layers}
        if unknown := sorted(set(layers) - known):
            faults.append(Fault("manifest", f"{MANIFEST}, layers", f"{unknown}, the plan has none such"))
        facts = facts_of_plan(plan, layers)
    except (HelixError, LookupError, TypeError, ValueError) as error:
        return [*faults, Fault("manifest", MANIFEST, f"{type(error).__name__}: {error}")]
    facts = json.loads(json.dumps(facts))
    return faults + [
        Fault("manifest", f"{MANIFEST}, {key}", f"{manifest.get(key)}, by its plan {value}")
        for key, value in facts.items()
        if manifest.get(key) != value
    ]


def check_files(folder: Path, manifest: dict[str, Any]) -> list[Fault]:
    """Each file that the manifest names is there, as it was written, and none beside them that passes for one of them."""
    faults = [
        Fault("extra_file", path.name, "the manifest has no such file")
        for path in sorted(folder.iterdir())
        if _OURS.fullmatch(path.name) and path.name not in manifest["files"]
    ]
    for name, stated in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            faults.append(Fault("missing_file", name, "the manifest has it, the folder has not"))
        elif path.stat().st_size != stated["bytes"]:
            faults.append(Fault("changed_file", name, f"{path.stat().st_size} bytes, written were {stated['bytes']}"))
        elif sha256_of(path) != stated["sha256"]:
            faults.append(Fault("changed_file", name, "its sha256 is not the manifest's"))
    return faults


def digest_of_tensor(dtype: str, sizes: Sequence[int], data: Any) -> str:
    """sha256 of what a tensor is: its dtype (torch's word), its sizes and its bytes."""
    digest = hashlib.sha256(f"{dtype} {list(sizes)}\n".encode())
    digest.update(data)
    return digest.hexdigest()


def check_tensors(where: str, rank: int, found: dict[str, str], manifest: dict[str, Any]) -> list[Fault]:
    """The digests of what a rank's file holds against those that its weights had when they were cut."""
    faults, left = [], dict(found)
    for weight, digests in manifest["weights"].items():
        if weight not in left:
            faults.append(Fault("weights", f"{where}, {weight}", "the file has no such weight"))
        elif (digest := left.pop(weight)) != digests[rank]:
            others = [r for r, of_rank in enumerate(digests) if of_rank == digest]
            faults.append(
                Fault("weights", f"{where}, {weight}", f"it is rank {others[0]}'s" if others else OTHER_VALUES)
            )
    return faults + [Fault("weights", f"{where}, {weight}", "the manifest has no such weight") for weight in left]
