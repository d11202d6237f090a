"""Inputs of mla_decode in hostile memory, a run of one form of the kernel, and the comparison that its tests share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from helix_compile.kernels.merge import merge_splits
from helix_compile.kernels.mla.launch import decode_parts
from helix_compile.kernels.mla.tuning import MlaConfig
from helix_compile.kernels.registry import CompileCase

TOLERANCE = 2e-6  # float32, of the largest reference value
STALE = 1e4  # what the unused slots of a used page hold


@dataclass(frozen=True)
class MlaInputs:
    """Arguments of the op, in its order."""

    q_latent: Tensor
    q_rope: Tensor
    cache: Tensor
    page_table: Tensor
    visible: Tensor
    scale: float

    @property
    def args(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, float]:
        return (self.q_latent, self.q_rope, self.cache, self.page_table, self.visible, self.scale)

    def to(self, dtype: torch.dtype) -> MlaInputs:
        """The same in another dtype of q and cache."""
        q, q_rope, cache = (t.to(dtype) for t in self.args[:3])
        return MlaInputs(q, q_rope, cache, *self.args[3:])


def mla_inputs(
    lengths: list[int],
    T: int = 1,
    H: int = 5,
    R: int = 32,
    r: int = 16,
    page_size: int = 16,
    scale: float = 0.2,
    magnitude: float = 1.0,
    seed: int = 0,
) -> MlaInputs:
    """Sequences of the given numbers of slots, pages shuffled.

    Unused pages hold NaN (unused entries of the page table name one of them), unused slots of used pages STALE. The
    last token sees its whole length, earlier ones a random number of slots, 0 included.
    """
    g = torch.Generator().manual_seed(seed)
    B = len(lengths)
    pages_each = max(-(-length // page_size) for length in lengths) + 1
    cache = torch.full((B * pages_each + 1, page_size, R + r), torch.nan)
    order = torch.randperm(B * pages_each, generator=g).view(B, pages_each)
    page_table = torch.full_like(order, B * pages_each)
    for b, length in enumerate(lengths):
        used = -(-length // page_size)
        page_table[b, :used] = order[b, :used]
        rows = torch.full((used * page_size, R + r), STALE)
        rows[:length] = torch.randn(length, R + r, generator=g)
        cache[order[b, :used]] = rows.view(used, page_size, R + r)
    visible = torch.stack([torch.randint(0, n + 1, (T,), generator=g) for n in lengths])
    visible[:, -1] = torch.tensor(lengths)
    q = torch.randn(B, T, H, R + r, generator=g) * magnitude
    return MlaInputs(q[..., :R].contiguous(), q[..., R:].contiguous(), cache, page_table, visible.int(), scale)


def run_form(
    config: MlaConfig,
    inputs: MlaInputs,
    splits: int = 1,
    cache_scale: Tensor | None = None,
    case: CompileCase | None = None,
    first: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """partial_o and lse by one form of the kernel under the interpreter, splits merged."""
    o, lse = decode_parts(config, *inputs.args, cache_scale, first=first, splits=splits, direct=splits == 1, case=case)
    if splits == 1:
        return o[:, :, :, 0], lse[..., 0]
    return merge_splits(o, lse, inputs.q_latent.dtype)


def mismatch(got: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor], channels: int = 64) -> str | None:
    """What differs between two results of mla_decode, or None; the bound of every float32 test of its kernels.

    A score is a float32 sum of `channels` products in an order that the interpreter's BLAS chooses: its rounding grows
    with their root (2.1e-6 of the largest value against float64 at 576 channels on one machine, 0.4e-6 on another).
    """
    (o, lse), (o_ref, lse_ref) = got, wanted
    if not torch.equal(lse == -torch.inf, lse_ref == -torch.inf):
        return "lse = -inf in other rows"
    alive = lse_ref != -torch.inf
    for name, a, b in (("partial_o", o, o_ref), ("lse", lse[alive], lse_ref[alive])):
        bound = TOLERANCE * max(1.0, channels / 64) ** 0.5 * max(b.abs().max().item(), 1e-30) if b.numel() else 0.0
        error = (a.double() - b.double()).abs().max().item() if b.numel() else 0.0
        if not error <= bound:  # a NaN fails too
            return f"{name} differs by {error:.3g}, bound {bound:.3g}"
    return None
