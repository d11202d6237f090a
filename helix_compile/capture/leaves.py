"""Which layers, or parts of layers, stay leaves; and how they come into the graphs.

A leaf is a whole layer without cached attention (linear attention keeps a state that branches on T), or the innermost
module that export chokes on (experts in a Python loop), made opaque while the rest of its layer is captured: it never
hides an attention site that could match. Layers that are the same around their parts share a body, whatever these are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from helix_compile.capture.body import CachedSite, example_like, probe_layer
from helix_compile.capture.checks import explained
from helix_compile.capture.layers import ConcatenatingCache
from helix_compile.capture.structure import alike_but_values
from helix_compile.errors import CaptureError
from helix_compile.ir.dataflow import ancestors
from helix_compile.ir.graph import LAYER_NUMBER, Inputs, add_input, calls, input_named, input_ref
from helix_compile.ir.leaves import LayerCall, Leaf, LeafLayer, LeafPart, leaves_of, record_call
from helix_compile.ir.sizes import HINT_B, HINT_S, hint_of
from helix_compile.ir.stage import copy_module, graphs_of


@torch.library.custom_op("helix_capture::part", mutates_args=())
def _part(tensors: list[Tensor], like: int) -> Tensor:
    """Stand-in for a child module while its layer is exported; its result is shaped like tensors[like]."""
    raise RuntimeError("helix_capture::part has no implementation: it only marks a module's place")


@_part.register_fake
def _(tensors: list[Tensor], like: int) -> Tensor:
    return torch.empty_like(tensors[like])


PART_OP = torch.ops.helix_capture.part.default
# what a graph can't hold, though the module is sound; any other error is the model's own
_DATA_DEPENDENT = ("DynamicOutputShapeException", "DataDependentOutputException", "GuardOnDataDependentSymNode")


@dataclass(frozen=True)
class Probe:
    """What is known of a layer before it is captured.

    Attributes:
        signature: layers of one signature share a body. Of a layer with a part: all but what is inside of the part.
        sites: what it caches.
        leaf: why the whole layer stays a leaf, or "".
        part: dotted name, in the layer, of the child that stays a leaf, or "".
        part_reason: what export said of it.
    """

    signature: str
    sites: list[CachedSite]
    leaf: str = ""
    part: str = ""
    part_reason: str = ""


Choked = list[tuple[str, str, nn.Module]]  # parts that were found so far: name in the layer, reason, module


def probe(layer: nn.Module, call: LayerCall, config: Any, choked: Choked) -> Probe:
    """Run a layer on fake tensors.

    Args:
        choked: a child like one of these is not run again to hear that it can't be; a new one is put there.

    Raises:
        CaptureError: it can't be run so, and no child of it can be held responsible.
    """
    for part, reason, module in choked:
        own = dict(layer.named_modules()).get(part)
        if own is None or not alike_but_values(own, module):
            continue
        with suppress(CaptureError):  # the whole layer is run then, and says what is wrong
            if (found := _probe_around(layer, call, config, part)) is not None:
                return Probe(*found, part=part, part_reason=reason)
    try:
        signature, sites, reads = probe_layer(layer, call, config)
    except CaptureError as error:
        part = _choking_child(layer, call, config) or ""
        around = _probe_around(layer, call, config, part) if part else None
        if around is None:
            raise
        choked.append((part, str(error), layer.get_submodule(part)))
        return Probe(*around, part=part, part_reason=str(error))
    return probe_of(signature, sites, reads)


def probe_of(signature: str, sites: list[CachedSite], reads: bool) -> Probe:
    """Of a layer that can be run: a leaf where it caches nothing, and reads nothing that a layer before it made."""
    kept = "" if sites or reads else "no cached attention: it keeps a state of its own"
    return Probe(signature, sites, leaf=kept)


def _probe_around(layer: nn.Module, call: LayerCall, config: Any, part: str) -> tuple[str, list[CachedSite]] | None:
    """Signature and sites of a layer around its part and how the part is called; None: it is not called at all."""
    with opaque_part(layer, part) as recorded:
        signature, sites, _ = probe_layer(layer, call, config)
    if not recorded:
        return None
    return " ".join([signature, part, *(given.constants() for given in recorded)]), sites


def _choking_child(layer: nn.Module, call: LayerCall, config: Any) -> str | None:
    """The innermost child whose forward raises on fake tensors, if it takes no cache."""
    names = {module: name for name, module in layer.named_modules()}
    active: list[tuple[nn.Module, Any]] = []
    handles = []
    for module in names:
        handles.append(module.register_forward_pre_hook(lambda m, *given: active.append((m, given)), with_kwargs=True))
        handles.append(module.register_forward_hook(lambda *_: active.pop() and None))
    device = next(layer.parameters()).device
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    kind = ""
    try:
        with torch.no_grad(), fake:
            hidden = example_like(call.hidden, device)
            others = [example_like(t, device) for t in call.others]
            cache = ConcatenatingCache(config, None, hidden.new_zeros(HINT_B, 1, HINT_S, 1))
            args, kwargs = call.rebuild(hidden, others, cache)
            layer(*args, **kwargs)
    except Exception as error:  # the model's forward may raise anything
        kind = type(error).__name__
    finally:
        for handle in handles:
            handle.remove()
    if kind not in _DATA_DEPENDENT or not active or active[-1][0] is layer:
        return None
    module, arguments = active[-1]
    is_cache = lambda x: isinstance(x, ConcatenatingCache)  # noqa: E731 - two uses on one line
    return None if any(map(is_cache, pytree.tree_leaves(arguments, is_leaf=is_cache))) else names[module]


@contextmanager
def opaque_part(layer: nn.Module, part: str) -> Iterator[list[LayerCall]]:
    """The child's forward is one opaque op while this is open; yields how it was called."""
    recorded: list[LayerCall] = []
    if not part:
        yield recorded
        return
    child = layer.get_submodule(part)

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        call = record_call(args, kwargs)
        like = _like(child, original, call, part)
        recorded.append(call)
        return PART_OP([call.hidden, *call.others], like)

    original = child.forward
    with patch.object(child, "forward", forward):
        yield recorded


def _like(child: nn.Module, original: Any, call: LayerCall, part: str) -> int:
    """Which of its tensors the result is shaped like, by running the child on small real ones."""
    device = next((p.device for p in child.parameters()), torch.device("cpu"))
    if device.type == "meta":
        return 0  # nothing can be run there; checked on the first real capture
    tensors = [call.hidden, *call.others]
    shapes = [tuple(map(hint_of, t.shape)) for t in tensors]
    with torch.utils._python_dispatch._disable_current_modes(), torch.no_grad():
        real = [torch.zeros(s, dtype=t.dtype, device=device) for s, t in zip(shapes, tensors, strict=True)]
        args, kwargs = call.rebuild(real[0], real[1:], None)
        with explained(f"{type(child).__name__} ({part}) can't be run on {shapes}"):
            out = original(*args, **kwargs)
    if isinstance(out, Tensor):
        for i, tensor in enumerate(real):
            if (out.shape, out.dtype) == (tensor.shape, tensor.dtype):
                return i
    got = f"{tuple(out.shape)} {out.dtype}" if isinstance(out, Tensor) else type(out).__name__
    raise CaptureError(
        f"capture: {type(child).__name__} ({part}) can't be exported and can't stay a leaf: it returns {got}, "
        f"expected one tensor like one of its inputs {shapes}"
    )


def insert_part(
    body: fx.GraphModule, part: str, names: Mapping[int, str], reason: str, recorded: list[LayerCall]
) -> None:
    """The opaque op of a body becomes a call_module of the leaf, which is told the layer; `names`: layer -> full name."""
    layer = add_input(body.graph, *LAYER_NUMBER)
    for number, node in enumerate(calls(body.graph, PART_OP)):
        target = f"leaf_{number}"
        body.add_submodule(target, LeafPart(part, reason, recorded[number], names))
        with body.graph.inserting_before(node):
            call = body.graph.create_node("call_module", target, (layer, *node.args[0]), name=f"{target}_out")
        call.meta = {**node.meta, "leaf": part}
        node.replace_all_uses_with(call)
        body.graph.erase_node(node)
    body.recompile()


def insert_layer(
    module: fx.GraphModule, inputs: Inputs, node: fx.Node, name: str, reason: str, call: LayerCall, config: Any
) -> fx.Node:
    """The opaque op `node` of the outer graph becomes a call_module of a leaf layer; returns it."""
    hidden, others, index = node.args
    graph = module.graph
    arguments, weights = _arguments(others, name)
    target = f"leaf_{index}"
    module.add_submodule(target, LeafLayer(name, reason, call, arguments, config))
    ids = input_named(graph, "input", "input_ids")
    state = inputs.add("leaf", target)
    positions = inputs.add("input", "positions", ids.meta["val"])
    with graph.inserting_before(node):
        leaf = graph.create_node(
            "call_module", target, (hidden, state, positions, ids, *weights), name=f"layer_{index}"
        )
    leaf.meta.update(
        {"layer": index, "leaf": name, "val": node.meta["val"], "stack_trace": node.meta.get("stack_trace")}
    )
    return leaf


def _arguments(others: list[fx.Node], name: str) -> tuple[fx.GraphModule, list[fx.Node]]:
    """Graph of a leaf layer's other tensors, and the weights of the outer graph that it reads."""
    needed = ancestors(others)
    copy, mapping, weights = fx.Graph(), dict[fx.Node, fx.Node](), list[fx.Node]()
    outer = others[0].graph.nodes if others else ()
    for node in (n for n in outer if n in needed):
        if node.op not in ("placeholder", "call_function") or node.meta.get("layer") is not None:
            raise CaptureError(
                f"capture: {name} can't stay a leaf: it reads what another layer computes (`{node.name}`)"
            )
        mapping[node] = copy.node_copy(node, mapping.__getitem__)
        if node.op == "placeholder" and input_ref(node).kind == "param":
            weights.append(node)
    # positions and ids come with the step: what reads hidden states of another layer was refused above
    copy.output(tuple(mapping[n] for n in others))
    return fx.GraphModule(nn.Module(), copy), weights


def bind_leaves(module: fx.GraphModule, model: nn.Module) -> fx.GraphModule:
    """A copy of an outer graph whose leaves are modules of `model`; the graph itself where it has none."""
    if not leaves_of(module):
        return module
    copy = copy_module(module)
    for _, parent in graphs_of(copy):
        for name, child in list(parent.named_children()):
            if isinstance(child, Leaf):
                setattr(parent, name, child.bound(model))
    return copy
