"""Index keys of a past, such that the choice among them is decided where faults show.

On random keys the k-th score stands alone, and needles are not chosen: attention never looks for them. So, for the last
query of each sequence, the keys of needles score best. In the first sequence the k-th place falls among keys that tie: all
index heads of theirs are rectified to 0, which is what ties in real models are, and they lie on every rank; what is not
chosen for sure scores below 0. The other sequences have random keys besides.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from helix_compile.plan.matches import AttentionMatch, Selection
from helix_compile.verifier.numeric.sharpen import needle_places

TIED = 2  # keys of each rank that tie at the k-th place


def index_keys(
    match: AttentionMatch,
    values: dict[str, Any],
    lengths: list[int],
    S: int,
    hands: list[list[list[int]]],
    generator: torch.Generator,
) -> tuple[Tensor, int]:
    """Index keys [B, S, I], rows aligned at the end, and in how many sequences the k-th place falls among tied keys.

    Args:
        values: of the original's layer, for the queries.
        hands: of each sequence the positions of each rank.
    """
    selection = match.selection
    assert isinstance(selection, Selection)
    q = in_order(values[selection.query].double(), selection.query_form, "BTJI")[:, -1]
    w = in_order(values[selection.weights].double(), selection.weights_form, "BTJ")[:, -1]
    new = values[selection.new].double()
    keys = torch.randn(len(lengths), S, selection.width, generator=generator, dtype=torch.float64)
    tied = 0
    for b, n in enumerate(lengths):
        own = (w[b, :, None] * (selection.scale * q[b] @ new[b].T).relu()).sum(dim=0)  # of the new tokens
        high, zero, low = (_direction(q[b], side) for side in (w[b] > 0, w[b] > torch.inf, w[b] < 0))
        best = float((w[b] * (selection.scale * q[b] @ high).relu()).sum())
        if n < 5 or best <= 0:
            continue
        mine = keys[b, S - n :]
        top = float((w[b, :, None] * (selection.scale * q[b] @ mine.T).relu()).sum(dim=0).amax())
        places = needle_places(match, n, new.shape[1])[: max(1, selection.top_k // 2)]
        strength = 2 * max(top, float(own.max()), best) / best
        group = _tied_places(hands[b], places) if b == 0 else []
        above = int((own > 0).sum())
        if _all_rectified(q[b], zero) and n > selection.top_k and above < selection.top_k and len(group) > 1:
            tied += 1
            wanted = max(0, selection.top_k - max(1, len(group) // 2 - 1) - above)
            spare = [p for p in range(n) if p not in group and p not in places]
            places = [*places, *spare][:wanted]
            mine[:] = low * (0.5 + torch.rand(n, 1, generator=generator, dtype=torch.float64))
            mine[group] = zero
        for number, place in enumerate(places):
            mine[place] = high * strength * (1 + number / (1 + len(places)))
    return keys, tied


def score_sizes(match: AttentionMatch, values: dict[str, Any], past: Tensor) -> Tensor:
    """[B, T, S + T] by column: the size of a score that random q and keys of these norms have. Its rounding is a part of
    that, and not of the score: what heads add may cancel.
    """
    selection = match.selection
    assert isinstance(selection, Selection)
    q = in_order(values[selection.query].double(), selection.query_form, "BTJI")
    w = in_order(values[selection.weights].double(), selection.weights_form, "BTJ")
    keys = torch.cat([past.double(), values[selection.new].double()], dim=1)
    of_query = (w.square() * q.square().mean(dim=-1)).sum(dim=-1).sqrt()
    return selection.scale * of_query[..., None] * keys.norm(dim=-1)[:, None]


def in_order(value: Tensor, form: str, wanted: str) -> Tensor:
    """A value whose dims are `form`, dims of one (1) dropped, in the order `wanted`."""
    value = value.reshape([n for n, letter in zip(value.shape, form, strict=True) if letter != "1"])
    form = form.replace("1", "")
    return value.permute([form.index(letter) for letter in wanted])


def _direction(q: Tensor, positive: Tensor) -> Tensor:
    """A key [I] whose products with q [J, I] are 1 for some heads and -1 for the others, as near as J and I allow."""
    return torch.linalg.pinv(q) @ torch.where(positive, 1.0, -1.0).double()


def _all_rectified(q: Tensor, key: Tensor) -> bool:
    """Every product is so far below 0 that rounding can't lift it."""
    products = q @ key
    return bool((products < -0.05 * q.norm(dim=-1) * key.norm()).all())


def _tied_places(hands: list[list[int]], taken: list[int]) -> list[int]:
    """Some positions of every rank, out of the middle of what it has."""
    found = []
    for hand in hands:
        free = [p for p in hand if p not in taken]
        found += free[len(free) // 3 :][:TIED]
    return sorted(found)
