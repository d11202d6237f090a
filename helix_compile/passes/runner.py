"""How passes are scheduled and run. The runner knows nothing about any pass; the order is in passes/pipeline.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import fx

from helix_compile.errors import HelixError, PassError
from helix_compile.ir.origin import CAPTURED, mark_captured, mark_pass
from helix_compile.ir.stage import body_of, copy_module, graphs_of

Check = Callable[[fx.GraphModule], None]
Dump = Callable[[int, str, fx.GraphModule], None]  # number and name of a stage that is done


@dataclass(frozen=True)
class PassResult:
    """What a pass did to one graph: the graph, and how many sites it rewrote."""

    gm: fx.GraphModule
    num_rewrites: int


@dataclass(frozen=True)
class GraphPass:
    """One stage: a pass for each body, one for the outer graph, and what must hold after it.

    Args:
        stage: name of the stage it makes.
        bodies: body name -> (pass, number of rewrites that the plan expects).
        outer: pass over the outer graph, run after the bodies (it reads their placeholders).
        ensures: body name -> what must hold for it afterwards.
    """

    stage: str
    bodies: dict[str, tuple[Callable[[fx.GraphModule], PassResult], int]]
    outer: Callable[[fx.GraphModule], None] | None = None
    ensures: Mapping[str, Check] = field(default_factory=dict)


def run_passes(
    captured: fx.GraphModule, passes: list[GraphPass], dump: Dump | None = None
) -> dict[str, fx.GraphModule]:
    """Run `passes` in order on copies; returns stage name -> outer graph (bodies are its submodules).

    Raises:
        PassError: a pass rewrote another number of sites than planned or broke a promise; names the passes before.
    """
    for _, graph in graphs_of(captured):
        mark_captured(graph.graph)
    stages = {CAPTURED: captured}
    current = captured
    if dump is not None:
        dump(0, CAPTURED, captured)
    for number, graph_pass in enumerate(passes, 1):
        current = copy_module(current)
        before = [(graph.graph, set(graph.graph.nodes)) for _, graph in graphs_of(current)]
        try:
            _run_one(current, graph_pass)
        except HelixError:
            raise
        except Exception as error:
            raise PassError(
                f"pass {graph_pass.stage!r} failed after {', '.join(stages)}: {type(error).__name__}: {error}"
            ) from error
        for graph, nodes in before:
            mark_pass(graph, nodes, graph_pass.stage)
        stages[graph_pass.stage] = current
        if dump is not None:
            dump(number, graph_pass.stage, current)
    return stages


def _run_one(module: fx.GraphModule, graph_pass: GraphPass) -> None:
    for name, (run, expected) in graph_pass.bodies.items():
        result = run(body_of(module, name))
        if result.num_rewrites != expected:
            raise PassError(
                f"pass {graph_pass.stage!r}, {name}: {result.num_rewrites} sites rewritten, the plan has {expected}"
            )
    if graph_pass.outer is not None:
        graph_pass.outer(module)
    for graph_module in (module, *(body_of(module, n) for n in graph_pass.bodies)):
        graph_module.graph.lint()
        graph_module.recompile()
    for name, check in graph_pass.ensures.items():
        check(body_of(module, name))
