"""Shorter ends of the graph that runs, made when they are first asked for, and again when the graph was edited."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from helix_compile.runtime.prepared import parts_of, same_objects

KEPT = 16  # a caller may ask for another number of columns, or of candidates, at each step
MakeEnd = Callable[[fx.GraphModule, str], fx.GraphModule | None]


class ShortEnds:
    """Args: make: the lowered graph, which end -> the graph that ends so; None where there is none."""

    def __init__(self, make: MakeEnd):
        self._make = make
        self._seen: list[Any] = []
        self._ends: dict[str, fx.GraphModule | None] = {}

    def graph(self, lowered: fx.GraphModule, what: str) -> fx.GraphModule | None:
        """The end `what` of `lowered` as it is now; bodies are shared, so an edit of one shows in either."""
        nodes = parts_of(lowered)
        if not same_objects(nodes, self._seen):
            self._seen = nodes
            self._ends.clear()
        if what not in self._ends:
            while len(self._ends) >= KEPT:
                self._ends.pop(next(iter(self._ends)))
            self._ends[what] = self._make(lowered, what)
        return self._ends[what]
