"""Where a node comes from: the pass that made it, the captured nodes it stands for, the user's source line.

    meta["helix_stage"]    name of the stage whose pass made the node; "captured" for the original ones
    meta["helix_origin"]   names of captured nodes of the same graph that it stands for
    meta["helix_via"]      [stage, name] of what it was before, from the first rewrite on: a lowered collective was a move
    meta["helix_source"]   "file:line" of the user's model, "" where there is none

The runner marks what a pass made by comparing the graph's nodes before and after it. A pass only says what a node
stands for, where dataflow can't tell: `with made_from(graph, old): ...`. All is plain data, and no name is ever read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import fx

from helix_compile.ir.graph import source_line

STAGE, ORIGIN, VIA, SOURCE = "helix_stage", "helix_origin", "helix_via", "helix_source"
PROVENANCE_KEYS = (STAGE, ORIGIN, VIA, SOURCE)
CAPTURED = "captured"
Neighbours = Callable[[fx.Node], list[fx.Node]]


def mark_captured(graph: fx.Graph) -> None:
    """Mark every node of a freshly captured graph as its own origin. Marking twice changes nothing."""
    for node in graph.nodes:
        node.meta.update({STAGE: CAPTURED, ORIGIN: [node.name], VIA: [], SOURCE: source_line(node)})
    for node in graph.nodes:  # parameters and sizes have no line of their own: the one that reads them first
        node.meta[SOURCE] = node.meta[SOURCE] or _first(_sources(_nearest(node, _readers, SOURCE)))
    for node in graph.nodes:
        near = _nearest(node, _producers, SOURCE)
        node.meta[SOURCE] = node.meta[SOURCE] or _first(_sources(near))


@contextmanager
def made_from(graph: fx.Graph, *old: fx.Node) -> Iterator[None]:
    """What is added to `graph` inside stands for `old`, which may be erased afterwards. An inner block wins."""
    made = _origin_of(old)
    before = set(graph.nodes)
    yield
    for node in graph.nodes:
        if node not in before and ORIGIN not in node.meta:
            node.meta.update(made)


def stands_for(node: fx.Node, *old: fx.Node) -> fx.Node:
    """The same of one node that was added, unless it is said already; returns it."""
    if ORIGIN not in node.meta:
        node.meta.update(_origin_of(old))
    return node


def _origin_of(old: Sequence[fx.Node]) -> dict[str, Any]:
    source = _first(_sources(old)) or _first(map(source_line, old))
    return {ORIGIN: _union(n.meta.get(ORIGIN, [n.name]) for n in old), VIA: _chain(old), SOURCE: source}


def mark_pass(graph: fx.Graph, before: set[fx.Node], stage: str) -> None:
    """Mark what a pass added to `graph`: its stage, and by dataflow the origin of what the pass said nothing about."""
    added = [n for n in graph.nodes if n not in before]
    for node in added:
        node.meta[STAGE] = stage
    for node in [n for n in added if ORIGIN not in n.meta]:
        # an input has no producers: it stands for what its readers stand for
        near = _nearest(node, _producers, ORIGIN) or _nearest(node, _readers, ORIGIN)
        origins = _union(n.meta[ORIGIN] for n in near)
        node.meta.update({ORIGIN: origins, VIA: [], SOURCE: _first(_sources(near))})


def _producers(node: fx.Node) -> list[fx.Node]:
    return node.all_input_nodes


def _readers(node: fx.Node) -> list[fx.Node]:
    return list(node.users)


def _nearest(node: fx.Node, towards: Neighbours, key: str) -> list[fx.Node]:
    """The closest nodes in one direction whose meta[key] says something; [] if there are none."""
    ring, seen = [node], {node}
    while ring:
        ring = list(dict.fromkeys(n for m in ring for n in towards(m) if n not in seen))
        seen.update(ring)
        found = [n for n in ring if n.meta.get(key)]
        if found:
            return found
    return []


def _chain(nodes: Iterable[fx.Node]) -> list[list[str]]:
    """What the nodes went through, themselves included where a pass made them."""
    steps: list[list[str]] = []
    for node in nodes:
        own = [] if node.meta.get(STAGE, CAPTURED) == CAPTURED else [[node.meta[STAGE], node.name]]
        steps += [step for step in (*node.meta.get(VIA, []), *own) if step not in steps]
    return steps


def _union(lists: Iterable[list[str]]) -> list[str]:
    return list(dict.fromkeys(name for names in lists for name in names))


def _sources(nodes: Iterable[fx.Node]) -> list[str]:
    return [n.meta.get(SOURCE, "") for n in nodes]


def _first(texts: Iterable[str]) -> str:
    return next((text for text in texts if text), "")
