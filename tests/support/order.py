"""What ranks did of a batch that is exchanged a part at a time, in the order in which they did it."""

from __future__ import annotations

from typing import Any

import pytest
from torch import fx

from helix_compile.ir.collectives import WAIT, is_collective
from helix_compile.ir.graph import PART, helix_op
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
