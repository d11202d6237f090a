"""The spine: model -> capture -> match -> plan -> passes -> parameters -> HelixModule, one line a stage."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from helix_compile.capture.captured import CapturedGraph
from helix_compile.capture.model import CAPTURING, capture
from helix_compile.capture.source import captured_from, device_of, device_of_input
from helix_compile.capture.stage import stage_model
from helix_compile.config.options import HelixOptions, takes_options
from helix_compile.errors import CaptureError, PlanError
from helix_compile.kernels.target import KernelTarget, target_for
from helix_compile.layout.degrees import HelixMesh
from helix_compile.module import HelixModule
from helix_compile.passes.decide.plan_helix import plan_helix
from helix_compile.passes.match.layers import match_bodies, match_layers
from helix_compile.passes.pipeline import LOWERED, helix_passes
from helix_compile.passes.runner import Dump, PassContext, run_passes
from helix_compile.plan.helix_plan import HelixPlan, trace_plan
from helix_compile.plan.matches import LayerMatch
from helix_compile.runtime.claims import claims_of
from helix_compile.runtime.inductor import check_inductor
from helix_compile.runtime.rank import build_ranks, facts_of
from helix_compile.runtime.tensorrt import EngineBuilder, check_tensorrt
from helix_compile.runtime.watch import ModelWatch
from helix_compile.views.graph_python import dump_to
from helix_compile.worlds.world import device_for, errors_told, open_world


@takes_options
def helix_compile(
    model: nn.Module | CapturedGraph | ExportedProgram | str | Path,
    cp: int | None = None,
    *,
    tpa: int = 1,
    ep: int | None = None,
    tokens_per_block: int = 32,
    merge: str = "a2a",
    q_proj: str = "replicate",
    v_up: str = "auto",
    topk_exchange: str = "auto",
    window: str = "shard",
    overlap: str = "none",
    lower: str = "auto",
    world: Any = "auto",
    max_batch_size: int = 8,
    max_seq_len: int = 4096,
    cache_dtype: str = "auto",
    cache_scale: float | tuple[float, ...] = 1.0,
    unmatched: str = "error",
    pad_heads: bool = False,
    pp: int = 1,
    stage: int = 0,
    pp_split: str = "first",
    head: str = "replicate",
    check: str = "deferred",
    cuda_graphs: bool = True,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    options: HelixOptions | None = None,
    builder: EngineBuilder | None = None,
    plan: HelixPlan | str | Path | None = None,
) -> HelixModule:
    """Rewrite the decode step of `model` for Helix parallelism (arXiv 2507.07120).

    Args:
        model: a transformers causal language model with MLA or grouped-query attention in eval mode, a checkpoint
            folder, a CapturedGraph, or a program of torch.export (or the .pt2 file of one).
            A model is left as it was; shards are views of its weights. Of a folder each rank reads its slices.
        {fields of HelixOptions}
        world: "virtual": all ranks in this process; "distributed": this process is one rank of torch's default group,
            made from torchrun's environment if there is none; "auto": distributed iff WORLD_SIZE is set; or a
            ProcessGroup, or a DeviceMesh (flattened), of N processes.
        device: where shards and caches live; default: where the model is (a folder: CPU). "cuda" under torchrun:
            cuda:LOCAL_RANK.
        dtype: convert a copy of the weights first (a folder: as they are read); the model itself keeps its own.
        options: all from `cp` to `cuda_graphs` in one, in place of these keywords.
        builder: what makes an engine of a piece where lower="tensorrt" (docs/exports.md); default: torch_tensorrt.
        plan: a plan, or the plan.json of one (`helix-compile plan --out`, `inspect --out`), in place of all of them: the model is laid
            out as it says, or refused.

    Returns:
        HelixModule: `compiled(input_ids)` is one step; `.plan`, `.stages`, `.graph`, `.ranks` can be inspected.

    Raises:
        HelixError: a subclass that says which stage refused, where and why.
    """
    assert options is not None  # takes_options makes them of the keywords
    if isinstance(model, HelixModule):
        raise CaptureError("this model is already compiled by helix_compile; pass the original model")
    with CAPTURING:  # torch.export and fake modes patch what all threads share
        asked = device_for(device, world)
        with errors_told(world, options.cp, options.tpa, asked or device_of_input(model)):
            target = target_for(options.lower, asked or device_of_input(model))
            if options.compiles_segments:
                check_inductor(asked or device_of_input(model))
            if options.builds_engines:
                check_tensorrt(asked or device_of_input(model), builder)
            elif builder is not None:
                raise PlanError(
                    f"builder has no effect at lower={options.lower!r}: it makes engines of TensorRT; drop it"
                )
            captured = captured_from(stage_model(model, options), dtype, asked, options.unmatched)
            planned = plan_model(captured, options)
            if plan is not None:
                check_planned(plan, planned.plan)
        opened = open_world(HelixMesh(planned.plan.layout), world, asked or device_of(planned.captured), options.check)
        trace_plan(planned.plan)
        facts = facts_of(planned.captured, planned.matches, planned.plan, asked, opened)
        if isinstance(model, nn.Module):
            watch = ModelWatch.of(model, planned.captured.constants)
            converted = planned.captured.model is not model
            if converted:
                watch.sample_all()
            facts = replace(facts, watch=watch, converted=converted)
        dump = os.environ.get("HELIX_DUMP") if opened.is_leader else None
        stages = rewrite_model(planned, target, dump_to(Path(dump) if dump else None))
        lowered = stages[LOWERED.stage]
        opened.start(claims_of(planned.plan, lowered, facts))
        ranks = build_ranks(planned.plan, lowered, facts, opened)
        return HelixModule(planned.plan, stages, ranks, opened, facts, builder)


@dataclass(frozen=True)
class PlannedModel:
    """A model up to its plan: what every lowering, and the verifier, starts from.

    Attributes:
        captured: its graphs; with unmatched="keep", layers that no matcher recognises are leaves in them.
        matches: body -> what was found in it.
        plan: every decision.
    """

    captured: CapturedGraph
    matches: dict[str, LayerMatch]
    plan: HelixPlan


def plan_model(captured: CapturedGraph, options: HelixOptions) -> PlannedModel:
    """Match and plan.

    Raises:
        MatchError: a layer that is not recognised; with unmatched="keep", none is left to rewrite.
        LayoutError, PlanError: options that do not fit the model.
    """
    captured, matches = match_model(captured, options)
    return PlannedModel(captured, matches, plan_helix(captured, matches, options))


def check_planned(asked: HelixPlan | str | Path, made: HelixPlan) -> None:
    """Raise PlanError where this model's plan decides otherwise than the one that was asked for; bytes follow from the dtype."""
    stated = asked if isinstance(asked, HelixPlan) else HelixPlan.from_json(Path(asked).read_text(encoding="utf-8"))
    if differences := stated.decides_otherwise(made):
        raise PlanError(
            f"plan: it was made for {stated.model}, and for this model ({made.model}) it comes out otherwise, in {len(differences)} "
            f"places; the first (asked for -> this model's): {differences[0]}. Make a plan for this model: helix-compile plan MODEL --out"
        )


def match_model(captured: CapturedGraph, options: HelixOptions) -> tuple[CapturedGraph, dict[str, LayerMatch]]:
    """The matches; with unmatched="keep" of the same model with every layer that no matcher recognises as a leaf.

    Experts that none recognises then stay whole on every rank, in a layer whose attention is rewritten.
    """
    keeps = options.unmatched == "keep"
    matches, failures = match_bodies(captured, options.max_seq_len, keeps)
    if not failures:
        return captured, matches
    if not keeps:
        raise next(iter(failures.values()))
    keep = {layer.index: str(error) for name, error in failures.items() for layer in captured.layers_of(name)}
    assert captured.model is not None
    again = capture(captured.model, keep=keep, unmatched="keep")
    kept = replace(again, weights=captured.weights, notes=captured.notes)
    return kept, match_layers(kept, options.max_seq_len, keeps)


def rewrite_model(
    planned: PlannedModel, target: KernelTarget | None, dump: Dump | None = None
) -> dict[str, fx.GraphModule]:
    """Every stage, by the passes of passes/pipeline.py."""
    context = PassContext(planned.captured, planned.matches, planned.plan, target)
    return run_passes(helix_passes(planned.plan.options, target), context, dump)
