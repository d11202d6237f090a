"""The predicted schedule of one layer of each body, every rank, as data and as a Chrome trace; the critical path of a graph.

    process = rank; threads "compute" and "link"; a complete event a node that takes time.

Each queue runs its nodes in graph order, as streams do. A collective starts when its last rank has made its input and
its link is free; wait_tensor holds the compute queue until it is over. Costs are those of costs.py: predicted.

What networkx answers (critical path with slack, convexity, edges of a picture) calls nodes by fx.Node.name; a view does not
follow later edits of its graph.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import networkx as nx
from torch import fx

from helix_compile.ir.collectives import is_collective
from helix_compile.ir.origin import CAPTURED, ORIGIN, STAGE
from helix_compile.ir.sizes import layout_text, shape_text
from helix_compile.ir.stage import OUTER, body_of
from helix_compile.layout.degrees import HelixMesh
from helix_compile.plan.helix_plan import HelixPlan
from helix_compile.predict.costs import GB200, Machine, NodeCost, Workload, predict_costs

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


def critical_path(graph: fx.Graph, cost: Mapping[str, float], thread: Thread | None = None) -> CriticalPath:
    """Longest path through `graph`, each node weighing cost[name] (a node that is not named costs nothing).

    Args:
        graph: any graph.
        cost: name -> seconds, or any other unit.
        thread: node -> the queue that runs it; nodes of one queue run one after the other, in graph order (None: no
            queue). Without it only dataflow orders nodes, so that slack is what overlap could hide at best.
    """
    view = to_networkx(graph)
    queues: dict[str | None, list[str]] = {}
    for node in graph.nodes:
        queues.setdefault(thread(node) if thread else None, []).append(node.name)
    queues.pop(None, None)
    for queue in queues.values():
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


def _longest(view: nx.DiGraph, finish: dict[str, float], cost: Mapping[str, float]) -> tuple[str, ...]:
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
    index_of = {n.name: i for i, n in enumerate(graph.nodes)}
    edges = nx.transitive_reduction(to_networkx(graph)).edges
    return sorted(edges, key=lambda edge: (index_of[edge[0]], index_of[edge[1]]))


COMPUTE, LINK = "compute", "link"


@dataclass(frozen=True)
class Event:
    """One node on one rank, in seconds from the start of the first body."""

    rank: int
    thread: str
    node: fx.Node
    start: float
    seconds: float
    cost: NodeCost

    @property
    def end(self) -> float:
        """When it is over."""
        return self.start + self.seconds


@dataclass(frozen=True)
class BodySchedule:
    """One layer of one body on every rank.

    Attributes:
        body: its name.
        events: in graph order, rank by rank; nodes that take no time have none.
        seconds: from the first start to the last end.
        path: critical path by dataflow alone on the busiest rank: its slack is what overlap could hide at best.
    """

    body: str
    events: tuple[Event, ...]
    seconds: float
    path: CriticalPath


def thread_of(node: fx.Node) -> str | None:
    """The queue that runs a node: collectives on the link, all other calls on compute, inputs and output on none."""
    if is_collective(node):
        return LINK
    return COMPUTE if node.op in ("call_function", "call_module", "call_method") else None


def default_workload(plan: HelixPlan) -> Workload:
    """One token a sequence at full capacity."""
    return Workload(plan.options.max_batch_size, 1, plan.options.max_seq_len - 1)


def predict_body(
    graph: fx.Graph, name: str, plan: HelixPlan, workload: Workload | None = None, machine: Machine = GB200
) -> BodySchedule:
    """Schedule a lowered body on every rank of `plan`; see the module's words."""
    step = workload or default_workload(plan)
    mesh, ranks = HelixMesh(plan.layout), range(plan.layout.world_size)
    tokens_per_block = plan.options.tokens_per_block
    costs = [predict_costs(graph, step, plan.layout, tokens_per_block, rank) for rank in ranks]
    free = [{COMPUTE: 0.0, LINK: 0.0} for _ in ranks]
    done: list[dict[fx.Node, float]] = [{} for _ in ranks]
    events: list[Event] = []
    for node in graph.nodes:
        ready = [max((d[n] for n in node.all_input_nodes), default=0.0) for d in done]
        if is_collective(node):
            alone = [max(ready[r], free[r][LINK]) for r in ranks]
            ready = [max(alone[m] for m in mesh.members(str(node.args[-1]), r)) for r in ranks]
        for rank in ranks:
            thread = thread_of(node)
            seconds = costs[rank][node.name].seconds(machine)
            start = max(ready[rank], free[rank][thread]) if thread else ready[rank]
            done[rank][node] = start + seconds
            if thread:
                free[rank][thread] = start + seconds
            if seconds:
                events.append(Event(rank, thread or COMPUTE, node, start, seconds, costs[rank][node.name]))
    busiest = max(ranks, key=lambda r: sum(e.seconds for e in events if e.rank == r))
    weights = {name: cost.seconds(machine) for name, cost in costs[busiest].items()}
    total = max((max(d.values()) for d in done), default=0.0)
    return BodySchedule(name, tuple(events), total, critical_path(graph, weights))


def predict_schedule(
    plan: HelixPlan, lowered: fx.GraphModule, workload: Workload | None = None, machine: Machine = GB200
) -> list[BodySchedule]:
    """One layer of each body; and the graph around the layers, without them, where something moves between ranks in it."""
    return [predict_body(graph, name, plan, workload, machine) for name, _, graph in _predicted(plan, lowered)]


def _predicted(plan: HelixPlan, lowered: fx.GraphModule) -> Iterator[tuple[str, int, fx.Graph]]:
    """Name, how many layers, and graph of what is predicted."""
    for body in plan.bodies:
        yield body.name, len(body.layers), body_of(lowered, body.name).graph
    if plan.outer.collectives:
        yield OUTER, 1, lowered.graph


def predicted_facts(plan: HelixPlan, lowered: fx.GraphModule) -> dict[str, Any]:
    """Critical path of what predict_schedule() has, on rank 0, which has the most tokens, as plain data."""
    step, machine = default_workload(plan), GB200
    bodies = []
    for name, layers, graph in _predicted(plan, lowered):
        costs = predict_costs(graph, step, plan.layout, plan.options.tokens_per_block)
        seconds = {node: cost.seconds(machine) for node, cost in costs.items()}
        path = critical_path(graph, seconds)
        collectives = [
            {
                "node": node,
                "wire_bytes": costs[node].wire_bytes,
                "microseconds": 1e6 * seconds[node],
                "slack_microseconds": 1e6 * slack,
            }
            for node, slack in path.collective_slack().items()
        ]
        bodies.append(
            {
                "body": name,
                "layers": layers,
                "microseconds_of_a_layer": 1e6 * path.total,
                "longest": max(path.nodes, key=seconds.__getitem__, default=""),
                "collectives": collectives,
            }
        )
    return {
        "what": "predicted by peak figures, not measured",
        "machine": machine.name,
        **asdict(step),
        "bodies": bodies,
    }


def chrome_trace(
    schedules: list[BodySchedule], plan: HelixPlan, workload: Workload | None = None, machine: Machine = GB200
) -> dict[str, Any]:
    """The schedules one behind the other, in the Trace Event Format (microseconds)."""
    step = workload or default_workload(plan)
    events: list[dict[str, Any]] = []
    for rank in range(plan.layout.world_size):
        events.append(_name("process_name", rank, 0, f"rank {rank} (predicted)"))
        events += [_name("thread_name", rank, i, t) for i, t in enumerate((COMPUTE, LINK))]
    offset = 0.0
    for schedule in schedules:
        events += [_complete(event, schedule.body, offset) for event in schedule.events]
        offset += schedule.seconds
    about = {
        "predicted": "by peak figures; not measured",
        "model": plan.model,
        "machine": machine.name,
        **asdict(step),
        "layers": "one of each body",
    }
    return {"traceEvents": events, "displayTimeUnit": "ns", "otherData": about}


def _name(kind: str, rank: int, thread: int, text: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": rank, "tid": thread, "args": {"name": text}}


def _complete(event: Event, body: str, offset: float) -> dict[str, Any]:
    node, cost = event.node, event.cost
    args = {
        "body": body,
        "op": str(node.target),
        "shape": shape_text(node.meta.get("val")),
        "layout": layout_text(node),
        "stage": node.meta.get(STAGE, ""),
        "from": ", ".join(node.meta.get(ORIGIN, ())),
        "flops": cost.flops,
        "memory_bytes": cost.hbm_bytes,
        "wire_bytes": cost.wire_bytes,
        "axis": node.args[-1] if cost.is_collective else "",
    }
    return {
        "name": node.name,
        "cat": "predicted",
        "ph": "X",
        "pid": event.rank,
        "tid": (COMPUTE, LINK).index(event.thread),
        "ts": 1e6 * (offset + event.start),
        "dur": 1e6 * event.seconds,
        "args": args,
    }
