"""The original's own choice of keys (a top-k of an indexer's scores), recorded, and in place of it what the ranks chose.

At an exact tie torch.topk takes any key, and its set changes when columns are appended: the model itself is not defined
there. So every run of the original takes the earlier position, here and nowhere else: the router's top-k is left alone.
Which top-k is an indexer's is known by the node in a captured graph, and in the eager model by what comes before it: the
index keys are appended to the cache, and the next top-k is over their scores.

Told which keys to take, the original computes attention, layers and logits for these: a key that rounding has turned is no
error of rounding's size, and must be judged by its score alone (choice_check.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class SiteChoice:
    """One top-k of an indexer, by position.

    Attributes:
        scores: [B, T, n], -inf where a query does not see a key.
        keys: [B, T, n], the chosen ones.
        sizes: [B, T, n], what rounding of a score is a part of (score_sizes); None where that is not known.
    """

    scores: Tensor
    keys: Tensor
    sizes: Tensor | None = None


@dataclass
class Indexers:
    """The indexers of one run, in the order in which they choose.

    Attributes:
        mask: [B, S + T], the columns of the run that are tokens; padding has no position.
        told: keys [B, T, n] by position that each takes in place of its own choice; none: its own.
        choices: what each would have chosen by itself.
    """

    mask: Tensor
    told: Sequence[Tensor] = ()
    choices: list[SiteChoice] = field(default_factory=list)
    armed: bool = False

    def arm(self) -> None:
        """The next top-k is an indexer's."""
        self.armed = True

    def topk(self, scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """In place of scores.topk(k): the best k of [B, T, S + T], of equal ones the earlier column; or what it is told."""
        self.armed = False
        best, indices = (x[..., :k] for x in torch.sort(scores + 0.0, dim=-1, descending=True, stable=True))
        hidden = scores <= torch.finfo(scores.dtype).min / 2
        keys = torch.zeros_like(hidden).scatter_(-1, indices, True) & ~hidden
        wide = scores.double().masked_fill(hidden, -torch.inf).cpu()
        self.choices.append(
            SiteChoice(by_position(wide, self.mask, -torch.inf), by_position(keys.cpu(), self.mask, False))
        )
        if not self.told:
            return best, indices
        told = by_column(self.told[len(self.choices) - 1], self.mask, False).to(scores.device)
        indices = as_indices(told, hidden, k, otherwise=indices)
        return scores.gather(-1, indices), indices

    def join(self, chunks: Sequence[Indexers]) -> None:
        """Take over a step that ran in chunks along T."""
        n = int(self.mask.sum(dim=1).max())
        for parts in zip(*(chunk.choices for chunk in chunks), strict=True):
            scores = torch.cat([_wider(p.scores, n, -torch.inf) for p in parts], dim=1)
            self.choices.append(SiteChoice(scores, torch.cat([_wider(p.keys, n, False) for p in parts], dim=1)))


def _wider(value: Tensor, n: int, fill: float) -> Tensor:
    return torch.nn.functional.pad(value, (0, n - value.shape[-1]), value=fill)


def by_position(value: Tensor, mask: Tensor, fill: float) -> Tensor:
    """[B, T, S + T] by column -> [B, T, n] by position, n of the longest sequence."""
    found = value.new_full((*value.shape[:2], int(mask.sum(dim=1).max())), fill)
    for b, kept in enumerate(mask.bool().cpu()):
        found[b, :, : int(kept.sum())] = value[b][:, kept]
    return found


def by_column(value: Tensor, mask: Tensor, fill: float) -> Tensor:
    """Inverse of by_position."""
    found = value.new_full((*value.shape[:2], mask.shape[1]), fill)
    for b, kept in enumerate(mask.bool().cpu()):
        found[b][:, kept] = value[b, :, : int(kept.sum())]
    return found


def as_indices(keys: Tensor, hidden: Tensor, k: int, otherwise: Tensor) -> Tensor:
    """Chosen columns [B, T, S + T] as k indices or more: the rest are columns that the query does not see, or one twice.

    `otherwise` [B, T, k] are the indices of a query that chose nothing (padding).
    """
    count = keys.sum(dim=-1, keepdim=True)
    k = max(k, int(count.max()))
    # chosen ones first, then hidden ones
    order = torch.sort(keys.int() * 2 + hidden.int(), dim=-1, descending=True, stable=True).indices[..., :k]
    usable = (keys | hidden).gather(-1, order)
    indices = torch.where(usable, order, order[..., :1])
    nothing = torch.nn.functional.pad(otherwise, (0, k - otherwise.shape[-1])) if k > otherwise.shape[-1] else otherwise
    return torch.where(count > 0, indices, nothing[..., :k])
