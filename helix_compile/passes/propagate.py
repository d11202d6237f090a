"""Give every node of an edited graph its meta["val"]: shapes at this rank, symbolic in B and T."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from helix_compile.errors import PassError
from helix_compile.plan import BodyPlan, ParamShard


def fake_mode_of(graph: fx.Graph) -> FakeTensorMode:
    """The fake mode that the graph's values live in."""
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return FakeTensorMode(shape_env=ShapeEnv())


def propagate_shapes(graph: fx.Graph) -> None:
    """Recompute meta["val"] of every node from the placeholders'.

    Raises:
        PassError: an op does not take the shapes it gets; names node, op and shapes.
    """
    mode = fake_mode_of(graph)
    with mode, torch.no_grad():
        for node in graph.nodes:
            if node.op != "call_function":
                continue
            args = fx.map_arg(node.args, lambda n: n.meta["val"])
            kwargs = fx.map_arg(node.kwargs, lambda n: n.meta["val"])
            try:
                node.meta["val"] = node.target(*args, **kwargs)
            except Exception as error:
                shapes = [_shape(n.meta["val"]) for n in node.all_input_nodes]
                raise PassError(
                    f"node `{node.name}` ({node.target}) does not take {shapes}: {error}"
                ) from error


def _shape(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else str(value)


def fake_shard(node: fx.Node, shard: ParamShard, plan: BodyPlan) -> Tensor:
    """Value of a parameter placeholder after its cut: what one rank holds."""
    old = node.meta["val"]
    shape = list(shard.shape)
    if -1 in shape:  # the width of the input, which the cut leaves alone
        shape[shape.index(-1)] = old.shape[-1]
    with fake_mode_of(node.graph):
        return torch.empty(shape, dtype=old.dtype, device=old.device)

