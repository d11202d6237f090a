"""A lowered graph in segments: what lies between two collectives is one call.

    q, append, attend, pack | all_to_all_single | wait | merge, o_proj | all_reduce | wait | norm, FFN | all_reduce | wait | add
    segment_0                                     segment_1                           segment_2                        segment_3

Segments are runs of neighbours in the order of the graph, so each can be run as a whole. Collectives, calls of bodies and of the
user's own modules stay where they are: starts and waits keep their order, and no group is named inside a segment. Sizes are
computed inside from a tensor that the segment gets, so what goes in and out are tensors alone.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from types import BuiltinFunctionType
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.utils._sympy.functions import FloorDiv

from helix_compile.errors import PassError
from helix_compile.ir.collectives import WAIT, is_collective
from helix_compile.ir.graph import aten, input_ref, is_call, placeholders, ring_name
from helix_compile.ir.shapes import propagate_shapes
from helix_compile.ir.stage import SEGMENTS, bodies_of, copy_module, graphs_of
from helix_compile.passes.runner import PassContext

# what moves no data: a run of these and one op that computes is no segment, calling it would cost more than the op
_FREE = {
    getattr(aten, name)
    for name in (
        *("view", "_unsafe_view", "slice", "transpose", "t", "unsqueeze", "squeeze", "permute", "expand", "select"),
        *("split", "split_with_sizes", "unflatten", "movedim", "detach", "alias"),
    )
}


@dataclass(frozen=True)
class SegmentsPass:
    """The stage behind `lowered` where segments are compiled. See Pass."""

    stage: str = SEGMENTS

    def requires(self, stage: fx.GraphModule, context: PassContext) -> None:
        """Any lowered stage can be cut."""

    def run(self, stage: fx.GraphModule, context: PassContext) -> None:
        """Cut the outer graph and every body."""
        cut_stage(stage)

    def ensures(self, stage: fx.GraphModule, context: PassContext) -> None:
        """No segment holds a collective."""
        for name, graph in graphs_of(stage):
            if "_segment_" in name and (inside := [n for n in graph.graph.nodes if is_boundary(n, inside=True)]):
                raise PassError(f"{name}: {', '.join(n.name for n in inside)} inside a segment")


def segments_of(lowered: fx.GraphModule, is_cut: Callable[[fx.Node], bool] | None = None) -> fx.GraphModule:
    """The stage `segments` of a lowered one, which is left as it is."""
    copy = copy_module(lowered)
    cut_stage(copy, is_cut)
    return copy


def cut_stage(stage: fx.GraphModule, is_cut: Callable[[fx.Node], bool] | None = None) -> None:
    """Cut the outer graph of a lowered stage and every body, in place; `is_cut` as in cut_graph()."""
    _know_shapes(stage)
    _lay_out_arguments(stage)
    for name, graph in graphs_of(stage):
        cut_graph(graph, name, is_cut or is_boundary)


def is_boundary(node: fx.Node, inside: bool = False) -> bool:
    """True for what is in no segment: a collective, its wait, a call of another graph or module, what is read off a module.

    And a function of Python that a user's edit calls: what it computes may hang on things that its code in a graph would not follow.
    """
    if is_collective(node) or is_call(node, WAIT) or node.op in ("call_module", "get_attr", "call_method"):
        return True
    if node.op == "call_function":
        return not isinstance(node.target, (torch._ops.OpOverload, BuiltinFunctionType))
    return not inside


def cut_graph(gm: fx.GraphModule, of: str, is_cut: Callable[[fx.Node], bool] = is_boundary) -> None:
    """Put every run of computing nodes of `gm` into a submodule OF_segment_0, OF_segment_1, ... and call that.

    Args:
        gm: is changed.
        of: its name.
        is_cut: True for a node that is in no segment.
    """
    runs = [run for run in _runs(gm.graph, is_cut) if sum(map(computes, run)) > 1]
    run_of = {node: number for number, run in enumerate(runs) for node in run}
    needed = [_outputs(run) for run in runs]
    graph, new = fx.Graph(), dict[fx.Node, fx.Node]()
    last = {run[-1]: number for number, run in enumerate(runs)}
    sizes_inside = {n for n in gm.graph.nodes if is_size(n) and _used_inside_alone(n, run_of)}
    for node in gm.graph.nodes:
        if node not in run_of and node not in sizes_inside:
            new[node] = graph.node_copy(node, new.__getitem__)
            new[node].meta = dict(node.meta)
        if node in last:
            number = last[node]
            segment, inputs = _segment(gm, runs[number], needed[number])
            gm.add_submodule(f"{of}_segment_{number}", segment)
            given = tuple(new[i] for i in inputs)
            call = graph.create_node("call_module", f"{of}_segment_{number}", given, name=f"segment_{number}")
            call.meta = {"val": tuple(n.meta.get("val") for n in needed[number]), "segment": number}
            for place, value in enumerate(needed[number]):
                new[value] = graph.create_node("call_function", operator.getitem, (call, place), name=value.name)
                new[value].meta = dict(value.meta)
    gm.graph = graph
    gm.recompile()


def _know_shapes(stage: fx.GraphModule) -> None:
    """Bring them up to date: a user's edit may say none, or those of what was there before; an outer graph knows few.

    Raises:
        PassError: an op does not take what it gets, or a layer returns another dtype than the next one takes.
    """
    for name, body in bodies_of(stage).items():
        propagate_shapes(body.graph)
        _check_returned(name, body.graph)
    graph = stage.graph
    for node in placeholders(graph):
        kind, name = input_ref(node)
        if kind == "input" and (name == "page_table" or name.startswith(ring_name("table"))):
            bodies = [placeholders(b.graph) for b in bodies_of(stage).values()]
            pages = {p.meta["val"].shape[1] for body in bodies for p in body if input_ref(p) == ("step", name)}
            if len(pages) == 1:
                ids = placeholders(graph)[0].meta["val"]
                node.meta["val"] = ids.new_empty((ids.shape[0], pages.pop()))
    propagate_shapes(graph)


def _check_returned(name: str, body: fx.Graph) -> None:
    """Code of one layer is made for what the layers before it return."""
    (returned,) = next(n for n in body.nodes if n.op == "output").args
    hidden = returned[0] if isinstance(returned, (tuple, list)) else returned
    taken = [n.meta["val"] for n in placeholders(body) if input_ref(n).kind == "hidden"]
    gives = hidden.meta.get("val") if isinstance(hidden, fx.Node) else None
    if taken and isinstance(gives, Tensor) and gives.dtype != taken[0].dtype:
        raise PassError(
            f"{name}: it returns {hidden} in {gives.dtype}, and layers take {taken[0].dtype}: an edit must cast back "
            "before it can be compiled"
        )


def _lay_out_arguments(stage: fx.GraphModule) -> None:
    """Code holds for the strides that a body was captured with, which are those of whole tensors: a part of one is copied."""
    bodies = bodies_of(stage)
    for call in [n for n in stage.graph.nodes if n.op == "call_module" and str(n.target) in bodies]:
        for place, taken in enumerate(placeholders(bodies[str(call.target)].graph)):
            argument = call.args[place]
            is_part = taken.meta["input"][0] == "tensor" and isinstance(argument, fx.Node) and _is_part(argument)
            if is_part:
                with stage.graph.inserting_before(call):
                    whole = stage.graph.call_function(
                        aten.clone.default, (argument,), {"memory_format": torch.contiguous_format}
                    )
                whole.meta["val"] = argument.meta["val"].contiguous()
                call.update_arg(place, whole)


def _is_part(node: fx.Node) -> bool:
    """True for a tensor that does not lie in a row; by its expressions, which adds no guard."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return False
    expected: Any = 1
    for size, stride in zip(reversed(value.shape), reversed(value.stride()), strict=True):
        if size != 1 and _expression(stride) != _expression(expected):
            return True
        expected = expected * size
    return False


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def _runs(graph: fx.Graph, is_cut: Callable[[fx.Node], bool]) -> list[list[fx.Node]]:
    """Neighbours between boundaries. Sizes are in none; what is taken out of a tuple is where the tuple is."""
    runs: list[list[fx.Node]] = [[]]
    run_of: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        if is_cut(node):
            if runs[-1]:
                runs.append([])
        elif is_call(node, operator.getitem):
            if node.args[0] in run_of:
                run_of[node.args[0]].append(node)
                run_of[node] = run_of[node.args[0]]
        elif not is_size(node):
            runs[-1].append(node)
            run_of[node] = runs[-1]
    return [run for run in runs if run]


def is_size(node: fx.Node) -> bool:
    """True for a number that the sizes of a step give."""
    value = node.meta.get("val")
    return is_call(node, aten.sym_size.int) or isinstance(value, (torch.SymInt, torch.SymBool, torch.SymFloat))


def computes(node: fx.Node) -> bool:
    """True for what is worth a call: no view, nothing that is taken out of a tuple."""
    return not is_call(node, operator.getitem) and getattr(node.target, "overloadpacket", None) not in _FREE


def _used_inside_alone(node: fx.Node, run_of: dict[fx.Node, int]) -> bool:
    """A size that only segments (or other such sizes) read: each computes its own."""
    return all(u in run_of or (is_size(u) and _used_inside_alone(u, run_of)) for u in node.users)


def _outputs(run: list[fx.Node]) -> list[fx.Node]:
    """The tensors of a run that are read behind it."""
    inside = set(run)
    return [n for n in run if isinstance(n.meta.get("val"), Tensor) and any(u not in inside for u in n.users)]


def _hides_batch(graph: fx.Graph, inputs: list[fx.Node]) -> bool:
    """Have inputs of a segment the rows of a part of the batch, and none has all? Then it takes the hidden states too, for their number."""
    sizes = {_expression(size) for n in inputs for size in n.meta["val"].shape if isinstance(size, torch.SymInt)}
    in_parts = any(size.atoms(FloorDiv) for size in sizes)
    return in_parts and _expression(placeholders(graph)[0].meta["val"].shape[0]) not in sizes


def _segment(gm: fx.GraphModule, run: list[fx.Node], returned: list[fx.Node]) -> tuple[fx.GraphModule, list[fx.Node]]:
    """The graph of a run, and the nodes of `gm` whose values it takes."""
    inside, wanted = set(run), dict[fx.Node, None]()

    def want(node: fx.Node) -> None:
        if node in wanted or node in inside:
            return
        if is_size(node):
            for source in node.all_input_nodes:
                want(source)
        wanted[node] = None

    for node in run:
        for source in node.all_input_nodes:
            want(source)
    inputs = [n for n in wanted if not is_size(n)]
    if _hides_batch(gm.graph, inputs):
        inputs.insert(0, placeholders(gm.graph)[0])
    graph, new = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in inputs:
        new[node] = graph.placeholder(node.name)
        new[node].meta = dict(node.meta)
    sizes = {n for n in wanted if is_size(n)}
    for node in gm.graph.nodes:  # in the order of the graph
        if node in inside or node in sizes:
            new[node] = graph.node_copy(node, new.__getitem__)
            new[node].meta = dict(node.meta)
    graph.output(tuple(new[n] for n in returned))
    return _LazyGraphModule(torch.nn.Module(), graph), inputs
