"""The predicted schedule of one layer of each body, every rank, as data and as a Chrome trace; the critical path of a graph.

    process = rank; threads "compute" and "link"; a complete event a node that takes time, and one a wait

Each queue runs its nodes in graph order, as streams do. A collective starts when its last rank has made its input and
its link is free; its wait_tensor holds the compute queue until it is over: not at all where other work hid it. Costs are those of
costs.py: predicted.

What networkx answers (critical path with slack, convexity, edges of a picture) calls nodes by fx.Node.name; a view does not
follow later edits of its graph.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import networkx as nx
from torch import fx

from helix_compile.ir.collectives import ALL_REDUCE, WAIT, is_collective
from helix_compile.ir.graph import is_call
from helix_compile.ir.origin import CAPTURED, ORIGIN, STAGE
from helix_compile.ir.sizes import layout_text, shape_text
from helix_compile.ir.stage import OUTER, body_of
from helix_compile.layout.degrees import HelixMesh
from helix_compile.plan.helix_plan import HelixPlan
from helix_compile.predict.accelerators import PRESETS, Accelerator
from helix_compile.predict.costs import NodeCost, Workload, predict_costs
from helix_compile.predict.overlap import StepTime, Verdict, part_of_node

GB200 = PRESETS["gb200"]  # what inspect predicts for

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
    """One node on one rank, in seconds from the start of its body.

    Of a wait: from when the compute queue comes to it until the queue goes on. `waits_for` is its collective.
    """

    rank: int
    thread: str
    node: fx.Node
    start: float
    seconds: float
    cost: NodeCost
    waits_for: fx.Node | None = None

    @property
    def end(self) -> float:
        """When it is over."""
        return self.start + self.seconds


@dataclass(frozen=True)
class BodySchedule:
    """One layer of one body on every rank.

    Attributes:
        body: its name.
        events: in graph order, rank by rank; nodes that take no time have none, but for waits.
        seconds: from the first start to the last end.
        path: critical path by dataflow alone on the busiest rank: its slack is what overlap could hide at best.
    """

    body: str
    events: tuple[Event, ...]
    seconds: float
    path: CriticalPath

    def held(self, rank: int = 0) -> dict[str, float]:
        """Collective -> seconds that its wait holds the compute queue of a rank; what it takes beyond that is hidden."""
        return {e.waits_for.name: e.seconds for e in self.events if e.rank == rank and e.waits_for is not None}


def thread_of(node: fx.Node) -> str | None:
    """The queue that runs a node: collectives on the link, all other calls on compute, inputs and output on none."""
    if is_collective(node):
        return LINK
    return COMPUTE if node.op in ("call_function", "call_module", "call_method") else None


def default_workload(plan: HelixPlan) -> Workload:
    """One token a sequence at full capacity."""
    return Workload(plan.options.max_batch_size, 1, plan.options.max_seq_len - 1)


def predict_body(
    graph: fx.Graph, name: str, plan: HelixPlan, workload: Workload | None = None, machine: Accelerator = GB200
) -> BodySchedule:
    """Schedule a lowered body on every rank of `plan`; see the module's words."""
    step = workload or default_workload(plan)
    mesh, ranks = HelixMesh(plan.layout), range(plan.layout.world_size)
    costs = [predict_costs(graph, step, plan.layout, plan.options.tokens_per_block, rank) for rank in ranks]
    seconds = [{node: cost.seconds(machine) for node, cost in own.items()} for own in costs]
    timed = run_queues(graph, seconds, mesh.members)
    events = tuple(_event(own, costs[own.rank]) for own in timed)
    busiest = max(ranks, key=lambda r: sum(seconds[r].values()))
    total = max((e.end for e in events), default=0.0)
    return BodySchedule(name, events, total, critical_path(graph, seconds[busiest]))


class Timed(NamedTuple):
    """When a node runs; of a wait also what it waits for."""

    rank: int
    thread: str
    node: fx.Node
    start: float
    seconds: float
    waits_for: fx.Node | None


def _event(own: Timed, costs: Mapping[str, NodeCost]) -> Event:
    return Event(own.rank, own.thread, own.node, own.start, own.seconds, costs[own.node.name], own.waits_for)


def run_queues(
    graph: fx.Graph, seconds: Sequence[Mapping[str, float]], members: Callable[[str, int], Sequence[int]]
) -> list[Timed]:
    """What two queues a rank make of a graph whose nodes take seconds[rank][name]; the rule stands in the module's words.

    Args:
        members: (axis, rank) -> ranks that take part in a collective, of those that `seconds` has.
    """
    ranks = range(len(seconds))
    free = [{COMPUTE: 0.0, LINK: 0.0} for _ in ranks]
    done: list[dict[fx.Node, float]] = [{} for _ in ranks]
    timed: list[Timed] = []
    for node in graph.nodes:
        ready = [max((d[n] for n in node.all_input_nodes), default=0.0) for d in done]
        if is_collective(node):
            alone = [max(ready[r], free[r][LINK]) for r in ranks]
            ready = [max(alone[m] for m in members(str(node.args[-1]), r)) for r in ranks]
        for rank in ranks:
            thread, own = thread_of(node), seconds[rank].get(node.name, 0.0)
            reached = free[rank][thread] if thread else 0.0
            start = max(ready[rank], reached)
            done[rank][node] = start + own
            if thread:
                free[rank][thread] = start + own
            if node.target is WAIT:
                waits_for: Any = node.args[0]
                timed.append(Timed(rank, COMPUTE, node, reached, start - reached, waits_for))
            elif own:
                timed.append(Timed(rank, thread or COMPUTE, node, start, own, None))
    return timed


def predict_schedule(
    plan: HelixPlan, lowered: fx.GraphModule, workload: Workload | None = None, machine: Accelerator = GB200
) -> list[BodySchedule]:
    """One layer of each body; and the graph around the layers, without them, where something moves between ranks in it."""
    return [predict_body(graph, name, plan, workload, machine) for name, _, graph in _predicted(plan, lowered)]


def _predicted(plan: HelixPlan, lowered: fx.GraphModule) -> Iterator[tuple[str, int, fx.Graph]]:
    """Name, how many layers, and graph of what is predicted."""
    for body in plan.bodies:
        yield body.name, len(body.layers), body_of(lowered, body.name).graph
    if plan.outer.collectives:
        yield OUTER, 1, lowered.graph


def first_rank(graph: fx.Graph, name: str, plan: HelixPlan, workload: Workload, machine: Accelerator) -> BodySchedule:
    """Schedule of rank 0 alone: it has the most tokens, so that nobody keeps it waiting."""
    costs = predict_costs(graph, workload, plan.layout, plan.options.tokens_per_block)
    seconds = {node: cost.seconds(machine) for node, cost in costs.items()}
    timed = run_queues(graph, [seconds], lambda axis, rank: (0,))
    events = tuple(_event(own, costs) for own in timed)
    return BodySchedule(name, events, max((e.end for e in events), default=0.0), critical_path(graph, seconds))


def rank_schedules(
    plan: HelixPlan, lowered: fx.GraphModule, workload: Workload | None = None, machine: Accelerator = GB200
) -> list[BodySchedule]:
    """What predict_schedule() has, of rank 0 alone."""
    step = workload or default_workload(plan)
    return [first_rank(graph, name, plan, step, machine) for name, _, graph in _predicted(plan, lowered)]


def predict_step(
    plan: HelixPlan,
    lowered: fx.GraphModule,
    workload: Workload | None = None,
    machine: Accelerator = GB200,
    outer: fx.GraphModule | None = None,
) -> StepTime:
    """A step, as the planner has it: every layer, what is around them (of `outer`), and the fixed time of each layer."""
    step = workload or default_workload(plan)
    total = _time_of(first_rank((outer or lowered).graph, OUTER, plan, step, machine))
    for body in plan.bodies:
        own = first_rank(body_of(lowered, body.name).graph, body.name, plan, step, machine)
        total += (_time_of(own) + StepTime(0.0, 0.0, 0.0, fixed_us(own, machine))).times(len(body.layers))
    return total


def _time_of(schedule: BodySchedule) -> StepTime:
    """On rank 0; its compute queue is busy or waits from the first node to the last."""
    waits = [(e.waits_for, e.seconds) for e in schedule.events if e.waits_for is not None]
    sums = sum(seconds for of, seconds in waits if is_call(of, ALL_REDUCE.target))
    exchanges = sum(seconds for _, seconds in waits) - sums
    return StepTime(1e6 * (schedule.seconds - sums - exchanges), 1e6 * exchanges, 1e6 * sums, 0.0)


def predict_overlap(
    plan: HelixPlan,
    whole: fx.GraphModule,
    in_parts: fx.GraphModule,
    outer: fx.GraphModule,
    workload: Workload | None = None,
    machine: Accelerator = GB200,
) -> Verdict:
    """Whether the plan's overlap pays: its bodies in parts of the batch against the same as a whole, both lowered."""
    step = workload or default_workload(plan)
    without, hopb = (predict_step(plan, bodies, step, machine, outer) for bodies in (whole, in_parts))
    return Verdict(without, hopb, step.batch, step.context + step.tokens, machine.name)


def fixed_us(schedule: BodySchedule, machine: Accelerator) -> float:
    """The fixed time of a layer, which goes with its launches: other parts of the batch have some of their own."""
    launched = [e.node for e in schedule.events if e.waits_for is None]
    more = sum(1 for node in launched if (own := part_of_node(node)) and own[1])
    return machine.fixed_us_per_layer + machine.fixed_us_of_more(len(launched) - more, more)


def predicted_facts(
    plan: HelixPlan, lowered: fx.GraphModule, of_overlap: tuple[fx.GraphModule, fx.GraphModule] | None = None
) -> dict[str, Any]:
    """What predict_schedule() has of rank 0, which has the most tokens, as plain data.

    Args:
        of_overlap: bodies as a whole and in parts of the batch, both lowered, where parts overlap.
    """
    step, machine = default_workload(plan), GB200
    bodies = []
    for name, layers, graph in _predicted(plan, lowered):
        schedule = first_rank(graph, name, plan, step, machine)
        took = {e.node.name: e for e in schedule.events if e.waits_for is None}
        held = schedule.held()
        collectives = [
            {
                "node": node,
                "wire_bytes": took[node].cost.wire_bytes,
                "microseconds": 1e6 * took[node].seconds,
                "slack_microseconds": 1e6 * slack,
                "held_microseconds": 1e6 * held[node],
            }
            for node, slack in schedule.path.collective_slack().items()
        ]
        bodies.append(
            {
                "body": name,
                "layers": layers,
                "microseconds_of_a_layer": 1e6 * schedule.seconds,
                "microseconds_at_least": 1e6 * schedule.path.total,
                "longest": max(took, key=lambda node: took[node].seconds, default=""),
                "collectives": collectives,
            }
        )
    return {
        "what": "predicted by a roofline, not measured",
        "machine": machine.name,
        **asdict(step),
        "microseconds_of_a_step": predict_step(plan, lowered, step, machine).total,
        "fixed_microseconds_of_a_layer": machine.fixed_us_per_layer,
        "bodies": bodies,
        "overlap": predict_overlap(plan, *of_overlap, lowered, step, machine).facts() if of_overlap else None,
    }


def chrome_trace(
    schedules: list[BodySchedule], plan: HelixPlan, workload: Workload | None = None, machine: Accelerator = GB200
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
        events += _arrows(schedule, offset, first=len(events))
        offset += schedule.seconds
    about = {
        "predicted": "by a roofline; not measured",
        "model": plan.model,
        "machine": machine.name,
        **asdict(step),
        "layers": "one of each body",
    }
    return {"traceEvents": events, "displayTimeUnit": "ns", "otherData": about}


def _name(kind: str, rank: int, thread: int, text: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": rank, "tid": thread, "args": {"name": text}}


def _arrows(schedule: BodySchedule, offset: float, first: int) -> list[dict[str, Any]]:
    """From each collective on the link to its wait on compute: flows, of which every one needs a number of its own."""
    started = {(e.rank, e.node): e for e in schedule.events if e.thread == LINK}
    waits = [(e, e.waits_for) for e in schedule.events if e.waits_for is not None]
    arrows = []
    for number, (end, waits_for) in enumerate(waits, first):
        start = started[end.rank, waits_for]
        flow = {"name": start.node.name, "cat": "predicted", "id": number, "pid": end.rank}
        arrows.append({**flow, "ph": "s", "tid": 1, "ts": 1e6 * (offset + start.start)})
        arrows.append({**flow, "ph": "f", "bp": "e", "tid": 0, "ts": 1e6 * (offset + end.end)})
    return arrows


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
    if event.waits_for is not None:
        args["waits_for"] = event.waits_for.name
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
