"""A mutant: a compiled module with one known fault, the family it belongs to, and the tools to make it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from helix_compile.ir.graph import calls, helix_op
from helix_compile.ir.stage import bodies_of, graphs_of, nodes_of
from helix_compile.module import HelixModule

c10d = torch.ops._c10d_functional
WAIT = c10d.wait_tensor.default
A2A: dict[str, Any] = {"cp": 4, "tokens_per_block": 4, "max_seq_len": 1024}
MIXED: dict[str, Any] = {"cp": 2, "tpa": 2, "tokens_per_block": 4, "max_seq_len": 1024}
EXPERT: dict[str, Any] = {**A2A, "ep": 2}
FFN = ("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight")


@dataclass(frozen=True)
class Mutant:
    """One injected bug.

    Attributes:
        name: what is wrong.
        family: a key of verifier.report.FAMILIES.
        kind: what it is made on: graph, parameters, cache, positions, plan or kernel.
        apply: breaks a freshly compiled module in place.
        options: what the module is compiled with, so that the fault can matter.
    """

    name: str
    family: int
    kind: str
    apply: Callable[[HelixModule], None]
    options: dict[str, Any] = field(default_factory=lambda: A2A)


CATALOGUE: list[Mutant] = []  # made on a model with MLA
# faults that only grouped-query attention can have, made on a model with it
GQA_CATALOGUE: list[Mutant] = []
# faults that only sparse attention can have, made on a model with an indexer and a layer that attends to what it chose
SPARSE_CATALOGUE: list[Mutant] = []
# faults of windows and sinks, made on a model with both
WINDOW_CATALOGUE: list[Mutant] = []
# faults of layers that read what an earlier one caches, made on a model with such
SHARED_CATALOGUE: list[Mutant] = []
# faults of caches in FP8, made on a model with MLA
FP8_CATALOGUE: list[Mutant] = []


def mutant(
    name: str, family: int, kind: str, options: dict[str, Any] | None = None, catalogue: list[Mutant] = CATALOGUE
) -> Callable[[Callable[[HelixModule], None]], Callable[[HelixModule], None]]:
    """Register the function that follows; what it edits is recompiled."""

    def register(edit: Callable[[HelixModule], None]) -> Callable[[HelixModule], None]:
        def apply(compiled: HelixModule) -> None:
            edit(compiled)
            for _, gm in graphs_of(compiled.graph):
                gm.recompile()

        catalogue.append(Mutant(name, family, kind, apply, options or A2A))
        return edit

    return register


def kernel_mutant(
    name: str,
    family: int,
    base: str,
    options: dict[str, Any] | None = None,
    kind: str = "kernel",
    catalogue: list[Mutant] = CATALOGUE,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a mutant that replaces one op by the function that follows."""

    def register(kernel: Callable[..., Any]) -> Callable[..., Any]:
        mutant(name, family, kind, options, catalogue)(partial(replace_op, base=base, kernel=kernel))
        return kernel

    return register


def helix_nodes(compiled: HelixModule, base: str) -> list[fx.Node]:
    """Every node of a helix op, in bodies and outer graph."""
    return [n for n in nodes_of(compiled.graph) if helix_op(n) == base]


def collectives(compiled: HelixModule, target: Any) -> list[fx.Node]:
    """Every node that starts one kind of collective."""
    return [n for b in bodies_of(compiled.graph).values() for n in calls(b.graph, target)]


def wait_of(node: fx.Node) -> fx.Node:
    """The wait of a collective."""
    return next(u for u in node.users if u.target is WAIT)


_LIBRARIES: dict[str, torch.library.Library] = {}  # dropping one unregisters its ops


def replace_op(compiled: HelixModule, base: str, kernel: Callable[..., Any]) -> None:
    """Replace every helix::`base` by a provider's op of the same base name that computes `kernel`.

    `kernel` takes the op's arguments; the reference op is torch.ops.helix.`base`.
    """
    namespace = f"helix_mutant_{base}_{kernel.__name__}"
    if namespace not in _LIBRARIES:
        library = torch.library.Library(namespace, "DEF")
        original = getattr(torch.ops.helix, base).default
        schema = str(original._schema).removeprefix("helix::")
        library.define(schema)
        library.impl(base, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{namespace}::{base}", original, lib=library)
        _LIBRARIES[namespace] = library
    target = getattr(getattr(torch.ops, namespace), base).default
    for node in helix_nodes(compiled, base):
        node.target = target


Ending = str | tuple[str, ...]


def shard_names(compiled: HelixModule, ending: Ending) -> list[str]:
    """Parameters of rank 0 whose name ends so, or in one of several ways."""
    names = [n for n in compiled.ranks[0].params if n.endswith(ending)]
    assert names, f"no parameter ends with {ending!r}"
    return names


def permute_ranks(compiled: HelixModule, ending: Ending, order: list[int]) -> None:
    """Rank r gets what rank order[r] holds."""
    for name in shard_names(compiled, ending):
        held = [rank.params[name] for rank in compiled.ranks]
        for rank, source in zip(compiled.ranks, order, strict=True):
            rank.params[name] = held[source]


def edit_param(compiled: HelixModule, ending: Ending, edit: Callable[[Tensor, int], Tensor]) -> None:
    """Replace a parameter on every rank by edit(tensor, rank)."""
    for name in shard_names(compiled, ending):
        for rank in compiled.ranks:
            rank.params[name] = edit(rank.params[name].clone(), rank.rank)
