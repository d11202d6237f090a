"""nn.Module -> CapturedGraph: the decode step as one outer graph and one body per structurally distinct layer."""

from __future__ import annotations

import inspect
import operator
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from transformers import PreTrainedModel

from helix_compile.capture_body import CachedSite, capture_body, normalised_module, probe_layer
from helix_compile.capture_checks import check_model, check_surroundings
from helix_compile.capture_layers import (
    LAYER_OP,
    LayerCall,
    export_around,
    export_whole,
    find_layers,
)
from helix_compile.errors import CaptureError
from helix_compile.passes.fx_edit import add_input, placeholders


@dataclass(frozen=True)
class CapturedLayer:
    """One layer of the model: which body computes it and where its parameters are.

    Attributes:
        index: place in the model, 0-based.
        prefix: what to put before a body's parameter names, e.g. "model.layers.3.".
        body: name of the body, e.g. "body_1".
        caches: places of its cached tensors in the module's list of caches, one per attention site.
    """

    index: int
    prefix: str
    body: str
    caches: tuple[int, ...]


@dataclass(frozen=True)
class CapturedGraph:
    """A decode step as graphs.

    Attributes:
        graph: outer graph; its call_module nodes are the layers, its submodules the bodies. Placeholders:
            input_ids [B, T], attention_mask [B, S + T], position_ids [B, T], past latents, parameters.
        layers: the layers in order.
        dtype: the dtype it was captured in; a graph can't be retyped.
        max_positions: the model's own longest sequence, or None.
        vocab_size: number of token ids the embedding has.
        model_name: class name, for reports.
        model: the module the parameters come from; None inside the memo.
        weights: what they are read from instead, where `model` is on meta and stands for a checkpoint folder.
        notes: what the plan shall say of where the model came from.
    """

    graph: fx.GraphModule
    layers: tuple[CapturedLayer, ...]
    dtype: torch.dtype
    max_positions: int | None
    vocab_size: int
    model_name: str
    model: nn.Module | None
    weights: Mapping[str, Tensor] | None = None
    notes: tuple[str, ...] = ()

    @property
    def bodies(self) -> dict[str, fx.GraphModule]:
        """Body name -> graph."""
        return {n: m for n, m in self.graph.named_children() if isinstance(m, fx.GraphModule)}

    def layers_of(self, body: str) -> list[CapturedLayer]:
        """The layers that `body` computes."""
        return [layer for layer in self.layers if layer.body == body]


_MEMO: weakref.WeakKeyDictionary[nn.Module, dict[tuple, CapturedGraph]] = (
    weakref.WeakKeyDictionary()
)


def capture(
    model: nn.Module, *, whole: bool = False, owner: nn.Module | None = None
) -> CapturedGraph:
    """Capture the decode step of `model`, which is left as it was.

    Args:
        model: a transformers causal language model in eval mode.
        whole: inline all layers in one body (slow; the cross-check of the per-layer mode).
        owner: object the result is remembered for, by default `model` (a converted copy names its original).

    Raises:
        CaptureError: training mode, no layers found, or torch.export failed; says where.
    """
    check_surroundings()
    check_model(model)
    memo = _MEMO.setdefault(owner if owner is not None else model, {})
    key = (whole, _structure_key(model))
    if key not in memo:
        with _experts_as(model, _capturable_experts(model)):
            captured = _capture_whole(model) if whole else _capture_layers(model)
        memo[key] = replace(captured, model=None)
    return replace(memo[key], model=model)


def _structure_key(model: PreTrainedModel) -> tuple:
    """What a capture depends on: shapes, dtypes, configuration, constants and code of every module, not weights."""
    shapes = tuple((n, tuple(p.shape), p.dtype, p.device) for n, p in model.named_parameters())
    config = model.config
    implementations = (
        config._attn_implementation,
        getattr(config, "_experts_implementation", None),
    )
    modules = tuple((name, _constants_and_code(m)) for name, m in model.named_modules())
    return shapes, implementations, repr(config.to_dict()), modules


def _constants_and_code(module: nn.Module) -> tuple:
    """Plain attributes, hooks, and the functions of the class and of the instance (someone may have patched one)."""
    plain = {k: v for k, v in vars(module).items() if not k.startswith("_") and _is_plain(v)}
    tensors = [
        (k, v.data_ptr(), v._version, tuple(v.shape))
        for k, v in vars(module).items()
        if isinstance(v, torch.Tensor)
    ]
    # handles count up and are never used twice, so they name a set of hooks without holding what hooks close over
    hooks = (tuple(module._forward_hooks), tuple(module._forward_pre_hooks))
    # a bound method's function alone: the method would keep the model alive through its own memo
    patched = [
        (k, getattr(v, "__func__", v)) for k, v in vars(module).items() if inspect.isroutine(v)
    ]
    code = [(k, v) for k, v in vars(type(module)).items() if inspect.isroutine(v)]
    return type(module), repr(plain), tuple(tensors), hooks, tuple(patched), tuple(code)


def _is_plain(value: Any) -> bool:
    """A value whose repr says all there is to say."""
    if isinstance(value, dict):
        return all(_is_plain(k) and _is_plain(v) for k, v in value.items())
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype))


@contextmanager
def _experts_as(model: PreTrainedModel, implementation: str | None) -> Iterator[None]:
    """Experts in another form while this is open (None: as they are)."""
    before = getattr(model.config, "_experts_implementation", None)
    if before is None or implementation in (None, before):
        yield
        return
    try:
        model.set_experts_implementation(implementation)
        yield
    finally:
        model.set_experts_implementation(before)


def _capturable_experts(model: PreTrainedModel) -> str | None:
    """The form to capture: grouped_mm raises on fp64, eager is a Python loop over the experts that were hit."""
    now = getattr(model.config, "_experts_implementation", None)
    fits = now == "batched_mm" or (now == "grouped_mm" and model.dtype != torch.float64)
    return None if fits else "batched_mm"


def _probe_layers(
    model: nn.Module, layers: nn.ModuleList, calls: dict[int, LayerCall]
) -> list[tuple[str, list[CachedSite]]]:
    """Signature and cached sites of each layer; batched_mm, since the fake of grouped_mm takes bf16 only."""
    with _experts_as(model, "batched_mm"):
        return [probe_layer(x, calls[i], model.config) for i, x in enumerate(layers)]


def _facts(model: PreTrainedModel) -> dict[str, Any]:
    embedding = model.get_input_embeddings()
    return {
        "dtype": model.dtype,
        "max_positions": getattr(model.config, "max_position_embeddings", None),
        "vocab_size": embedding.num_embeddings,
        "model_name": type(model).__name__,
        "model": model,
    }


def _capture_layers(model: nn.Module) -> CapturedGraph:
    name, layers = find_layers(model)
    program, calls = export_around(model, layers)
    if len(calls) != len(layers):
        raise CaptureError(
            f"capture: {len(layers)} layers in {name!r} but the forward calls {len(calls)}"
        )
    by_signature: dict[str, str] = {}
    bodies: dict[str, fx.GraphModule] = {}
    captured, caches = [], 0
    probes = _probe_layers(model, layers, calls)
    for i, (layer, (signature, cached)) in enumerate(zip(layers, probes, strict=True)):
        if signature not in by_signature:
            by_signature[signature] = f"body_{len(bodies)}"
            bodies[f"body_{len(bodies)}"] = capture_body(layer, calls[i], model.config, cached)
        places = tuple(range(caches, caches + len(cached)))
        caches += len(cached)
        captured.append(CapturedLayer(i, f"{name}.{i}.", by_signature[signature], places))
    outer = _outer_graph(program, bodies, captured, {i: c.names for i, c in calls.items()})
    return CapturedGraph(graph=outer, layers=tuple(captured), **_facts(model))


_OUTER_INPUTS = [
    ("input", "input_ids"),
    ("input", "attention_mask"),
    ("input", "position_ids"),
]


def _outer_graph(
    program: Any,
    bodies: dict[str, fx.GraphModule],
    layers: list[CapturedLayer],
    other_names: dict[int, list[str]],
) -> fx.GraphModule:
    """The graph around the layers, with one call_module per layer instead of the opaque op."""
    module = normalised_module(program, [*_OUTER_INPUTS, ("past", "past_shape")], prefix="model.")
    for name, body in bodies.items():
        module.add_submodule(name, body)
    graph, new_states = module.graph, []
    for node in [n for n in graph.nodes if n.target is LAYER_OP]:
        hidden, others, index = node.args
        layer = layers[index]
        values = dict(zip(other_names[index], others, strict=True))
        body = bodies[layer.body]
        args = []
        for placeholder in placeholders(body.graph):
            kind, name = placeholder.meta["input"]
            if kind == "hidden":
                args.append(hidden)
            elif kind == "tensor":
                args.append(values[name])
            else:
                full = f"{layer.prefix}{name}" if kind == "param" else _past_name(layer, name)
                args.append(add_input(graph, kind, full, placeholder.meta["val"]))
        with graph.inserting_before(node):
            call = graph.create_node("call_module", layer.body, tuple(args), name=f"layer_{index}")
            call.meta.update({"layer": index, "stack_trace": node.meta.get("stack_trace")})
            out = graph.call_function(operator.getitem, (call, 0))
            states = graph.call_function(operator.getitem, (call, 1))
        out.meta["val"] = node.meta["val"]
        new_states.append(states)
        node.replace_all_uses_with(out)
        graph.erase_node(node)
    output = next(n for n in graph.nodes if n.op == "output")
    output.args = ((output.args[0][0], new_states),)
    graph.eliminate_dead_code()
    for unused in [n for n in placeholders(graph) if not n.users]:
        graph.erase_node(unused)
    graph.lint()
    module.recompile()
    return module


def _past_name(layer: CapturedLayer, name: str) -> str:
    """past_latent_0 of a body -> past_latent_7 of the model: sites are numbered over all layers."""
    part, _, site = name.rpartition("_")
    return f"{part}_{layer.caches[int(site)]}"


def _capture_whole(model: nn.Module) -> CapturedGraph:
    _, layers = find_layers(model)
    _, calls = export_around(model, layers)
    cached = [site for _, sites in _probe_layers(model, layers, calls) for site in sites]
    program = export_whole(model, [(site.k_width, site.v_width) for site in cached])
    pasts = [(f"past_{p}_{i}") for i in range(len(cached)) for p in ("latent", "rope")]
    inputs = [("hidden", "input_ids"), ("tensor", "attention_mask"), ("tensor", "position_ids")]
    body = normalised_module(program, [*inputs, *(("past", p) for p in pasts)], prefix="model.")
    layer = CapturedLayer(0, "", "body_0", tuple(range(len(cached))))
    outer = fx.Graph()
    args = []
    for placeholder in placeholders(body.graph):
        kind, name = placeholder.meta["input"]
        node = outer.placeholder(placeholder.name)
        kind = "input" if kind in ("hidden", "tensor") else kind
        node.meta = {"input": [kind, name], "val": placeholder.meta["val"]}
        args.append(node)
    call = outer.create_node("call_module", "body_0", tuple(args), name="layers")
    call.meta["layer"] = 0
    out = outer.call_function(operator.getitem, (call, 0))
    outer.output((out, [outer.call_function(operator.getitem, (call, 1))]))
    root = nn.Module()
    root.add_module("body_0", body)
    module = fx.GraphModule(root, outer)
    return CapturedGraph(graph=module, layers=(layer,), **_facts(model))
