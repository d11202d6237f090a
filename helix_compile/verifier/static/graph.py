"""Type the finished graph again, from what the ranks really hold: nothing that the passes wrote is read.

Shapes are propagated from the parameters' real shapes on a copy, layouts from how the parameters lie, by one rule an op.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from helix_compile.errors import PassError
from helix_compile.ir.collectives import WAIT
from helix_compile.ir.graph import calls, input_ref, placeholders, source_line
from helix_compile.ir.leaves import Leaf, is_leaf_call
from helix_compile.ir.shapes import fake_mode_of, propagate_shapes
from helix_compile.ir.stage import bodies_of, body_of, copy_module
from helix_compile.layout.degrees import HelixLayout
from helix_compile.layout.placement import Layout, format_layout
from helix_compile.passes.typing.aten_rules import require
from helix_compile.passes.typing.check_layouts import Untyped, infer_layouts, step_layout, whole_on_whole
from helix_compile.passes.typing.helix_rules import LOWERED_RULES
from helix_compile.verifier.report import Finding

_CODE = {
    "layout": ("HX102", 0),
    "partial": ("HX101", 10),
    "pending": ("HX104", 10),
    "collective": ("HX105", 10),
    "unknown": ("HX103", 0),
}


COLLECTIVES = tuple(t for t in LOWERED_RULES if "_c10d_functional" in str(t) and t is not WAIT)


@dataclass
class TypedGraph:
    """Findings, and the layouts of every node by body ("" is the outer graph), on a copy with fresh shapes."""

    module: fx.GraphModule
    findings: list[Finding] = field(default_factory=list)
    layouts: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def nodes(self) -> int:
        """How many nodes were typed."""
        return sum(map(len, self.layouts.values()))


def type_graph(
    graph: fx.GraphModule, shapes: dict[str, Tensor], params: dict[str, Layout], degrees: HelixLayout
) -> TypedGraph:
    """Infer every layout of outer graph and bodies.

    Args:
        graph: the lowered outer graph.
        shapes: parameter -> a rank's tensor (its shape and dtype are what counts).
        params: parameter -> how it lies over the ranks.
        degrees: the mesh.
    """
    typed = TypedGraph(copy_module(graph))
    outer = typed.module.graph
    _real_shapes(outer, shapes)

    def outer_layout(node: fx.Node) -> Layout:
        kind, name = input_ref(node)
        return params.get(name, {}) if kind == "param" else step_layout(node)

    first_calls: dict[str, fx.Node] = {}
    bodies = [n for n in _layer_calls(outer) if not is_leaf_call(typed.module, n)]
    for call in bodies:
        first = first_calls.setdefault(str(call.target), call)
        typed.findings += _fits(call, first, typed.module, params)
    for name, call in first_calls.items():
        body = body_of(typed.module, name)
        _type_body(typed, name, body.graph, call, shapes, params, degrees)
    _forget_shapes(outer)
    try:
        propagate_shapes(outer)
        layouts = infer_layouts(outer, outer_layout, degrees, partial(_call, typed))
        typed.layouts[""] = {n.name: layout for n, layout in layouts.items()}
    except Untyped as error:
        typed.findings.append(_finding("outer graph", error))
    except PassError as error:
        typed.findings.append(Finding("HX102", "outer graph", str(error), "shapes that fit"))
    return typed


def malformed(graph: fx.GraphModule) -> list[Finding]:
    """Graphs that fx itself would refuse: no output, a node before what it reads, a call of a body that is not there."""
    findings = []
    for where, part in (("outer graph", graph), *bodies_of(graph).items()):
        outputs = [n for n in part.graph.nodes if n.op == "output"]
        if len(outputs) != 1:
            got = f"{len(outputs)} output nodes" if outputs else "no output node"
            findings.append(Finding("HX110", where, got, "one output node, as the last"))
            continue
        try:
            part.graph.lint()
        except Exception as error:  # lint() raises RuntimeError, ValueError and AssertionError
            got = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            findings.append(Finding("HX110", where, got, "a graph that torch.fx accepts"))
    return findings


def _call(typed: TypedGraph, node: fx.Node, of: Any, degrees: HelixLayout) -> Layout:
    """A layer takes what its body was typed for, and returns the hidden state, whole."""
    body = typed.module.get_submodule(str(node.target))
    if isinstance(body, Leaf):
        return whole_on_whole(node, of, degrees)
    assert isinstance(body, fx.GraphModule)
    inside = typed.layouts.get(str(node.target), {})
    for taken, argument in zip(placeholders(body.graph), node.args, strict=False):
        if taken.name in inside and isinstance(argument, fx.Node):
            require(
                of(argument) == inside[taken.name],
                f"`{argument.name}` is {format_layout(of(argument))}, the body takes "
                f"{format_layout(inside[taken.name])} as `{taken.name}`",
            )
    return {}


def _layer_calls(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if n.op == "call_module"]


def every_layer_is_called(graph: fx.GraphModule, layers: list[int]) -> list[Finding]:
    """Each layer of the model once, in order."""
    called = [n.meta.get("layer") for n in _layer_calls(graph.graph)]
    if called == layers:
        return []
    return [Finding("HX109", "outer graph", f"layers {called} are called", f"layers {layers}, once each")]


def _foreign(graph: fx.Graph) -> list[fx.Node]:
    """Nodes of kinds that no pass makes: what a call_method or get_attr computes can't be known."""
    known = ("placeholder", "call_function", "output")
    return [n for n in graph.nodes if n.op not in known]


def _real_shapes(graph: fx.Graph, shapes: dict[str, Tensor]) -> None:
    mode = fake_mode_of(graph)
    for node in placeholders(graph):
        kind, name = input_ref(node)
        if kind == "param" and name in shapes:
            real = shapes[name]
            with mode:
                node.meta["val"] = torch.empty(real.shape, dtype=real.dtype, device=real.device)


def _forget_shapes(graph: fx.Graph) -> None:
    """Nothing that an earlier propagation wrote is trusted."""
    for node in graph.nodes:
        node.meta.pop("val_key", None)


def _type_body(
    typed: TypedGraph,
    name: str,
    graph: fx.Graph,
    call: fx.Node,
    shapes: dict[str, Tensor],
    params: dict[str, Layout],
    degrees: HelixLayout,
) -> None:
    full = dict(zip(placeholders(graph), call.args, strict=False))
    local = {}
    for node, argument in full.items():
        if isinstance(argument, fx.Node) and input_ref(argument).kind == "param":
            local[node] = input_ref(argument).name
    mode = fake_mode_of(graph)
    for node, parameter in local.items():
        if parameter in shapes:
            with mode:
                real = shapes[parameter]
                node.meta["val"] = torch.empty(real.shape, dtype=real.dtype, device=real.device)

    def layout_of(node: fx.Node) -> Layout:
        return params.get(local[node], {}) if node in local else step_layout(node)

    typed.findings += _waits(name, graph)
    module = body_of(typed.module, name)
    foreign = [n for n in _foreign(graph) if not is_leaf_call(module, n)]
    for node in foreign:
        got = f"{node.op} {node.target}"
        typed.findings.append(Finding("HX103", f"{name}, `{node.name}`", got, "a call_function with a typing rule"))
    if foreign:
        return
    _forget_shapes(graph)
    try:
        propagate_shapes(graph)
        layouts = infer_layouts(graph, layout_of, degrees, whole_on_whole)
        typed.layouts[name] = {n.name: layout for n, layout in layouts.items()}
    except Untyped as error:
        typed.findings.append(_finding(name, error))
    except PassError as error:
        typed.findings.append(Finding("HX102", name, str(error), "shapes that fit", 2))


def _finding(where: str, error: Untyped) -> Finding:
    code, family = _CODE[error.kind]
    node = error.node
    line = source_line(node)
    at = f"{where}, node `{node.name}`" + (f" ({line})" if line else "")
    return Finding(code, at, str(error), "operands that the op's typing rule takes", family)


def _waits(name: str, graph: fx.Graph) -> list[Finding]:
    """Each collective has one user, its wait_tensor."""
    findings = []
    for node in calls(graph, *COLLECTIVES):
        waits = [u for u in node.users if u.target is WAIT]
        if len(waits) != 1:
            got = f"{len(waits)} wait_tensor"
            findings.append(Finding("HX104", f"{name}, node `{node.name}`", got, "one", 10))
    return findings


def _fits(call: fx.Node, first: fx.Node, module: fx.GraphModule, params: dict[str, Layout]) -> list[Finding]:
    """A layer gets its own parameters and caches, lying as those of the first layer of its body do."""
    body = body_of(module, call.target)
    inputs = placeholders(body.graph)
    where = f"layer {call.meta.get('layer', call.name)}"
    if len(call.args) != len(inputs):
        return [Finding("HX109", where, f"{len(call.args)} arguments", f"{len(inputs)}")]
    findings = []
    for node, argument, typed_as in zip(inputs, call.args, first.args, strict=True):
        (kind, name), given = input_ref(node), input_ref(argument)
        if kind == "param":
            full = given.name
            lies = format_layout(params.get(full, {}))
            expected = format_layout(params.get(input_ref(typed_as).name, {}))
            if given.kind != "param" or not full.endswith(name):
                findings.append(Finding("HX109", f"{where}, input {name}", full, f"...{name}", 2))
            elif lies != expected:
                findings.append(Finding("HX109", f"{where}, input {name}", lies, expected, 2))
        elif kind == "cache" and given.kind != "cache":
            findings.append(Finding("HX109", f"{where}, input {name}", given.name, "a cache"))
    return findings + _own_layer(call, where)


def _own_layer(call: fx.Node, where: str) -> list[Finding]:
    """All parameters of a call come from one layer of the model."""
    names = [input_ref(a).name for a in call.args if input_ref(a).kind == "param"]
    layers = Counter(_layer_number(name) for name in names)
    if len(layers) > 1:
        got = f"parameters of layers {sorted(map(str, layers))}"
        return [Finding("HX109", where, got, "those of one layer", 2)]
    return []


def _layer_number(name: str) -> str:
    return next((part for part in name.split(".") if part.isdigit()), "")


def collective_sequence(graph: fx.GraphModule) -> list[tuple[str, str]]:
    """(op, axis) in the order of execution, layers inlined."""
    found = []
    for node in graph.graph.nodes:
        if node.op == "call_module":
            body = graph.get_submodule(str(node.target))
            if isinstance(body, fx.GraphModule):  # a leaf starts none
                found += collective_sequence(body)
        elif node.op == "call_function" and node.target in COLLECTIVES:
            found.append((str(node.target).split(".")[1], str(node.args[-1])))
    return found


def same_collectives(graphs: list[fx.GraphModule]) -> list[Finding]:
    """Ranks that run graphs of their own must start the same collectives in the same order."""
    sequences = [collective_sequence(g) for g in graphs]
    for rank, sequence in enumerate(sequences[1:], 1):
        if sequence != sequences[0]:
            place = next(
                (i for i, (a, b) in enumerate(zip(sequence, sequences[0], strict=False)) if a != b),
                min(len(sequence), len(sequences[0])),
            )
            got = f"rank {rank}: {sequence[place : place + 1] or 'nothing'}"
            expected = f"rank 0: {sequences[0][place : place + 1] or 'nothing'}"
            return [Finding("HX108", f"collective #{place}", got, expected, 10)]
    return []
