"""Only attention may read the cache, its length or the padding: a rank holds its shard of them and nothing else.

What the layer still reads once attention is rewritten is found by walking back from its result, o_proj standing for the
query, the new cache entries and the gate.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import fx

from helix_compile.capture.captured import CapturedGraph
from helix_compile.errors import MatchError
from helix_compile.ir.dataflow import ancestors
from helix_compile.ir.elements import is_cache_update, is_layout_op
from helix_compile.ir.graph import (
    ATTENTION_MASK,
    aten,
    input_ref,
    inputs_of,
    is_call,
    node_named,
    placeholders,
    source_line,
)
from helix_compile.plan.matches import AttentionMatch


def check_context(captured: CapturedGraph, body: str, sites: Sequence[AttentionMatch]) -> None:
    """Raise MatchError if something besides `sites` depends on what is cached, how much that is, or the padding mask."""
    graph = captured.bodies[body].graph
    gone = {n: "what is cached" for n in inputs_of(graph, "past", "shared")}
    gone |= _made_from_mask(captured, body)
    reader_of: dict[fx.Node, fx.Node] = {}
    stands_for = {node_named(graph, s.o_proj): list(_still_read(graph, s)) for s in sites}
    output = next(n for n in graph.nodes if n.op == "output")
    todo = [output.args[0][0]]
    while todo:
        node = todo.pop()
        if node in gone:
            raise _error(captured, body, gone[node], node, reader_of)
        for source in stands_for.get(node, node.all_input_nodes):
            if source not in reader_of:
                reader_of[source] = node
                todo.append(source)


def _still_read(graph: fx.Graph, site: AttentionMatch) -> Iterable[fx.Node]:
    yield from (node_named(graph, name) for name in site.reads)
    yield from (n for n in node_named(graph, site.o_proj).args[1:] if isinstance(n, fx.Node))


def _made_from_mask(captured: CapturedGraph, body: str) -> dict[fx.Node, str]:
    """Inputs of a body that some layer is given something for that depends on the mask or on the cached length."""
    found: dict[fx.Node, str] = {}
    inputs = placeholders(captured.bodies[body].graph)
    for call in captured.graph.graph.nodes:
        if call.op != "call_module" or call.target != body:
            continue
        for placeholder, argument in zip(inputs, call.args, strict=True):
            if input_ref(placeholder).kind != "tensor" or placeholder in found:
                continue
            for node in ancestors([argument], until=[]):
                if node.op == "placeholder" and (input_ref(node) == ATTENTION_MASK or input_ref(node).kind == "past"):
                    found[placeholder] = "the attention mask, or how much is cached"
    return found


def _error(
    captured: CapturedGraph, body: str, what: str, source: fx.Node, reader_of: dict[fx.Node, fx.Node]
) -> MatchError:
    """Names the first reader on the way that does more than move elements or count them."""
    way = [source]
    while way[-1] in reader_of:
        way.append(reader_of[way[-1]])
    between = [n for n in way[1:] if n.op == "call_function"]
    reader = next((n for n in between if not _moves_or_counts(n)), between[0] if between else source)
    if any(is_call(n, aten.sym_size.int) for n in between):
        what = "how much is cached"
    layers = captured.layers_of(body)
    where = f"layer {layers[0].index}" + (f" (and {len(layers) - 1} like it)" if layers[1:] else "")
    return MatchError(
        f"{where}: node `{reader.name}` ({reader.target}, {source_line(reader) or 'no source line'}) reads {what} "
        f"(`{source.name}`) outside of attention: a rank holds its own shard of the cache alone, and no mask.\n"
        "  expected: only attention reads the cache, its length and the mask\n"
        "  nearest that works: compute it from the new tokens and their position_ids; "
        'unmatched="keep" leaves such layers as they are, if others match'
    )


def _moves_or_counts(node: fx.Node) -> bool:
    if is_cache_update(node) or is_layout_op(node) or is_call(node, aten.sym_size.int):
        return True
    return not isinstance(node.meta.get("val"), torch.Tensor)  # arithmetic on sizes
