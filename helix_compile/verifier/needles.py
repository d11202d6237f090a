"""Keys that make faults matter: on random keys one token in 32768 carries no weight, and a lost one passes any limit.

A needle is a key that one head of the last query must find: its score is the row's maximum + ln(S) / 2 + 4
(the bug families of served systems were told apart so, and by no tighter tolerance).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from helix_compile.matches import Site


def scores(match: Site, query: tuple[Tensor, Tensor], latent: Tensor, k_rope: Tensor) -> Tensor:
    """[B, T, H, S] of keys latent [B, S, R], k_rope [B, S, r]."""
    q_latent, q_rope = query
    by_latent = torch.einsum("bthr,bsr->bths", q_latent, latent.double())
    return match.scale * (by_latent + torch.einsum("bthr,bsr->bths", q_rope, k_rope.double()))


def background(
    match: Site, query: tuple[Tensor, Tensor], S: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Random entries [B, S, R], [B, S, r] whose scores have a spread of about one."""
    B = query[0].shape[0]
    parts = []
    for part, width in zip(query, match.cache.widths, strict=True):
        keys = torch.randn(B, S, width, generator=generator, dtype=torch.float64)
        norm = float(part.square().sum(-1).mean().sqrt()) if width else 1.0
        # V has no part in the scores: values of about one
        parts.append(keys / max(norm * match.scale, 1e-12) / math.sqrt(2) if norm else keys)
    return parts[0], parts[1]


def need_the_new_token(
    match: Site,
    query: tuple[Tensor, Tensor],
    new: tuple[Tensor, Tensor],
    latent: Tensor,
    lengths: list[int],
) -> int:
    """Shift all past keys so that the last query's own token outweighs them in the last heads; in place.

    The new token's key comes from the hidden state and can't be chosen. A vector u with q_h . u = -1 for these heads,
    added to every past key, lowers all their scores alike. Returns how many heads were made so.
    """
    B, S = latent.shape[:2]
    heads = list(range(match.num_heads))[-2:]
    if S == 0:
        return 0
    for b in range(B):
        first, n = S - lengths[b], lengths[b]
        if n == 0:
            continue
        one = tuple(part[b : b + 1, -1:] for part in query)
        own = scores(match, (one[0], one[1]), new[0][b : b + 1, -1:], new[1][b : b + 1, -1:])[
            0, 0, heads, 0
        ]
        # a k_rope of zeros would do for the latent part alone: needles in the rope part are planted later
        top = match.scale * torch.einsum(
            "hr,sr->hs", query[0][b, -1, heads], latent[b, first:]
        ).amax(-1)
        lower = (top + math.log(n) + 3 - own).clamp(min=0) / match.scale
        latent[b, first:] += torch.linalg.pinv(query[0][b, -1, heads]) @ -lower
    return B * len(heads)


def plant(
    match: Site,
    query: tuple[Tensor, Tensor],
    latent: Tensor,
    k_rope: Tensor,
    lengths: list[int],
) -> int:
    """Overwrite keys of each sequence with needles, in place; returns how many.

    For the last query, head by head in turn: at the start of the context, near its end, in the middle (by the latent),
    and at the start and the end by the rope part alone. Rows are aligned at the end: the first key of row b is at
    S - lengths[b].
    """
    B, S = latent.shape[:2]
    q_latent, q_rope = query[0][:, -1], query[1][:, -1]  # [B, H, *] of the last query
    planted = 0
    for b in range(B):
        first, n = S - lengths[b], lengths[b]
        if n < 5:
            continue
        places = [first, S - 1, first + n // 2, first + 1, S - 2]
        for h, place in enumerate(places[: max(1, match.num_heads - 2)]):
            by_rope = h >= 3 and bool(q_rope.any())
            part, keys = (q_rope, k_rope) if by_rope else (q_latent, latent)
            direction = part[b, h]
            row = scores(match, query, latent, k_rope)[b, -1, h, first:]
            target = float(row.max()) + math.log(n) / 2 + 4
            now = float(row[place - first])
            strength = (target - now) / (match.scale * float(direction.square().sum()))
            keys[b, place] += strength * direction
            planted += 1
    return planted
