"""Type the finished graph again, from what the ranks really hold: nothing that the passes wrote is read.

Shapes are propagated from the parameters' real shapes on a copy, layouts from how the parameters lie, by one rule an op.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from helix_compile.errors import PassError
from helix_compile.ir.collectives import WAIT
from helix_compile.ir.graph import calls, input_ref, inputs_of, is_param, placeholders, source_line
from helix_compile.ir.leaves import Leaf, is_leaf_call
from helix_compile.ir.shapes import fake_mode_of, propagate_shapes
from helix_compile.ir.stage import bodies_of, body_of, copy_module
from helix_compile.layout.degrees import HelixLayout
from helix_compile.layout.placement import Layout, format_layout
from helix_compile.passes.typing.aten_rules import Result, Rule, require
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

    def infer(name: str, graph: fx.Graph, full_names: dict[fx.Node, str], call: Rule) -> None:
        """Type one graph, whose parameters have these names in the model."""
        where = name or "outer graph"
        try:
            propagate_shapes(graph)
            layouts = infer_layouts(
                graph, lambda n: params.get(full_names[n], {}) if n in full_names else step_layout(n), degrees, call
            )
            typed.layouts[name] = {n.name: layout for n, layout in layouts.items()}
        except Untyped as error:
            typed.findings.append(_finding(where, error))
        except PassError as error:
            typed.findings.append(Finding("HX102", where, str(error), "shapes that fit", 2 if name else 0))

    first_calls: dict[str, fx.Node] = {}
    bodies = [n for n in _layer_calls(outer) if not is_leaf_call(typed.module, n)]
    for call in bodies:
        first = first_calls.setdefault(str(call.target), call)
        typed.findings += _fits(call, first, typed.module, params)
    for name, call in first_calls.items():
        body = body_of(typed.module, name)
        given = zip(placeholders(body.graph), call.args, strict=False)
        full_names = {n: input_ref(a).name for n, a in given if is_param(a)}
        _real_shapes(body.graph, full_names, shapes)
        foreign = _foreign(name, body)
        typed.findings += [*_waits(name, body.graph), *foreign]
        if not foreign:
            infer(name, body.graph, full_names, whole_on_whole)
    own_names = {n: input_ref(n).name for n in inputs_of(outer, "param")}
    _real_shapes(outer, own_names, shapes)
    infer("", outer, own_names, partial(_call, typed))
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


def _call(typed: TypedGraph, node: fx.Node, of: Any, degrees: HelixLayout) -> Result:
    """A layer takes what its body was typed for, and returns the hidden state, whole, and what it hands on."""
    body = typed.module.get_submodule(str(node.target))
    if isinstance(body, Leaf):
        return whole_on_whole(node, of, degrees)
    inside = typed.layouts.get(str(node.target), {})
    for taken, argument in zip(placeholders(body.graph), node.args, strict=False):
        if taken.name in inside and isinstance(argument, fx.Node):
            require(
                of(argument) == inside[taken.name],
                f"`{argument.name}` is {format_layout(of(argument))}, the body takes "
                f"{format_layout(inside[taken.name])} as `{taken.name}`",
            )
    (returned,) = next(n for n in body.graph.nodes if n.op == "output").args
    if isinstance(returned, (tuple, list)):
        return ({}, *(inside.get(n.name, {}) for n in returned[1:]))
    return {}


def _layer_calls(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if n.op == "call_module"]


def every_layer_is_called(graph: fx.GraphModule, layers: list[int]) -> list[Finding]:
    """Each layer of the model once, in order."""
    called = [n.meta.get("layer") for n in _layer_calls(graph.graph)]
    if called == layers:
        return []
    return [Finding("HX109", "outer graph", f"layers {called} are called", f"layers {layers}, once each")]


def _foreign(name: str, body: fx.GraphModule) -> list[Finding]:
    """Nodes of kinds that no pass makes: what a call_method or get_attr computes can't be known."""
    known = ("placeholder", "call_function", "output")
    return [
        Finding("HX103", f"{name}, `{n.name}`", f"{n.op} {n.target}", "a call_function with a typing rule")
        for n in body.graph.nodes
        if n.op not in known and not is_leaf_call(body, n)
    ]


def _real_shapes(graph: fx.Graph, full_names: dict[fx.Node, str], shapes: dict[str, Tensor]) -> None:
    """Inputs as the ranks hold them; nothing that an earlier propagation wrote is trusted."""
    for node, name in full_names.items():
        if name in shapes:
            real = shapes[name]
            with fake_mode_of(graph):
                node.meta["val"] = torch.empty(real.shape, dtype=real.dtype, device=real.device)
    for node in graph.nodes:
        node.meta.pop("val_key", None)


def _finding(where: str, error: Untyped) -> Finding:
    code, family = _CODE[error.kind]
    node = error.node
    line = source_line(node)
    at = f"{where}, node `{node.name}`" + (f" ({line})" if line else "")
    return Finding(code, at, str(error), "operands that the op's typing rule takes", family)


def _waits(name: str, graph: fx.Graph) -> list[Finding]:
    """Each collective has one user, its wait_tensor."""
    waits = {n: sum(u.target is WAIT for u in n.users) for n in calls(graph, *COLLECTIVES)}
    return [
        Finding("HX104", f"{name}, node `{node.name}`", f"{count} wait_tensor", "one", 10)
        for node, count in waits.items()
        if count != 1
    ]


def _fits(call: fx.Node, first: fx.Node, module: fx.GraphModule, params: dict[str, Layout]) -> list[Finding]:
    """A layer gets its own parameters and caches, lying as those of the first layer of its body do."""
    inputs = placeholders(body_of(module, call.target).graph)
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
        elif kind == "scale" and (given.kind, given.site) not in {("scale", s) for s in _sites(call)}:
            findings.append(Finding("HX109", f"{where}, input {name}", given.name, "the scale of its own cache", 4))
        elif kind == "layer" and argument != call.meta.get("layer"):
            findings.append(Finding("HX109", f"{where}, parts of a layer", f"those of layer {argument}", "its own", 2))
    return findings + _own_layer(call, where)


def _sites(call: fx.Node) -> set[int]:
    """Cached attentions whose caches a call gets."""
    return {input_ref(a).site for a in call.args if input_ref(a).kind == "cache"}


def _own_layer(call: fx.Node, where: str) -> list[Finding]:
    """All parameters of a call come from one layer of the model."""
    layers = {_layer_number(input_ref(a).name) for a in call.args if is_param(a)}
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
