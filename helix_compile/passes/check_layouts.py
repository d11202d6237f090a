"""Type every value of a body: meta["layout"], one placement per mesh axis, inferred by one rule an op.

Run after every pass. A partial sum that reaches a nonlinear op, shards that do not meet or an output that is not whole
is a PassError that names the node.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from helix_compile.errors import PassError
from helix_compile.layout import HelixLayout
from helix_compile.passes.fx_edit import source_line
from helix_compile.passes.helix_rules import HELIX_RULES
from helix_compile.passes.lowered_rules import LOWERED_RULES
from helix_compile.passes.typing_rules import RULES, Violation
from helix_compile.placement import Layout, PerRank, format_layout, normal_form, parse_layout
from helix_compile.plan import BodyPlan

_RULES = {**RULES, **HELIX_RULES, **LOWERED_RULES}
_PER_RANK = {"slots": "kvp", "visible": "kvp", "kvp_rank": "kvp", "ep_rank": "ep"}


def check_layouts(gm: fx.GraphModule, *, plan: BodyPlan, degrees: HelixLayout) -> None:
    """Infer and write meta["layout"] of every node of a body.

    Raises:
        PassError: a value that the op which reads it can't take, or an output that is not the same on every rank.
    """
    layouts: dict[fx.Node, Any] = {}

    def of(node: Any) -> Any:
        return layouts[node]

    for node in gm.graph.nodes:
        try:
            layouts[node] = _infer(node, of, plan, degrees)
        except Violation as violation:
            raise PassError(
                f"{plan.name}, node `{node.name}` ({source_line(node) or node.target}): {violation}"
            ) from violation
        node.meta["layout"] = layouts[node]


def _infer(node: fx.Node, of: Any, plan: BodyPlan, degrees: HelixLayout) -> Any:
    if node.op == "placeholder":
        return normal_form(_input_layout(node, plan), degrees)
    if node.op == "output":
        result = of(node.args[0])
        if result:
            raise Violation(
                f"the body returns {format_layout(result)}, expected the same value on every rank"
            )
        return result
    rule = _RULES.get(node.target)
    if rule is not None:
        result = rule(node, of, degrees)
        if isinstance(result, tuple):
            return tuple(normal_form(r, degrees) for r in result)
        return normal_form(result, degrees)
    return _whole(node, of)


def _whole(node: fx.Node, of: Any) -> Any:
    """An op without a rule is fine on values that are the same on every rank, and on nothing else."""
    for source in node.all_input_nodes:
        layout = of(source)
        if any(layout) if isinstance(layout, tuple) else layout:
            raise Violation(
                f"`{node.target}` has no typing rule and reads `{source.name}`: {layout}"
            )
    value = node.meta.get("val")
    return ({},) * len(value) if isinstance(value, (tuple, list)) else {}


def _input_layout(node: fx.Node, plan: BodyPlan) -> Layout:
    kind, name = node.meta["input"]
    if kind == "cache":
        return {"kvp": PerRank()}
    if kind in ("step", "input") and name in _PER_RANK:
        return {_PER_RANK[name]: PerRank()}
    if kind == "param" and node.meta.get("sharded"):
        shard = plan.shard(name)
        assert shard is not None
        return parse_layout(shard.layout)
    return {}
