"""The truth: a deep fp64 copy of the original model, run as it is; and its captured graph, node by node, in fp64.

The eager copy decides. The graph only says *where* a deviation starts, and is the reference for one layer alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.cache_utils import DynamicCache

from helix_compile.matches import MoEMatch
from helix_compile.model_source import converted_copy
from helix_compile.numerics import WidenedIslands
from helix_compile.params import originals
from helix_compile.verifier.routing import Choices, RecordTopK

GATHER_BYTES = (
    2**30
)  # batched_mm gathers each token's experts: long steps are cut so that this bounds it
Edits = Mapping[str, Callable[[Tensor], Tensor]]


def wide_copy(model: Any, edits: Edits) -> Any:
    """A deep copy in fp64 with sdpa attention, batched_mm experts and the edited weights; `model` is left alone."""
    twin: Any = converted_copy(model, torch.float64).eval()
    twin.config._attn_implementation = "sdpa"
    if getattr(twin.config, "_experts_implementation", None) is not None:
        twin.set_experts_implementation("batched_mm")
    apply_edits(dict(originals(twin)), edits)
    return twin


def apply_edits(tensors: dict[str, Tensor], edits: Edits) -> None:
    """Change weights in place. Each edit commutes with every cut, so a faulty shard stays faulty."""
    with torch.no_grad():
        for name, edit in edits.items():
            if name in tensors:
                tensors[name].copy_(edit(tensors[name]))


@dataclass
class EagerReference:
    """The copy with its own DynamicCache. Padding is a column there and never a position."""

    model: Any
    mask: Tensor | None = None
    cache: Any = field(init=False)

    def __post_init__(self) -> None:
        self.cache = DynamicCache(config=self.model.config)

    def step(self, ids: Tensor, mask: Tensor, choices: Choices | None = None) -> Tensor:
        """Logits [B, T, vocab] of ids [B, T] with mask [B, T]; every top-k goes to `choices`."""
        width = self._chunk(ids.shape[0])
        logits, recorded = [], []
        for part, kept in zip(ids.split(width, 1), mask.split(width, 1), strict=True):
            recorded.append(Choices())
            with RecordTopK(recorded[-1]):
                logits.append(self._chunk_logits(part, kept))
        if choices is not None:
            choices.join(recorded, len(ids))
        return torch.cat(logits, dim=1)

    def _chunk_logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        self.mask = mask if self.mask is None else torch.cat([self.mask, mask], dim=1)
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        device = next(self.model.parameters()).device
        with torch.no_grad(), WidenedIslands():
            out = self.model(
                input_ids=ids.to(device),
                attention_mask=self.mask.to(device),
                position_ids=positions.to(device),
                past_key_values=self.cache,
            )
        return out.logits

    def _chunk(self, batch: int) -> int:
        config = self.model.config
        experts = getattr(config, "num_experts_per_tok", None) or 1
        widths = (getattr(config, "moe_intermediate_size", None) or 0) * config.hidden_size
        a_token = max(1, batch * experts * widths * 2 * 8)
        return max(1, min(256, GATHER_BYTES // a_token))


class Widened(TorchDispatchMode):
    """A graph captured in `dtype`, evaluated in fp64: casts to float32 or to `dtype` keep fp64."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func`, wide."""
        kwargs = dict(kwargs or {})
        target = kwargs.get("dtype")
        if target in (torch.float32, self.dtype) and target.is_floating_point:
            narrow = func is torch.ops.aten._to_copy.default
            if narrow and args[0].dtype is torch.float64:
                return args[0].clone()
            if target is self.dtype:  # the model's own dtype; position tables stay as they are
                kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


@dataclass(frozen=True)
class Override:
    """Computes a node in another way: from the values of the nodes that it names."""

    reads: tuple[str, ...]
    compute: Callable[..., Any]


def evaluate_graph(
    module: fx.GraphModule,
    inputs: list[Any],
    *,
    overrides: Mapping[str, Mapping[str, Override]],
    record: Callable[[str, fx.Node, Any], None] | None = None,
    path: str = "",
    body: str = "",
) -> Any:
    """Run a captured graph on plain tensors, its bodies node by node.

    Args:
        inputs: values of the placeholders in order.
        overrides: body -> node name -> how it is computed instead.
        record: called with (path, node, value) for each node that was computed.
        body: name of the body that this graph is, "" for the outer graph.
    """
    replaced = overrides.get(body, {})
    needed = _needed(module.graph, replaced)
    values: dict[fx.Node, Any] = {}
    by_name = {n.name: n for n in module.graph.nodes}
    remaining = iter(inputs)
    for node in module.graph.nodes:
        if node.op == "placeholder":
            values[node] = next(remaining)
        elif node.op == "output":
            return fx.map_arg(node.args[0], values.__getitem__)
        elif node not in needed:
            continue
        elif node.name in replaced:
            override = replaced[node.name]
            values[node] = override.compute(*(values[by_name[n]] for n in override.reads))
        elif node.op == "call_module":
            sub = module.get_submodule(str(node.target))
            assert isinstance(sub, fx.GraphModule)
            args = list(fx.map_arg(node.args, values.__getitem__))
            values[node] = evaluate_graph(
                sub, args, overrides=overrides, record=record, path=f"{path}{node.name}.",
                body=str(node.target),
            )  # fmt: skip
        else:
            args = fx.map_arg(node.args, values.__getitem__)
            kwargs = fx.map_arg(node.kwargs, values.__getitem__)
            values[node] = node.target(*args, **kwargs)
        if record is not None:
            record(path, node, values[node])
    raise ValueError("the graph has no output")


def _needed(graph: fx.Graph, replaced: Mapping[str, Override]) -> set[fx.Node]:
    """Nodes that the output depends on; an overridden node needs what it names and nothing else."""
    by_name = {n.name: n for n in graph.nodes}
    needed: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or node in needed:
            override = replaced.get(node.name)
            needed.add(node)
            needed.update(
                node.all_input_nodes if override is None else map(by_name.get, override.reads)
            )
    return needed


def experts_override(match: MoEMatch, graph: fx.Graph) -> Override:
    """Routed experts by the textbook, expert by expert: fp64 has no grouped matmul, and this is written apart
    from the op's reference.
    """
    weights = [n.name for n in graph.nodes if n.meta.get("input") in (["param", match.gate_up], ["param", match.down])]  # fmt: skip
    by_param = {n.meta["input"][1]: n.name for n in graph.nodes if n.name in weights}
    reads = (match.x, match.expert_ids, match.weights, by_param[match.gate_up], by_param[match.down])  # fmt: skip
    return Override(reads, _experts)


def _experts(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """X [.., D], ids and weights [.., k], gate_up [E, 2F, D], down [E, D, F] -> [N, D]."""
    tokens = x.reshape(-1, x.shape[-1])
    ids, weights = ids.reshape(len(tokens), -1), weights.reshape(len(tokens), -1)
    out = torch.zeros_like(tokens)
    for expert in torch.unique(ids).tolist():
        chosen = (ids == expert).any(dim=1)
        share = (weights * (ids == expert)).sum(dim=1)[chosen, None]
        gate, up = nn.functional.linear(tokens[chosen], gate_up[expert]).chunk(2, dim=-1)
        out[chosen] += nn.functional.linear(nn.functional.silu(gate) * up, down[expert]) * share
    return out
