"""Questions about a graph that networkx answers: critical path with slack, convexity, edges of a picture.

Nodes are called by fx.Node.name. Build a view once a graph; it does not follow later edits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from itertools import pairwise

import networkx as nx
from torch import fx

from helix_compile.graph_text import shape_text
from helix_compile.passes.fx_edit import is_collective
from helix_compile.provenance import CAPTURED, STAGE

Thread = Callable[[fx.Node], "str | None"]


def to_networkx(graph: fx.Graph) -> nx.DiGraph:
    """The graph as a DiGraph of names; attributes op, target, shape and stage."""
    view = nx.DiGraph()
    for node in graph.nodes:
        view.add_node(
            node.name,
            op=node.op,
            target=str(node.target),
            shape=shape_text(node.meta.get("val")),
            stage=node.meta.get(STAGE, CAPTURED),
        )
        view.add_edges_from((source.name, node.name) for source in node.all_input_nodes)
    return view


@dataclass(frozen=True)
class CriticalPath:
    """The longest chain of a graph under given costs.

    Attributes:
        total: its length, in the unit of the costs.
        nodes: names of its nodes that cost something, in order.
        slack: name -> by how much the node may be late before `total` grows.
        collectives: names of the collectives, in graph order.
    """

    total: float
    nodes: tuple[str, ...]
    slack: dict[str, float]
    collectives: tuple[str, ...]

    def collective_slack(self) -> dict[str, float]:
        """Slack of each collective: 0 means that all of it is on the critical path."""
        return {name: self.slack[name] for name in self.collectives}


def critical_path(
    graph: fx.Graph, cost: Mapping[str, float], thread: Thread | None = None
) -> CriticalPath:
    """Longest path through `graph`, each node weighing cost[name] (a node that is not named costs nothing).

    Args:
        graph: any graph.
        cost: name -> seconds, or any other unit.
        thread: node -> the queue that runs it; nodes of one queue run one after the other, in graph order (None: no
            queue). Without it only dataflow orders nodes, so that slack is what overlap could hide at best.
    """
    view = to_networkx(graph)
    for name in queue_names(graph, thread) if thread else ():
        queue = [n.name for n in graph.nodes if thread is not None and thread(n) == name]
        view.add_edges_from(pairwise(queue))
    order = list(nx.topological_sort(view))
    finish: dict[str, float] = {}
    for name in order:
        start = max((finish[p] for p in view.predecessors(name)), default=0.0)
        finish[name] = start + cost.get(name, 0.0)
    total = max(finish.values(), default=0.0)
    latest: dict[str, float] = {}
    for name in reversed(order):
        starts = [latest[s] - cost.get(s, 0.0) for s in view.successors(name)]
        latest[name] = min(starts, default=total)
    return CriticalPath(
        total=total,
        nodes=_longest(view, finish, cost),
        slack={name: max(0.0, latest[name] - finish[name]) for name in order},
        collectives=tuple(n.name for n in graph.nodes if is_collective(n)),
    )


def queue_names(graph: fx.Graph, thread: Thread) -> list[str]:
    """Names of the queues that run some node."""
    names = (thread(n) for n in graph.nodes)
    return [name for name in dict.fromkeys(names) if name is not None]


def _longest(
    view: nx.DiGraph, finish: dict[str, float], cost: Mapping[str, float]
) -> tuple[str, ...]:
    """Walk back from the node that finishes last, always to the input that finished last."""
    path: list[str] = []
    name = max(finish, key=finish.__getitem__, default=None)
    while name is not None:
        path.append(name)
        name = max(view.predecessors(name), key=finish.__getitem__, default=None)
    return tuple(n for n in reversed(path) if cost.get(n, 0.0))


def is_convex(graph: fx.Graph, nodes: Collection[str]) -> bool:
    """True if no path leaves `nodes` and comes back: the region can become one node.

    Raises:
        KeyError: a name that the graph does not have.
    """
    view, region = to_networkx(graph), set(nodes)
    if missing := region - set(view):
        raise KeyError(f"no nodes {sorted(missing)} in the graph")
    below: set[str] = set().union(*(nx.descendants(view, n) for n in region)) - region
    above: set[str] = set().union(*(nx.ancestors(view, n) for n in region)) - region
    return not below & above


def reduced_edges(graph: fx.Graph) -> list[tuple[str, str]]:
    """Edges of a picture: those that no longer path implies. For one body; a whole model takes many seconds."""
    place = {n.name: i for i, n in enumerate(graph.nodes)}
    edges = nx.transitive_reduction(to_networkx(graph)).edges
    return sorted(edges, key=lambda edge: (place[edge[0]], place[edge[1]]))
