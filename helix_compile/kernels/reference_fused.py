"""Pure-torch definition of every op that exists as a kernel only: several ops in one.

    B sequences, T new tokens a sequence, H query heads, R kv_lora_rank, r rope width, S splits of one rank's shard

The norm and rope formulas are DeepSeek's as transformers has them: statistics in float32, interleaved channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from helix_compile.kernels.exchange import pack_heads_reference
from helix_compile.kernels.reference import accumulation_dtype, cache_append_reference, merge_lse_reference


def pack_splits_reference(partial_o: Tensor, lse: Tensor, peers: int, dtype: torch.dtype) -> Tensor:
    """Merge the splits partial_o [B, T, H, S, R], lse [B, T, H, S] of one rank, and pack_heads of o in `dtype`.

    A split with lse = -inf is not read; a row whose splits are all dead has o = 0 and lse = -inf.
    """
    o = merge_lse_reference(partial_o.movedim(3, 0), lse.movedim(3, 0))
    return pack_heads_reference(o.to(dtype).contiguous(), torch.logsumexp(lse, dim=3), peers)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dim: statistics in float32 or wider, rounded to x's dtype before the weight."""
    wide = x.to(accumulation_dtype(x.dtype))
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (wide * scale).to(x.dtype)


def rope_reference(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate x [..., r] by cos and sin [..., r]; interleaved: channels come in pairs and leave in halves."""
    if interleaved:
        x = torch.cat([x[..., 0::2], x[..., 1::2]], dim=-1)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def cache_append_norm_rope_reference(
    cache: Tensor,
    page_table: Tensor,
    slots: Tensor,
    visible: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    norm_weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    *,
    cache_scale: Tensor | None = None,
    index_key: Tensor | None = None,
) -> Tensor:
    """cache_append of the normed latent [B, T, R] and the roped k_rope [B, T, r]; cos, sin [B or 1, T, r]."""
    normed = rms_norm_reference(latent, norm_weight, eps)
    roped = rope_reference(k_rope, cos, sin, interleaved)
    row = cache, page_table, slots, visible, normed, roped
    return cache_append_reference(*row, cache_scale=cache_scale, index_key=index_key)


def rope_heads_reference(q_rope: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """q_rope [B, H, T, r] -> roped [B, T, H, r], contiguous: what the absorbed attention takes."""
    roped = rope_reference(q_rope, cos.unsqueeze(1), sin.unsqueeze(1), interleaved)
    return roped.transpose(1, 2).contiguous()
