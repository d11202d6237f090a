"""Bodies of captured models, their values on random inputs, and the few ops of a graph that a reader looks for."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, fx

from helix_compile import HelixModule, helix_compile
from helix_compile.capture.captured import CapturedGraph
from helix_compile.capture.model import capture
from helix_compile.ir.dataflow import evaluate
from helix_compile.ir.graph import node_named
from helix_compile.ir.sizes import shape_of
from helix_compile.models.presets import build_model, preset_config
from tests.support.models import tiny_model

_SHOWN = ("helix.", "_c10d_functional.", "aten.linear.", "aten.einsum.")


def captured_tiny(
    variant: str = "plain", dtype: torch.dtype = torch.float64, attention: str = "sdpa", experts: str = "batched_mm"
) -> CapturedGraph:
    """The memoised capture of a tiny model: body_0 is dense, body_1 is MoE."""
    return capture(tiny_model(variant, dtype, attention, experts))


@cache
def compiled_tiny() -> HelixModule:
    """The tiny preset on the meta device over four ranks, made once a worker; to look at, not to change."""
    return helix_compile(build_model(preset_config("tiny"), meta=True), cp=4)


def key_ops(gm: fx.GraphModule) -> list[str]:
    """Names of helix ops, collectives, linears and einsums in order, without namespace and overload."""
    targets = [str(n.target) for n in gm.graph.nodes if n.op == "call_function"]
    return [t.split(".")[1] for t in targets if t.startswith(_SHOWN)]


class BodyValues:
    """Values of a captured body's nodes for one set of random inputs at the capture hints."""

    def __init__(self, graph: fx.Graph, seed: int = 0):
        self.graph = graph
        self._known: dict[fx.Node, Tensor] = {}
        self._generator = torch.Generator().manual_seed(seed)

    def __getitem__(self, name: str) -> Tensor:
        return evaluate(node_named(self.graph, name), self._known, self._random)

    def set(self, name: str, value: Tensor) -> None:
        """Give a node a value instead of computing it."""
        self._known[node_named(self.graph, name)] = value

    def param(self, name: str) -> Tensor:
        """Value of a parameter by its name relative to the layer."""
        node = next(n for n in self.graph.nodes if n.meta.get("input") == ["param", name])
        return self[node.name]

    def _random(self, node: fx.Node) -> Tensor:
        dtype = node.meta["val"].dtype
        if dtype is torch.bool:
            return torch.ones(shape_of(node), dtype=dtype)
        return torch.randn(shape_of(node), generator=self._generator, dtype=torch.float64).to(dtype)


def stage_text(stage: fx.GraphModule) -> str:
    """Text of an outer graph and its bodies, node names included; of a leaf its name only."""
    bodies = [f"{name}: {getattr(body, 'graph', 'leaf')}" for name, body in stage.named_children()]
    return "\n".join([str(stage.graph), *bodies])
