"""Check and cut a prefilled cache into one run of entries a sequence, before anything is written."""

from __future__ import annotations

import torch
from torch import Tensor

from helix_compile.errors import RuntimeFault
from helix_compile.options import HelixOptions


def sequences_to_import(
    latents: list[Tensor],
    k_ropes: list[Tensor],
    lengths: Tensor | list[int],
    mask: Tensor | None,
    widths: tuple[int, ...],
    options: HelixOptions,
) -> list[list[Tensor]]:
    """entries[site][row] = [length, R + r] in order of position.

    Raises:
        RuntimeFault: another number of sites, shapes, lengths or mask that do not fit each other.
    """
    if len(latents) != len(widths) or len(k_ropes) != len(widths):
        raise RuntimeFault(
            f"import_cache: {len(latents)} latents and {len(k_ropes)} k_ropes for {len(widths)} cached attentions"
        )
    counts = list(lengths.tolist() if isinstance(lengths, Tensor) else lengths)
    if any(isinstance(n, bool) or not isinstance(n, int) for n in counts):
        raise RuntimeFault(f"import_cache: lengths must be ints, got {counts}")
    if latents[0].dim() != 3:
        raise RuntimeFault(
            f"import_cache: latents must be [B, S, R], got {tuple(latents[0].shape)}"
        )
    B, S = latents[0].shape[:2]
    for site, (latent, k_rope, width) in enumerate(zip(latents, k_ropes, widths, strict=True)):
        fits = latent.dim() == k_rope.dim() == 3 and latent.shape[:2] == k_rope.shape[:2] == (B, S)
        if not fits or latent.shape[2] + k_rope.shape[2] != width:
            raise RuntimeFault(
                f"import_cache: attention {site}: latent {tuple(latent.shape)} and k_rope {tuple(k_rope.shape)}; "
                f"expected [{B}, {S}, R] and [{B}, {S}, r] with R + r = {width} (squeeze the head dim of a "
                "transformers cache)"
            )
    if len(counts) != B or B > options.max_batch_size:
        raise RuntimeFault(
            f"import_cache: {len(counts)} lengths for {B} sequences (max_batch_size={options.max_batch_size})"
        )
    if any(n < 0 or n > min(S, options.max_seq_len) for n in counts):
        raise RuntimeFault(
            f"import_cache: lengths {counts}; expected 0 <= length <= columns {S} and max_seq_len {options.max_seq_len}"
        )
    columns = _columns(mask, counts, B, S)
    return [
        [torch.cat([latent[b, c], k_rope[b, c]], dim=-1) for b, c in enumerate(columns)]
        for latent, k_rope in zip(latents, k_ropes, strict=True)
    ]


def _columns(mask: Tensor | None, counts: list[int], B: int, S: int) -> list[Tensor]:
    """Columns of each row that hold its tokens."""
    if mask is None:
        return [torch.arange(n) for n in counts]
    if tuple(mask.shape) != (B, S):
        raise RuntimeFault(f"import_cache: mask {tuple(mask.shape)}, expected {(B, S)}")
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise RuntimeFault("import_cache: mask must hold 0 and 1 only")
    columns = [torch.nonzero(row).flatten() for row in mask.cpu()]
    found = [len(c) for c in columns]
    if found != counts:
        raise RuntimeFault(
            f"import_cache: the mask keeps {found} tokens a row, lengths say {counts}"
        )
    return columns
