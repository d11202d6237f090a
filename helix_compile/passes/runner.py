"""How passes are run. The runner knows nothing about any pass; the order is in passes/pipeline.py."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Protocol

from torch import fx

from helix_compile.capture.captured import CapturedGraph
from helix_compile.errors import HelixError, PassError
from helix_compile.ir.origin import CAPTURED, mark_captured, mark_pass
from helix_compile.ir.stage import body_of, copy_module, graphs_of
from helix_compile.kernels.target import KernelTarget
from helix_compile.plan.helix_plan import HelixPlan
from helix_compile.plan.matches import LayerMatch

Dump = Callable[[int, str, fx.GraphModule], None]  # number and name of a stage that is done


@dataclass(frozen=True)
class PassContext:
    """What every pass may look at, and none changes.

    Attributes:
        captured: the model's graphs before any pass.
        matches: body -> what was found in it.
        plan: every decision.
        target: whose kernels compute the ops; None: their references do.
    """

    captured: CapturedGraph
    matches: dict[str, LayerMatch]
    plan: HelixPlan
    target: KernelTarget | None = None


class Pass(Protocol):
    """Makes one stage out of the one before, in place: the runner hands in a copy."""

    @property
    def stage(self) -> str:
        """Name of the stage it makes."""

    def requires(self, stage: fx.GraphModule, context: PassContext) -> None:
        """Raise unless the stage is one that this pass can take."""

    def run(self, stage: fx.GraphModule, context: PassContext) -> None:
        """Rewrite the outer graph and its bodies; PassError if it finds other sites than the plan has."""

    def ensures(self, stage: fx.GraphModule, context: PassContext) -> None:
        """Raise unless the stage is what this pass promises."""


BodyCheck = Callable[[fx.GraphModule, LayerMatch, PassContext], None]


def nothing(gm: fx.GraphModule, match: LayerMatch, context: PassContext) -> None:
    """No condition."""


@dataclass(frozen=True)
class BodyPass:
    """A pass that rewrites every body by its match, and then what is around them.

    Args:
        stage: name of the stage it makes.
        rewrite: edits one body; returns the number of sites that it rewrote.
        planned: that number, by the plan.
        outer: pass over the outer graph, run after the bodies (it reads their placeholders).
        needs: what must hold for each body before.
        promises: what must hold for each body afterwards.
    """

    stage: str
    rewrite: Callable[[fx.GraphModule, LayerMatch, PassContext], int]
    planned: Callable[[LayerMatch, PassContext], int]
    outer: Callable[[fx.GraphModule, PassContext], None] | None = None
    needs: BodyCheck = nothing
    promises: BodyCheck = nothing

    def requires(self, stage: fx.GraphModule, context: PassContext) -> None:
        """See Pass."""
        for name, match in context.matches.items():
            self.needs(body_of(stage, name), match, context)

    def run(self, stage: fx.GraphModule, context: PassContext) -> None:
        """See Pass."""
        for name, match in context.matches.items():
            done, planned = self.rewrite(body_of(stage, name), match, context), self.planned(match, context)
            if done != planned:
                raise PassError(f"pass {self.stage!r}, {name}: {done} sites rewritten, the plan has {planned}")
        if self.outer is not None:
            self.outer(stage, context)

    def ensures(self, stage: fx.GraphModule, context: PassContext) -> None:
        """See Pass."""
        for name, match in context.matches.items():
            self.promises(body_of(stage, name), match, context)


def run_passes(
    passes: Iterable[Pass],
    context: PassContext,
    dump: Dump | None = None,
    begin: tuple[str, fx.GraphModule] | None = None,
    keep: Collection[str] | None = None,
) -> dict[str, fx.GraphModule]:
    """Run `passes` in order on copies; returns stage name -> outer graph (bodies are its submodules).

    Args:
        begin: name and graph of a stage that earlier passes made, by the same decisions; default: what was captured.
        keep: stages that someone wants; the others are gone once the next pass has rewritten them. None: all.

    Raises:
        PassError: a pass rewrote another number of sites than planned or broke a promise; names the passes before.
    """
    first, current = begin or (CAPTURED, context.captured.graph)
    for _, graph in graphs_of(current) if begin is None else ():
        mark_captured(graph.graph)
    stages = {first: current}
    if dump is not None:
        dump(0, first, current)
    for number, step in enumerate(passes, 1):
        if keep is None or current is stages[first] or next(reversed(stages)) in keep:
            current = copy_module(current)
        else:  # half of a lowering is copies
            stages.popitem()
        before = [(graph.graph, set(graph.graph.nodes)) for _, graph in graphs_of(current)]
        try:
            step.requires(current, context)
            step.run(current, context)
            for _, graph in graphs_of(current):
                graph.graph.lint()
                graph.recompile()
            step.ensures(current, context)
        except HelixError:
            raise
        except Exception as error:
            raise PassError(
                f"pass {step.stage!r} failed after {', '.join(stages)}: {type(error).__name__}: {error}"
            ) from error
        for nodes_of_graph, nodes in before:
            mark_pass(nodes_of_graph, nodes, step.stage)
        stages[step.stage] = current
        if dump is not None:
            dump(number, step.stage, current)
    return stages
