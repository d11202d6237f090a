"""A folder of programs and the walk that calls them, for torch alone; what it holds is described in docs/exports.md.

body_0_segment_0.pt2, ...   programs: of torch.export (format pt2), or compiled by AOTInductor (format aoti)
walk.json                   which are called in which order, with what, and what is exchanged between them
rank0.safetensors, ...      each rank's weights and coordinates
manifest.json               last: its presence says "complete"
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, fx
from tqdm import tqdm

from helix_compile.errors import ExportError
from helix_compile.export.exportable import check_exportable, without_kernels
from helix_compile.export.manifest import EXPORT_ID, MANIFEST, VERSION, described_file, facts_of_plan, format_manifest
from helix_compile.export.programs import (
    check_native,
    cut_for_export,
    described_program,
    distinct_programs,
    program_of,
    save_native,
    save_program,
)
from helix_compile.export.rank_file import COORDINATES, digest_of, file_of_rank
from helix_compile.export.walk import WALK, collectives_of, format_walk, step_inputs, walk_document, without_layers
from helix_compile.files import StagedFiles, unfinished
from helix_compile.ir.graph import input_ref, inputs_of
from helix_compile.ir.stage import bodies_of, copy_module
from helix_compile.layout.degrees import HelixLayout
from helix_compile.plan.helix_plan import HelixPlan
from helix_compile.runtime.compiled import CompiledModule
from helix_compile.runtime.rank import Rank, follow_edits


def export_programs(
    compiled: CompiledModule, folder: Path, format: str, layers: Collection[int] | None = None
) -> dict[str, Any]:
    """Write programs, walk and weights of all ranks into `folder`, which must be empty: all or nothing. Returns the manifest.

    Args:
        compiled: with all ranks in this process, on the CPU; on the meta device (format pt2) no weights are written.
        folder: is made, if it is not there.
        format: "pt2" or "aoti".
        layers: of these layers alone; None: all.

    Raises:
        ExportError: what can't be exported, a folder that holds anything, ranks that live elsewhere.
        LoweringUnavailable: format aoti without a C++ compiler.
        HelixError: the disk refuses.
    """
    check_programs_of(compiled, format)
    # what an export that was killed left is replaced
    if folder.is_dir() and (there := sorted({path.name for path in folder.iterdir()} - {unfinished("export")})):
        raise ExportError(
            f"export: {folder} holds {', '.join(there[:5])}{', ...' if len(there) > 5 else ''}; choose a folder of its own"
        )
    follow_edits(compiled.plan, compiled.graph, compiled.ranks, compiled.facts)
    lowered = _with_layers(without_kernels(compiled), compiled.plan, layers)
    stage = cut_for_export(lowered)
    graphs, program_names = distinct_programs(stage)
    walk = walk_document(stage, lowered, program_names, "")
    facts = _manifest(compiled, format, layers, stage, walk, graphs)
    said = json.dumps([walk, {name: str(graph.graph) for name, graph in graphs.items()}, compiled.plan.to_json()])
    walk[EXPORT_ID] = facts[EXPORT_ID] = hashlib.sha256(said.encode()).hexdigest()
    save = save_program if format == "pt2" else save_native
    with StagedFiles(folder, "export") as files:

        def write(name: str, act: Callable[[Path], None]) -> None:
            def writing(path: Path) -> None:
                act(path)
                facts["files"][name] = described_file(path)

            files.write(name, writing)

        for name, graph in tqdm(graphs.items(), desc="export", unit="program", delay=2):
            program = program_of(graph, name)
            write(f"{name}.pt2", lambda path, program=program: save(program, path, facts[EXPORT_ID]))  # type: ignore[misc]
        write(WALK, lambda path: _write_text(path, format_walk(walk)))
        for rank in compiled.ranks if facts["weights"] is not None else []:
            held = _held_by(rank, stage, compiled.plan.layout)
            for weight in sorted(set(held) - {f"{axis}_rank" for axis in COORDINATES}):
                facts["weights"].setdefault(weight, []).append(digest_of(held[weight]))
            write(file_of_rank(rank.rank), lambda path, held=held: save_file(held, path, {EXPORT_ID: facts[EXPORT_ID]}))  # type: ignore[misc]
        files.write_text(MANIFEST, format_manifest(facts))
        files.move()
    return facts


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def check_programs_of(compiled: CompiledModule, format: str) -> None:
    """Raise ExportError or LoweringUnavailable where a module has no programs of this format."""
    check_exportable(compiled)
    if compiled.plan.leaves:
        raise ExportError(
            f"format={format!r}: {', '.join(name for name, _ in compiled.plan.leaves)} stay the user's own modules, whose code is "
            "in no graph"
        )
    if compiled.plan.options.overlap != "none":
        raise ExportError(
            f"format={format!r}: got overlap={compiled.plan.options.overlap!r}: torch.export can't store programs that take the rows of a part "
            "of a batch; compile the model with overlap='none', which has the same bits"
        )
    if compiled.device.type not in ("cpu", "meta"):
        raise ExportError(
            f"format={format!r}: programs are made of a module on the CPU, this one is on {compiled.device}: "
            "helix_compile(model, ..., device='cpu').export(...)"
        )
    if compiled.plan.options.overlap != "none":
        _check_parts(compiled.plan, format)
    if format == "aoti":
        check_native(compiled.device)


def _check_parts(plan: HelixPlan, format: str) -> None:
    """Raise ExportError where rows of a part of a batch have no program."""
    if format == "aoti":
        raise ExportError(
            "format='aoti': overlap='hopb' leaves a part of a batch of one sequence without rows, which compiled programs were never "
            "given; compile the model with overlap='none', or use format='pt2'"
        )
    if any(site.parts > 1 and site.v_up == "before" for body in plan.bodies for site in body.attentions):
        raise ExportError(
            f"format={format!r}: overlap='hopb' with W_UV before the exchange puts rows of a part among those of all, in a program that "
            "torch.export.load() does not read; compile the model with v_up='after', or overlap='none'"
        )


def _with_layers(lowered: fx.GraphModule, plan: HelixPlan, layers: Collection[int] | None) -> fx.GraphModule:
    """A copy without the calls of other layers."""
    copy = copy_module(lowered)
    if layers is None:
        return copy
    known = sorted(n for body in plan.bodies for n in body.layers)
    if unknown := sorted(set(layers) - set(known)):
        raise ExportError(f"--layers {unknown}: the model has layers {known[0]} to {known[-1]}")
    left_out, calls = dict[str, int](), Counter[str]()
    bodies = bodies_of(copy)
    for node in copy.graph.nodes:
        if node.op == "call_module" and (body := str(node.target)) in bodies:
            layer = plan.body(body).layers[calls[body]]
            calls[body] += 1
            if layer not in layers:
                left_out[node.name] = layer
    without_layers(copy, left_out)
    return copy


def _held_by(rank: Rank, stage: fx.GraphModule, layout: HelixLayout) -> dict[str, Tensor]:
    """A rank's file: its weights, each in a row of its own, and where it is on each axis."""
    names = [input_ref(node).name for node in inputs_of(stage.graph, "param")]
    held = {name: rank.params[name].detach().cpu().clone(memory_format=torch.contiguous_format) for name in names}
    return held | {f"{axis}_rank": torch.tensor(layout.index(axis, rank.rank)) for axis in COORDINATES}


def _manifest(
    compiled: CompiledModule,
    format: str,
    layers: Collection[int] | None,
    stage: fx.GraphModule,
    walk: dict[str, Any],
    graphs: dict[str, fx.GraphModule],
) -> dict[str, Any]:
    plan, facts = compiled.plan, compiled.facts
    return {
        "format": format,
        "version": VERSION,
        EXPORT_ID: "",
        "torch": torch.__version__,
        **facts_of_plan(plan, layers),
        "vocab_size": facts.vocab_size,
        "limits": {letter: list(limit) for letter, limit in facts.limits.items()},
        "inputs": step_inputs(walk),
        "outputs": [{"name": "logits", "dtype": plan.dtype, "shape": ["B", "T", facts.vocab_size]}],
        "caches": [asdict(row) for row in facts.caches],
        "collectives": collectives_of(stage),
        "programs": {name: {"file": f"{name}.pt2", **described_program(graph)} for name, graph in graphs.items()},
        "needs": _needs(format),
        # weight -> digest of each rank's; null: of a module without weights
        "weights": None if compiled.device.type == "meta" else {},
        "files": {},
    }


def _needs(format: str) -> list[str]:
    """What must be there to step it."""
    walked = (
        "helix:: ops of walk.json (attention, append, routed experts, ledger): helix_compile registers them for torch"
    )
    if format == "pt2":
        return [walked]
    return [f"torch {torch.__version__} on this kind of machine: programs are machine code", walked]
