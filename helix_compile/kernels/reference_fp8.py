"""Pure-torch definition of the FP8 caches: what becomes of an entry when it is cached, and what a cached row stands for.

    fp8_e4m3      float8_e4m3fn [.., R + r], or [.., K, Dk + Dv]: entry / scale, clamped to +-448, to nearest even;
                  one float32 scale for the whole cache of a layer
    fp8_ds_mla    uint8 [.., bytes] (layout/cache_bytes.py): each 128 latent values share the scale amax / 448, at least
                  1e-12, the rope part is bfloat16
    fp8_e4m3 with an index key: uint8 [.., bytes], the key as it is behind the FP8 values

Arithmetic is in float32, or wider where the model is wider, and each value is rounded once. torch takes float64 to
narrow types by way of float32, which rounds twice: 1 + 2**-4 + 2**-40 becomes 1, not 1.125.
"""

from __future__ import annotations

import torch
from torch import Tensor

from helix_compile.layout.cache_bytes import BLOCK, ds_mla_bytes, index_key_at, rope_at, scales_at

FP8, BYTES = torch.float8_e4m3fn, torch.uint8
LARGEST = 448.0  # of e4m3
LEAST_SCALE = 1e-12


def rounded_once(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Float32 or float64 x as float8_e4m3fn or bfloat16, to nearest even; not beyond the largest value."""
    if x.dtype is not torch.float64:
        return x.to(dtype)
    mantissa, least = (3, -6) if dtype is FP8 else (7, -126)
    exponent = (torch.frexp(x).exponent - 1).clamp(min=least)
    step = torch.ldexp(torch.ones_like(x), exponent - mantissa)
    return (torch.round(x / step) * step).to(dtype)  # exact: what is cast is a value of dtype


def quantize(x: Tensor, cache_scale: Tensor) -> Tensor:
    """Entries as float8_e4m3fn of this scale. A NaN stays one."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return rounded_once((wide / cache_scale.to(wide)).clamp(-LARGEST, LARGEST), FP8)


def pack_ds_mla(latent: Tensor, k_rope: Tensor) -> Tensor:
    """Latent [n, R] and k_rope [n, r] as rows of fp8_ds_mla, uint8 [n, bytes]."""
    n, R = latent.shape
    dtype = torch.promote_types(latent.dtype, torch.float32)
    rows = latent.new_zeros((n, ds_mla_bytes(R, k_rope.shape[1])), dtype=BYTES)
    scales = []
    for start in range(0, R, BLOCK):
        block = latent[:, start : start + BLOCK].to(dtype)
        scale = (block.abs().amax(dim=1, keepdim=True) / LARGEST).to(torch.float32).clamp(min=LEAST_SCALE)
        rows[:, start : start + block.shape[1]] = quantize(block, scale).view(BYTES)
        scales.append(scale)
    rows[:, scales_at(R) : rope_at(R)] = torch.cat(scales, dim=1).view(BYTES)
    rope = rounded_once(k_rope.to(dtype), torch.bfloat16).contiguous().view(BYTES)
    rows[:, rope_at(R) : rope_at(R) + rope.shape[1]] = rope
    return rows


def scales_and_rope(rows: Tensor, R: int, r: int) -> tuple[Tensor, Tensor]:
    """The scales [.., R / 128] and rope parts [.., r] of rows of fp8_ds_mla [.., bytes], as views."""
    start = rope_at(R)
    return rows[..., scales_at(R) : start].view(torch.float32), rows[..., start : start + 2 * r].view(torch.bfloat16)


def unpack_ds_mla(rows: Tensor, R: int, r: int, dtype: torch.dtype) -> Tensor:
    """What rows [n, bytes] of fp8_ds_mla stand for: [n, R + r] in dtype."""
    scales = rows[:, scales_at(R) : rope_at(R)].contiguous().view(torch.float32).to(dtype)
    latent = rows[:, :R].view(FP8).to(dtype) * scales.repeat_interleave(BLOCK, dim=1)[:, :R]
    rope = rows[:, rope_at(R) : rope_at(R) + 2 * r].contiguous().view(torch.bfloat16).to(dtype)
    return torch.cat([latent, rope], dim=1)


def cached_rows(
    first: Tensor, second: Tensor, cache: Tensor, cache_scale: Tensor | None = None, index_key: Tensor | None = None
) -> Tensor:
    """What a cache holds of entries [n, R] and [n, r], or [n, K, Dk] and [n, K, Dv]: rows [n, *] in its dtype.

    `cache` gives dtype and width. `index_key` [n, I] is what lies behind the rope part of an FP8 row.
    """
    if cache.dtype not in (FP8, BYTES):
        return torch.cat([first, second], dim=-1).to(cache.dtype)
    if cache_scale is None:
        rows = pack_ds_mla(first, second)
    else:
        rows = quantize(torch.cat([first, second], dim=-1), cache_scale)
    if index_key is None:
        return rows
    whole = rows.new_zeros((len(rows), cache.shape[-1]), dtype=BYTES)
    whole[:, : rows.shape[1]] = rows.view(BYTES)
    start = index_key_at(rows.shape[1])
    key = index_key.contiguous().view(BYTES)
    whole[:, start : start + key.shape[1]] = key
    return whole


def entries_of_rows(rows: Tensor, R: int, r: int, dtype: torch.dtype, cache_scale: Tensor | None = None) -> Tensor:
    """What rows [n, *] of a cache, without index keys, stand for: entries of these widths in dtype."""
    if rows.dtype is BYTES:
        return unpack_ds_mla(rows, R, r, dtype)
    wide = rows.to(dtype)
    return wide if cache_scale is None else wide * cache_scale.to(dtype)
