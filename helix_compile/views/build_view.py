"""fx.Graph -> GraphView, with shapes and bytes by the letters that a reader knows: B, T, S.

Views, reshapes, getitem and wait_tensor are folded into edges, which carry the shape and layout that arrives.
Small ops (elementwise, reductions, casts) of one module become one node where that keeps the graph acyclic.
Parameters are listed at the node that reads them. Nothing here changes a graph.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from helix_compile.ir.graph import input_ref, is_param, placeholders, source_line
from helix_compile.ir.sizes import shape_text
from helix_compile.layout.placement import format_placement
from helix_compile.views.folding import (
    Folded,
    cluster_of,
    fold,
    group_small_ops,
    is_collective,
    is_helix_op,
    is_small,
    module_paths,
)
from helix_compile.views.graph_text import parameter_text
from helix_compile.views.graph_view import EdgeView, GraphView, InputView, NodeView, ValueView


def build_view(
    graph: fx.Graph,
    name: str,
    *,
    first_stage: Mapping[str, str] | None = None,
    egress: Sequence[tuple[str, float]] = (),
    runs: bool = True,
) -> GraphView:
    """The view of one graph.

    Args:
        graph: a body, or an outer graph.
        name: its name.
        first_stage: node name -> first stage that has it; used where a node doesn't say which pass made it.
        egress: (torch's name, bytes a rank and token) of the plan's collectives in order.
        runs: join small ops of a module into one node, and leave out the step's small inputs.
    """
    folded = fold(graph)
    modules = module_paths(graph)
    groups = group_small_ops(folded, modules) if runs else [[n] for n in folded.kept]
    owner = {n: group for group in groups for n in group}
    leaving = {root for n in folded.kept for root, _ in folded.arguments(n) if owner[root] is not owner[n]}
    builder = _Builder(folded, modules, Letters(graph), first_stage or {}, runs, leaving)
    nodes = [builder.node(group) for group in groups if builder.is_drawn(group)]
    edges = builder.edges(groups, owner)
    return GraphView(name, tuple(_with_egress(nodes, egress)), tuple(edges))


def first_stages(stages: Mapping[str, fx.GraphModule], body: str | None) -> dict[str, str]:
    """Node name -> the first stage whose graph of `body` (None: the outer graph) has it."""
    found: dict[str, str] = {}
    for stage, module in stages.items():
        for node in module.get_submodule(body or "").graph.nodes:
            found.setdefault(node.name, stage)
    return found


def _with_egress(nodes: list[NodeView], egress: Sequence[tuple[str, float]]) -> list[NodeView]:
    """Give each collective its bytes, if the plan's list and the graph agree op by op."""
    collectives = [n for n in nodes if n.kind == "collective"]
    if [n.title for n in collectives] != [op for op, _ in egress]:
        return nodes
    known = {n.name: amount for n, (_, amount) in zip(collectives, egress, strict=True)}
    return [replace(n, egress=known[n.name]) if n.name in known else n for n in nodes]


@dataclass(frozen=True)
class _Builder:
    """Turns groups of fx nodes into NodeViews and the arguments between them into EdgeViews."""

    folded: Folded
    modules: dict[fx.Node, str]
    letters: Letters
    first_stage: Mapping[str, str]
    runs: bool
    leaving: set[fx.Node]

    def is_drawn(self, group: list[fx.Node]) -> bool:
        """In a picture with runs, of all inputs only the hidden states have a box; others are named where they are read."""
        node = group[0]
        if node.op != "placeholder":
            return True
        kind = _input_kind(node)
        return kind != "param" and (not self.runs or kind == "hidden")

    def node(self, group: list[fx.Node]) -> NodeView:
        last = group[-1]
        reads = [a for n in group for a in self.folded.arguments(n)]
        roots = [r for r, _ in reads if r.op == "placeholder"]
        caches = [input_ref(r).name for r in roots if _input_kind(r) in ("past", "cache")]
        title, subtitle = self._titles(group)
        subtitle = ", ".join(x for x in (subtitle, *dict.fromkeys(caches)) if x)
        return NodeView(
            name=last.name,
            kind=_kind(group),
            op=", ".join(dict.fromkeys(_op_text(n) for n in group)),
            title=title,
            subtitle=subtitle,
            cluster=cluster_of(self.modules.get(last, "")),
            module=self.modules.get(last, ""),
            stage=self._stage(last),
            origin=_union(n.meta.get("helix_origin", ()) for n in group),
            source=_sources(group),
            outputs=self._outputs(group),
            params=self._inputs(r for r in roots if is_param(r)),
            step_inputs=self._inputs(r for r in roots if not is_param(r) and not self.is_drawn([r])),
            members=tuple((n.name, _op_text(n)) for n in group) if len(group) > 1 else (),
        )

    def edges(self, groups: list[list[fx.Node]], owner: dict[fx.Node, list[fx.Node]]) -> list[EdgeView]:
        found: dict[tuple[str, str], EdgeView] = {}
        for group in groups:
            for node in group:
                for root, arrived in self.folded.arguments(node):
                    source = owner.get(root)
                    if source is None or source is group or not self.is_drawn(source):
                        continue
                    key = (source[-1].name, group[-1].name)
                    old = found.get(key, EdgeView(*key, (), ()))
                    found[key] = EdgeView(
                        *key,
                        (*old.values, *(v for v in self.values(arrived) if v not in old.values)),
                        (*old.folded, *(_op_text(n) for n in self.folded.path(arrived))),
                    )
        return list(found.values())

    def values(self, node: fx.Node) -> tuple[ValueView, ...]:
        val, layout = node.meta.get("val"), node.meta.get("layout")
        vals = val if isinstance(val, (list, tuple)) else (val,)
        layouts = layout if isinstance(layout, (list, tuple)) else [layout] * len(vals)
        return tuple(
            ValueView(
                self.letters.shape(v),
                str(v.dtype).removeprefix("torch."),
                {a: format_placement(p) for a, p in (lay or {}).items() if a != "pending"},  # a picture folds the wait
                bytes_text(v, self.letters),
            )
            for v, lay in zip(vals, layouts, strict=False)
            if isinstance(v, Tensor)
        )

    def _outputs(self, group: list[fx.Node]) -> tuple[ValueView, ...]:
        found: list[ValueView] = []
        for node in group:
            if node.op == "output":
                return tuple(v for _, a in self.folded.arguments(node) for v in self.values(a))
            if node in self.leaving:
                found += [v for v in self.values(node) if v not in found]
        return tuple(found)

    def _inputs(self, nodes: Any) -> tuple[InputView, ...]:
        names = {n: input_ref(n).name or n.name for n in dict.fromkeys(nodes)}
        return tuple(InputView(name, self.values(n)[0]) for n, name in names.items())

    def _stage(self, node: fx.Node) -> str:
        stated = node.meta.get("helix_stage") or self.first_stage.get(node.name)
        return str(stated or "captured")

    def _titles(self, group: list[fx.Node]) -> tuple[str, str]:
        last, module = group[-1], self.modules.get(group[-1], "")
        if last.op in ("placeholder", "output"):
            return input_ref(last).name or last.name, ""
        if last.op == "call_module":
            return str(last.name), str(last.target)
        op = _op_text(last)
        op = op.split(".")[1] if "." in op else op
        if len(group) == 1 and not is_small(last):
            params = [p for p, _ in self.folded.arguments(last) if is_param(p)]
            if params and not is_helix_op(last):
                return parameter_text(input_ref(params[-1 if op == "einsum" else 0]).name), op
            if is_collective(last):
                return op, f"over {_axis(last)}"
            return op, "helix" if is_helix_op(last) else "aten"
        if len(group) == 1:
            made = self._stage(last) != "captured"
            return (last.name, op) if made and not last.name.startswith(op) else (op, "")
        whole = [n for n in self.folded.kept if self.modules.get(n) == module]
        leaf = module.rsplit(".", 1)[-1]
        called = _called(group)
        title = leaf if set(whole) == set(group) or not called else called
        return title or "ops", f"{len(group)} ops"


def _kind(group: list[fx.Node]) -> str:
    node = group[-1]
    if node.op == "placeholder":
        return "cache" if _input_kind(node) in ("past", "cache") else "input"
    if node.op == "output":
        return "output"
    if is_collective(node):
        return "collective"
    if is_helix_op(node):
        return "helix"
    return "run" if is_small(node) else "op"


def _input_kind(node: fx.Node) -> str:
    return str(input_ref(node).kind)


def _op_text(node: fx.Node) -> str:
    if node.op != "call_function":
        return str(node.op)
    name = getattr(node.target, "__name__", str(node.target))
    text = str(node.target) if not str(node.target).startswith("<") else name
    return text.removesuffix(".default")


def _axis(node: fx.Node) -> str:
    """The mesh axis of a collective: the last text among its arguments; of a reshard, what it goes from and to."""
    texts = [a for a in node.args if isinstance(a, str)]
    return " -> ".join(texts) if "reshard" in str(node.target) else (texts or ["?"])[-1]


def _sources(group: list[fx.Node]) -> str:
    """file:line of the ops; lines of one file joined to a range."""
    lines: dict[str, list[int]] = {}
    for node in group:
        text = node.meta.get("helix_source") or source_line(node)
        file, _, line = str(text).rpartition(":")
        if file and line.isdigit():
            lines.setdefault(file, []).append(int(line))
    spans = {f: (min(n), max(n)) for f, n in lines.items()}
    return ", ".join(f"{f}:{a}" + (f"-{b}" if b > a else "") for f, (a, b) in spans.items())


def _called(group: list[fx.Node]) -> str:
    """The function that the source line of most of these ops calls, or ""."""
    traces = [(n.meta.get("stack_trace") or "").strip().splitlines() for n in group]
    texts = [t[-1].strip() for t in traces if t and not t[-1].strip().startswith("File ")]
    if not texts:
        return ""
    text = max(dict.fromkeys(texts), key=texts.count)
    called = text.split("(")[0].split()[-1].rsplit(".", 1)[-1] if "(" in text else ""
    return called if called.isidentifier() and texts.count(text) * 2 > len(group) else ""


def _union(names: Any) -> tuple[str, ...]:
    return tuple(dict.fromkeys(str(n) for some in names for n in some))


class Letters:
    """The letter of each symbol of a graph, learnt from inputs whose sizes are one symbol."""

    def __init__(self, graph: fx.Graph):
        self._letters: dict[str, str] = {}
        for node in placeholders(graph):
            value = node.meta.get("val")
            if isinstance(value, Tensor) and value.dim():
                texts = shape_text(value)[1:-1].split(",")
                for size, letter in zip(value.shape, texts, strict=True):
                    if isinstance(size, torch.SymInt) and letter in ("B", "T", "S"):
                        self._letters.setdefault(str(size), letter)

    def sizes(self, value: Tensor) -> list[str]:
        """Sizes as text, such as "512", "S+T" or "32896*B*T"."""
        text = shape_text(value)[1:-1].replace(" ", "")
        named = re.sub(r"\bs\d+\b", lambda m: self._letters.get(m[0], m[0]), text)
        return named.split(",") if value.dim() else []

    def shape(self, value: Tensor) -> str:
        """A shape, such as "[B,T,72]"."""
        return "[" + ",".join(self.sizes(value)) + "]"


def bytes_text(value: Tensor, letters: Letters) -> str:
    """Bytes of a value, such as "14,336 x B*T"; a product over the sizes that are known only at run time."""
    known, symbols = value.dtype.itemsize, []
    for text in letters.sizes(value):
        factors = text.split("*") if re.fullmatch(r"[\w*]+", text) else [f"({text})"]
        for factor in factors:
            if factor.isdigit():
                known *= int(factor)
            else:
                symbols.append(factor)
    return f"{known:,}" + (f" x {'*'.join(sorted(symbols))}" if symbols else "")
