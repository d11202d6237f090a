"""The walk of an exported step as data: walk.json, a line a node.

    outer     embedding, position tables, one call of a body a layer, norm and head
    bodies    name -> a layer: calls of programs, helix:: ops, and collectives over an axis of the mesh, each with its wait
    mixing    the node, if any, that lets tokens of one call meet: a step that would show it is refused

A node is {name, op, target, args, kwargs}, of an input also what it is, its dtype and shape; "call_module" calls a body or the
program `target` of TARGET.pt2, which returns a tuple of `returns`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx

from helix_compile.errors import ExportError, HelixError
from helix_compile.ir.collectives import COLLECTIVE_OF
from helix_compile.ir.graph import InputRef, input_ref, placeholders, source_line
from helix_compile.ir.graph_json import graph_from_json, graph_to_json
from helix_compile.ir.stage import OUTER, bodies_of
from helix_compile.ir.tokens import mixing_node

WALK = "walk.json"
_VERSION = 1


def walk_document(
    stage: fx.GraphModule, lowered: fx.GraphModule, program_of: Mapping[str, str], identity: str
) -> dict[str, Any]:
    """walk.json of a stage that was cut.

    Args:
        stage: cut for export.
        lowered: what it was cut from.
        program_of: segment -> its program.
        identity: of the export.

    Raises:
        ExportError: a node that is no op of torch's or ours.
    """
    try:
        return {
            "version": _VERSION,
            "helix_export": identity,
            OUTER: _entries(stage, program_of),
            "bodies": {name: _entries(body, program_of) for name, body in layers_of(stage).items()},
            "mixing": {"any": _mixing(lowered, False), "padding": _mixing(lowered, True)},
        }
    except HelixError as error:
        raise ExportError(f"export: {error}") from error


def layers_of(stage: fx.GraphModule) -> dict[str, fx.GraphModule]:
    """Body name -> its graph, of a stage that was cut: its segments are children of a graph too."""
    cut = {str(node.target) for node in stage.graph.nodes if "segment" in node.meta}
    return {name: graph for name, graph in bodies_of(stage).items() if name not in cut}


def _entries(graph: fx.GraphModule, program_of: Mapping[str, str]) -> list[dict[str, Any]]:
    entries = graph_to_json(graph)
    for entry, node in zip(entries, graph.graph.nodes, strict=True):
        if node.op == "get_attr":
            raise ExportError(f"node `{node.name}`: a tensor that an edited graph holds can't be exported")
        if str(node.target).startswith(("helix_cpp.", "helix_triton.")):
            raise ExportError(
                f"node `{node.name}`: {node.target} is a kernel of this machine; compile the model with lower='reference' to "
                "export it"
            )
        entry["meta"] = {"input": entry["meta"]["input"]} if "input" in entry["meta"] else {}
        for empty in [key for key in ("args", "kwargs", "meta") if not entry[key]]:
            del entry[empty]
        if "segment" in node.meta:
            entry["target"], entry["returns"] = program_of[str(node.target)], len(node.meta["val"])
    return entries


def _mixing(lowered: fx.GraphModule, padding: bool) -> dict[str, str] | None:
    node = mixing_node(lowered, padding)
    return None if node is None else {"node": node.name, "source": source_line(node)}


def format_walk(document: Mapping[str, Any]) -> str:
    """Text with a line a node."""

    def lines(entries: list[dict[str, Any]]) -> str:
        return "[\n" + ",\n".join(f"  {json.dumps(entry)}" for entry in entries) + "\n ]"

    bodies = ",\n".join(f" {json.dumps(name)}: {lines(entries)}" for name, entries in document["bodies"].items())
    rest = {key: value for key, value in document.items() if key not in (OUTER, "bodies")}
    head = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in rest.items())
    return f'{{\n{head},\n"{OUTER}": {lines(document[OUTER])},\n"bodies": {{\n{bodies}\n}}\n}}\n'


def read_walk(path: Path) -> dict[str, Any]:
    """The document in a file; ExportError where it is none."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(f"{path}: can't be read: {error}") from error
    if not isinstance(document, dict):
        raise ExportError(f"{path}: no walk: {type(document).__name__}")
    return document


def stage_of_walk(document: Mapping[str, Any], device: torch.device) -> fx.GraphModule:
    """The graphs of walk.json: as a stage in segments, whose segments are empty and named after their programs.

    Raises:
        ExportError: another version, or a node that is not valid.
    """
    if document.get("version") != _VERSION:
        raise ExportError(f"{WALK}: version {document.get('version')!r}, expected {_VERSION}")
    try:
        bodies = {name: _graph(entries, name, {}, device) for name, entries in document["bodies"].items()}
        return _graph(document[OUTER], OUTER, bodies, device)
    except HelixError as error:
        raise ExportError(str(error)) from error
    except (LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise ExportError(f"{WALK}: damaged: {type(error).__name__}: {error}") from error


def _graph(
    entries: list[dict[str, Any]], name: str, bodies: Mapping[str, fx.GraphModule], device: torch.device
) -> fx.GraphModule:
    entries = [{"args": [], "kwargs": {}, "meta": {}, **entry} for entry in entries]  # what is empty is not written
    called = {entry["target"] for entry in entries if "returns" in entry}
    modules = {**bodies, **{program: _closed(program) for program in called}}
    graph = graph_from_json(entries, f"{WALK}, {name}", modules, device, None)
    for node, entry in zip(graph.graph.nodes, entries, strict=True):
        if "returns" in entry:
            node.meta |= {"segment": entry["target"], "val": (None,) * entry["returns"]}
    return graph


def _closed(program: str) -> fx.GraphModule:
    """What stands in a walk for a program, whose graph is in its own file."""
    module = fx.GraphModule(torch.nn.Module(), fx.Graph())
    module.meta["program"] = program
    return module


def programs_called(stage: fx.GraphModule) -> set[str]:
    """Names of the programs of a walk."""
    graphs = (stage, *layers_of(stage).values())
    return {str(n.target) for graph in graphs for n in graph.graph.nodes if "segment" in n.meta}


def inputs_of_walk(document: Mapping[str, Any]) -> dict[InputRef, tuple[list[Any], str]]:
    """Shape and dtype of each input of a step."""
    return {
        InputRef(*e["meta"]["input"]): (e["shape"], e["dtype"]) for e in document[OUTER] if e["op"] == "placeholder"
    }


def step_inputs(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Name, dtype and shape of what a step takes, alike on every rank; letters are free sizes."""
    given = [(ref.name, *of) for ref, of in inputs_of_walk(document).items() if ref.kind == "input"]
    return [{"name": n, "dtype": d, "shape": s} for n, s, d in given if not n.endswith("_rank")]


def mixing_of_walk(document: Mapping[str, Any]) -> dict[bool, fx.Node | None]:
    """By `padding`, as PreparedSteps.mixing(); a node that stands for the one of the graphs that were cut."""

    def standing_for(said: dict[str, str] | None) -> fx.Node | None:
        if said is None:
            return None
        node = fx.Graph().placeholder(said["node"])
        file, _, line = said["source"].rpartition(":")
        node.meta["stack_trace"] = f'File "{file}", line {line}' if file else ""
        return node

    return {False: standing_for(document["mixing"]["any"]), True: standing_for(document["mixing"]["padding"])}


def flattened(stage: fx.GraphModule) -> Iterator[tuple[str, fx.Node, Mapping[fx.Node, InputRef]]]:
    """("layer_3.all_reduce", node, what the inputs of its graph are) of every call, those of bodies where they are called."""
    bodies = layers_of(stage)
    own = {node: input_ref(node) for node in placeholders(stage.graph)}
    for node in stage.graph.nodes:
        if node.op == "call_module" and str(node.target) in bodies and "segment" not in node.meta:
            graph = bodies[str(node.target)].graph
            given = {p: own.get(a, input_ref(p)) for p, a in zip(placeholders(graph), node.args, strict=True)}
            for inner in graph.nodes:
                yield f"{node.name}.{inner.name}", inner, given
        else:
            yield node.name, node, own


def collectives_of(stage: fx.GraphModule) -> list[list[str]]:
    """[name, axis] of each collective of a step, in the order in which every rank starts them."""
    started = [n for _, n, _ in flattened(stage) if n.op == "call_function" and n.target in COLLECTIVE_OF]
    return [[COLLECTIVE_OF[n.target].name, str(n.args[-1])] for n in started]


def without_layers(stage: fx.GraphModule, left_out: Mapping[str, int]) -> None:
    """Take calls of layers out of an outer graph, in place: what such a layer is given goes on, as if it added nothing.

    Args:
        stage: an outer graph.
        left_out: name of the call's node -> layer.

    Raises:
        ExportError: another layer reads more of one of them than its hidden states.
    """
    bodies = layers_of(stage)
    for call in [n for n in stage.graph.nodes if n.name in left_out]:
        taken = placeholders(bodies[str(call.target)].graph)
        place = next(i for i, node in enumerate(taken) if input_ref(node).kind == "hidden")
        (returned,) = bodies[str(call.target)].graph.output_node().args
        hidden = [call]
        if isinstance(returned, (tuple, list)):
            hidden = [user for user in call.users if user.args[1] == 0]
            if others := [user for user in call.users if user not in hidden and user.users]:
                reads = ", ".join(sorted({reader.name for user in others for reader in user.users}))
                raise ExportError(
                    f"--layers: layer {left_out[call.name]} is left out, and {reads} reads what it hands on; keep it"
                )
        for node in hidden:
            node.replace_all_uses_with(call.args[place])
        for node in [*call.users, call]:
            stage.graph.erase_node(node)
    for node in placeholders(stage.graph):
        if not node.users and input_ref(node).kind in ("param", "cache", "scale"):
            stage.graph.erase_node(node)
    stage.recompile()
