"""Layers that cache K and V of every head though both are expanded from one latent (transformers 5.17's sparse MLA): the latent is cached.

    kv = linear(latent)                                 k, v = cat([past_k, [kv's k | rope]]), cat([past_v, kv's v])
    latents, ropes = cat([past, latent]), cat([past, rope])       kv = linear(latents)                K = [kv's k | ropes], V = kv's v

Both are the same function: a linear works on each token alone, and what is behind it only moves elements within a token.
That is looked up element by element before anything is changed; a layer of which it isn't true stays as it is.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from helix_compile.ir.dataflow import ancestors
from helix_compile.ir.elements import Provenance, is_cache_update, is_layout_op, trace_elements
from helix_compile.ir.graph import aten, input_ref, is_call, is_param, placeholders
from helix_compile.ir.shapes import fake_mode_of, propagate_shapes
from helix_compile.ir.sizes import shape_of


class _Update(NamedTuple):
    """cat([past, new], 2) of K or V, [B, heads, S + T, width]."""

    node: fx.Node
    past: fx.Node
    new: fx.Node


@dataclass(frozen=True)
class _Expanded:
    """K and V of a site, and what one token's are made from: `latent` and `rope`, [B, T, width] or [B, 1, T, width]."""

    k: _Update
    v: _Update
    latent: fx.Node
    rope: fx.Node


def latents_cached(bodies: Iterable[fx.GraphModule]) -> list[str]:
    """Edit captured bodies: each site whose K and V are expanded from a latent caches the latent and the rope part instead.

    Args:
        bodies: captured layers, or a whole model, compared with the module already.

    Returns:
        Notes of what was changed.
    """
    with torch.device("cpu"):  # elements are traced by numbers, whatever a caller's default device is
        return list(dict.fromkeys(note for body in bodies for note in _with_latents(body)))


def _with_latents(body: fx.GraphModule) -> list[str]:
    graph, notes = body.graph, []
    for k, v in _sites(graph):
        found = _expanded(k, v)
        if found is None:
            continue
        held, needed = (sum(_per_token(n) for n in pair) for pair in ((k.new, v.new), (found.latent, found.rope)))
        if needed >= held:
            continue
        _move(graph, found)
        notes.append(
            f"the model caches K and V of every head ({held} numbers a token and layer) and expands both from one latent; "
            f"cached here are the latent and the shared rope part ({needed})"
        )
    if notes:
        body.recompile()
    return notes


def _per_token(node: fx.Node) -> int:
    B, T = shape_of(node)[0], shape_of(node)[-2]
    return math.prod(shape_of(node)) // (B * T)


def _sites(graph: fx.Graph) -> list[tuple[_Update, _Update]]:
    """K and V of the sites whose two pasts are each read by one concatenation (and for their size)."""
    pasts: dict[int, dict[int, _Update]] = {}
    for past in placeholders(graph):
        ref = input_ref(past)
        if ref.kind != "past" or ref.part > 1:
            continue
        updates = [u for u in past.users if is_cache_update(u)]
        if len(updates) != 1 or any(u is not updates[0] and not is_call(u, aten.sym_size.int) for u in past.users):
            continue
        parts, *dim = updates[0].args
        if len(parts) == 2 and parts[0] is past and dim and dim[0] in (2, -2):
            pasts.setdefault(ref.site, {})[ref.part] = _Update(updates[0], past, parts[1])
    return [(parts[0], parts[1]) for _, parts in sorted(pasts.items()) if len(parts) == 2]


def _expanded(k: _Update, v: _Update) -> _Expanded | None:
    made = trace_elements(v.new)
    sources = made.used()
    if len(sources) != 1 or made.undefined() or not is_call(sources[0], aten.linear.default):
        return None
    linear = sources[0]
    latent, weight = linear.args[:2]
    if not isinstance(latent, fx.Node) or not is_param(weight) or _is_hidden(latent):
        return None
    if not _moves_within_tokens(made, linear) or not _is_one_row(latent):
        return None
    for rope in _without_heads(k.new, linear):
        made = trace_elements(k.new, stop=lambda n, rope=rope: n is rope)  # type: ignore[misc]
        if set(made.used()) == {linear, rope} and not made.undefined():
            fits = _moves_within_tokens(made, linear, rope) and _is_shared_by_heads(made, rope)
            return _Expanded(k, v, latent, rope) if fits else None
    return None


def _is_hidden(node: fx.Node) -> bool:
    return node.op == "placeholder"


def _is_one_row(node: fx.Node) -> bool:
    """[B, T, width] or [B, 1, T, width]."""
    shape = shape_of(node)
    return len(shape) == 3 or (len(shape) == 4 and shape[1] == 1)


def _without_heads(new: fx.Node, linear: fx.Node) -> list[fx.Node]:
    """Values without heads that `new` is moved together from, the nearest first; none that comes from the linear."""
    order = {n: i for i, n in enumerate(new.graph.nodes)}
    todo, seen, found = [new], {new}, []
    while todo:
        node = max(todo, key=order.__getitem__)
        todo.remove(node)
        is_tensor = isinstance(node.meta.get("val"), Tensor)
        if is_tensor and _is_one_row(node) and linear not in ancestors([node], until=[]):
            found.append(node)
        if is_layout_op(node):
            fresh = [n for n in node.all_input_nodes if n not in seen]
            seen.update(fresh)
            todo += fresh
    return found


def _moves_within_tokens(made: Provenance, *sources: fx.Node) -> bool:
    """Does every element of [B, H, T, width] come from the same row of the batch and the same token of a source?"""
    B, _, T, _ = made.ids.shape
    batch, token = torch.arange(B).view(B, 1, 1, 1), torch.arange(T).view(1, 1, T, 1)
    for source in sources:
        shape, base = shape_of(source), made.sources[source]
        if len(shape) < 3 or shape[0] != B or shape[-2] != T or math.prod(shape[1:-2]) != 1:
            return False
        here = (made.ids >= base) & (made.ids < base + math.prod(shape))
        at = torch.unravel_index(torch.where(here, made.ids - base, 0), shape)
        if bool((here & ((at[0] != batch) | (at[-2] != token))).any()):
            return False
    return True


def _is_shared_by_heads(made: Provenance, source: fx.Node) -> bool:
    """Does every head of [B, H, T, width] hold the same elements of a source, where it holds some?"""
    base = made.sources[source]
    here = (made.ids >= base) & (made.ids < base + math.prod(shape_of(source)))
    of_source = torch.where(here, made.ids, 0)
    return torch.equal(of_source, of_source[:, :1].expand_as(of_source))


def _move(graph: fx.Graph, site: _Expanded) -> None:
    """Concatenate the latent and the rope part with what is cached of them, and expand the whole."""
    last = max((site.k.node, site.v.node, site.latent, site.rope), key=list(graph.nodes).index)
    mode = fake_mode_of(graph)
    wholes, news, again = [], [], dict[fx.Node, fx.Node]()
    with graph.inserting_after(last):
        anchor = graph.call_function(aten.sym_size.int, (site.k.past, 2))  # new nodes go in front of it; it goes away
    for update, part in ((site.k, site.latent), (site.v, site.rope)):
        rows = part
        with graph.inserting_before(anchor):
            if len(shape_of(part)) == 3:
                rows = _made_as(graph, part, aten.unsqueeze.default, part, 1)
            whole = _made_as(graph, update.node, aten.cat.default, [update.past, rows], 2)
            again[part] = whole if rows is part else _made_as(graph, part, aten.squeeze.dim, whole, 1)
        B, _, S, _ = update.past.meta["val"].shape
        with mode:
            update.past.meta["val"] = update.past.meta["val"].new_empty((B, 1, S, shape_of(part)[-1]))
        wholes.append(whole)
        news.append(rows)
    with graph.inserting_before(anchor):
        total = _made_as(graph, wholes[0], aten.sym_size.int, wholes[0], 2)
    _tokens_become(graph, site, again, total)
    _expand_again(graph, anchor, site, again)
    for update in (site.k, site.v):
        update.node.replace_all_uses_with(again[update.new])
        graph.erase_node(update.node)
    output = next(n for n in graph.nodes if n.op == "output")
    replaced = dict(zip((site.k.new, site.v.new), news, strict=True))
    output.args = fx.map_arg(output.args, lambda n: replaced.get(n, n))
    graph.erase_node(anchor)
    _in_order(graph)
    graph.eliminate_dead_code()
    propagate_shapes(graph)
    graph.lint()


def _made_as(graph: fx.Graph, like: fx.Node, target: Any, *args: Any) -> fx.Node:
    """A call that comes from the line of the model that `like` comes from."""
    node = graph.call_function(target, args)
    node.meta["stack_trace"] = like.meta.get("stack_trace")
    return node


def _tokens_become(graph: fx.Graph, site: _Expanded, again: dict[fx.Node, fx.Node], total: fx.Node) -> None:
    """A size that is T stands for S + T where the whole is expanded."""
    tokens = site.k.new.meta["val"].shape[2]
    for node in graph.nodes:
        size = node.meta.get("val")
        if isinstance(size, torch.SymInt) and node is not total and size.node.expr == tokens.node.expr:
            again[node] = total


def _expand_again(graph: fx.Graph, anchor: fx.Node, site: _Expanded, again: dict[fx.Node, fx.Node]) -> None:
    """Copies, in front of `anchor`, of all that lies between the parts and K and V; `again` has a copy for each."""
    cut = set(again)
    between = ancestors([site.k.new, site.v.new], until=cut)
    for node in [n for n in graph.nodes if n in between]:
        # what knows neither tokens nor parts (weights, sizes of a batch) is the same for the whole
        if node.op == "call_function" and any(n in again for n in node.all_input_nodes):
            with graph.inserting_before(anchor):
                again[node] = graph.node_copy(node, lambda n: again.get(n, n))
            again[node].meta.pop("val", None)
            again[node].meta.pop("val_key", None)


def _in_order(graph: fx.Graph) -> None:
    """Readers of K and V stand behind them: what reads the old concatenations may stand in front of the new ones."""
    done: set[fx.Node] = set()
    nodes = list(graph.nodes)
    sorted_nodes: list[fx.Node] = []
    todo = [n for n in reversed(nodes)]
    while todo:
        node = todo[-1]
        if node in done:
            todo.pop()
            continue
        waiting = [n for n in node.all_input_nodes if n not in done]
        if waiting:
            todo.extend(waiting)
            continue
        todo.pop()
        done.add(node)
        sorted_nodes.append(node)
    for before, node in itertools.pairwise(sorted_nodes):
        before.append(node)
