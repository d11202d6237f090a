"""Read an export of programs back: files against the manifest, and what the walk says against the plan in it.

Digests say that a file changed; what stands behind them says it of a folder whose digests were made anew, or whose writer erred. What
logits alone do not show (the ledger, an append that is not there, where a rank takes itself to be) stands in the walk and in the ranks' files
as plain data, whatever the programs are: those are functions of tensors that know nothing of ranks.
"""

from __future__ import annotations

import json
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from helix_compile.errors import ExportError, HelixError
from helix_compile.export.manifest import EXPORT_ID, Fault, check_files, check_tensors, plan_of
from helix_compile.export.program_file import member_of, read_program
from helix_compile.export.rank_file import RankFile, digest_of, file_of_rank
from helix_compile.export.walk import (
    WALK,
    collectives_of,
    flattened,
    inputs_of_walk,
    read_walk,
    stage_of_walk,
    step_inputs,
)
from helix_compile.ir.graph import helix_op, placeholders
from helix_compile.plan.helix_plan import HelixPlan


def check_programs(folder: Path, manifest: dict[str, Any]) -> list[Fault]:
    """Every fault of a folder, in the order in which they are looked for."""
    faults = check_files(folder, manifest)
    plan = plan_of(manifest)
    taken: dict[str, Any] = {}
    for name, stated in manifest["programs"].items():
        if (folder / stated["file"]).is_file():
            faults += _check_program(folder / stated["file"], name, stated, manifest)
    if (folder / WALK).is_file():
        faults += _check_walk(folder / WALK, manifest, plan, taken)
    for rank in range(manifest["ranks"] if manifest["weights"] is not None else 0):
        if (folder / file_of_rank(rank)).is_file():
            faults += _check_rank(folder / file_of_rank(rank), rank, manifest, plan, taken)
    return faults


def _check_program(path: Path, name: str, stated: dict[str, Any], manifest: dict[str, Any]) -> list[Fault]:
    """It is part of this export and, where it is a graph, this torch reads it and it takes and gives what the manifest says. None is run."""
    try:
        with zipfile.ZipFile(path) as archive:
            identity = _identity(archive, manifest["format"])
    except (zipfile.BadZipFile, OSError, LookupError, TypeError, ValueError) as error:
        return [Fault("unreadable", path.name, f"no program: {type(error).__name__}: {error}")]
    if identity != manifest[EXPORT_ID]:
        return [Fault("other_export", path.name, "it is part of another export than the manifest")]
    if manifest["format"] != "pt2":
        return []
    try:
        graph = read_program(path).graph
    except ExportError as error:
        return [Fault("unreadable", path.name, str(error))]
    faults = []
    (outputs,) = graph.output_node().args
    for kind, values in (("inputs", placeholders(graph)), ("outputs", outputs)):
        got = [_kind(value.meta["val"]) for value in values]
        expected = [
            (value["dtype"], [s if isinstance(s, int) else None for s in value["shape"]]) for value in stated[kind]
        ]
        if got != expected:
            faults.append(Fault(f"other_{kind}", path.name, f"got {got}, expected {expected}"))
    return faults


def _kind(value: Tensor) -> tuple[str, list[int | None]]:
    """Dtype and sizes; None for those that are free."""
    return str(value.dtype)[6:], [size if isinstance(size, int) else None for size in value.shape]


def _identity(archive: zipfile.ZipFile, format: str) -> str:
    """Which export a program says that it is a part of."""
    if format == "pt2":
        return member_of(archive, f"extra/{EXPORT_ID}").decode()
    return str(json.loads(member_of(archive, "wrapper_metadata.json"))[EXPORT_ID])


def _check_walk(path: Path, manifest: dict[str, Any], plan: HelixPlan, taken: dict[str, Any]) -> list[Fault]:
    """`taken` gets (sizes, dtype) of each weight that the walk takes."""
    try:
        document = read_walk(path)
        stage = stage_of_walk(document, torch.device("cpu"))
    except ExportError as error:
        return [Fault("unreadable", path.name, str(error))]
    if document.get(EXPORT_ID) != manifest[EXPORT_ID]:
        return [Fault("other_export", path.name, "it is part of another export than the manifest")]
    try:
        taken |= {ref.name: (list(of[0]), of[1]) for ref, of in inputs_of_walk(document).items() if ref.kind == "param"}
        return [
            *_check_calls(stage, document, manifest),
            *_check_ledger(stage, plan),
            *_check_collectives(stage, manifest, plan),
            *_check_caches(stage, document),
        ]
    except (LookupError, TypeError, ValueError, AttributeError) as error:  # nodes of which nothing could be made
        return [Fault("unreadable", path.name, f"damaged: {type(error).__name__}: {error}")]


def _check_calls(stage: fx.GraphModule, document: dict[str, Any], manifest: dict[str, Any]) -> list[Fault]:
    """Programs are called with as many values as they take, and the step takes what the manifest says."""
    faults = []
    for where, node, _ in flattened(stage):
        if "segment" not in node.meta:
            continue
        stated = manifest["programs"].get(str(node.target))
        if stated is None:
            faults.append(
                Fault("programs", f"{WALK}, {where}", f"calls {node.target}, which the manifest does not know")
            )
        elif (len(node.args), len(node.meta["val"])) != (len(stated["inputs"]), len(stated["outputs"])):
            faults.append(Fault("programs", f"{WALK}, {where}", f"calls {node.target} with {len(node.args)} values"))
    if (got := step_inputs(document)) != manifest["inputs"]:
        faults.append(Fault("other_inputs", WALK, f"got {got}"))
    return faults


def _check_ledger(stage: fx.GraphModule, plan: HelixPlan) -> list[Fault]:
    """What the round robin of tokens hangs on, at each node that says it."""
    # slots of what every rank holds by itself are those of one rank
    cp = {plan.layout.kvp, 1} if plan.rings else {plan.layout.kvp}
    expected = {"cp": cp, "tokens_per_block": {plan.options.tokens_per_block}}
    faults = []
    for where, node, _ in flattened(stage):
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        for argument, value in zip(node.target._schema.arguments, node.args, strict=False):
            if argument.name in expected and value not in expected[argument.name]:
                what = f"{argument.name} = {value}, the plan has {max(expected[argument.name])}"
                faults.append(Fault("ledger", f"{WALK}, {where} ({helix_op(node)})", what))
    return faults


def _check_collectives(stage: fx.GraphModule, manifest: dict[str, Any], plan: HelixPlan) -> list[Fault]:
    """Those of the manifest in their order, and as many of each kind as the plan has."""
    faults, got = [], collectives_of(stage)
    if got != manifest["collectives"]:
        what = f"{len(got)}, the manifest has {len(manifest['collectives'])}; in order: {_first_other(got, manifest['collectives'])}"
        faults.append(Fault("collectives", WALK, what))
    layers, planned = set(manifest["layers"]), Counter[tuple[str, str]]()
    for body in plan.bodies:
        for collective in body.collectives:
            planned[collective.op, collective.axis] += collective.parts * len(layers & set(body.layers))
    for collective in plan.outer.collectives:
        planned[collective.op, collective.axis] += 1
    counted = Counter((name, axis) for name, axis in got)
    for kind in sorted(counted.keys() | (+planned).keys()):
        if counted[kind] != planned[kind]:
            what = f"{counted[kind]} {kind[0]} over {kind[1]}, the plan has {planned[kind]}"
            faults.append(Fault("collectives", WALK, what))
    return faults


def _first_other(got: list[Any], expected: list[Any]) -> str:
    at = next((i for i, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b), min(len(got), len(expected)))
    found, wanted = (values[at] if at < len(values) else "none" for values in (got, expected))
    return f"#{at} is {found}, expected {wanted}"


def _check_caches(stage: fx.GraphModule, document: dict[str, Any]) -> list[Fault]:
    """Every cache is appended to once a step, and what attends to it waits for that."""
    appended, faults = Counter[str](), []
    for where, node, given in flattened(stage):
        if helix_op(node) != "cache_append":
            continue
        cache = given.get(node.args[0])
        if cache is None or cache.kind != "cache":
            faults.append(Fault("cache_unwritten", f"{WALK}, {where}", f"appends to {node.args[0]}, which is no cache"))
            continue
        appended[cache.name] += 1
        if not node.users:
            faults.append(Fault("cache_unwritten", f"{WALK}, {where}", "nothing waits for this append"))
    for ref in inputs_of_walk(document):
        if ref.kind == "cache" and appended[ref.name] != 1:
            faults.append(
                Fault("cache_unwritten", f"{WALK}, {ref.name}", f"appended to {appended[ref.name]} times a step")
            )
    return faults


def _check_rank(path: Path, rank: int, manifest: dict[str, Any], plan: HelixPlan, taken: dict[str, Any]) -> list[Fault]:
    """`taken`: (sizes, dtype) of each weight that the walk takes."""
    try:
        file = RankFile(path)
    except HelixError as error:
        return [Fault("unreadable", path.name, str(error))]
    faults = []
    if file.identity != manifest[EXPORT_ID]:
        faults.append(Fault("other_export", path.name, "it is part of another export than the manifest"))
    for axis, got in file.coordinates().items():
        if got != (expected := plan.layout.index(axis, rank)):
            what = f"{got}, rank {rank} of this layout is at {expected}"
            faults.append(Fault("rank_coordinate", f"{path.name}, {axis}_rank", what))
    digests = {}
    for name in sorted(file.names - {f"{axis}_rank" for axis in file.coordinates()}):
        tensor = file.tensor(name)
        digests[name] = digest_of(tensor)
        kind = list(tensor.shape), str(tensor.dtype)[6:]
        if kind != taken.get(name, kind):
            faults.append(Fault("weights", f"{path.name}, {name}", f"it is {kind}, {WALK} takes {taken[name]}"))
    return faults + check_tensors(path.name, rank, digests, manifest)
