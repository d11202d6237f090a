"""What ranks did of a batch that is exchanged a part at a time, in the order in which they did it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import fx

from helix_compile.ir.collectives import WAIT, is_collective
from helix_compile.ir.graph import PART, helix_op
from helix_compile.worlds.program import Program
from helix_compile.worlds.walk import Hook, Pending

ATTENTION = ("mla_decode", "gqa_decode", "mla_decode_slots")
Events = dict[int, list[str]]  # by rank: "attend 0", "start 0", "attend 1", ...
A2A = ["attend 0", "start 0", "attend 1", "start 1", "wait 0", "merge 0", "wait 1", "merge 1"]
AG_RS = ["attend 0", "start 0", "attend 1", "start 1", "wait 0", "start 0", "wait 1", "start 1", "wait 0", "wait 1"]


def event_of(node: fx.Node) -> str:
    """What a node does of its part; "" for one that is of none, or only moves what is there."""
    if PART not in node.meta:
        return ""
    part = node.meta[PART][1]
    if is_collective(node):
        return f"start {part}"
    if node.target is WAIT:
        return f"wait {part}"
    return f"attend {part}" if helix_op(node) in ATTENTION else f"merge {part}" if helix_op(node) == "merge_lse" else ""


def record_walks(monkeypatch: pytest.MonkeyPatch, world: type) -> Events:
    """The events of every graph that a world of this class walks from now on; a start that gave a value at once is no start."""
    events: Events = {}
    run = world.run  # type: ignore[attr-defined] # both worlds have it

    def recorded(self: Any, graphs: Any, inputs: Any, hook: Hook | None = None, agreed: Any = None) -> Any:
        def both(rank: int, node: fx.Node, value: Any) -> None:
            if what := event_of(node):
                assert isinstance(value, Pending) == what.startswith("start")
                events.setdefault(rank, []).append(what)
            if hook is not None:
                hook(rank, node, value)

        return run(self, graphs, inputs, both, agreed)

    monkeypatch.setattr(world, "run", recorded)
    return events


class ProgramEvents:
    """The events of every program that is walked from now on.

    Attributes:
        events: by rank. Of starts and waits only those of nodes of graphs that it was told of.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.events: Events = {}
        self._names: dict[str, str] = {}  # by call and node: bodies have nodes of one name
        self._rank = 0
        walk = Program.walk

        def recorded(program: Program, step: Any, post: Any, tape: Any = None) -> Any:
            def posted(op: str, args: tuple, where: str) -> Any:
                self._said(self._names.get(where, ""))
                return post(op, args, where)

            inner, value = walk(program, step, posted, tape), None
            try:
                while True:
                    self._rank = program.rank
                    pending, where = inner.send(value)
                    value = yield pending, where
                    self._rank = program.rank
                    self._said(self._names.get(where, ""))
            except StopIteration as stop:
                return stop.value

        monkeypatch.setattr(Program, "walk", recorded)

    def of(self, lowered: fx.GraphModule) -> Events:
        """Events, those of starts and waits in this graph too."""
        for call in lowered.graph.find_nodes(op="call_module"):
            if isinstance(body := lowered.get_submodule(str(call.target)), fx.GraphModule):
                self._names |= {f"{call.name}.{n.name}": event_of(n) for n in body.graph.nodes}
        return self.events

    def told(self, segment: fx.GraphModule, code: Callable[..., Any]) -> Callable[..., Any]:
        """Code of a segment, which says what of a part it does when it is called."""
        inside = [event_of(n) for n in segment.graph.nodes if n.op == "call_function"]

        def run(*tensors: Any) -> Any:
            for what in inside:
                self._said(what)
            return code(*tensors)

        return run

    def _said(self, what: str) -> None:
        if what:
            self.events.setdefault(self._rank, []).append(what)
