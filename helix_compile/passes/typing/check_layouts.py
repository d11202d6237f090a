"""Type every value of a body: meta["layout"], one placement per mesh axis, inferred by one rule an op.

Run after every pass. A partial sum that reaches a nonlinear op, shards that do not meet or an output that is not whole
is a PassError that names the node.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.distributed.tensor.placement_types import Shard

from helix_compile.errors import PassError
from helix_compile.ir.graph import helix_op, input_ref, source_line
from helix_compile.layout.degrees import HelixLayout
from helix_compile.layout.placement import Chosen, Layout, PerRank, format_layout, normal_form, parse_layout
from helix_compile.passes.typing.aten_rules import RULES, Rule, Violation, is_partial
from helix_compile.passes.typing.helix_rules import HELIX_RULES, LOWERED_RULES, PENDING, WAIT
from helix_compile.passes.typing.part_rules import rows_made, with_rows, without_rows
from helix_compile.plan.helix_plan import BodyPlan
from helix_compile.plan.matches import FIRST_VISIBLE

_RULES = {**RULES, **HELIX_RULES, **LOWERED_RULES}


_PER_RANK = {"slots": "kvp", "visible": "kvp", "kvp_rank": "kvp", "ep_rank": "ep", "world_rank": "world"}


def check_layouts(gm: fx.GraphModule, *, plan: BodyPlan, degrees: HelixLayout) -> None:
    """Infer and write meta["layout"] of every node of a body.

    Raises:
        PassError: a value that the op which reads it can't take, or an output that is not the same on every rank.
    """

    def input_layout(node: fx.Node) -> Layout:
        kind, name = input_ref(node)
        if kind == "param" and node.meta.get("sharded"):
            shard = plan.shard(name)
            assert shard is not None
            return parse_layout(shard.layout)
        return step_layout(node)

    try:
        layouts = infer_layouts(gm.graph, input_layout, degrees, whole_on_whole)
    except Untyped as error:
        node = error.node
        raise PassError(f"{plan.name}, node `{node.name}` ({source_line(node) or node.target}): {error}") from error
    for node, layout in layouts.items():
        node.meta["layout"] = layout


class Untyped(Exception):
    """Typing stopped at `node`; `kind` is that of the Violation."""

    def __init__(self, node: fx.Node, violation: Violation):
        super().__init__(str(violation))
        self.node, self.kind = node, violation.kind


def infer_layouts(
    graph: fx.Graph, input_layout: Callable[[fx.Node], Layout], degrees: HelixLayout, call_rule: Rule | None = None
) -> dict[fx.Node, Any]:
    """Layout of every node, from those of the placeholders and one rule an op; meta["val"] gives the shapes.

    Args:
        call_rule: the rule of call_module nodes, where the graph has some.

    Raises:
        Untyped: the first node that does not take the layouts it gets.
    """
    layouts: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        try:
            layouts[node] = _infer(node, layouts.__getitem__, input_layout, degrees, call_rule)
        except Violation as violation:
            raise Untyped(node, violation) from violation
    return layouts


def step_layout(node: fx.Node) -> Layout:
    """Layout of an input that is not a parameter. A cache of K and V [pages, page size, K, D] is cut by heads too."""
    ref = input_ref(node)
    kind, name = ref
    if ref.ring:  # the same on every rank, but for the KV heads that each holds
        return {"world": PerRank()} if kind == "cache" and node.meta["val"].dim() == 4 else {}
    if kind == "cache":
        heads: Layout = {"tpa": Shard(2)} if node.meta["val"].dim() == 4 else {}
        return {"kvp": PerRank(), **heads}
    if kind in ("step", "input") and name in _PER_RANK:
        return {_PER_RANK[name]: PerRank()}
    if kind == "step" and name.startswith(FIRST_VISIBLE):
        return {"kvp": PerRank()}
    if kind == "chosen":
        return {"kvp": Chosen()}
    if kind == "written":
        return {"kvp": PerRank()}
    return {}


def _handed_layout(node: fx.Node) -> Layout:
    """Of what a body may hand on besides hidden states: what it wrote, or chose."""
    if helix_op(node) == "cache_append" and input_ref(node.args[0]).ring:
        return {}
    return {"kvp": PerRank()} if helix_op(node) == "cache_append" else {"kvp": Chosen()}


def _infer(
    node: fx.Node,
    of: Callable[[Any], Any],
    input_layout: Callable[[fx.Node], Layout],
    degrees: HelixLayout,
    call_rule: Rule | None,
) -> Any:
    if node.op == "placeholder":
        return normal_form(input_layout(node), degrees)
    started = [n.name for n in node.all_input_nodes if not isinstance(of(n), tuple) and PENDING in of(n)]
    if started and node.target is not WAIT:
        raise Violation(f"reads {started} before wait_tensor", "pending")
    if node.op == "output":
        returned = node.args[0]
        hidden, *others = returned if isinstance(returned, (tuple, list)) else (returned,)
        result = of(hidden)
        if degrees.kvp > 1 and any(of(n) != _handed_layout(n) for n in others):
            texts = ", ".join(f"`{n.name}` {format_layout(of(n))}" for n in others)
            raise Violation(
                f"the graph returns {texts} beside hidden states, expected chosen slots, or what is visible of a cache"
            )
        if result:
            raise Violation(
                f"the graph returns {format_layout(result)}, expected the same value on every rank",
                "partial" if is_partial(result) else "layout",
            )
        return result
    rule = call_rule if node.op == "call_module" else rule_of(node.target)
    if rule is None:
        return _whole(node, of)
    rows = rows_made(node, of)
    try:
        result = with_rows(rule(node, lambda n: without_rows(of(n)), degrees), rows)
    except Violation as violation:
        if violation.kind == "layout" and any(is_partial(of(n)) for n in node.all_input_nodes):
            violation.kind = "partial"
        raise
    return tuple(normal_form(r, degrees) for r in result) if isinstance(result, tuple) else normal_form(result, degrees)


def rule_of(target: Any) -> Rule | None:
    """The typing rule of an op; a form, or a provider's op (helix_triton::mla_decode), has that of the helix:: op it stands for."""
    rule = _RULES.get(target)
    if rule is None and isinstance(target, torch._ops.OpOverload):
        provider, name = target._schema.name.split("::")
        if provider.startswith("helix") and hasattr(torch.ops.helix, name):
            rule = _RULES.get(getattr(torch.ops.helix, name).default)
    return rule


def typing_rule(*targets: Any) -> Callable[[Rule], Rule]:
    """Register the rule that follows as that of `targets` (ops of your own): rule(node, layout_of, degrees) -> layout.

    A rule returns the layout of the node's value (a tuple for several outputs) or raises Violation.
    """

    def register(rule: Rule) -> Rule:
        _RULES.update(dict.fromkeys(targets, rule))
        return rule

    return register


def whole_on_whole(node: fx.Node, of: Callable[[Any], Any], degrees: HelixLayout) -> Any:
    """Rule of an op that computes the same from the same inputs and knows no rank: whole in, whole out."""
    for source in node.all_input_nodes:
        layout = of(source)
        if any(layout) if isinstance(layout, tuple) else layout:
            text = layout if isinstance(layout, tuple) else format_layout(layout)
            raise Violation(
                f"`{node.target}` reads `{source.name}`, which is {text}", "partial" if is_partial(layout) else "layout"
            )
    value = node.meta.get("val")
    return ({},) * len(value) if isinstance(value, (tuple, list)) else {}


def _whole(node: fx.Node, of: Callable[[Any], Any]) -> Any:
    """An op without a rule of its own: a pure function of aten or of Python's operator, on whole values only."""
    if not _is_pure(node.target):
        raise Violation(
            f"`{node.target}` has no typing rule; register one with "
            "helix_compile.passes.typing.check_layouts.typing_rule",
            "unknown",
        )
    return whole_on_whole(node, of, None)  # type: ignore[arg-type] # degrees do not matter to it


# made by transformers' own grouped experts before they are rewritten; registered late, so known by name
_PURE_NAMES = {"transformers::grouped_mm_fallback"}


_PURE_MODULES = {"_operator", "math", "torch"}


def _is_pure(target: Any) -> bool:
    """The same result from the same arguments on every rank: nothing random, nothing written in place."""
    if not isinstance(target, torch._ops.OpOverload):
        return getattr(target, "__module__", "") in _PURE_MODULES
    name = target._schema.name
    if name.split("::")[0] not in ("aten", "prims") and name not in _PURE_NAMES:
        return False
    random = torch.Tag.nondeterministic_seeded in target.tags
    return not random and not target._schema.is_mutable
