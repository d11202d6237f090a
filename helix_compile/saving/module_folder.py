"""save() and load(): what was inspected is what runs.

    plan.json        every decision
    graphs.json      stages from "ffn" on: outer graph and bodies
    rank_R.safetensors   each storage once, in the file of the first rank that uses it
    views.json       rank -> parameter -> file, storage, shape, stride, offset
    config.json, generation_config.json   of the original model, for generate()

On real ranks each writes its own file, and rank 0 what they have in common. The files come into the folder when all
ranks have said that theirs are written. Either kind of folder loads in either world.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, GenerationConfig

from helix_compile.cache.pages import allocate_caches, scales_of_caches
from helix_compile.errors import HelixError
from helix_compile.files import StagedFiles
from helix_compile.ir.graph_json import graph_from_json, graph_to_json, values_of_graphs
from helix_compile.ir.leaves import leaves_of
from helix_compile.ir.stage import bodies_of
from helix_compile.kernels.target import device_target
from helix_compile.layout.degrees import HelixMesh
from helix_compile.passes.lower.select_kernels import PROVIDER
from helix_compile.plan.helix_plan import HelixPlan
from helix_compile.runtime.claims import claims_of
from helix_compile.runtime.compiled import CompiledModule
from helix_compile.runtime.rank import ModelFacts, Rank, follow_edits
from helix_compile.saving.checks import check_saved_graphs, check_saved_inputs, check_saved_params, saved_caches
from helix_compile.saving.weights import SavedWeights, files_digest, gather_weights, read_params
from helix_compile.worlds.world import World, device_for, open_world

SAVED_STAGES = ("ffn", "lowered")
WRITTEN = ("config.json", "generation_config.json", "digests.json", "graphs.json", "views.json", "rank_*.safetensors")
_VERSION = 2
_DAMAGE = (LookupError, AssertionError, TypeError, ValueError, AttributeError, RuntimeError, SyntaxError)


def save_module(compiled: CompiledModule, folder: Path) -> None:
    """Write `compiled` to `folder`, which must not hold a saved module yet, nor anything that would be replaced. Every rank of its world calls it.

    Raises:
        HelixError: on every rank, if one can't; nothing is left in the folder then.
    """
    world = compiled.world
    with StagedFiles(folder, f"rank_{world.ranks[0]}") as files:
        _together(world, lambda: follow_edits(compiled.plan, compiled.graph, compiled.ranks, compiled.facts))
        document = _together(world, lambda: _checked_document(compiled, folder))
        weights = gather_weights(compiled)
        _together(world, lambda: _write(compiled, files, weights, document))
        # the leader's last file says "complete", so the others come first
        _together(world, lambda: None if world.is_leader else files.move())
        _together(world, lambda: files.move() if world.is_leader else None)


def _checked_document(compiled: CompiledModule, folder: Path) -> dict[str, Any]:
    """graphs.json, once everything is known to load again. Nothing is written yet."""
    if (folder / "plan.json").exists():
        raise HelixError(f"{folder} holds a saved module already; choose another folder or delete it")
    if taken := sorted(path.name for pattern in WRITTEN for path in folder.glob(pattern)):
        raise HelixError(
            f"save: {folder} holds {', '.join(taken)}, which would be replaced (a checkpoint?); choose a folder of its own"
        )
    leaves = leaves_of(compiled.graph)
    if leaves:
        raise HelixError(
            f"save: {', '.join(leaf.name for leaf in leaves)} stay the user's own modules, whose code is not in the "
            "graphs; a module with leaves can't be saved: compile it where it runs"
        )
    if compiled.device.type == "meta":
        raise HelixError("a module on the meta device has no weights to save")
    check_saved_params(compiled.stages[SAVED_STAGES[-1]], {r.rank: r.params for r in compiled.ranks})
    graphs = {
        name: {
            "outer": graph_to_json(compiled.stages[name]),
            "bodies": {n: graph_to_json(b) for n, b in bodies_of(compiled.stages[name]).items()},
        }
        for name in saved_stages(compiled.plan)
    }
    try:  # as load() will: an edit that it would refuse is said before anything is written
        check_saved_graphs(_stages(graphs, "", torch.device("cpu"), compiled.plan), compiled.plan)
    except (HelixError, *_DAMAGE) as error:
        raise HelixError(f"this graph could not be loaded again, nothing is saved: {error}") from error
    return {
        "version": _VERSION,
        "vocab_size": compiled.facts.vocab_size,
        "cache_widths": list(compiled.facts.cache_widths),
        "latent_widths": list(compiled.facts.latent_widths),
        "index_widths": [row.index for row in compiled.facts.caches],
        "kv_heads": [row.heads for row in compiled.facts.caches],
        "configured": compiled.facts.config is not None,
        "limits": {letter: list(limit) for letter, limit in compiled.facts.limits.items()},
        "stages": graphs,
    }


def _write(compiled: CompiledModule, files: StagedFiles, weights: SavedWeights, document: dict[str, Any]) -> None:
    """This process's weights; on the leader also what the ranks have in common."""
    weights.write(files)
    if not compiled.world.is_leader:
        return
    facts = compiled.facts
    if (config := facts.config) is not None:  # an exported program has none
        files.write("config.json", lambda path: config.save_pretrained(path.parent))
    generation = facts.generation_config
    if generation is not None:
        files.write("generation_config.json", lambda path: generation.save_pretrained(path.parent))
    texts = {
        "graphs.json": json.dumps(document),
        "views.json": json.dumps(weights.views, indent=1),
        "plan.json": compiled.plan.to_json(),
    }
    digests = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
    files.write_text("digests.json", json.dumps(digests, indent=1))
    # plan.json last: its presence says "complete"
    for name, text in texts.items():
        files.write_text(name, text)


def _together(world: World, act: Callable[[], Any]) -> Any:
    """Do it on every rank; if it fails on one, all raise, and none goes on alone."""
    result, mine = None, None
    try:
        result = act()
    except Exception as error:  # transformers refuses what it is to write by many exception classes
        mine = error
    said = world.gather_texts("" if mine is None else f"{type(mine).__name__}: {mine}")
    if isinstance(mine, HelixError):
        raise mine
    failed = [f"rank {r}: {text}" for r, text in enumerate(said) if text]
    if failed:
        raise HelixError(f"save: {'; '.join(failed)}") from mine
    return result


def load_parts(
    folder: Path, device: str | torch.device | None, world: object
) -> tuple[HelixPlan, dict[str, fx.GraphModule], list[Rank], World, ModelFacts]:
    """What save_module wrote, as HelixModule takes it. HelixError names the file and what is wrong with it."""
    there = device_for(device or "cpu", world)
    assert there is not None
    plan = HelixPlan.from_json(_read(folder / "plan.json"))
    with _reading(folder / "graphs.json"):
        document = _json(folder / "graphs.json")
        if document.get("version") != _VERSION:
            raise HelixError(f"{folder / 'graphs.json'}: version {document.get('version')}, expected {_VERSION}")
        if _uses_kernels(document["stages"]):
            device_target(there)
        stages = _stages(document["stages"], "graphs.json, ", there, plan)
        check_saved_graphs(stages, plan)
        facts = ModelFacts(
            vocab_size=document["vocab_size"],
            caches=saved_caches(document),
            originals={},
            device=there,
            limits={letter: (int(low), int(high)) for letter, (low, high) in document.get("limits", {}).items()},
            **(_configurations(folder) if document.get("configured", True) else {}),
        )
        lowered = stages[SAVED_STAGES[-1]]
        check_saved_inputs(lowered, plan, facts)
    opened = open_world(HelixMesh(plan.layout), world, there, plan.options.check)
    with _reading(folder / "views.json"):
        params = read_params(folder, _json(folder / "views.json"), there, opened)
        check_saved_params(lowered, params)
    _check_digests(folder)
    opened.start({**claims_of(plan, lowered, facts), "weights": partial(files_digest, folder)})
    dtype, scales = getattr(torch, plan.dtype), scales_of_caches(len(facts.caches), plan.options, there)
    ranks = [Rank(r, params[r], allocate_caches(facts.caches, plan, dtype, there), scales) for r in opened.ranks]
    return plan, stages, ranks, opened, facts


def _check_digests(folder: Path) -> None:
    """Graphs, views and plan are as save() wrote them; folders of older versions have no digests."""
    path = folder / "digests.json"
    if not path.is_file():
        return
    with _reading(path):
        stated = dict(_json(path))
    for name, digest in stated.items():
        if hashlib.sha256(_read(folder / name).encode()).hexdigest() != digest:
            raise HelixError(
                f"{folder / name}: was changed after save() wrote it; save the module again (to take the file as it is, "
                "delete digests.json: nothing then tells a changed graph from the one that was saved)"
            )


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Whatever a damaged file makes fail is said to be that file's fault."""
    try:
        yield
    except HelixError:
        raise
    except _DAMAGE as error:
        raise HelixError(f"{path}: damaged, or not written by save(): {type(error).__name__}: {error}") from error


def _configurations(folder: Path) -> dict[str, Any]:
    """The original model's configurations, for generate()."""
    generation = folder / "generation_config.json"
    try:
        return {
            "config": AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False),
            "generation_config": GenerationConfig.from_pretrained(folder) if generation.exists() else None,
        }
    except Exception as error:  # transformers checks a config by many exception classes of its own
        reason: object = error
        if "trust_remote_code" in str(error):
            reason = "its model_type is none of transformers', and code that an auto_map names is never run"
        raise HelixError(f"{folder / 'config.json'}: can't be read: {reason}") from error


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise HelixError(f"{path}: not a saved module: {error}") from error


def _json(path: Path) -> Any:
    try:
        return json.loads(_read(path))
    except json.JSONDecodeError as error:
        raise HelixError(f"{path}: not valid JSON: {error}") from error


def _uses_kernels(stages: dict[str, Any]) -> bool:
    """True if a graph calls kernels, which its device must be able to run."""
    bodies = [b for stage in stages.values() for b in stage["bodies"].values()]
    return any(node["target"].startswith(f"{PROVIDER}.") for body in bodies for node in body)


def saved_stages(plan: HelixPlan) -> tuple[str, ...]:
    """The last stage that speaks of moves, the same with the batch in parts, and what runs."""
    return SAVED_STAGES if plan.options.overlap == "none" else (SAVED_STAGES[0], "overlap", SAVED_STAGES[1])


def _stages(entries: dict[str, Any], where: str, device: torch.device, plan: HelixPlan) -> dict[str, fx.GraphModule]:
    mode = values_of_graphs()
    return {name: _stage(entries[name], f"{where}stage {name}", device, mode) for name in saved_stages(plan)}


def _stage(entry: dict[str, Any], where: str, device: torch.device, mode: FakeTensorMode) -> fx.GraphModule:
    if _uses_kernels({"": entry}):
        import helix_compile.kernels.catalog  # noqa: F401  registers the ops that the graph names
    bodies = {
        name: graph_from_json(nodes, f"{where}, {name}", {}, device, mode) for name, nodes in entry["bodies"].items()
    }
    return graph_from_json(entry["outer"], f"{where}, outer graph", bodies, device, mode)
