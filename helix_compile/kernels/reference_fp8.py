"""Torch definition of mla_decode over an FP8 cache, and the quantiser of the cache: the spec of mla_decode.scaled.

cache [pages, page_size, R + r] e4m3 (3 mantissa bits), cache_scale [pages, page_size / tokens_per_scale] float32
a slot's row is its FP8 values times the scale of its block of tokens
"""

from __future__ import annotations

import torch
from torch import Tensor

from helix_compile.kernels.reference import accumulation_dtype, mla_decode_reference

FP8 = torch.float8_e4m3fn


def quantize_cache_reference(cache: Tensor, tokens_per_scale: int) -> tuple[Tensor, Tensor]:
    """Split cache [pages, page_size, W] into e4m3 values and float32 scales [pages, page_size / tokens_per_scale].

    The largest value of a block becomes the largest that e4m3 holds; a block of zeros keeps scale 1.
    """
    pages, page_size, width = cache.shape
    blocks = cache.float().view(pages, page_size // tokens_per_scale, -1)
    largest = blocks.abs().amax(dim=2)
    scale = torch.where(largest > 0, largest / torch.finfo(FP8).max, 1.0)
    values = (blocks / scale[..., None]).to(FP8)
    return values.view(pages, page_size, width), scale


def dequantize_cache_reference(cache: Tensor, cache_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The cache [pages, page_size, W] that FP8 values and their scales stand for."""
    pages, page_size, width = cache.shape
    blocks = cache.to(dtype).view(pages, cache_scale.shape[1], -1)
    return (blocks * cache_scale[..., None].to(dtype)).view(pages, page_size, width)


def mla_decode_scaled_reference(
    q_latent: Tensor,
    q_rope: Tensor,
    cache: Tensor,
    page_table: Tensor,
    visible: Tensor,
    scale: float,
    cache_scale: Tensor,
) -> tuple[Tensor, Tensor]:
    """mla_decode_reference over the dequantised cache, kept in float32 or wider."""
    dtype = accumulation_dtype(q_latent.dtype)
    wide = dequantize_cache_reference(cache, cache_scale, dtype)
    return mla_decode_reference(q_latent, q_rope, wide, page_table, visible, scale)
