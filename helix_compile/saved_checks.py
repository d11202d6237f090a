"""What a saved module must hold before it is trusted: graphs that type, and inputs and weights that fit them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, fx

from helix_compile.errors import HelixError, PassError, RuntimeFault
from helix_compile.kv_cache import cache_shape
from helix_compile.passes.check_layouts import check_layouts
from helix_compile.passes.fx_edit import placeholders
from helix_compile.plan import HelixPlan
from helix_compile.ranks import ModelFacts


def check_saved_graphs(stages: dict[str, fx.GraphModule], plan: HelixPlan) -> None:
    """Infer the layout of every value again: a collective that was taken out or changed is found here.

    Raises:
        HelixError: a body that the plan does not know, or does not type.
    """
    names = {body.name for body in plan.bodies}
    for stage, outer in stages.items():
        bodies = dict(outer.named_children())
        if set(bodies) != names:
            raise HelixError(
                f"stage {stage}: bodies {sorted(bodies)}, the plan has {sorted(names)}"
            )
        for name, body in bodies.items():
            assert isinstance(body, fx.GraphModule)
            try:
                check_layouts(body, plan=plan.body(name), degrees=plan.layout)
            except PassError as error:
                raise HelixError(f"graphs.json, stage {stage}: {error}") from error
        for call in [n for n in outer.graph.nodes if n.op == "call_module"]:
            _check_call(stage, call, placeholders(outer.get_submodule(call.target).graph))


def _check_call(stage: str, call: fx.Node, inputs: list[fx.Node]) -> None:
    """A layer gets its own weights and caches: the same kind, name and shape as its body takes."""
    where = f"graphs.json, stage {stage}, layer call `{call.name}`"
    if len(call.args) != len(inputs):
        raise HelixError(f"{where}: {len(call.args)} arguments, its body takes {len(inputs)}")
    for argument, taken in zip(call.args, inputs, strict=True):
        kind, name = taken.meta["input"]
        if not isinstance(argument, fx.Node):
            raise HelixError(f"{where}: {argument!r} stands for {kind} {name}")
        if kind not in ("param", "cache"):
            continue
        given, given_name = argument.meta.get("input", (None, argument.name))
        same_name = kind == "cache" or given_name.endswith(f".{name}")
        if given != kind or not same_name or _shape(argument) != _shape(taken):
            raise HelixError(
                f"{where}: {given} {given_name} {_shape(argument)} stands for {kind} {name} {_shape(taken)}"
            )


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def check_saved_inputs(lowered: fx.GraphModule, plan: HelixPlan, facts: ModelFacts) -> None:
    """Caches of the graph are those that the plan's options and the stated widths make.

    Raises:
        HelixError: another number, size or dtype of caches.
    """
    whole, latent = facts.cache_widths, facts.latent_widths
    if len(latent) != len(whole) or not all(0 < R < w for R, w in zip(latent, whole, strict=True)):
        raise HelixError(
            f"graphs.json: latent_widths {list(latent)} are not parts of cache_widths {list(whole)}"
        )
    wanted = {
        f"cache_{i}": (cache_shape(width, plan.options, plan.layout.kvp), plan.dtype)
        for i, width in enumerate(facts.cache_widths)
    }
    got = {
        n.meta["input"][1]: (tuple(n.meta["val"].shape), str(n.meta["val"].dtype).split(".")[1])
        for n in placeholders(lowered.graph)
        if n.meta["input"][0] == "cache"
    }
    if got != wanted:
        raise HelixError(f"graphs.json takes caches {got}, the plan makes {wanted}")


def check_saved_params(lowered: fx.GraphModule, params: Mapping[int, Mapping[str, Tensor]]) -> None:
    """Each rank holds every parameter of the graph, in its shape and dtype, and no other.

    Raises:
        RuntimeFault: one that is missing, does not fit or is unknown.
    """
    inputs = [n.meta["input"] for n in placeholders(lowered.graph)]
    known = {name for kind, name in inputs if kind == "param"}
    for rank, held in params.items():
        if unknown := sorted(set(held) - known):
            raise RuntimeFault(f"rank {rank}: the graph takes no parameter {', '.join(unknown)}")
    for node in placeholders(lowered.graph):
        kind, name = node.meta["input"]
        if kind != "param":
            continue
        expected = (tuple(node.meta["val"].shape), node.meta["val"].dtype)
        for rank, held in params.items():
            tensor = held.get(name)
            got = (tuple(tensor.shape), tensor.dtype) if isinstance(tensor, Tensor) else None
            if got != expected:
                raise RuntimeFault(
                    f"rank {rank}: parameter {name} is {got}, the graph expects {expected}"
                )
