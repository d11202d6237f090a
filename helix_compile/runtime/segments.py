"""A prepared step: each rank's program over the lowered graph, in segments or as it is, made again when something that it holds changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, Protocol

import torch
from torch import Tensor, fx
from tqdm import tqdm

from helix_compile.ir.graph import InputTable, input_ref, placeholders
from helix_compile.ir.stage import SEGMENTS
from helix_compile.layout.degrees import HelixLayout
from helix_compile.runtime.prepared import Arguments, held_by, parts_of, same_objects
from helix_compile.runtime.rank import Rank
from helix_compile.worlds.program import Program, SegmentCall
from helix_compile.worlds.world import World

Cut = Callable[[fx.GraphModule], fx.GraphModule]
Code = Callable[..., Sequence[Any]]


class SegmentCompiler(Protocol):
    """Makes of a segment what a step calls in its place: takes its tensors, returns a sequence.

    Attributes:
        unit: what one of them is called where progress is shown.
    """

    unit: str

    def is_known(self, call: SegmentCall) -> bool:
        """Is it made already?"""

    def code(self, call: SegmentCall) -> Code:
        """Make it, unless it is known.

        Raises:
            LoweringError: it can't be made.
        """

    def made_for(self, ranks: Sequence[Rank]) -> tuple[Any, ...]:
        """What code holds for besides the very objects that ranks hold: where it changes, all is asked for anew."""


class RankPrograms:
    """The programs of the ranks in this process.

    Args:
        cut: a lowered stage -> its segments, or the stage itself where nodes stay calls of their own.
        compiler: of segments.
        stages: of the module; what the graph was edited to is cut again, and is the stage `segments` from then on.
    """

    def __init__(
        self, cut: Cut, compiler: SegmentCompiler, stages: dict[str, fx.GraphModule], layout: HelixLayout, world: World
    ):
        self._compiler = compiler
        self._cut, self._stages, self._layout, self._world = cut, stages, layout, world
        self._inputs = InputTable()
        self._programs: list[Program] = []
        self._seen: list[Any] = []
        self._held: list[Any] = []
        self._made_for: tuple[Any, ...] = ()
        self._tensors: list[Tensor] = []
        self._forms: list[list[Any]] = []

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
        held = [thing for rank in ranks for thing in held_by(rank, rank.params)]
        made_for = self._compiler.made_for(ranks)
        known = self._programs and not edited and made_for == self._made_for and same_objects(held, self._held)
        if not known or _forms_of(self._tensors) != self._forms:
            self._programs = self._made(self._stages[SEGMENTS], ranks, device)
            self._seen, self._held, self._made_for = seen, held, made_for
            self._tensors = [tensor for program in self._programs for tensor in program.held]
            self._forms = _forms_of(self._tensors)
        return self._programs

    def _made(self, stage: fx.GraphModule, ranks: Sequence[Rank], device: torch.device) -> list[Program]:
        bound = [bound_inputs(stage, rank, self._layout, device) for rank in ranks]
        wanted: dict[int, SegmentCall] = {}

        def ask(call: SegmentCall) -> Callable[..., Any]:
            wanted[len(wanted)] = call
            return _not_compiled

        for rank, values in zip(ranks, bound, strict=True):
            Program(rank.rank, stage, values, ask)
        left = [call for call in wanted.values() if not self._compiler.is_known(call)]
        shown = None if self._world.is_leader else True
        # kept until the programs hold them: the compiler may keep only what somebody uses
        made = [
            self._compiler.code(call)
            for call in tqdm(left, desc="compile", unit=self._compiler.unit, disable=shown, delay=2)
        ]
        programs = [
            Program(rank.rank, stage, values, self._compiler.code) for rank, values in zip(ranks, bound, strict=True)
        ]
        del made
        return programs


def _forms_of(tensors: list[Tensor]) -> list[list[Any]]:
    """What code of a tensor relies on, asked in C: `x.data = y` changes it behind the same object."""
    return [[*map(ask, tensors)] for ask in _FORM]


_FORM: tuple[Callable[[Tensor], Any], ...] = (attrgetter("dtype"), Tensor.stride, Tensor.size)


def _not_compiled(*_: Any) -> Any:
    raise AssertionError("a program that asks for code is never run")


def bound_inputs(stage: fx.GraphModule, rank: Rank, layout: HelixLayout, device: torch.device) -> dict[fx.Node, Any]:
    """What an outer graph takes at every step alike, by its placeholder."""
    nodes = placeholders(stage.graph)
    arguments = Arguments([input_ref(node) for node in nodes], rank, rank.params, layout, device)
    of_step = {place for place, _ in arguments.of_step}
    return {node: arguments.values[place] for place, node in enumerate(nodes) if place not in of_step}
