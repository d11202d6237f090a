"""A prepared step: each rank's program over the lowered graph, in segments or as it is, made again when something that it holds changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import fx
from tqdm import tqdm

from helix_compile.ir.graph import InputTable, input_ref, placeholders
from helix_compile.ir.stage import SEGMENTS, graphs_of
from helix_compile.layout.degrees import HelixLayout
from helix_compile.runtime.inductor import code_of, is_known, open_modes
from helix_compile.runtime.prepared import Arguments, held_by, parts_of, same_objects
from helix_compile.runtime.rank import Rank
from helix_compile.worlds.program import Program, SegmentCall
from helix_compile.worlds.world import World

Cut = Callable[[fx.GraphModule], fx.GraphModule]


class RankPrograms:
    """The programs of the ranks in this process.

    Args:
        cut: a lowered stage -> its segments, or the stage itself where nodes stay calls of their own.
        stages: of the module; what the graph was edited to is cut again, and is the stage `segments` from then on.
    """

    def __init__(self, cut: Cut, stages: dict[str, fx.GraphModule], layout: HelixLayout, world: World):
        self._cut, self._stages, self._layout, self._world = cut, stages, layout, world
        self._inputs = InputTable()
        self._programs: list[Program] = []
        self._seen: list[Any] = []
        self._held: list[Any] = []
        self._modes: tuple[str, ...] = ()
        self._read_off: list[tuple[fx.GraphModule, str]] = []

    def programs(self, lowered: fx.GraphModule, ranks: Sequence[Rank], device: torch.device) -> list[Program]:
        """One for each rank; compiles what is not known, with a progress bar.

        Raises:
            LoweringError: a segment that can't be compiled.
            RuntimeFault: a rank lacks a parameter.
        """
        seen, renamed = parts_of(lowered), self._inputs.read(lowered.graph)
        edited = bool(self._seen) and (renamed or not same_objects(seen, self._seen))
        if edited:
            self._stages[SEGMENTS] = self._cut(lowered)
        held, modes = [thing for rank in ranks for thing in held_by(rank, rank.params)], open_modes()
        held += [attrgetter(target)(graph) for graph, target in self._constants(lowered, edited or not self._programs)]
        if edited or not self._programs or modes != self._modes or not same_objects(held, self._held):
            self._programs = self._made(self._stages[SEGMENTS], ranks, device)
            self._seen, self._held, self._modes = seen, held, modes
        return self._programs

    def _constants(self, lowered: fx.GraphModule, again: bool) -> list[tuple[fx.GraphModule, str]]:
        """What nodes of a user's edit read off its graphs."""
        if again:
            nodes = ((g, n) for _, g in graphs_of(lowered) for n in g.graph.nodes)
            self._read_off = [(g, str(n.target)) for g, n in nodes if n.op == "get_attr"]
        return self._read_off

    def _made(self, stage: fx.GraphModule, ranks: Sequence[Rank], device: torch.device) -> list[Program]:
        bound = [bound_inputs(stage, rank, self._layout, device) for rank in ranks]
        wanted: dict[int, SegmentCall] = {}

        def ask(call: SegmentCall) -> Callable[..., Any]:
            wanted[len(wanted)] = call
            return _not_compiled

        for rank, values in zip(ranks, bound, strict=True):
            Program(rank.rank, stage, values, ask)
        left = [call for call in wanted.values() if not is_known(call.segment, call.bound)]
        shown = None if self._world.is_leader else True
        for call in tqdm(left, desc="compile", unit="segment", disable=shown, delay=2):
            code_of(call.segment, call.bound, call.where)
        return [
            Program(rank.rank, stage, values, lambda call: code_of(call.segment, call.bound, call.where))
            for rank, values in zip(ranks, bound, strict=True)
        ]


def _not_compiled(*_: Any) -> Any:
    raise AssertionError("a program that asks for code is never run")


def bound_inputs(stage: fx.GraphModule, rank: Rank, layout: HelixLayout, device: torch.device) -> dict[fx.Node, Any]:
    """What an outer graph takes at every step alike, by its placeholder."""
    nodes = placeholders(stage.graph)
    arguments = Arguments([input_ref(node) for node in nodes], rank, rank.params, layout, device)
    of_step = {place for place, _ in arguments.of_step}
    return {node: arguments.values[place] for place, node in enumerate(nodes) if place not in of_step}
