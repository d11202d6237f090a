"""load_exported(): what export(format="pt2") or "aoti" wrote, stepped without the model and without transformers.

module = load_exported("out", rank, group)          # every process of the group, as HelixModule does on real ranks
logits = module(input_ids, attention_mask)          # a step: the same checks, chunks, ledger and worlds as a HelixModule
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from helix_compile.cache.pages import Ledger, allocate_caches, scales_of_caches
from helix_compile.errors import ExportError
from helix_compile.export.manifest import EXPORT_ID, MANIFEST, SEAL, is_sealed, plan_of, read_manifest, sha256_of
from helix_compile.export.program_file import read_program
from helix_compile.export.rank_file import RankFile, file_of_rank
from helix_compile.export.walk import WALK, inputs_of_walk, mixing_of_walk, programs_called, read_walk, stage_of_walk
from helix_compile.ir.graph import InputRef, input_ref, placeholders
from helix_compile.layout.degrees import HelixMesh
from helix_compile.plan.cache_row import CacheRow
from helix_compile.plan.helix_plan import HelixPlan
from helix_compile.runtime.alone import alone
from helix_compile.runtime.prepared import Arguments, PreparedSteps
from helix_compile.runtime.rank import ModelFacts, Rank
from helix_compile.runtime.step import checked_lengths, checked_rows, run_step
from helix_compile.worlds.program import Program, SegmentCall
from helix_compile.worlds.world import World, open_world

FORMATS = ("pt2", "aoti")


def load_exported(
    folder: str | Path, rank: int | None = None, group: Any = None, device: str | torch.device = "cpu"
) -> ExportedModule:
    """Read a folder that export() wrote in format "pt2" or "aoti".

    Args:
        folder: all ranks see it; a rank reads its own weights.
        rank: which one this process is, in `group`; None: the one that it is there.
        group: a ProcessGroup or DeviceMesh of as many processes as there are ranks, or the group of each axis by its name
            ("world", and "kvp" and "tpa" where they are others). None: torch's default group, made from torchrun's environment if there is
            none; without `rank` and without torchrun all ranks live in this process.
        device: "cpu"; "meta": graphs and shapes alone.

    Returns:
        ExportedModule: `module(input_ids, attention_mask)` is one step.

    Raises:
        ExportError: what is no such folder, or files that do not fit each other. helix_compile's verify reads all of it back.
        HelixError: a group that does not fit.
    """
    folder, there = Path(folder), torch.device(device)
    manifest = read_manifest(folder)
    _check_manifest(folder, manifest, there)
    plan = plan_of(manifest)
    walk = read_walk(folder / WALK)
    stage = stage_of_walk(walk, there)
    if missing := sorted(programs_called(stage) - set(manifest["programs"])):
        raise ExportError(f"{folder / WALK}: it calls {', '.join(missing)}, of which manifest.json knows nothing")
    facts = ModelFacts(
        vocab_size=manifest["vocab_size"],
        caches=tuple(CacheRow(**row) for row in manifest["caches"]),
        originals={},
        device=there,
        limits={letter: (low, high) for letter, (low, high) in manifest["limits"].items()},
    )
    world = _world(rank, group, plan, there)
    inputs = inputs_of_walk(walk)
    ranks = [_rank(folder, number, manifest, plan, facts, inputs) for number in world.ranks]
    code = {
        name: _program(folder / stated["file"], manifest["format"])
        for name, stated in manifest["programs"].items()
        if there.type != "meta" or manifest["format"] == "pt2"
    }
    world.start({"torch version": lambda: torch.__version__, "export": lambda: manifest[SEAL]})
    return ExportedModule(plan, stage, ranks, world, facts, code, mixing_of_walk(walk))


def _check_manifest(folder: Path, manifest: dict[str, Any], device: torch.device) -> None:
    format = manifest["format"]
    if not is_sealed(manifest):
        raise ExportError(f"{folder / MANIFEST}: edited after the export: its {SEAL} is not that of what stands in it")
    if format not in FORMATS:
        raise ExportError(
            f"{folder}: format {format!r} is run by a runtime of its own (docs/exports.md); expected pt2 or aoti"
        )
    if device.type not in ("cpu", "meta"):
        raise ExportError(
            f"load_exported: device={str(device)!r}: programs were made for the CPU; expected 'cpu' or 'meta'"
        )
    if manifest["weights"] is None and device.type != "meta":
        raise ExportError(f"{folder}: a module without weights was exported; it loads on device='meta' alone")
    if format == "aoti" and device.type != "meta" and manifest["torch"] != torch.__version__:
        raise ExportError(
            f"{folder}: programs were compiled by torch {manifest['torch']}, this is {torch.__version__}: machine code fits the version "
            "that made it; export again here, or use format='pt2'"
        )
    if missing := [name for name in manifest["files"] if not (folder / name).is_file()]:
        raise ExportError(f"{folder}: {', '.join(missing)} not there, manifest.json has them")
    # weights are large: verify reads these
    small = [name for name in manifest["files"] if not name.endswith(".safetensors")]
    if changed := [name for name in small if sha256_of(folder / name) != manifest["files"][name]["sha256"]]:
        raise ExportError(
            f"{folder}: {', '.join(changed)} not as exported; export again, or see `helix-compile verify`"
        )


def _world(rank: int | None, group: Any, plan: HelixPlan, device: torch.device) -> World:
    mesh, named = HelixMesh(plan.layout), dict[str, Any]()
    if isinstance(group, Mapping):
        named = dict(group)
        if "world" not in named:
            raise ExportError(
                f"load_exported: group has {', '.join(map(str, named)) or 'nothing'}; expected one for 'world' at least"
            )
        group = named.pop("world")
    alone = rank is None and group is None
    asked = group if group is not None else "auto" if alone else "distributed"
    world = open_world(mesh, asked, device, plan.options.check, named)
    if rank is not None and tuple(world.ranks) != (rank,):
        raise ExportError(
            f"load_exported: rank={rank}, and this process is rank {world.ranks[0]} of its group; leave rank, or pass that"
        )
    return world


def _rank(
    folder: Path,
    number: int,
    manifest: Mapping[str, Any],
    plan: HelixPlan,
    facts: ModelFacts,
    inputs: Mapping[InputRef, tuple[list[Any], str]],
) -> Rank:
    """What a rank holds: exactly the weights that the walk takes."""
    wanted = {
        ref.name: (tuple(shape), getattr(torch, dtype)) for ref, (shape, dtype) in inputs.items() if ref.kind == "param"
    }
    caches = allocate_caches(facts.caches, plan, getattr(torch, plan.dtype), facts.device)
    scales = scales_of_caches(len(facts.caches), plan.options, facts.device)
    if facts.device.type == "meta":
        params = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in wanted.items()}
        return Rank(number, params, caches, scales)
    path = folder / file_of_rank(number)
    file = RankFile(path)
    if file.identity != manifest[EXPORT_ID]:
        raise ExportError(f"{path}: it is part of another export than manifest.json")
    expected = {axis: plan.layout.index(axis, number) for axis in file.coordinates()}
    if (got := file.coordinates()) != expected:
        raise ExportError(f"{path}: it is the file of the rank at {got}, rank {number} is at {expected}")
    if missing := sorted(set(wanted) - file.names):
        raise ExportError(f"{path}: holds no {', '.join(missing[:3])}")
    params = {name: file.tensor(name) for name in wanted}
    for name, tensor in params.items():
        if (tuple(tensor.shape), tensor.dtype) != wanted[name]:
            raise ExportError(
                f"{path}: {name} is {(tuple(tensor.shape), tensor.dtype)}, walk.json takes {wanted[name]}"
            )
    return Rank(number, params, caches, scales)


def _program(path: Path, format: str) -> Callable[..., Any]:
    """What computes a program: takes its tensors, returns a tuple."""
    if format == "pt2":
        return read_program(path).graph_module
    try:
        return torch._inductor.aoti_load_package(path, run_single_threaded=False)
    except Exception as error:  # torch's own classes are many
        first = str(error).strip().split("\n")[0]
        raise ExportError(f"{path}: can't be loaded: {type(error).__name__}: {first}") from error


class _KnownMixing(PreparedSteps):
    """PreparedSteps of a walk, whose programs are closed: what mixes tokens was found before they were cut."""

    def __init__(self, known: Mapping[bool, fx.Node | None], *given: Any):
        super().__init__(*given)
        self._known = known

    def mixing(self, graph: fx.GraphModule, padding: bool = False) -> fx.Node | None:
        """See PreparedSteps."""
        return self._known[padding]


def _alone(method: Callable[..., Any]) -> Callable[..., Any]:
    """One thread at a time: there is one batch, one ledger and one cache a rank."""

    @wraps(method)
    def run(self: ExportedModule, *args: Any, **kwargs: Any) -> Any:
        with alone(self._lock, method.__name__):
            return method(self, *args, **kwargs)

    return run


class ExportedModule:
    """A decode step out of an exported folder, with its ranks' weights and caches. Made by load_exported().

    Attributes:
        plan: every decision (frozen).
        graph: the walk; `module.graph.print_readable()`.
        ranks: what each rank in this process holds.
        world: runs them.
        code: name of a program -> what computes it.
    """

    replays, value_dump = None, None  # see HelixModule: steps are not recorded, values not dumped

    def __init__(
        self,
        plan: HelixPlan,
        graph: fx.GraphModule,
        ranks: list[Rank],
        world: World,
        facts: ModelFacts,
        code: Mapping[str, Callable[..., Any]],
        mixing: Mapping[bool, fx.Node | None],
    ):
        self.plan, self.graph, self.ranks, self.world, self.facts, self.code = plan, graph, ranks, world, facts, code
        self.device, self.stages = facts.device, {"walk": graph}
        self._lock = threading.RLock()
        self._ledger = Ledger(plan.options, plan.layout.kvp, facts.device, plan.rings)
        self._tables = _KnownMixing(mixing, plan.layout, facts.device)
        self._programs = [Program(rank.rank, graph, self._bound(rank), self._code_of) for rank in ranks] if code else []

    def _bound(self, rank: Rank) -> dict[fx.Node, Any]:
        """What the walk takes at every step alike."""
        nodes = placeholders(self.graph.graph)
        arguments = Arguments([input_ref(n) for n in nodes], rank, rank.params, self.plan.layout, self.device)
        of_step = {place for place, _ in arguments.of_step}
        return {node: arguments.values[place] for place, node in enumerate(nodes) if place not in of_step}

    def _code_of(self, call: SegmentCall) -> Callable[..., Any]:
        return self.code[call.segment.meta["program"]]

    def programs(self, end: str = "") -> list[Program]:
        """What runs a step, one a rank."""
        return self._programs

    def short_end(self, what: str) -> None:
        """None: logits are whole."""

    def best_words(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> None:
        """None: see HelixModule."""

    def top_words(self, input_ids: Tensor, attention_mask: Tensor | None, count: int) -> None:
        """None: see HelixModule."""

    @property
    def lengths(self) -> Tensor:
        """[B] int64: tokens of each sequence on all ranks together; empty before the first step."""
        return torch.tensor(self._ledger.lengths, dtype=torch.int64, device="cpu")

    @property
    def page_table(self) -> Tensor:
        """[B, pages] int64, the same on every rank; before the first step all max_batch_size rows. Read only."""
        return self._ledger.pages_of(self._ledger.batch_size or self.plan.options.max_batch_size).clone()

    @_alone
    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None, logits_to_keep: int = 0) -> Tensor:
        """Append input_ids [B, T] to each sequence's cache; logits [B, T or logits_to_keep, vocab]. As HelixModule.forward().

        Raises:
            RuntimeFault: what a step may not be; nothing was written then.
        """
        params = [rank.params for rank in self.ranks]
        return run_step(self, self._ledger, self.graph, params, self._tables, input_ids, attention_mask, logits_to_keep)

    @_alone
    def reset(self, rows: list[int] | None = None) -> None:
        """Empty the cache; with `rows`, only these sequences, and the others go on."""
        self._ledger.empty(None if rows is None else checked_rows(rows, self._ledger))

    @_alone
    def truncate(self, lengths: int | list[int] | Tensor) -> None:
        """Take back the last tokens of each sequence; the tokens that remain as HelixModule.truncate() has them.

        Raises:
            RuntimeFault: not 0 <= new <= present length, or what a window needs then was forgotten; no row is changed then.
        """
        kept = checked_lengths(lengths, self._ledger.lengths)
        self._ledger.check_held(kept, "truncate")
        self._ledger.lengths = kept
        self._ledger.forget_tails()
