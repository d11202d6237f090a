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

from helix_compile.capture_body import capture_body, normalised_module, probe_layer
from helix_compile.capture_checks import check_model, check_surroundings
from helix_compile.capture_equal import OWN_NAMES, EqualLayers
from helix_compile.capture_layers import (
    LayerCall,
    explain_by_whole_run,
    export_around,
    export_whole,
    find_layers,
)
from helix_compile.capture_leaves import (
    Probe,
    bind_leaves,
    insert_part,
    opaque_part,
    probe,
)
from helix_compile.capture_outer import CapturedLayer, build_outer
from helix_compile.capture_paths import check_paths
from helix_compile.errors import CaptureError, HelixError, MatchError
from helix_compile.leaves import Leaf, leaves_of
from helix_compile.passes.fx_edit import placeholders


@dataclass(frozen=True)
class CapturedGraph:
    """A decode step as graphs.

    Attributes:
        graph: outer graph; its call_module nodes are the layers, its submodules the bodies. Placeholders:
            input_ids [B, T], attention_mask [B, S + T], position_ids [B, T], past latents, parameters.
        layers: the layers in order, but for those that stay leaves.
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
    def leaves(self) -> list[Leaf]:
        """What stays the user's own module: whole layers and parts of layers."""
        return leaves_of(self.graph)

    @property
    def all_layers(self) -> list[int]:
        """Numbers of the layers in the order in which they are called, leaves included."""
        return [n.meta["layer"] for n in self.graph.graph.nodes if n.op == "call_module"]

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
    model: nn.Module,
    *,
    whole: bool = False,
    owner: nn.Module | None = None,
    keep: Mapping[int, str] | None = None,
    unmatched: str = "error",
) -> CapturedGraph:
    """Capture the decode step of `model`, which is left as it was.

    Args:
        model: a transformers causal language model in eval mode.
        whole: inline all layers in one body (slow; the cross-check of the per-layer mode).
        owner: object the result is remembered for, by default `model` (a converted copy names its original).
        keep: layers that stay leaves though they could be captured, with the reason.
        unmatched: "keep" makes a leaf of a layer that can't be captured, too.

    Raises:
        CaptureError: training mode, no layers found, or torch.export failed; says where.
    """
    check_surroundings()
    check_model(model)
    memo = _MEMO.setdefault(owner if owner is not None else model, {})
    kept = dict(keep or {})
    key = (whole, unmatched, tuple(sorted(kept.items())), structure_key(model))
    if key not in memo:
        with _experts_as(model, _capturable_experts(model)):
            captured = (
                _capture_whole(model)
                if whole
                else _capture_layers(model, kept, unmatched == "keep")
            )
        memo[key] = replace(captured, model=None)
    return replace(memo[key], graph=bind_leaves(memo[key].graph, model), model=model)


def structure_key(model: PreTrainedModel) -> tuple:
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
    plain = {k: v for k, v in vars(module).items() if k not in OWN_NAMES and _is_plain(v)}
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


def _facts(model: PreTrainedModel) -> dict[str, Any]:
    embedding = model.get_input_embeddings()
    return {
        "dtype": model.dtype,
        "max_positions": getattr(model.config, "max_position_embeddings", None),
        "vocab_size": embedding.num_embeddings,
        "model_name": type(model).__name__,
        "model": model,
        "notes": _mtp_notes(model.config),
    }


def _mtp_notes(config: Any) -> tuple[str, ...]:
    """Checkpoints of some families hold layers that predict further tokens; transformers' classes have none of them."""
    # transformers gives one number both names in some configurations
    names = ("num_nextn_predict_layers", "num_mtp_layers")
    count = next((n for name in names if (n := getattr(config, name, None))), 0)
    if not count:
        return ()
    return (
        f"{count} multi-token-prediction layer(s) in the configuration: ignored, the model class has none",
    )


def _capture_layers(model: nn.Module, keep: dict[int, str], keep_failing: bool) -> CapturedGraph:
    name, layers = find_layers(model)
    try:
        program, calls = export_around(model, layers)
    except CaptureError as error:
        raise explain_by_whole_run(model, None, error) from error.__cause__
    if len(calls) != len(layers):
        raise CaptureError(
            f"capture: {len(layers)} layers in {name!r} but the forward calls {len(calls)}"
        )
    by_signature: dict[tuple, str] = {}
    bodies: dict[str, fx.GraphModule] = {}
    captured, leaves, caches = [], dict[int, str](), 0
    equal = EqualLayers(lambda layer, call: _run_on_fakes(model, layer, call, -1).signature)
    for i, layer in enumerate(layers):
        try:
            known = None if i in keep else equal.find(layer, calls[i])
            found = known or _probe(model, layer, calls[i], i, keep)
            if known is None and not found.leaf and not found.part:
                equal.add(layer, calls[i], found)
            signature = (found.signature, *map(id, calls[i].masks))
            if not found.leaf and signature not in by_signature:
                number = f"body_{len(bodies)}"
                bodies[number] = _capture_body(model, layer, calls[i], found, f"{name}.{i}")
                by_signature[signature] = number
        except HelixError as error:
            if not keep_failing:
                raise
            found = Probe("", [], leaf=str(error))
        if found.leaf:
            leaves[i] = found.leaf
            continue
        places = tuple(range(caches, caches + len(found.sites)))
        caches += len(found.sites)
        captured.append(CapturedLayer(i, f"{name}.{i}.", by_signature[signature], places))
    if not bodies:
        raise _nothing_captured(model, leaves)
    outer = build_outer(
        program, bodies, captured, calls, {i: (f"{name}.{i}", why) for i, why in leaves.items()}, model.config
    )  # fmt: skip
    return CapturedGraph(graph=outer, layers=tuple(captured), **_facts(model))


def _nothing_captured(model: nn.Module, leaves: dict[int, str]) -> MatchError:
    reasons: dict[str, list[int]] = {}
    for index, reason in leaves.items():
        reasons.setdefault(reason, []).append(index)
    lines = [f"  layers {', '.join(map(str, numbers))}: {why}" for why, numbers in reasons.items()]
    return MatchError(
        "\n".join(
            [
                f"{type(model).__name__}: no layer with cached attention that could be rewritten",
                *lines,
            ]
        )
    )


def _probe(
    model: nn.Module, layer: nn.Module, call: LayerCall, index: int, keep: dict[int, str]
) -> Probe:
    if index in keep:
        return Probe("", [], leaf=keep[index])
    try:
        return _run_on_fakes(model, layer, call, index)
    except CaptureError as error:
        raise explain_by_whole_run(model, index, error) from error.__cause__


def _run_on_fakes(model: nn.Module, layer: nn.Module, call: LayerCall, index: int) -> Probe:
    with _experts_as(model, "batched_mm"):  # the fake of grouped_mm takes bf16 only
        return probe(layer, call, model.config, index)


def _capture_body(
    model: nn.Module, layer: nn.Module, call: LayerCall, found: Probe, name: str
) -> fx.GraphModule:
    with opaque_part(layer, found.part) as recorded:
        body = capture_body(layer, call, model.config, found.sites)
    if not found.part:  # the part is a branch on data itself, which can't be run on fake tensors
        check_paths(layer, call, model.config, body)
    if found.part:
        insert_part(body, f"{name}.{found.part}", found.part_reason, recorded)
    return body


def _capture_whole(model: nn.Module) -> CapturedGraph:
    _, layers = find_layers(model)
    _, calls = export_around(model, layers)
    with _experts_as(model, "batched_mm"):  # the fake of grouped_mm takes bf16 only
        probes = [probe_layer(x, calls[i], model.config) for i, x in enumerate(layers)]
    cached = [site for _, sites in probes for site in sites]
    program = export_whole(model, [(site.k_width, site.v_width) for site in cached])
    pasts = [(f"past_{p}_{i}") for i in range(len(cached)) for p in ("latent", "rope")]
    inputs = [("hidden", "input_ids"), ("tensor", "attention_mask"), ("tensor", "position_ids")]
    body = normalised_module(program, [*inputs, *(("past", p) for p in pasts)], prefix="model.")
    layer = CapturedLayer(0, "", "body_0", tuple(range(len(cached))))
    return CapturedGraph(graph=whole_graph(body), layers=(layer,), **_facts(model))


def whole_graph(body: fx.GraphModule) -> fx.GraphModule:
    """The outer graph of a model that is one body: its inputs, one call, logits and what is cached."""
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
    return fx.GraphModule(root, outer)
