"""What a saved module must hold before it is trusted: graphs that type, and inputs and weights that fit them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from helix_compile.config.options import FP8_E4M3
from helix_compile.errors import HelixError, PassError, RuntimeFault
from helix_compile.ir.graph import InputRef, aten, helix_op, input_ref, inputs_of, is_call, placeholders
from helix_compile.ir.stage import bodies_of
from helix_compile.passes.typing.check_layouts import check_layouts
from helix_compile.plan.cache_row import CacheRow, cache_shape
from helix_compile.plan.helix_plan import HelixPlan
from helix_compile.runtime.rank import ModelFacts

SCALED = ("cache_append", "mla_decode", "mla_decode_slots", "gqa_decode")


def check_saved_graphs(stages: dict[str, fx.GraphModule], plan: HelixPlan) -> None:
    """Infer the layout of every value again: a collective that was taken out or changed is found here.

    Raises:
        HelixError: a body that the plan does not know, or does not type.
    """
    names = {body.name for body in plan.bodies}
    for stage, outer in stages.items():
        bodies = bodies_of(outer)
        for graph in (outer, *bodies.values()):
            _check_constants(stage, graph, plan)
        if set(bodies) != names:
            raise HelixError(f"stage {stage}: bodies {sorted(bodies)}, the plan has {sorted(names)}")
        for name, body in bodies.items():
            try:
                check_layouts(body, plan=plan.body(name), degrees=plan.layout)
            except PassError as error:
                raise HelixError(f"graphs.json, stage {stage}: {error}") from error
        for call in [n for n in outer.graph.nodes if n.op == "call_module"]:
            _check_call(stage, call, placeholders(outer.get_submodule(call.target).graph))


def _check_constants(stage: str, graph: fx.GraphModule, plan: HelixPlan) -> None:
    """What the plan decides and the graph holds as a number must be one: who reads the cache goes by the plan."""
    # slots of what every rank holds by itself are those of one rank
    ranks = (plan.layout.kvp, 1) if plan.rings else (plan.layout.kvp,)
    decided = {"cp": ranks, "tokens_per_block": (plan.options.tokens_per_block,)}
    for node in graph.graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        for argument, value in zip(node.target._schema.arguments, node.args, strict=False):
            if argument.name in decided and value not in decided[argument.name]:
                raise HelixError(
                    f"graphs.json, stage {stage}, node `{node.name}`: {argument.name} is {value}, plan.json says "
                    f"{decided[argument.name][0]}"
                )


def _check_call(stage: str, call: fx.Node, inputs: list[fx.Node]) -> None:
    """A layer gets its own weights and caches: the same kind, name and shape as its body takes."""
    where = f"graphs.json, stage {stage}, layer call `{call.name}`"
    if len(call.args) != len(inputs):
        raise HelixError(f"{where}: {len(call.args)} arguments, its body takes {len(inputs)}")
    for argument, taken in zip(call.args, inputs, strict=True):
        kind, name = input_ref(taken)
        if not isinstance(argument, fx.Node):
            raise HelixError(f"{where}: {argument!r} stands for {kind} {name}")
        if kind not in ("param", "cache", "scale"):
            continue
        given, given_name = input_ref(argument)
        same_name = kind != "param" or f".{given_name}".endswith(f".{name}")
        if given != kind or not same_name or _shape(argument) != _shape(taken):
            raise HelixError(
                f"{where}: {given} {given_name} {_shape(argument)} stands for {kind} {name} {_shape(taken)}"
            )


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def saved_caches(document: Mapping[str, Any]) -> tuple[CacheRow, ...]:
    """What a token leaves in each cache, as graphs.json states it (files of before grouped-query attention: latents).

    Raises:
        HelixError: widths and heads that do not fit each other.
    """
    whole, first = document["cache_widths"], document["latent_widths"]
    heads = document.get("kv_heads", [0] * len(whole))
    if len(first) != len(whole) or not all(0 < a < w for a, w in zip(first, whole, strict=True)):
        raise HelixError(f"graphs.json: latent_widths {first} are not parts of cache_widths {whole}")
    if len(heads) != len(whole) or not all(
        K >= 0 and a % (K or 1) == w % (K or 1) == 0 for K, a, w in zip(heads, first, whole, strict=True)
    ):
        raise HelixError(f"graphs.json: kv_heads {heads} do not divide widths {first} of {whole}")
    index = document.get("index_widths", [0] * len(whole))
    if len(index) != len(whole) or not all(0 <= i < w - a for i, a, w in zip(index, first, whole, strict=True)):
        raise HelixError(f"graphs.json: index_widths {index} are not parts of cache_widths {whole} besides {first}")
    rows = zip(heads, first, whole, index, strict=True)
    return tuple(CacheRow(a // (K or 1), (w - a - i) // (K or 1), K, i) for K, a, w, i in rows)


def check_saved_inputs(lowered: fx.GraphModule, plan: HelixPlan, facts: ModelFacts) -> None:
    """Caches of the graph are those that the plan's options and the stated widths make.

    Raises:
        HelixError: another number, size or dtype of caches, or another vocabulary.
    """
    dtype, wanted = getattr(torch, plan.dtype), {}
    if len(facts.caches) != len(plan.cached):
        raise HelixError(f"graphs.json states {len(facts.caches)} caches, the plan has {len(plan.cached)}")
    for i, (row, site) in enumerate(zip(facts.caches, plan.cached, strict=True)):
        stored = row.stored(plan.options.cache_dtype, dtype, site.kv_parts(plan.layout))
        shape = cache_shape(stored, plan.options, plan.layout, site.ring)
        wanted[InputRef.cache(i, bool(site.ring)).name] = (shape, stored.dtype)
    got = {input_ref(n).name: (_shape(n), n.meta["val"].dtype) for n in inputs_of(lowered.graph, "cache")}
    if got != wanted:
        raise HelixError(f"graphs.json takes caches {got}, the plan makes {wanted}")
    scales = {f"cache_scale_{i}" for i in range(len(facts.caches)) if plan.options.cache_dtype == FP8_E4M3}
    if (read := {input_ref(n).name for n in inputs_of(lowered.graph, "scale")}) != scales:
        raise HelixError(f"graphs.json reads the scales {sorted(read)}, the plan makes {sorted(scales)}")
    _check_scaled(lowered, bool(scales))
    for node in lowered.graph.nodes:
        looked_up = is_call(node, aten.embedding.default) and node.args[1] in inputs_of(lowered.graph, "input")
        if not looked_up and helix_op(node) != "embed_rows":
            continue
        table = node.args[0] if looked_up else node.args[1]
        shard = plan.outer.shard(input_ref(table).name)
        words = _shape(table)[0] if shard is None else shard.source_shape[0]
        if words != facts.vocab_size or (shard is not None and _shape(table) != shard.shape):
            raise HelixError(
                f"graphs.json: vocab_size is {facts.vocab_size!r}, its embedding `{node.name}` has {words}"
            )


def _check_scaled(lowered: fx.GraphModule, scaled: bool) -> None:
    """What writes or reads a cache in FP8 of one scale gets that scale, everywhere or nowhere."""
    for name, body in bodies_of(lowered).items():
        for node in body.graph.nodes:
            if helix_op(node) in SCALED and ("cache_scale" in node.kwargs) != scaled:
                wanted = "a cache_scale, by the cache_dtype of plan.json" if scaled else "none: the cache has no scale"
                raise HelixError(
                    f"graphs.json, {name}, node `{node.name}`: cache_scale: got {dict(node.kwargs)}, expected {wanted}"
                )


def check_saved_params(lowered: fx.GraphModule, params: Mapping[int, Mapping[str, Tensor]]) -> None:
    """Each rank holds every parameter of the graph, in its shape and dtype, and no other.

    Raises:
        RuntimeFault: one that is missing, does not fit or is unknown.
    """
    taken = inputs_of(lowered.graph, "param")
    known = {input_ref(n).name for n in taken}
    for rank, held in params.items():
        if unknown := sorted(set(held) - known):
            raise RuntimeFault(f"rank {rank}: the graph takes no parameter {', '.join(unknown)}")
    for node in taken:
        name = input_ref(node).name
        expected = (_shape(node), node.meta["val"].dtype)
        for rank, held in params.items():
            tensor = held.get(name)
            got = (tuple(tensor.shape), tensor.dtype) if isinstance(tensor, Tensor) else None
            if got != expected:
                raise RuntimeFault(f"rank {rank}: parameter {name} is {got}, the graph expects {expected}")
