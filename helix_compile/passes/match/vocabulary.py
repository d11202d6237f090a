"""Find the two ends of a model in its outer graph: the table in which tokens are looked up, and the linear that makes the logits."""

from __future__ import annotations

from torch import fx

from helix_compile.capture.captured import CapturedGraph
from helix_compile.errors import MatchError
from helix_compile.ir.dataflow import ancestors
from helix_compile.ir.graph import InputRef, aten, calls, input_ref, is_param, source_line
from helix_compile.ir.sizes import shape_of
from helix_compile.plan.matches import VocabularyMatch

_IDS = InputRef("input", "input_ids")


def find_vocabulary(captured: CapturedGraph) -> VocabularyMatch:
    """Embedding and head of a captured model.

    Raises:
        MatchError: names the node that another shape of graph has in their place.
    """
    graph = captured.graph.graph
    found = [n for n in calls(graph, aten.embedding.default) if input_ref(n.args[1]) == _IDS]
    embedding = _only(found, "looks up input_ids (aten.embedding)", graph)
    (returned,) = next(n for n in graph.nodes if n.op == "output").args
    last_layer = [n for n in graph.nodes if n.op == "call_module"][-1:]
    behind = ancestors([returned[0]], until=last_layer)
    heads = [n for n in calls(graph, aten.linear.default) if n in behind]
    linear = _only(heads, "makes the logits (aten.linear behind the last layer)", graph)
    rows, weight, bias = embedding.args[0], linear.args[1], (*linear.args, None)[2]
    for node, user in ((rows, embedding), (weight, linear), (bias, linear)):
        if node is None:
            continue
        others = [u for u in node.users if u not in (embedding, linear)]
        if not is_param(node) or others:
            why = f"is read by `{others[0].name}` too" if others else "is computed, and no parameter"
            raise MatchError(
                f"head='shard': `{node.name}`, which node `{user.name}` ({source_line(user) or 'no source line'}) takes, {why}: "
                "its rows can't be cut; use head='replicate'"
            )
    return VocabularyMatch(
        embedding.name,
        input_ref(rows).name,
        tuple(shape_of(rows)),
        linear.name,
        input_ref(weight).name,
        tuple(shape_of(weight)),
        "" if bias is None else input_ref(bias).name,
    )


def _only(found: list[fx.Node], what: str, graph: fx.Graph) -> fx.Node:
    if len(found) == 1:
        return found[0]
    got = ", ".join(f"`{n.name}`" for n in found) or "none"
    raise MatchError(f"head='shard': expected one node of the outer graph that {what}, got {got}; use head='replicate'")
