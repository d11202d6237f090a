"""The router of a mixture of experts in plain torch: biased grouped top-k as in DeepSeek-V3, with ties defined.

    N tokens, E experts in n_group groups of equal size, k experts a token

torch.topk leaves ties open; here the lower index wins, among groups and among experts. This is the spec of the kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor


def moe_router_reference(
    logits: Tensor,
    bias: Tensor,
    n_group: int,
    topk_group: int,
    top_k: int,
    normalize: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Choose top_k of E experts for each token.

    Args:
        logits: [N, E] float32.
        bias: [E], added to the scores for the choice alone.
        n_group: groups of E // n_group neighbours; a group scores the sum of its two best.
        topk_group: groups that experts may come from.
        top_k: experts a token.
        normalize: divide a token's weights by their sum (plus 1e-20).
        scale: factor of the weights.

    Returns:
        expert_ids [N, top_k] int64, best first by biased score, and weights [N, top_k]. A NaN ranks above all.
    """
    scores = logits.sigmoid()
    choice = scores + bias
    size = choice.shape[1] // n_group
    two_best = choice.unflatten(1, (n_group, size)).topk(min(2, size), dim=-1).values
    kept_groups = _best(two_best.sum(dim=-1), topk_group)
    kept = torch.zeros((choice.shape[0], n_group), dtype=torch.bool, device=choice.device)
    kept.scatter_(1, kept_groups, True)
    choice = choice.masked_fill(~kept.repeat_interleave(size, dim=1), -torch.inf)
    expert_ids = _best(choice, top_k)
    weights = scores.gather(1, expert_ids)
    if normalize:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return expert_ids, weights * scale


def _best(values: Tensor, count: int) -> Tensor:
    return values.sort(dim=-1, descending=True, stable=True).indices[:, :count]
