"""cache_append: the owner writes latent [B, T, R] and k_rope [B, T, r] at its slots; returns a copy of `visible`.

    cache_append.norm_rope: latent before RMSNorm and k_rope before rope: norm, rope and append in one kernel

    B sequences, T new tokens a sequence, R kv_lora_rank, r rope width, cos and sin [B, T, r] or [1, T, r]
    cache [pages, page_size, R + r], page_table [B, pages of a sequence], slots and visible [B, T]
    cache with KV heads [pages, page_size, K, Dk + Dv], latent [B, T, K, Dk], k_rope [B, T, K, Dv]: each head of a token
    is a token of its own, in pages of page_size * K
    cache in fp8_e4m3 [.., R + r]; in fp8_ds_mla [pages, page_size, bytes] (layout/cache_bytes.py)
    program (token): cache[page_table[b, slot // page_size], slot % page_size] = [latent, k_rope]; slot -1: nothing

What goes into FP8 is rounded by hand, to nearest even, so that a cast has nothing left to do: Triton's interpreter (3.7) casts wrongly
where rounding reaches the next power of two. Norm and rope are computed in float32; as in the model the normed latent is rounded to its own dtype before the weight.
The specs are cache_append_reference and cache_append_norm_rope_reference.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from helix_compile.kernels.ops import OPS
from helix_compile.kernels.reference_fp8 import BYTES, FP8, scales_and_rope
from helix_compile.kernels.registry import (
    CompileCase,
    Prepared,
    Site,
    cases_of,
    launch_of,
    register_kernel,
    register_launches,
    run,
)
from helix_compile.kernels.rope_heads import rotate_pairs, token_strides, unit_stride
from helix_compile.kernels.target import KernelTarget, no_fp8
from helix_compile.kernels.triton_ops import TRITON_TYPE
from helix_compile.layout.cache_bytes import ds_mla_bytes, index_key_at

_ANGLE_STRIDES = ("stride_cos_B", "stride_cos_T", "stride_sin_B", "stride_sin_T")


# arguments of the fused form, without values where the launch only appends
_FUSED_ONLY = dict.fromkeys(("norm_weight_ptr", "cos_ptr", "sin_ptr", "eps", *_ANGLE_STRIDES))


@triton.jit
def _rounded_e4m3(x, scale):  # type: ignore[no-untyped-def] # Triton types its arguments
    """X / scale as float32 values of e4m3, clamped to +-448, to nearest even. A NaN stays one."""
    y = tl.div_rn(x, scale)
    y = tl.where(y > 448.0, 448.0, tl.where(y < -448.0, -448.0, y))
    bits = y.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & ~0xFFFFF).to(tl.float32, bitcast=True)
    # below 2**-6 the step is 2**-9, which is float32's at 2**14
    tiny = (tl.abs(y) + 16384.0 - 16384.0).to(tl.int32, bitcast=True) | (bits & -2147483648)  # 0.0 keeps its sign
    rounded = tl.where(tl.abs(y) < 0.015625, tiny.to(tl.float32, bitcast=True), normal)
    return tl.where(y == y, rounded, y)


@triton.jit
def _rounded_bfloat16(x):  # type: ignore[no-untyped-def] # Triton types its arguments
    """Float32 x as float32 values of bfloat16, to nearest even. A NaN stays one."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & ~0xFFFF).to(tl.float32, bitcast=True)
    return tl.where(x == x, rounded, x)


@triton.jit(do_not_specialize=["T"])
def _cache_append_kernel(  # type: ignore[no-untyped-def] # Triton types its arguments
    cache_ptr,
    page_table_ptr,
    slots_ptr,
    visible_ptr,
    latent_ptr,
    k_rope_ptr,
    norm_weight_ptr,
    cos_ptr,
    sin_ptr,
    cache_scale_ptr,
    scales_ptr,
    rope_ptr,
    out_ptr,
    stride_cache_page,
    stride_cache_slot,
    stride_table_B,
    stride_latent_B,
    stride_latent_T,
    stride_rope_B,
    stride_rope_T,
    stride_cos_B,
    stride_cos_T,
    stride_sin_B,
    stride_sin_T,
    T,
    eps,
    NORM_ROPE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PAGE: tl.constexpr,
    R: tl.constexpr,
    r: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_ROPE: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCKED: tl.constexpr,
):
    token = tl.program_id(0)
    b, t = (token // T).to(tl.int64), (token % T).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    tl.store(out_ptr + token, tl.load(visible_ptr + token))
    # the values before the branch: their loads don't wait for the slot's
    cache_dtype: tl.constexpr = cache_ptr.dtype.element_ty
    rope_dtype: tl.constexpr = rope_ptr.dtype.element_ty if BLOCKED else cache_dtype
    channel = tl.arange(0, BLOCK_R)
    latent = tl.load(latent_ptr + b * stride_latent_B + t * stride_latent_T + channel, mask=channel < R, other=0.0)
    k_rope_row = k_rope_ptr + b * stride_rope_B + t * stride_rope_T
    pair = tl.arange(0, BLOCK_ROPE // 2)
    rope_channel = tl.arange(0, BLOCK_ROPE)
    if NORM_ROPE:
        wide = latent.to(tl.float32)
        scale = tl.rsqrt(tl.sum(wide * wide, 0) / R + eps)
        weight = tl.load(norm_weight_ptr + channel, mask=channel < R, other=0.0).to(tl.float32)
        latent = weight * (wide * scale).to(latent_ptr.dtype.element_ty).to(tl.float32)
        first, second = rotate_pairs(
            k_rope_row,
            cos_ptr + b * stride_cos_B + t * stride_cos_T,
            sin_ptr + b * stride_sin_B + t * stride_sin_T,
            pair,
            pair < r // 2,
            r,
            INTERLEAVED,
        )
    else:
        k_rope = tl.load(k_rope_row + rope_channel, mask=rope_channel < r, other=0.0)
        if SCALED or BLOCKED:  # here, for a branch may not change what a name's dtype is
            latent, k_rope = latent.to(tl.float32), k_rope.to(tl.float32)
    if slot >= 0:
        page = tl.load(page_table_ptr + b * stride_table_B + slot // PAGE).to(tl.int64)
        row_ptr = cache_ptr + page * stride_cache_page + (slot % PAGE) * stride_cache_slot
        rope_row = row_ptr + R
        if NORM_ROPE and (SCALED or BLOCKED):  # what is rounded to FP8 are values of the model's dtype
            latent = latent.to(latent_ptr.dtype.element_ty)
            first, second = first.to(k_rope_ptr.dtype.element_ty), second.to(k_rope_ptr.dtype.element_ty)
        if SCALED:
            one_scale = tl.load(cache_scale_ptr)
            latent = _rounded_e4m3(latent.to(tl.float32), one_scale)
            if NORM_ROPE:
                first = _rounded_e4m3(first.to(tl.float32), one_scale)
                second = _rounded_e4m3(second.to(tl.float32), one_scale)
            else:
                k_rope = _rounded_e4m3(k_rope, one_scale)
        if BLOCKED:  # strides are bytes, of 4 to a scale and 2 to a rope channel
            blocks: tl.constexpr = tl.cdiv(BLOCK_R, 128)
            values = tl.reshape(latent.to(tl.float32), [blocks, BLOCK_R // blocks])
            scales = tl.maximum(tl.div_rn(tl.max(tl.abs(values), 1), 448.0), 1e-12)
            latent = tl.reshape(_rounded_e4m3(values, tl.expand_dims(scales, 1)), [BLOCK_R])
            block = tl.arange(0, blocks)
            scales_row = scales_ptr + page * (stride_cache_page // 4) + (slot % PAGE) * (stride_cache_slot // 4)
            tl.store(scales_row + block, scales, mask=block < tl.cdiv(R, 128))
            rope_row = rope_ptr + page * (stride_cache_page // 2) + (slot % PAGE) * (stride_cache_slot // 2)
            if NORM_ROPE:
                first, second = _rounded_bfloat16(first.to(tl.float32)), _rounded_bfloat16(second.to(tl.float32))
            else:
                k_rope = _rounded_bfloat16(k_rope)
        tl.store(row_ptr + channel, latent.to(cache_dtype), mask=channel < R)
        if NORM_ROPE:
            tl.store(rope_row + pair, first.to(rope_dtype), mask=pair < r // 2)
            tl.store(rope_row + r // 2 + pair, second.to(rope_dtype), mask=pair < r // 2)
        else:
            tl.store(rope_row + rope_channel, k_rope.to(rope_dtype), mask=rope_channel < r)


def _prepare(
    cache: Tensor,
    page_table: Tensor,
    slots: Tensor,
    visible: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
    *,
    cache_scale: Tensor | None = None,
    index_key: Tensor | None = None,
) -> Prepared:
    """Without a weight the launch only appends; an index key is appended by a launch of its own."""
    out = OPS["cache_append"].fake(cache, page_table, slots, visible, latent, k_rope)
    page_table, latent, k_rope = unit_stride(page_table), unit_stride(latent), unit_stride(k_rope)
    R, r = latent.shape[2], k_rope.shape[2]
    whole = cache
    in_fp8: dict[str, Any] = dict.fromkeys(("cache_scale_ptr", "scales_ptr", "rope_ptr"))
    if cache_scale is not None:
        in_fp8["cache_scale_ptr"] = cache_scale
        cache = cache[..., : R + r].view(FP8)
    elif cache.dtype is BYTES:
        in_fp8["scales_ptr"], in_fp8["rope_ptr"] = scales_and_rope(cache, R, r)
        cache = cache[..., :R].view(FP8)
    fused: dict[str, Any] = {}
    kernel, form = "cache_append", "append"
    if norm_weight is not None and cos is not None and sin is not None:
        cos, sin = unit_stride(cos), unit_stride(sin)
        fused = {"norm_weight_ptr": norm_weight.contiguous(), "eps": eps, "cos_ptr": cos, "sin_ptr": sin}
        fused |= token_strides(cos=cos, sin=sin)
        kernel, form = "cache_append.norm_rope", f"norm, rope ({'interleaved' if interleaved else 'halves'})"
    step = launch_of(
        kernel,
        _cache_append_kernel,
        (slots.numel(),),
        {
            "cache_ptr": cache,
            "page_table_ptr": page_table,
            "slots_ptr": slots.contiguous(),
            "visible_ptr": visible.contiguous(),
            "latent_ptr": latent,
            "k_rope_ptr": k_rope,
            "out_ptr": out,
            "stride_cache_page": cache.stride(0),
            "stride_cache_slot": cache.stride(1),
            "stride_table_B": page_table.stride(0),
            **token_strides(latent=latent, rope=k_rope),
            "T": slots.shape[1],
            **fused,
            **{name: value for name, value in in_fp8.items() if value is not None},
        },
        {
            **{name: value for name, value in in_fp8.items() if value is None},
            "SCALED": cache_scale is not None,
            "BLOCKED": in_fp8["rope_ptr"] is not None,
            **({} if fused else _FUSED_ONLY),
            "NORM_ROPE": bool(fused),
            "INTERLEAVED": interleaved,
            "PAGE": cache.shape[1],
            "R": R,
            "r": r,
            "BLOCK_R": triton.next_power_of_2(R),
            "BLOCK_ROPE": max(2, triton.next_power_of_2(r)),  # r may be 0
        },
        config=f"{form}, {R} + {r} channels",
        num_warps=1,
    )
    if index_key is None:
        return out, [step]
    start = index_key_at(R + r if cache_scale is not None else ds_mla_bytes(R, r))
    keys = whole[..., start : start + index_key.shape[2] * index_key.dtype.itemsize].view(index_key.dtype)
    beside = _prepare(keys, page_table, slots, visible, index_key, index_key[..., :0])
    return out, [step, *beside[1]]


def cache_append_triton(cache: Tensor, *rest: Any, **keywords: Any) -> Tensor:
    """See cache_append_reference; float32, bfloat16 or float16 in any combination, or a cache in FP8."""
    if cache.dim() == 3:
        return run(_prepare(cache, *rest, **keywords))
    rows: tuple[Any, ...] = _heads_as_tokens(cache, *rest)
    by_head: Tensor = run(_prepare(*rows, **keywords))
    return by_head.view(*rest[2].shape, -1)[..., 0].contiguous()


def _heads_as_tokens(
    cache: Tensor, page_table: Tensor, slots: Tensor, visible: Tensor, latent: Tensor, k_rope: Tensor
) -> tuple[Tensor, ...]:
    """The arguments of a cache with K heads as those of one without: slot s, head k is slot s * K + k."""
    K = cache.shape[2]
    heads = torch.arange(K, device=slots.device)
    by_head = torch.where(slots[..., None] >= 0, slots[..., None] * K + heads, -1)
    return (
        cache.flatten(1, 2),
        page_table,
        by_head.flatten(1),
        visible[..., None].expand(*visible.shape, K).flatten(1),
        latent.flatten(1, 2),
        k_rope.flatten(1, 2),
    )


def _refusal(site: Site, floats: tuple[Tensor, ...]) -> str | None:
    cache, key = site.args[0], site.keywords.get("index_key")
    in_fp8 = cache.dtype is BYTES or (cache.dtype is FP8 and site.keywords.get("cache_scale") is not None)
    if any(
        x.dtype not in TRITON_TYPE for x in (*(() if in_fp8 else (cache,)), *floats, *(() if key is None else (key,)))
    ):
        dtypes = ", ".join(str(x.dtype) for x in floats)
        return f"cache of {cache.dtype}, values of {dtypes}; the kernel takes 16- and 32-bit floats, and caches in FP8"
    if cache.stride(-1) != 1:
        return f"channels of the cache have stride {cache.stride(-1)}; the kernel writes rows in place"
    if cache.dim() == 4 and cache.stride(1) != cache.shape[2] * cache.stride(2):
        return "the KV heads of a slot are not side by side in the cache; the kernel writes rows in place"
    return None


def _supports(site: Site, target: KernelTarget) -> str | None:
    return _refusal(site, site.args[4:6]) or no_fp8(site.args[0].dtype, target)


def _cases(site: Site, target: KernelTarget) -> list[CompileCase]:
    rows = _heads_as_tokens(*site.args) if site.args[0].dim() == 4 else site.args
    return cases_of(_prepare(*rows, **site.keywords))


def _norm_rope_supports(site: Site, target: KernelTarget) -> str | None:
    cache, _, _, _, latent, k_rope, norm_weight, _, cos, sin, _ = site.args
    if cache.dim() == 4:
        return "a cache with KV heads; the fused kernel writes one latent a token"
    if k_rope.shape[2] % 2:
        return f"rope width {k_rope.shape[2]} is odd"
    return _refusal(site, (latent, k_rope, norm_weight, cos, sin)) or no_fp8(cache.dtype, target)


CACHE_APPEND = register_kernel(OPS["cache_append"], cache_append_triton, _supports, _cases)


CACHE_APPEND_NORM_ROPE = register_launches(OPS["cache_append.norm_rope"], _prepare, _norm_rope_supports)
