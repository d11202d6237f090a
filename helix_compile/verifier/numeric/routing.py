"""Which experts a run chose, and how close the choice was: rounding may turn a near tie, and that is not a fault.

Every top-k of a model is recorded in order, on both sides alike: a TorchDispatchMode on the eager copy, a hook on the
graph. A token whose choice differs is excluded if the reference's own margin is within rounding, else it is a finding.
The top-ks of indexers are not among them (indexers.py), nor those inside of leaves, which both sides run alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode

from helix_compile.ir.graph import helix_op
from helix_compile.verifier.numeric.indexers import Indexers

_TOPK = torch.ops.aten.topk.default
# a margin below this part of the largest score may turn by rounding of the layers before the router
NEAR_TIE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.02}


@dataclass
class Choices:
    """Top-k results in order of execution: sorted indices [rows, k] and margins [rows]."""

    indices: list[Tensor] = field(default_factory=list)
    margins: list[Tensor] = field(default_factory=list)

    def add(self, scores: Tensor | None, indices: Tensor) -> None:
        """Keep one top-k; its margin is that between the last chosen and the first refused score, over the largest."""
        k = indices.shape[-1]
        self.indices.append(indices.reshape(-1, k).sort(dim=-1).values)
        if scores is None:
            return
        rows = scores.reshape(-1, scores.shape[-1]).double()
        if k >= rows.shape[1]:
            self.margins.append(rows.new_full((len(rows),), torch.inf))
            return
        best = rows.topk(k + 1, dim=-1).values
        largest = rows.masked_fill(~rows.isfinite(), 0).abs().amax(dim=-1).clamp(min=1e-300)
        self.margins.append((best[:, k - 1] - best[:, k]) / largest)

    def join(self, chunks: list[Choices], batch: int) -> None:
        """Take over a step that ran in chunks along T: rows in order of sequence, then token, again."""
        for parts in zip(*(c.indices for c in chunks), strict=True):
            self.indices.append(_joined(parts, batch))
        for margins in zip(*(c.margins for c in chunks), strict=True):
            self.margins.append(_joined([m[:, None] for m in margins], batch)[:, 0])


def _joined(parts: Sequence[Tensor], batch: int) -> Tensor:
    k = parts[0].shape[-1]
    return torch.cat([p.view(batch, -1, k) for p in parts], dim=1).view(-1, k)


class RecordTopK(TorchDispatchMode):
    """Record every router's top-k of an eager run in `choices`; an indexer's is taken by `indexers`.

    Attributes:
        paused: leave top-ks alone, as inside of a leaf.
    """

    def __init__(self, choices: Choices | None, indexers: Indexers | None = None):
        super().__init__()
        self.choices, self.indexers, self.paused = choices, indexers, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func` and look."""
        looked_at = func is _TOPK and not self.paused
        if looked_at and self.indexers is not None and self.indexers.armed:
            return self.indexers.topk(*args[:2])
        result = func(*args, **(kwargs or {}))
        if looked_at and self.choices is not None:
            self.choices.add(args[0], result[1])
        return result


def topk_hook(choices: Choices, *, with_scores: bool = False) -> Any:
    """A hook for VirtualWorld.run that records rank 0's choices; with_scores: their margins too."""
    scores: dict[str, Tensor] = {}
    router_inputs: dict[str, Tensor] = {}

    def hook(rank: int, node: fx.Node, value: Any) -> None:
        if rank:
            return
        if any(helix_op(user) == "moe_router" for user in node.users):
            router_inputs[node.name] = value
        if helix_op(node) == "moe_router":
            logits, bias = (router_inputs[n.name] for n in node.args[:2])
            _add_router(choices, logits, bias, node, value[0])
        if with_scores and any(user.target is _TOPK for user in node.users):
            scores[node.name] = value
        if node.op == "call_function" and node.target is _TOPK:
            choices.add(scores.get(node.args[0].name), value[1])

    return hook


def _add_router(choices: Choices, logits: Tensor, bias: Tensor, node: fx.Node, ids: Tensor) -> None:
    """The top-ks that the fused router stands for: those of the groups are taken again, that of the experts is its own."""
    groups, kept = node.args[2:4]
    scores = logits.sigmoid() + bias
    two_best = scores.unflatten(1, (groups, -1)).topk(2, dim=-1)
    choices.add(scores.unflatten(1, (groups, -1)), two_best.indices)
    totals = two_best.values.sum(dim=-1)
    chosen = totals.topk(kept, dim=-1).indices
    choices.add(totals, chosen)
    open_groups = torch.zeros_like(totals, dtype=torch.bool).scatter(1, chosen, True)
    size = scores.shape[1] // groups
    choices.add(scores.masked_fill(~open_groups.repeat_interleave(size, 1), -torch.inf), ids)


@dataclass(frozen=True)
class Routing:
    """Per token of a step [B, T]: chosen alike; and if not, whether it was a near tie.

    `unpaired` says why the two runs' choices can't be compared at all; "" where they can.
    """

    alike: Tensor
    near_tie: Tensor
    unpaired: str = ""


def compare_choices(got: Choices, expected: Choices, B: int, T: int, dtype: torch.dtype) -> Routing:
    """Compare two runs of one step."""
    alike, near = torch.ones(B * T, dtype=torch.bool), torch.zeros(B * T, dtype=torch.bool)
    shapes = [[tuple(x.shape) for x in side.indices] for side in (got, expected)]
    if shapes[0] != shapes[1]:
        first = next((i for i, (a, b) in enumerate(zip(*shapes, strict=False)) if a != b), min(map(len, shapes)))
        told = [f"{len(side)}, #{first} of {side[first] if first < len(side) else 'none'}" for side in shapes]
        return Routing(alike.view(B, T), near.view(B, T), f"top-ks of routers: {told[0]}; of the original {told[1]}")
    for mine, theirs, margin in zip(got.indices, expected.indices, expected.margins, strict=True):
        if len(mine) % (B * T):
            continue  # not of tokens
        same = (mine == theirs).all(dim=-1).view(B * T, -1).all(dim=-1).cpu()
        close = margin.view(B * T, -1).amin(dim=-1).cpu() < NEAR_TIE[dtype]
        near |= alike & ~same & close  # the first difference of a token decides: later ones follow from it
        alike &= same
    return Routing(alike.view(B, T), near.view(B, T))
