"""Moves become collectives; compute ops get a provider. The only pass that makes collectives.

    all_to_all_heads(o, lse)      pack_heads -> all_to_all_single -> wait_tensor -> unpack_heads
    reshard(P -> R)               all_reduce -> wait_tensor
    reshard(S(d) -> R)            all_gather_into_tensor -> wait_tensor -> peers of dim 0 moved to dim d
    kth_by_owners(candidates)     rows_for_owners -> all_to_all_single -> kth_candidate -> pack_kth -> all_gather -> unpack_kth
    reshard(P -> S(d))            dim d moved to 0 -> reduce_scatter_tensor -> wait_tensor -> moved back

Of what is exchanged in parts (meta["part"]) the wait and what follows it stand where the result is first read: between a part's start
and its wait lies what the order of the moves puts there, the attention of the next part.

Group arguments are axis names, so the graphs of all ranks are the same text.
"""

from __future__ import annotations

from torch import fx
from torch.distributed.tensor.placement_types import Partial, Shard

from helix_compile.errors import LoweringError
from helix_compile.ir.collectives import ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, REDUCE_SCATTER, WAIT, run_collective
from helix_compile.ir.graph import PART, aten, calls, getitems, named
from helix_compile.ir.ops import MOVES, helix, overload
from helix_compile.ir.origin import made_from
from helix_compile.ir.shapes import propagate_shapes
from helix_compile.kernels.exchange import NATIVE, ExchangeCodec, codec_of
from helix_compile.layout.placement import Layout, parse_layout
from helix_compile.passes.runner import PassContext
from helix_compile.plan.matches import LayerMatch


def lower_pass(gm: fx.GraphModule, match: LayerMatch, context: PassContext) -> int:
    """Expand every move of a body."""
    return lower_moves(gm, codec_of(context.plan.options))


def lower_outer_pass(gm: fx.GraphModule, context: PassContext) -> None:
    """The same of the graph around the layers, where that has moves."""
    if has_moves(gm):
        started, planned = lower_moves(gm), len(context.plan.outer.collectives)
        if started != planned:
            raise LoweringError(f"outer graph: {started} moves lowered, the plan has {planned} collectives")


def has_moves(gm: fx.GraphModule) -> bool:
    """True if something moves between ranks in it."""
    return bool(calls(gm.graph, *MOVES))


def lower_moves(gm: fx.GraphModule, codec: ExchangeCodec = NATIVE) -> int:
    """Expand every move, heads exchanged by `codec`; how many collectives that makes."""
    moves = calls(gm.graph, *MOVES)
    started = sum(2 if node.target is helix.kth_by_owners.default else 1 for node in moves)
    for node in moves:
        before = set(gm.graph.nodes)
        with made_from(gm.graph, node), gm.graph.inserting_before(node):
            if node.target is helix.all_to_all_heads.default:
                lowered = _all_to_all_heads(gm.graph, codec, *node.args)
            elif node.target is helix.kth_by_owners.default:
                lowered = _kth_by_owners(gm.graph, *node.args)
            else:
                lowered = _reshard(gm.graph, *node.args)
        lowered.meta = {**node.meta, **lowered.meta}
        node.replace_all_uses_with(lowered)
        gm.graph.erase_node(node)
        if PART in lowered.meta:
            _wait_late([n for n in gm.graph.nodes if n not in before], lowered)
    propagate_shapes(gm.graph)
    return started


def _wait_late(made: list[fx.Node], lowered: fx.Node) -> None:
    """Move the wait among `made`, which a move became, and what is made of it, to where `lowered`, the result, is first read."""
    for node in made:
        node.meta[PART] = list(lowered.meta[PART])
    place = {node: i for i, node in enumerate(lowered.graph.nodes)}
    reader = min(lowered.users, key=place.__getitem__)
    wait = next(i for i, node in enumerate(made) if node.target is WAIT)
    for node in made[wait:]:
        reader.prepend(node)


def no_moves_left(gm: fx.GraphModule) -> None:
    """A lowered graph holds collectives only."""
    left = calls(gm.graph, *MOVES)
    if left:
        raise LoweringError(f"{len(left)} moves not lowered: " + ", ".join(f"`{n.name}` ({n.target})" for n in left))


def _all_to_all_heads(
    graph: fx.Graph, codec: ExchangeCodec, partial_o: fx.Node, lse: fx.Node, axis: str, peers: int
) -> fx.Node:
    buffer = named(graph, "packed", overload(codec.op("pack_heads")), partial_o, lse, peers)
    splits = [1] * peers
    buffer = run_collective(graph, ALL_TO_ALL, buffer, splits, splits, axis)
    return named(graph, "unpacked", overload(codec.op("unpack_heads")), buffer, partial_o, lse)


def _kth_by_owners(
    graph: fx.Graph, candidates: fx.Node, visible: fx.Node, axis: str, peers: int, top_k: int
) -> fx.Node:
    rows = named(graph, "rows_of_owners", helix.rows_for_owners.default, candidates, peers)
    rows = run_collective(graph, ALL_TO_ALL, rows, [1] * peers, [1] * peers, axis)
    one_query_a_row = graph.call_function(aten.unsqueeze.default, (rows, 2))
    kth = named(graph, "kth_candidate", helix.kth_candidate.default, one_query_a_row, top_k)
    found = named(graph, "kth_found", helix.pack_kth.default, *getitems(graph, kth, "owner_score", "owner_position"))
    found = run_collective(graph, ALL_GATHER, found, peers, axis)
    return named(graph, "kth", helix.unpack_kth.default, found, visible)


def _reshard(graph: fx.Graph, x: fx.Node, source: str, target: str, size: int) -> fx.Node:
    before, after = parse_layout(source), parse_layout(target)
    axis = _moved_axis(before, after)
    old, new = before.get(axis, before.get("world")), after.get(axis)
    if isinstance(old, Partial) and new is None:
        return run_collective(graph, ALL_REDUCE, x, "sum", axis)
    if isinstance(old, Shard) and new is None:
        return _gather(graph, x, old.dim, size, axis)
    if isinstance(old, Partial) and isinstance(new, Shard):
        return _reduce_scatter(graph, x, new.dim, size, axis)
    raise LoweringError(f"no collective turns {source!r} into {target!r}")


def _moved_axis(before: Layout, after: Layout) -> str:
    """The one axis along which the layouts differ; "world" -> "tpa" moves along "kvp"."""
    if "world" in before and "tpa" in after:
        return "kvp"
    if "world" in before and not after:
        return "world"
    return next(iter(before))


def _gather(graph: fx.Graph, x: fx.Node, dim: int, size: int, axis: str) -> fx.Node:
    whole = graph.call_function(aten.contiguous.default, (x,))
    whole = run_collective(graph, ALL_GATHER, whole, size, axis)
    if dim == 0:
        return whole
    # the collective stacks peers on dim 0; heads of peer p go behind those of peer p - 1
    peers = graph.call_function(aten.unflatten.int, (whole, 0, [size, -1]))
    peers = graph.call_function(aten.movedim.int, (peers, 0, dim))
    return graph.call_function(aten.flatten.using_ints, (peers, dim, dim + 1))


def _reduce_scatter(graph: fx.Graph, x: fx.Node, dim: int, size: int, axis: str) -> fx.Node:
    first = graph.call_function(aten.movedim.int, (x, dim, 0))
    first = graph.call_function(aten.contiguous.default, (first,))
    part = run_collective(graph, REDUCE_SCATTER, first, "sum", size, axis)
    return graph.call_function(aten.movedim.int, (part, 0, dim))
