"""Where the boxes of a picture go: rows by dependency, one straight lane for the main flow, lanes beside it for branches.

The main flow is the longest path from the hidden states to the output. What is left falls into chains, each in a lane
of its own for the rows that it spans. An edge that skips rows gets a narrow lane, so no line crosses a box.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise

import networkx as nx

from helix_compile.views.graph_view import EdgeView, GraphView


@dataclass(frozen=True)
class Lanes:
    """Places in a grid.

    Attributes:
        row: node name -> row from the top.
        lane: node name -> column of boxes; 0 is the main flow, 1, 2 ... to its right.
        run: edge -> the lane in which it passes the rows between its ends.
        track: edge -> the narrow column in which it does, where no lane is free for it. A track t >= 0 lies right
            of lane t // TRACKS; one below 0 lies left of lane 0.
    """

    row: dict[str, int]
    lane: dict[str, int]
    run: dict[tuple[str, str], int]
    track: dict[tuple[str, str], int]
    rows: int
    lanes: int


def _take(column: set[int], rows: range) -> bool:
    """Take `rows` of a column if all are free."""
    free = column.isdisjoint(rows)
    if free:
        column.update(rows)
    return free


TRACKS = 6


def place(view: GraphView) -> Lanes:
    """Rows, lanes and tracks of a view."""
    graph = nx.DiGraph()
    graph.add_nodes_from(n.name for n in view.nodes)
    graph.add_edges_from((e.source, e.target) for e in view.edges)
    row = _rows(graph)
    chains = _chains(graph)
    columns: list[set[int]] = []
    lane: dict[str, int] = {}
    run: dict[tuple[str, str], int] = {}
    for chain in chains:
        span, links = _span(graph, row, chain, lane)
        for number in range(len(columns) + 1):
            if number == len(columns):
                columns.append(set())
            if (number > 0 or not lane) and _take(columns[number], span):
                lane.update(dict.fromkeys(chain, number))
                run.update(dict.fromkeys(links, number))
                break
    track = _tracks(view.edges, row, lane, set(run))
    return Lanes(row, lane, run, track, max(row.values()) + 1, len(columns))


def _rows(graph: nx.DiGraph) -> dict[str, int]:
    """Longest path from the top; what nothing depends on yet moves down to the first box that reads it."""
    row: dict[str, int] = {}
    order = list(nx.topological_sort(graph))
    for node in order:
        row[node] = max((row[p] + 1 for p in graph.predecessors(node)), default=0)
    for node in reversed(order):
        if not graph.in_degree(node) and graph.out_degree(node):
            row[node] = max(0, min(row[s] for s in graph.successors(node)) - 1)
    return row


def _chains(graph: nx.DiGraph) -> list[list[str]]:
    """The longest path, then the longest path of what is left, and so on."""
    left, chains = graph.copy(), []
    while left:
        chain = list(nx.dag_longest_path(left))
        chains.append(chain)
        left.remove_nodes_from(chain)
    return chains


def _span(
    graph: nx.DiGraph, row: dict[str, int], chain: list[str], placed: dict[str, int]
) -> tuple[range, set[tuple[str, str]]]:
    """Rows that a chain takes in its lane with the edge that enters it and the one that leaves it; all edges so carried."""
    links = set(pairwise(chain))
    top = row[chain[0]]
    bottom = row[chain[-1]]
    # a longest path starts where everything before it is placed, so one parent stands in the row above
    above = [p for p in graph.predecessors(chain[0]) if p in placed]
    if above:
        links.add((max(above, key=row.__getitem__), chain[0]))
    below = [s for s in graph.successors(chain[-1]) if s in placed]
    if below:
        child = min(below, key=row.__getitem__)
        bottom = max(bottom, row[child] - 1)
        links.add((chain[-1], child))
    return range(top, bottom + 1), links


def _tracks(
    edges: tuple[EdgeView, ...], row: dict[str, int], lane: dict[str, int], carried: set[tuple[str, str]]
) -> dict[tuple[str, str], int]:
    """A track for each edge that no lane carries and that passes at least one row."""
    columns: defaultdict[int, set[int]] = defaultdict(set)
    found = {}
    waiting = [e for e in edges if (e.source, e.target) not in carried]
    for edge in sorted(waiting, key=lambda e: row[e.target] - row[e.source]):
        between = range(row[edge.source] + 1, row[edge.target])
        if not between:
            continue
        near = max(lane[edge.source], lane[edge.target])
        # an edge inside the main flow passes on its left, any other between the lanes of its ends
        if near == 0:
            candidates = list(range(-1, -TRACKS - 1, -1))
        else:
            first = (near - 1) * TRACKS
            candidates = list(range(first, first + TRACKS)) + list(range(-1, -TRACKS - 1, -1))
        for number in candidates:
            if _take(columns[number], between):
                found[edge.source, edge.target] = number
                break
        else:
            found[edge.source, edge.target] = candidates[-1]
    return found
