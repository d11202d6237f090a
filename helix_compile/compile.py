"""The spine: model -> capture -> match -> plan -> passes -> parameters -> HelixModule, one line a stage."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from helix_compile.capture.captured import CapturedGraph
from helix_compile.capture.model import capture
from helix_compile.capture.source import captured_from, device_of, device_of_input
from helix_compile.config.options import HelixOptions
from helix_compile.errors import CaptureError, MatchError
from helix_compile.kernels.target import target_for
from helix_compile.layout.degrees import HelixMesh
from helix_compile.module import HelixModule
from helix_compile.passes.decide.plan_helix import plan_helix
from helix_compile.passes.match.layers import _match_body, match_layers
from helix_compile.passes.pipeline import STAGES, helix_passes
from helix_compile.passes.runner import run_passes
from helix_compile.plan.helix_plan import trace_plan
from helix_compile.runtime.claims import claims_of
from helix_compile.runtime.rank import build_ranks, facts_of
from helix_compile.views.graph_python import dump_to
from helix_compile.worlds.world import device_for, errors_told, open_world


def helix_compile(
    model: nn.Module | CapturedGraph | ExportedProgram | str | Path,
    cp: int,
    *,
    tpa: int = 1,
    ep: int | None = None,
    tokens_per_block: int = 32,
    merge: str = "a2a",
    q_proj: str = "replicate",
    v_up: str = "auto",
    overlap: str = "none",
    lower: str = "auto",
    world: Any = "auto",
    max_batch_size: int = 8,
    max_seq_len: int = 4096,
    unmatched: str = "error",
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> HelixModule:
    """Rewrite the decode step of `model` for Helix parallelism (arXiv 2507.07120).

    Args:
        model: a transformers causal language model with MLA or grouped-query attention in eval mode, a checkpoint
            folder, a CapturedGraph, or a program of torch.export (or the .pt2 file of one).
            A model is left as it was; shards are views of its weights. Of a folder each rank reads its slices.
        cp: ranks that share a KV cache by sequence (the paper's KVP).
        tpa: attention tensor parallel over heads (divides the KV heads where there are some); there are N = cp * tpa ranks.
        ep: expert parallel in the FFN, by default the largest that divides N and the experts; tpf = N / ep.
        tokens_per_block: round-robin unit of the cache between ranks.
        merge: "a2a" (one packed all-to-all over heads) or "ag_rs" (all-gather of lse, reduce-scatter of o).
        q_proj: "replicate" (each CP rank computes all its heads' q) or "gather" (each computes its own, then all-gather).
        v_up: W_UV "before" or "after" the exchange, or "auto" by bytes; grouped-query attention has none.
        overlap: "none".
        lower: "reference" (torch), "triton" (on a CPU by Triton's interpreter) or "auto": Triton on CUDA >= 9.0.
        world: "virtual": all ranks in this process; "distributed": this process is one rank of torch's default group,
            made from torchrun's environment if there is none; "auto": distributed iff WORLD_SIZE is set; or a
            ProcessGroup, or a DeviceMesh (flattened), of N processes.
        max_batch_size: capacity in sequences.
        max_seq_len: capacity in tokens a sequence, prompt included.
        unmatched: a layer that can't be captured or whose attention is not recognised is an "error", or stays as it is
            ("keep"): whole on every rank, listed in the report. Some layer must be rewritten.
        device: where shards and caches live; default: where the model is (a folder: CPU). "cuda" under torchrun:
            cuda:LOCAL_RANK.
        dtype: convert a copy of the weights first (a folder: as they are read); the model itself keeps its own.

    Returns:
        HelixModule: `compiled(input_ids)` is one step; `.plan`, `.stages`, `.graph`, `.ranks` can be inspected.

    Raises:
        HelixError: a subclass that says which stage refused, where and why.
    """
    options = HelixOptions(
        cp=cp,
        tpa=tpa,
        ep=ep,
        tokens_per_block=tokens_per_block,
        merge=merge,
        q_proj=q_proj,
        v_up=v_up,
        overlap=overlap,
        lower=lower,
        max_batch_size=max_batch_size,
        max_seq_len=max_seq_len,
        unmatched=unmatched,
    )
    if isinstance(model, HelixModule):
        raise CaptureError("this model is already compiled by helix_compile; pass the original model")
    place = device_for(device, world)
    with errors_told(world, cp, tpa, place or device_of_input(model)):
        captured = keep_unmatched(captured_from(model, dtype, place, unmatched), options)
        matches = match_layers(captured, options.max_seq_len)
        plan = plan_helix(captured, matches, options)
    opened = open_world(HelixMesh(plan.layout), world, place or device_of(captured))
    trace_plan(plan)
    dump = os.environ.get("HELIX_DUMP")
    facts = facts_of(captured, matches, plan, place, opened)
    passes = helix_passes(captured, matches, plan, target_for(lower, facts.device))
    stages = run_passes(captured.graph, passes, dump_to(Path(dump) if dump and opened.is_leader else None))
    opened.start(claims_of(plan, stages[STAGES[-1]], facts))
    ranks = build_ranks(plan, stages[STAGES[-1]], facts, opened)
    return HelixModule(plan, stages, ranks, opened, facts)


def keep_unmatched(captured: CapturedGraph, options: HelixOptions) -> CapturedGraph:
    """With unmatched="keep": the same model with every layer that no matcher recognises as a leaf.

    Raises:
        MatchError: no layer is left to rewrite; lists the reasons.
    """
    if options.unmatched != "keep":
        return captured
    keep: dict[int, str] = {}
    for name in captured.bodies:
        try:
            _match_body(captured, name, options.max_seq_len)
        except MatchError as error:
            keep |= {layer.index: str(error) for layer in captured.layers_of(name)}
    if not keep:
        return captured
    assert captured.model is not None
    again = capture(captured.model, keep=keep, unmatched="keep")
    return replace(again, weights=captured.weights, notes=captured.notes)
