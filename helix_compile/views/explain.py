"""explain_node(): the chain from a node of a finished graph back to the user's source line, with layouts and shapes."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import fx

from helix_compile.errors import HelixError
from helix_compile.ir.origin import CAPTURED, ORIGIN, SOURCE, STAGE, VIA
from helix_compile.ir.sizes import layout_text, shape_text
from helix_compile.ir.stage import graphs_of


@dataclass(frozen=True)
class ValueText:
    """One value as text: node name, op, shape "[B,T,72]", layout "world:P(sum)" ("-" where none was inferred)."""

    name: str
    op: str
    shape: str
    layout: str
    source: str = ""

    def __str__(self) -> str:
        return f"{self.name} = {self.op}  {self.value}"

    @property
    def value(self) -> str:
        """Shape, and layout where there is one."""
        return self.shape if self.layout == "-" else f"{self.shape}  {self.layout}"


@dataclass(frozen=True)
class NodeExplanation:
    """Where a node comes from; print() it.

    Attributes:
        body: the graph it is in, "outer" for the one around the layers.
        node: the node in the last stage that has it.
        in_stage: that stage; "lowered" unless a pass has taken the node away.
        made_by: stage whose pass made it, "captured" for a node of the user's model.
        via: (stage, node) of what it was before: a lowered collective was a move.
        origins: the captured nodes that it stands for.
        source: "file:line" of the user's model.
        reads: what it reads there: layouts and shapes before it.
        history: (stage, value) where the node's op, shape, layout or arguments are not those of the stage before.
        became: nodes of the last stage that stand for this one, where it is gone.
    """

    body: str
    node: ValueText
    in_stage: str
    made_by: str
    via: tuple[tuple[str, str], ...]
    origins: tuple[ValueText, ...]
    source: str
    reads: tuple[ValueText, ...]
    history: tuple[tuple[str, ValueText], ...]
    became: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The same as plain data."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{self.body}.{self.node}  (stage {self.in_stage})"]
        if self.became:
            lines.append(f"  gone after {self.in_stage}; now: {', '.join(self.became)}")
        by = "the user's model" if self.made_by == CAPTURED else f"pass {self.made_by}"
        lines.append(f"  made by   {by}")
        lines += [f"  was       {name}  (stage {stage})" for stage, name in reversed(self.via)]
        for origin in self.origins if self.made_by != CAPTURED else ():
            lines.append(f"  from      {origin}  {origin.source}".rstrip())
        lines.append(f"  source    {self.source or 'none: not a line of the model'}")
        lines += [f"  reads     {value}" for value in self.reads]
        lines.append(f"  gives     {self.node.value}")
        if len(self.history) > 1:
            lines += [f"  {stage:<9} {value.value}" for stage, value in self.history]
        return "\n".join(lines)


def explain_node(stages: Mapping[str, fx.GraphModule], name: str, body: str | None = None) -> NodeExplanation:
    """Explain one node of the last stage, or of the last one that has it.

    Args:
        stages: stage name -> outer graph, in order.
        name: "linear_4", or with its graph "body_0.linear_4".
        body: "body_0", or "outer"; needed where several graphs have the name.

    Raises:
        HelixError: no such node (close names are listed), or one in several graphs.
    """
    name, body = _split(stages, name, body)
    for stage in reversed(list(stages)):
        found = [(g, n) for g, n in _named(stages[stage], name) if body in (None, g)]
        if len(found) > 1:
            full_names = ", ".join(f"{graph}.{name}" for graph, _ in found)
            raise HelixError(f"node {name!r} is in {len(found)} graphs; say which: {full_names}")
        if found:
            return _explanation(stages, stage, *found[0])
    raise HelixError(_unknown(stages, name, body))


def _split(stages: Mapping[str, fx.GraphModule], name: str, body: str | None) -> tuple[str, str | None]:
    last = list(stages.values())[-1]
    names = [graph for graph, _ in graphs_of(last)]
    first, _, rest = name.partition(".")
    if body is None and rest and first in names:
        return rest, first
    if body is not None and body not in names:
        raise HelixError(f"no graph {body!r}; expected one of {', '.join(names)}")
    return name, body


def _named(stage: fx.GraphModule, name: str) -> list[tuple[str, fx.Node]]:
    return [(g, n) for g, gm in graphs_of(stage) for n in gm.graph.nodes if n.name == name]


def _unknown(stages: Mapping[str, fx.GraphModule], name: str, body: str | None) -> str:
    known = {
        f"{graph}.{node.name}": node.name
        for stage in stages.values()
        for graph, gm in graphs_of(stage)
        for node in gm.graph.nodes
        if body in (None, graph)
    }
    close = difflib.get_close_matches(name, set(known.values()), n=4)
    full_names = [full_name for full_name, short in known.items() if short in close][:6]
    hint = f"; close: {', '.join(full_names)}" if full_names else ""
    where = body or f"any of {len(graphs_of(list(stages.values())[-1]))} graphs"
    return f"no node {name!r} in {where}, stages {', '.join(stages)}{hint}"


def _explanation(stages: Mapping[str, fx.GraphModule], stage: str, body: str, node: fx.Node) -> NodeExplanation:
    first = dict(graphs_of(next(iter(stages.values()))))[body]
    originals = {n.name: n for n in first.graph.nodes}
    last_name, last = list(stages.items())[-1]
    step = [node.meta.get(STAGE), node.name]
    became = [
        n.name
        for n in dict(graphs_of(last))[body].graph.nodes
        if node.name in n.meta.get(ORIGIN, ()) or step in n.meta.get(VIA, ())
    ]
    return NodeExplanation(
        body=body,
        node=value_text(node),
        in_stage=stage,
        made_by=node.meta.get(STAGE, "an edit after the passes"),
        via=tuple((s, n) for s, n in node.meta.get(VIA, ())),
        origins=tuple(_origin(name, originals) for name in node.meta.get(ORIGIN, ())),
        source=node.meta.get(SOURCE, ""),
        reads=tuple(value_text(n) for n in node.all_input_nodes),
        history=_history(stages, body, node.name),
        became=() if stage == last_name else tuple(became),
    )


def _origin(name: str, originals: dict[str, fx.Node]) -> ValueText:
    """An original node; a reloaded module has kept names alone of those that were rewritten."""
    if name in originals:
        return value_text(originals[name])
    return ValueText(name, "(a captured node)", "-", "-")


def value_text(node: fx.Node) -> ValueText:
    """A node as text."""
    op = node.op if node.op != "call_function" else str(node.target).removesuffix(".default")
    if node.op == "call_function" and not hasattr(node.target, "_schema"):
        op = getattr(node.target, "__name__", op)
    return ValueText(node.name, op, shape_text(node.meta.get("val")), layout_text(node), node.meta.get(SOURCE, ""))


def _history(stages: Mapping[str, fx.GraphModule], body: str, name: str) -> tuple[tuple[str, ValueText], ...]:
    steps: list[tuple[str, ValueText]] = []
    before: Any = None
    for stage, module in stages.items():
        for node in (n for g, n in _named(module, name) if g == body):
            value = value_text(node)
            now = (value.op, value.shape, value.layout, str(node.args))
            if now != before:
                steps.append((stage, value))
            before = now
    return tuple(steps)
