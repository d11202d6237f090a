"""What the original caches in a whole step, where the ranks' caches round: what they hold of the step's tokens."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from helix_compile.verifier.numeric.cache_check import ENTRY
from helix_compile.verifier.numeric.scratch import Scratch


class HeldEntries:
    """The ranks have taken the step already; see CacheFormat.followed for where they are not followed.

    Args:
        scratch: whose caches are read.
        sites: layer -> its cached attention.
    """

    def __init__(self, scratch: Scratch, sites: Mapping[int, int]):
        self.scratch, self.sites = scratch, sites

    def __call__(self, layer: int, keys: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, heads, T, *] of a layer's new columns, by the mask [B, S + T] of all columns."""
        site, T = self.sites[layer], keys.shape[2]
        parts = [x.permute(0, 2, 1, 3).flatten(2).double() for x in (keys, values)]
        exact = torch.cat(parts, dim=-1)
        held = exact.clone()
        positions = mask.cumsum(1) - 1
        for row, kept in enumerate(mask[:, -T:].bool()):
            if bool(kept.any()):
                mine = positions[row, -T:][kept]
                entries = self.scratch.entries(site, row, int(mine[-1]) + 1)
                held[row, kept] = entries[mine, : exact.shape[-1]]
        noise = ENTRY[getattr(torch, self.scratch.compiled.plan.dtype)] * float(exact[mask[:, -T:].bool()].abs().max())
        given = self.scratch.format.cut(site).followed(0, exact, held, noise)[0]
        both = given.split([p.shape[-1] for p in parts], dim=-1)
        return _by_head(both[0], keys), _by_head(both[1], values)


def _by_head(flat: Tensor, like: Tensor) -> Tensor:
    """[B, T, heads * width] as [B, heads, T, width]."""
    return flat.unflatten(2, (like.shape[1], like.shape[3])).permute(0, 2, 1, 3).to(like)
