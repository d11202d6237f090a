"""The graph around the layers after the attention pass: positions, slots and caches instead of mask and pasts.

positions -> shard_index(kvp_rank) -> slots, visible        the only place that knows ranks and blocks
positions -> first_visible(kvp_rank, window or chunk)       once for each window and each size of chunks
positions -> shard_index and first_visible of one rank      where every rank holds the last tokens: ring_slots and so on
positions clamped to 0 -> rotary tables                     padding is position -1
layer_i = body(hidden, ..., slots, visible, page_table, cache_i, parameters)
"""

from __future__ import annotations

from typing import Any

from torch import fx

from helix_compile.capture.captured import CapturedLayer
from helix_compile.errors import PassError
from helix_compile.ir.graph import (
    ATTENTION_MASK,
    PARTS,
    POSITION_IDS,
    InputRef,
    Inputs,
    add_input,
    aten,
    erase_unused,
    getitems,
    input_named,
    input_ref,
    named,
    placeholders,
    ring_name,
)
from helix_compile.ir.leaves import is_leaf_call
from helix_compile.ir.ops import helix
from helix_compile.ir.origin import made_from, stands_for
from helix_compile.ir.shapes import fake_mode_of
from helix_compile.ir.stage import body_of
from helix_compile.passes.rewrite.handed import hand_on, handed_to
from helix_compile.passes.rewrite.parts import step_names
from helix_compile.passes.runner import PassContext
from helix_compile.plan.helix_plan import HelixPlan
from helix_compile.plan.matches import first_visible_input

STEP_INPUTS = ("slots", "visible", "page_table")
KVP_RANK = InputRef("step", "kvp_rank")


def rewire_outer_pass(gm: fx.GraphModule, context: PassContext) -> None:
    """Rebuild every layer call from its body's placeholders; the bodies are already rewritten."""
    graph, plan = gm.graph, context.plan
    layers = {layer.index: layer for layer in context.captured.layers}
    # what placeholders were before the pass: old arguments are found by name
    before = {n: [input_ref(p) for p in placeholders(b.graph)] for n, b in context.captured.bodies.items()}
    _index_tokens(graph, plan)
    handed: dict[fx.Node, list[fx.Node]] = {}  # what a layer chose or cached -> what stands for it
    inputs = Inputs(graph)
    steps = {n.meta["step"]: n for n in reversed(graph.nodes) if "step" in n.meta}
    for call in _layer_calls(gm):
        layer = layers[call.meta["layer"]]
        old = dict(zip(before[call.target], call.args, strict=True))
        body = body_of(gm, call.target)
        sources = {s.name: s.source for s in plan.body(call.target).param_shards}
        given = handed_to(context, call, handed)
        call.args = tuple(
            given.get(input_ref(p)) or _argument(inputs, steps, p, old, layer, sources)
            for p in placeholders(body.graph)
        )
        results = _results(body.graph)
        for user in list(call.users):
            if user.args[1] == 0:
                call.meta["val"] = user.meta.get("val")
                if not results:  # most bodies return the hidden state alone now
                    user.replace_all_uses_with(call)
        if results:
            call.meta["val"] = (call.meta["val"], *(r.meta["val"] for r in results))
            hand_on(graph, context, call, handed)
        _mark_cut(call, body)
    output = next(n for n in graph.nodes if n.op == "output")
    output.args = (output.args[0][0],)
    erase_unused(graph, keep=[placeholders(graph)[0]])
    left = [n for n in placeholders(graph) if input_ref(n) in _GONE or input_ref(n).kind == "past"]
    if left:
        users = ", ".join(f"`{u.name}`" for n in left for u in n.users)
        raise PassError(
            f"outer graph: {', '.join(n.name for n in left)} is still used by {users}; only the mask may "
            "depend on the cached length"
        )


def _results(body: fx.Graph) -> tuple[fx.Node, ...]:
    """What a rewritten body returns besides hidden states."""
    (returned,) = next(n for n in body.nodes if n.op == "output").args
    return tuple(returned[1:]) if isinstance(returned, (tuple, list)) else ()


def _layer_calls(gm: fx.GraphModule) -> list[fx.Node]:
    """Calls of bodies; a leaf is called as it was."""
    calls = [n for n in gm.graph.nodes if n.op == "call_module"]
    return [n for n in calls if not is_leaf_call(gm, n)]


_GONE = (ATTENTION_MASK, POSITION_IDS)


def _index_tokens(graph: fx.Graph, plan: HelixPlan) -> None:
    """Add positions, ranks, page table and shard_index; RoPE reads the clamped positions."""
    ids = placeholders(graph)[0]
    with fake_mode_of(graph):
        scalar = ids.meta["val"].new_empty(())
    gone = [n for n in placeholders(graph) if input_ref(n) in _GONE]
    with made_from(graph, *(gone or [ids])):
        positions = add_input(graph, "input", "positions", ids.meta["val"])
        page_table = add_input(graph, "input", "page_table", ids.meta["val"])
        kvp_rank = add_input(graph, "input", "kvp_rank", scalar)
        tables = {n: add_input(graph, "input", step_names(n)[2], ids.meta["val"]) for n in plan.rings}
    old = next((n for n in gone if input_ref(n) == POSITION_IDS), None)
    first = next(n for n in graph.nodes if n.op != "placeholder")
    with made_from(graph, *(gone or [ids])), graph.inserting_before(first):
        clamped = graph.call_function(aten.clamp.default, (positions, 0))
        clamped.meta["val"] = ids.meta["val"]
        indexed = graph.call_function(
            helix.shard_index.default, (positions, kvp_rank, plan.layout.kvp, plan.options.tokens_per_block)
        )
        slots, visible = getitems(graph, indexed, "slots", "visible")
        slots.meta["step"], visible.meta["step"], page_table.meta["step"] = STEP_INPUTS
        alone = None
        if tables:
            alone = named(graph, "only_rank", aten.new_zeros.default, kvp_rank, [])
            mapped = (positions, alone, 1, plan.options.tokens_per_block)
            indexed = graph.call_function(helix.shard_index.default, mapped)
            for name, value in zip(_RING_STEP, getitems(graph, indexed, *_RING_STEP), strict=True):
                value.meta["step"] = name
        for ring, table in tables.items():
            table.meta["step"] = step_names(ring)[2]
        for window, chunk, ring in _reaches(plan):
            name = first_visible_input(window, chunk)
            mapped = (positions, kvp_rank, plan.layout.kvp, plan.options.tokens_per_block)
            if ring:
                name, mapped = ring_name(name), (positions, alone, 1, plan.options.tokens_per_block)
            first = named(graph, name, helix.first_visible.default, *mapped, window, chunk)
            first.meta["step"] = name
    if old is not None:
        old.replace_all_uses_with(clamped)


_RING_STEP = step_names(1)[:2]


def _reaches(plan: HelixPlan) -> list[tuple[int, int, bool]]:
    """(window, chunk, is it in a ring) of every site that forgets, each once."""
    sites = (site for body in plan.bodies for site in body.attentions)
    return list(dict.fromkeys((site.window, site.chunk, bool(site.ring)) for site in sites if site.reach))


def _argument(
    inputs: Inputs,
    steps: dict[str, fx.Node],
    placeholder: fx.Node,
    old: dict[InputRef, Any],
    layer: CapturedLayer,
    sources: dict[str, str],
) -> Any:
    ref = input_ref(placeholder)
    kind, name = ref
    if ref == KVP_RANK:
        return inputs.add("input", "kvp_rank")
    if kind == "step":
        return steps[name]
    if kind == "cache":
        past = [old[r] for part in PARTS if (r := InputRef.past(part, ref.site)) in old]
        past += [old[r] for i in range(len(PARTS)) if (r := InputRef.shared(i, ref.site)) in old]
        return stands_for(inputs.add(*InputRef.cache(layer.caches[ref.site], ref.ring), placeholder.meta["val"]), *past)
    if kind == "scale":
        return inputs.add(*InputRef.scale(layer.caches[ref.site]), placeholder.meta["val"])
    if kind == "param" and ref not in old:  # cut out of another one
        source = old[InputRef("param", sources[name])]
        return stands_for(inputs.add("param", f"{layer.prefix}{name}", placeholder.meta["val"]), source)
    return old[ref]


def update_calls_pass(gm: fx.GraphModule, context: PassContext) -> None:
    """Follow a pass over the bodies: hand on ep_rank where a body asks for it now, name and mark what has been cut."""
    graph, inputs = gm.graph, Inputs(gm.graph)
    layers = {layer.index: layer for layer in context.captured.layers}
    for call in _layer_calls(gm):
        body = body_of(gm, call.target)
        names = [input_ref(p) for p in placeholders(body.graph)]
        if ("step", "ep_rank") in names and len(names) > len(call.args):
            scalar = input_named(graph, "input", "kvp_rank")
            ep_rank = inputs.add("input", "ep_rank", scalar.meta["val"])
            at = names.index(InputRef("step", "ep_rank"))
            call.args = (*call.args[:at], ep_rank, *call.args[at:])
        call.args = tuple(
            _part_of(inputs, p, argument, layers[call.meta["layer"]], context)
            for p, argument in zip(placeholders(body.graph), call.args, strict=True)
        )
        _mark_cut(call, body)
    erase_unused(graph, keep=[placeholders(graph)[0]])


def _part_of(inputs: Inputs, placeholder: fx.Node, argument: Any, layer: CapturedLayer, context: PassContext) -> Any:
    """The argument for an input, which may be a part now of what the argument was."""
    kind, name = input_ref(placeholder)
    shard = context.plan.body(layer.body).shard(name) if kind == "param" else None
    if shard is None or shard.source == name or not input_ref(argument).name.endswith(shard.source):
        return argument
    return stands_for(inputs.add(kind, f"{layer.prefix}{name}", argument.meta["val"]), argument)


def _mark_cut(call: fx.Node, body: fx.GraphModule) -> None:
    """An outer parameter is cut where its body's placeholder is."""
    for placeholder, argument in zip(placeholders(body.graph), call.args, strict=True):
        if input_ref(placeholder).kind == "param":
            argument.meta["val"] = placeholder.meta["val"]
            argument.meta["sharded"] = placeholder.meta.get("sharded", False)
