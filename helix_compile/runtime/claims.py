"""What real ranks must have in common before they start, as short texts that RankAgreement compares."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from helix_compile.checkpoint.weights import CheckpointWeights
from helix_compile.ir.stage import bodies_of
from helix_compile.plan.helix_plan import HelixPlan
from helix_compile.runtime.rank import ModelFacts


def graph_digest(graph: fx.GraphModule) -> str:
    """Hex digest of an outer graph and its bodies: operators, constants, data flow, and the names of their inputs.

    Not of where it runs, nor of the names and the order of its nodes.

    Args:
        graph: a stage of a HelixModule, e.g. `compiled.graph`. Weights' values and sizes of caches are no part of it.
    """
    bodies = {name: graph_digest(body) for name, body in bodies_of(graph).items()}
    digests: dict[fx.Node, str] = {}

    def text(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return digests[value]
        if isinstance(value, (list, tuple)):
            return [text(v) for v in value]
        if isinstance(value, dict):
            return {k: text(v) for k, v in sorted(value.items())}
        if isinstance(value, slice):
            return ["slice", text(value.start), text(value.stop), text(value.step)]
        if isinstance(value, torch.device):
            return "device"  # each rank's own: cuda:0 on one is cuda:1 on the next
        return repr(value)

    for node in graph.graph.nodes:
        if node.op == "placeholder":
            what = ["input", *map(str, node.meta.get("input", [node.name]))]
        elif node.op == "call_module":
            name = str(node.target)
            what = ["body", bodies[name]] if name in bodies else ["leaf", name]
        else:
            function, module = getattr(node.target, "__qualname__", None), getattr(node.target, "__module__", "")
            what = [node.op, str(node.target) if function is None else f"{module}.{function}"]
        parts = (what, [text(a) for a in node.args], text(node.kwargs))
        digests[node] = hashlib.sha256(repr(parts).encode()).hexdigest()
    output = next(n for n in graph.graph.nodes if n.op == "output")
    return digests[output]


_SAMPLES = 16


def claims_of(plan: HelixPlan, lowered: fx.GraphModule, facts: ModelFacts) -> dict[str, Callable[[], str]]:
    """Claim -> how to get it; a world without other processes asks for none.

    The options are said in full, so that a difference can be read; the rest as digests.
    """
    options = {f"option {name}": (lambda value=value: repr(value)) for name, value in plan.options.to_json().items()}
    return {
        "torch version": lambda: torch.__version__,
        **options,
        "dtype": lambda: plan.dtype,
        "weights": lambda: weights_digest(facts.originals),
        "plan": lambda: short_digest(plan.to_json()),
        "graph": lambda: graph_digest(lowered),
    }


def weights_digest(tensors: Mapping[str, Tensor]) -> str:
    """Of each tensor's name, shape, dtype, the sum of its bits and some of its elements.

    A sum does not see that elements changed places, a sample does not see most of them; together they tell two
    checkpoints apart at the price of reading the weights once. A checkpoint folder, of which a rank reads its slices
    only, is told by its headers and a few elements of each stored tensor.
    """
    if isinstance(tensors, CheckpointWeights):
        return short_digest(tensors.fingerprint())
    return short_digest("\n".join(f"{name} {_weights_text(t)}" for name, t in sorted(tensors.items())))


def _weights_text(tensor: Tensor) -> str:
    shape = f"{list(tensor.shape)} {tensor.dtype}"
    if tensor.device.type == "meta" or not tensor.numel():
        return shape
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    whole = tensor.detach()
    if whole.is_floating_point():
        whole = whole.view(bits[whole.itemsize])
    flat = whole.reshape(-1)
    sample: Any = flat[:: max(1, flat.numel() // _SAMPLES)]
    return f"{shape} {flat.sum(dtype=torch.int64).item()} {sample.tolist()}"


def short_digest(text: str) -> str:
    """Of eight bytes, in hex."""
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
