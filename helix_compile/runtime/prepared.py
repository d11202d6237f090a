"""What every step needs of its graph and parameters, prepared once and again when one of them was edited.

A deep model has thousands of inputs, and a decode step has no time to look each up. Whether anything was edited is asked
by comparing objects in C, item by item: no edit is missed, whoever made it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor, fx

from helix_compile.errors import RuntimeFault
from helix_compile.ir.graph import InputRef, InputTable
from helix_compile.ir.stage import graphs_of
from helix_compile.ir.tokens import mixing_node
from helix_compile.layout.degrees import HelixLayout
from helix_compile.runtime.rank import Rank


class PreparedSteps:
    """The argument list of each rank, and which node mixes tokens, of the graph that is run."""

    def __init__(self, layout: HelixLayout, device: torch.device):
        self._layout, self._device = layout, device
        self._table = InputTable()
        self._lists: dict[int, Arguments] = {}
        self._nodes: list[Any] = []
        self._mixing: dict[bool, fx.Node | None] = {}

    def inputs(
        self,
        graph: fx.GraphModule,
        ranks: Sequence[Rank],
        params: Sequence[Mapping[str, Tensor]],
        step: Mapping[str, Tensor],
    ) -> list[list[Any]]:
        """What each rank's graph is run on.

        Args:
            params: each rank's, by full local name.
            step: the inputs of this step, alike for all ranks.

        Raises:
            RuntimeFault: a parameter that a rank does not have.
        """
        if self._table.read(graph.graph):
            self._lists.clear()
        return [self._of_rank(rank, own, step) for rank, own in zip(ranks, params, strict=True)]

    def mixing(self, graph: fx.GraphModule, padding: bool = False) -> fx.Node | None:
        """See mixing_node()."""
        nodes = parts_of(graph)
        if not same_objects(nodes, self._nodes):
            self._nodes = nodes
            self._mixing.clear()
        if padding not in self._mixing:
            self._mixing[padding] = mixing_node(graph, padding)
        return self._mixing[padding]

    def _of_rank(self, rank: Rank, params: Mapping[str, Tensor], step: Mapping[str, Tensor]) -> list[Any]:
        held = held_by(rank, params)
        known = self._lists.get(rank.rank)
        if known is None or known.names != [*params] or not same_objects(known.held, held):
            known = Arguments(self._table.refs, rank, params, self._layout, self._device)
            self._lists[rank.rank] = known
        values = known.values.copy()
        for place, name in known.of_step:
            values[place] = step[name]
        return values


class Arguments:
    """One rank's argument list for a graph with the inputs `refs`.

    Attributes:
        names, held: of its parameters, and what it holds: what the list was made of.
        values: None where each step has its own value.
        of_step: (place, name) of these.

    Raises:
        RuntimeFault: a parameter that the rank does not have.
    """

    def __init__(
        self,
        refs: Sequence[InputRef],
        rank: Rank,
        params: Mapping[str, Tensor],
        layout: HelixLayout,
        device: torch.device,
    ):
        self.names, self.held = [*params], held_by(rank, params)
        self.values: list[Any] = []
        self.of_step: list[tuple[int, str]] = []
        coordinates = {
            f"{axis}_rank": torch.tensor(layout.index(axis, rank.rank), device=device)
            for axis in ("kvp", "ep", "world")
        }
        for place, ref in enumerate(refs):
            value: Any = None
            if ref.kind == "param":
                if ref.name not in params:
                    raise RuntimeFault(f"rank {rank.rank} has no parameter {ref.name!r}")
                value = params[ref.name]
            elif ref.kind == "cache":
                value = rank.cache[ref.site]
            elif ref.kind == "scale":
                value = rank.scales[ref.site]
            elif ref.kind == "leaf":
                value = rank.leaves[ref.name]
            elif ref.name in coordinates:
                value = coordinates[ref.name]
            else:
                self.of_step.append((place, ref.name))
            self.values.append(value)


def held_by(rank: Rank, params: Mapping[str, Tensor]) -> list[Any]:
    """The very objects that a rank's graph runs on at every step."""
    return [*params.values(), *rank.cache, *rank.scales, *rank.leaves.values()]


def parts_of(stage: fx.GraphModule) -> list[Any]:
    """What a stage says, as the very objects: an edit puts others there. What its nodes read off the graphs is a part too."""
    graphs = [g for _, g in graphs_of(stage)]
    parts = [part for g in graphs for n in g.graph.nodes for part in (n, n.target, n.args, n.kwargs)]
    return parts + [attrgetter(str(n.target))(g) for g in graphs for n in g.graph.nodes if n.op == "get_attr"]


def same_objects(a: list[Any], b: list[Any]) -> bool:
    """Item by item the same objects."""
    return len(a) == len(b) and all(map(is_, a, b))
