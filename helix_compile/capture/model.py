"""nn.Module -> CapturedGraph: the decode step as one outer graph and one body per structurally distinct layer. The outer graph has one
call_module a layer, of its body or of the user's own module.
"""

from __future__ import annotations

import gc
import operator
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import Tensor, fx, nn
from transformers import PreTrainedModel

from helix_compile.capture.around_paths import check_around
from helix_compile.capture.body import CONSTANTS, capture_body, normalised_module, probe_layer
from helix_compile.capture.captured import CapturedGraph, CapturedLayer, results_of, whole_graph
from helix_compile.capture.checks import check_model, check_surroundings
from helix_compile.capture.expanded_cache import latents_cached
from helix_compile.capture.experts import experts_as
from helix_compile.capture.layers import (
    LAYER_OP,
    RESULT_OP,
    explain_by_whole_run,
    export_around,
    export_whole,
    find_layers,
)
from helix_compile.capture.leaves import (
    Choked,
    Probe,
    bind_leaves,
    insert_layer,
    insert_part,
    opaque_part,
    probe,
    probe_of,
)
from helix_compile.capture.paths import (
    Sizes,
    check_eager_experts,
    check_paths,
    check_paths_by_numbers,
    dataflow_elsewhere,
)
from helix_compile.capture.rope import tables_by_position
from helix_compile.capture.same_values import EXPORTED
from helix_compile.capture.shared import with_shared
from helix_compile.capture.structure import alike_but_values, attributes_kept, tensors_forgotten, tensors_of
from helix_compile.capture.together import CanNotRun, not_compared, run_together
from helix_compile.errors import CaptureError, HelixError, MatchError
from helix_compile.ir.graph import (
    ATTENTION_MASK,
    LAYER_NUMBER,
    PARTS,
    POSITION_IDS,
    InputRef,
    Inputs,
    input_ref,
    placeholders,
)
from helix_compile.ir.leaves import LayerCall
from helix_compile.ir.sizes import HINT_B, HINT_S

TESTED = (5, 24)  # the newest transformers
CAPTURING = threading.RLock()  # torch.export patches what all threads share


@contextmanager
def _without_collection() -> Iterator[None]:
    """Graphs are many small objects that refer to each other: looking through them again and again is an eighth of a capture."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def capture(
    model: nn.Module, *, whole: bool = False, keep: Mapping[int, str] | None = None, unmatched: str = "error"
) -> CapturedGraph:
    """Capture the decode step of `model`, which is left as it was.

    Args:
        model: a transformers causal language model in eval mode.
        whole: inline all layers in one body (slow; the cross-check of the per-layer mode).
        keep: layers that stay leaves though they could be captured, with the reason.
        unmatched: "keep" makes a leaf of a layer that can't be captured, too.

    Raises:
        CaptureError: training mode, no layers found, or torch.export failed; says where.
    """
    check_surroundings()
    check_model(model)
    with CAPTURING, _without_collection(), tables_by_position(model), attributes_kept(model):
        captured = _captured(model, whole, dict(keep or {}), unmatched)
        return replace(captured, graph=bind_leaves(captured.graph, model), model=model)


def _captured(model: nn.Module, whole: bool, keep: dict[int, str], unmatched: str) -> CapturedGraph:
    """Nothing is remembered: what a model computes may hang on things that no key of ours would see."""
    form, now = _capturable_experts(model), getattr(model.config, "_experts_implementation", None)
    eager = "eager" if form and now == "eager" else ""
    with experts_as(model, form):
        return _capture_whole(model) if whole else _capture_layers(model, keep, unmatched == "keep", eager)


def _capturable_experts(model: PreTrainedModel) -> str | None:
    """The form to capture: grouped_mm raises on fp64, eager is a Python loop over the experts that were hit."""
    now = getattr(model.config, "_experts_implementation", None)
    if now not in (None, "eager", "batched_mm", "grouped_mm"):
        raise CaptureError(
            f"capture: the experts are computed by {now!r}, a function that was registered with transformers; what it computes "
            "is not known here: model.set_experts_implementation('grouped_mm')"
        )
    fits = now == "batched_mm" or (now == "grouped_mm" and model.dtype != torch.float64)
    return None if fits else "batched_mm"


def _facts(model: PreTrainedModel) -> dict[str, Any]:
    embedding, config = model.get_input_embeddings(), model.config.get_text_config()
    words = getattr(
        embedding, "num_embeddings", getattr(config, "vocab_size", None)
    )  # a wrapper has no count of its own
    if not isinstance(words, int):
        raise CaptureError(
            f"capture: how many token ids {type(model).__name__} knows can't be read: its input embedding "
            f"({type(embedding).__name__}) has no num_embeddings, its configuration no vocab_size"
        )
    return {
        "dtype": model.dtype,
        "max_positions": getattr(model.config, "max_position_embeddings", None),
        "vocab_size": words,
        "model_name": type(model).__name__,
        "model": model,
        "notes": (*version_notes(), *getattr(model, "notes_of_release", ()), *_mtp_notes(model.config)),
    }


def version_notes() -> tuple[str, ...]:
    """A newer transformers than any that was tested is no reason to refuse."""
    major, minor = (int(n) for n in transformers.__version__.split(".")[:2])
    if (major, minor) <= TESTED:
        return ()
    return (f"transformers {transformers.__version__} is newer than what was tested (up to {TESTED[0]}.{TESTED[1]})",)


def _mtp_notes(config: Any) -> tuple[str, ...]:
    """Checkpoints of some families hold layers that predict further tokens; transformers' classes have none of them."""
    # transformers gives one number both names in some configurations
    names = ("num_nextn_predict_layers", "num_mtp_layers")
    count = next((n for name in names if (n := getattr(config, name, None))), 0)
    if not count:
        return ()
    return (f"{count} multi-token-prediction layer(s) in the configuration: ignored, the model class has none",)


def _has_own_experts(layer: nn.Module) -> bool:
    """A class under transformers' use_experts_implementation that is not one of transformers'."""
    return any(
        hasattr(m, "is_transposed") and hasattr(m, "has_bias") and not type(m).__module__.startswith("transformers.")
        for m in layer.modules()
    )


def _capture_layers(model: nn.Module, keep: dict[int, str], keep_failing: bool, eager: str) -> CapturedGraph:
    name, layers = find_layers(model)
    try:
        program, exported, calls, returned = export_around(model, layers)
    except CaptureError as error:
        raise explain_by_whole_run(model, None, error) from error.__cause__
    if len(calls) != len(layers):
        raise CaptureError(f"capture: {len(layers)} layers in {name!r} but the forward calls {len(calls)}")
    by_signature: dict[tuple, str] = {}
    bodies: dict[str, fx.GraphModule] = {}
    parts: dict[str, _Parts] = {}
    captured, leaves, caches = [], dict[int, str](), 0
    around = normalised_module(program, [*OUTER_INPUTS, ("past", "past_shape")], prefix="model.")
    facts = _facts(model)
    named = {i: call.names for i, call in calls.items()}
    notes = [*facts.pop("notes"), *check_around(model, layers, returned, around, exported, named, facts["vocab_size"])]
    probes = _probes(model, layers, calls, keep, keep_failing, notes)
    for i, layer in enumerate(layers):
        try:
            if isinstance(found := probes[i], HelixError):
                raise found
            signature = (found.signature, *map(id, calls[i].masks))
            if not found.leaf and signature not in by_signature:
                number = f"body_{len(bodies)}"
                bodies[number], recorded = _capture_body(model, layer, calls[i], found, notes)
                by_signature[signature] = number
                if found.part:
                    parts[number] = _Parts(found, recorded, [layer.get_submodule(found.part)])
            elif found.part:
                number = by_signature[signature]
                parts[number].try_with(layer, calls[i], model, bodies[number], notes)
            if not found.leaf and not found.part and eager and _has_own_experts(layer):
                with experts_as(model, eager):
                    check_eager_experts(layer, calls[i], model.config, bodies[by_signature[signature]])
        except HelixError as error:
            if not keep_failing:
                raise
            found = Probe("", [], leaf=str(error))
        if found.leaf:
            leaves[i] = found.leaf
            continue
        own = tuple(range(caches, caches + len(found.sites)))
        caches += len(found.sites)
        captured.append(CapturedLayer(i, f"{name}.{i}.", by_signature[signature], own))
    if not bodies:
        raise _nothing_captured(model, leaves)
    for number, part in parts.items():
        names = {x.index: f"{x.prefix}{part.found.part}" for x in captured if x.body == number}
        insert_part(bodies[number], part.found.part, names, part.found.part_reason, part.recorded)
    constants = _constants(model, program.constants, [(x.prefix, bodies[x.body].meta[CONSTANTS]) for x in captured])
    notes += latents_cached(bodies.values())
    kept = {i: (f"{name}.{i}", why) for i, why in leaves.items()}
    outer = build_outer(around, bodies, captured, calls, kept, model.config)
    return CapturedGraph(
        graph=outer, layers=with_shared(outer, captured), constants=constants, notes=tuple(notes), **facts
    )


def _constants(
    model: nn.Module, around: Mapping[str, Any], of_layers: Iterable[tuple[str, Mapping[str, Tensor]]]
) -> dict[str, Tensor]:
    """Full name -> constant that no attribute of the model holds; those that one does hold are read there."""
    found = {name.removeprefix("model."): tensor for name, tensor in around.items() if isinstance(tensor, Tensor)}
    found |= {prefix + name: tensor for prefix, constants in of_layers for name, tensor in constants.items()}
    held = tensors_of(model)
    return {name: tensor for name, tensor in found.items() if name not in held}


def _nothing_captured(model: nn.Module, leaves: dict[int, str]) -> MatchError:
    reasons: dict[str, list[int]] = {}
    for index, reason in leaves.items():
        reasons.setdefault(reason, []).append(index)
    lines = [f"  layers {', '.join(map(str, numbers))}: {why}" for why, numbers in reasons.items()]
    return MatchError(
        "\n".join([f"{type(model).__name__}: no layer with cached attention that could be rewritten", *lines])
    )


def _probes(
    model: nn.Module,
    layers: nn.ModuleList,
    calls: Mapping[int, LayerCall],
    keep: Mapping[int, str],
    keep_failing: bool,
    notes: list[str],
) -> list[Probe | HelixError]:
    """Of each layer what is known before it is captured, or why it can't be; unless these are kept, up to the first of them."""
    with experts_as(model, "batched_mm"):  # the fake of grouped_mm takes bf16 only
        try:
            together = run_together(model, layers, dict(calls))
        except CanNotRun:
            found = _probes_one_by_one(model, layers, calls, keep, keep_failing)
            return _probes_around_parts(model, layers, calls, found, notes)
        return [
            Probe("", [], leaf=keep[i])
            if i in keep
            else probe_of(together.signatures[i], together.sites[i], together.reads[i])
            for i in range(len(layers))
        ]


def _probes_around_parts(
    model: nn.Module,
    layers: nn.ModuleList,
    calls: Mapping[int, LayerCall],
    found: list[Probe | HelixError],
    notes: list[str],
) -> list[Probe | HelixError]:
    """The same of a model that can be run as a whole with stand-ins only: for parts that no graph holds, for layers that failed."""
    if len(found) < len(layers):  # it is refused
        return found
    absent = [i for i, probe in enumerate(found) if isinstance(probe, HelixError) or probe.leaf]
    with ExitStack() as stack:
        for layer, probe in zip(layers, found, strict=True):
            stack.enter_context(opaque_part(layer, "" if isinstance(probe, HelixError) else probe.part))
        try:
            signatures = run_together(model, layers, dict(calls), absent).signatures
        except CanNotRun as error:
            notes.append(not_compared(error))
            return found
    return [
        replace(probe, signature=probe.signature + signatures[i])
        if isinstance(probe, Probe) and i in signatures
        else probe
        for i, probe in enumerate(found)
    ]


def _probes_one_by_one(
    model: nn.Module, layers: nn.ModuleList, calls: Mapping[int, LayerCall], keep: Mapping[int, str], keep_failing: bool
) -> list[Probe | HelixError]:
    choked: Choked = []
    found: list[Probe | HelixError] = []
    for i, layer in enumerate(layers):
        try:
            found.append(_probe(model, layer, calls[i], i, keep, choked))
        except HelixError as error:
            found.append(error)
            if not keep_failing:
                break
    return found


def _probe(
    model: nn.Module, layer: nn.Module, call: LayerCall, index: int, keep: Mapping[int, str], choked: Choked
) -> Probe:
    if index in keep:
        return Probe("", [], leaf=keep[index])
    try:
        found = probe(layer, call, model.config, choked)
        if found.leaf:
            return found
        with opaque_part(layer, found.part):
            return replace(found, signature=found.signature + dataflow_elsewhere(layer, call, model.config))
    except CaptureError as error:
        raise explain_by_whole_run(model, index, error) from error.__cause__


@dataclass(frozen=True)
class _Parts:
    """Parts of the layers of one body.

    Attributes:
        recorded: how the body calls the part.
        tried: parts that the body was tried with.
    """

    found: Probe
    recorded: list[LayerCall]
    tried: list[nn.Module]

    def try_with(
        self, layer: nn.Module, call: LayerCall, model: nn.Module, body: fx.GraphModule, notes: list[str]
    ) -> None:
        """The body stands for another layer: by numbers, unless its part runs the same code as one that was tried."""
        part = layer.get_submodule(self.found.part)
        if not any(alike_but_values(part, other) for other in self.tried):
            name, sizes = self.found.part, (Sizes(B=1, T=1),)
            notes += check_paths_by_numbers(layer, call, model.config, body, name, self.recorded, sizes)
            self.tried.append(part)


def _capture_body(
    model: nn.Module, layer: nn.Module, call: LayerCall, found: Probe, notes: list[str]
) -> tuple[fx.GraphModule, list[LayerCall]]:
    """A layer's graph, compared with the layer, and how it calls its part."""
    with opaque_part(layer, found.part) as recorded, tensors_forgotten(layer):
        body = capture_body(layer, call, model.config, found.sites)
    if found.part:
        notes += check_paths_by_numbers(layer, call, model.config, body, found.part, recorded)
    else:
        notes += check_paths(layer, call, model.config, body)
    del body.meta[EXPORTED]  # compared
    return body, recorded


def _capture_whole(model: nn.Module) -> CapturedGraph:
    _, layers = find_layers(model)
    _, _, calls, _ = export_around(model, layers)
    with experts_as(model, "batched_mm"):  # the fake of grouped_mm takes bf16 only
        probes = [probe_layer(x, calls[i], model.config) for i, x in enumerate(layers)]
    cached = [site for _, sites, _ in probes for site in sites]
    program = export_whole(model, [shape for site in cached for shape in site.shapes(HINT_B, HINT_S)])
    pasts = [InputRef.past(p, i).name for i, x in enumerate(cached) for p in PARTS[: len(x.shapes(1, 1))]]
    inputs = [("hidden", "input_ids"), ("tensor", "attention_mask"), ("tensor", "position_ids")]
    body = normalised_module(program, [*inputs, *(("past", p) for p in pasts)], prefix="model.")
    layer = CapturedLayer(0, "", "body_0", tuple(range(len(cached))))
    constants = _constants(model, program.constants, [("", body.meta[CONSTANTS])])
    facts = _facts(model)
    facts["notes"] = (*facts["notes"], *latents_cached([body]))
    return CapturedGraph(graph=whole_graph(body), layers=(layer,), constants=constants, **facts)


OUTER_INPUTS = [("input", "input_ids"), ATTENTION_MASK, POSITION_IDS]


def build_outer(
    module: fx.GraphModule,
    bodies: dict[str, fx.GraphModule],
    captured: list[CapturedLayer],
    calls: dict[int, LayerCall],
    leaves: dict[int, tuple[str, str]],
    config: Any,
) -> fx.GraphModule:
    """The graph around the layers (`module`, in place), with one call_module per layer instead of the opaque op."""
    for name, body in bodies.items():
        module.add_submodule(name, body)
    graph, new_states = module.graph, []
    inputs = Inputs(graph)
    results: dict[int, fx.Node] = {}  # layer -> its call, where it returns more than hidden states
    layers = {layer.index: layer for layer in captured}
    for node in [n for n in graph.nodes if n.target is LAYER_OP]:
        hidden, others, index = node.args
        if index in leaves:
            leaf = insert_layer(module, inputs, node, *leaves[index], calls[index], config)
            node.replace_all_uses_with(leaf)
            graph.erase_node(node)
            continue
        layer = layers[index]
        values = dict(zip(calls[index].names, others, strict=True))
        body = bodies[layer.body]
        args = []
        for placeholder in placeholders(body.graph):
            ref = input_ref(placeholder)
            if ref.kind == "hidden":
                args.append(hidden)
            elif ref.kind == "tensor":
                args.append(values[ref.name])
            elif ref == LAYER_NUMBER:
                args.append(index)
            else:
                if ref.kind == "param":
                    of_model = InputRef("param", f"{layer.prefix}{ref.name}")
                else:  # sites are numbered over all layers
                    of_model = InputRef.past(PARTS[ref.part], layer.caches[ref.site])
                args.append(inputs.add(*of_model, placeholder.meta["val"]))
        with graph.inserting_before(node):
            call = graph.create_node("call_module", layer.body, tuple(args), name=f"layer_{index}")
            call.meta.update({"layer": index, "stack_trace": node.meta.get("stack_trace")})
            out = graph.call_function(operator.getitem, (call, 0))
            states = graph.call_function(operator.getitem, (call, 1))
        out.meta.update({"val": node.meta["val"], "layer": index})
        new_states.append(states)
        results[index] = call
        node.replace_all_uses_with(out)
        graph.erase_node(node)
    _connect_results(graph, results, bodies)
    output = next(n for n in graph.nodes if n.op == "output")
    output.args = ((output.args[0][0], new_states),)
    graph.eliminate_dead_code()
    for unused in [n for n in placeholders(graph) if not n.users]:
        graph.erase_node(unused)
    graph.lint()
    module.recompile()
    return module


def _connect_results(graph: fx.Graph, layers: dict[int, fx.Node], bodies: dict[str, fx.GraphModule]) -> None:
    """What a layer returns besides hidden states comes from its call; what it only passes on, from where it had it.

    Raises:
        CaptureError: a leaf returns something that another layer reads.
    """
    for node in [n for n in graph.nodes if n.target is RESULT_OP]:
        *_, index, number = node.args[:4]
        if node.users and index not in layers:
            raise CaptureError(
                f"capture: layer {index} can't stay a leaf: what it returns besides hidden states is read by "
                f"{', '.join(f'`{u.name}`' for u in node.users)}"
            )
        if node.users:
            call = layers[index]
            body = bodies[str(call.target)].graph
            result = results_of(body)[number]
            if result.op == "placeholder":
                value = call.args[placeholders(body).index(result)]
                assert isinstance(value, fx.Node)
            else:
                with graph.inserting_after(call):
                    value = graph.call_function(operator.getitem, (call, 2 + number))
                value.meta = {"val": node.meta["val"], "layer": index}
            node.replace_all_uses_with(value)
        graph.erase_node(node)
