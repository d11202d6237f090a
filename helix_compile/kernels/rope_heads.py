"""rope_heads: q_rope [B, H, T, r] of any strides -> roped [B, T, H, r], contiguous: rope and the layout of absorbed q.

    B sequences, T tokens, H query heads, r rope width (even), cos and sin [B, T, r] or [1, T, r]
    program (token, head block): both halves of each head's pairs

    interleaved: pair i of the input is channels (2i, 2i + 1), else (i, i + r/2); of the output always (i, i + r/2)
    y[i] = x0 * cos[i] - x1 * sin[i],  y[i + r/2] = x1 * cos[i + r/2] + x0 * sin[i + r/2]

In float32, rounded once. The spec is rope_heads_reference; kernels/cache_append.py rotates k by the same function.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from helix_compile.kernels.ops import OPS
from helix_compile.kernels.registry import Prepared, Site, launch_of, register_launches
from helix_compile.kernels.target import KernelTarget
from helix_compile.kernels.triton_ops import TRITON_TYPE

BLOCK_H = 8


@triton.jit
def rotate_pairs(x_ptr, cos_ptr, sin_ptr, pair, mask, r: tl.constexpr, INTERLEAVED: tl.constexpr):  # type: ignore[no-untyped-def] # Triton types its arguments
    """Channels `pair` and `pair + r/2` of the roped vectors at x_ptr (float32); pointers and mask broadcast."""
    HALF: tl.constexpr = r // 2
    if INTERLEAVED:  # one wide load of neighbours, then apart
        channels = tl.expand_dims(x_ptr + 2 * pair, -1) + tl.arange(0, 2)
        x0, x1 = tl.split(tl.load(channels, mask=tl.expand_dims(mask, -1), other=0.0).to(tl.float32))
    else:
        x0 = tl.load(x_ptr + pair, mask=mask, other=0.0).to(tl.float32)
        x1 = tl.load(x_ptr + pair + HALF, mask=mask, other=0.0).to(tl.float32)
    # cos and sin have one row for all heads
    cos0 = tl.load(cos_ptr + pair, mask=pair < HALF, other=0.0).to(tl.float32)
    sin0 = tl.load(sin_ptr + pair, mask=pair < HALF, other=0.0).to(tl.float32)
    cos1 = tl.load(cos_ptr + pair + HALF, mask=pair < HALF, other=0.0).to(tl.float32)
    sin1 = tl.load(sin_ptr + pair + HALF, mask=pair < HALF, other=0.0).to(tl.float32)
    return x0 * cos0 - x1 * sin0, x1 * cos1 + x0 * sin1


@triton.jit(do_not_specialize=["T"])
def _rope_heads_kernel(  # type: ignore[no-untyped-def] # Triton types its arguments
    q_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    stride_q_B,
    stride_q_H,
    stride_q_T,
    stride_cos_B,
    stride_cos_T,
    stride_sin_B,
    stride_sin_T,
    T,
    H: tl.constexpr,
    r: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
):
    token = tl.program_id(0)
    b, t = (token // T).to(tl.int64), (token % T).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    pair = tl.arange(0, BLOCK_PAIRS)[None, :]
    mask = (head < H) & (pair < r // 2)
    first, second = rotate_pairs(
        q_ptr + b * stride_q_B + t * stride_q_T + head.to(tl.int64) * stride_q_H,
        cos_ptr + b * stride_cos_B + t * stride_cos_T,
        sin_ptr + b * stride_sin_B + t * stride_sin_T,
        pair,
        mask,
        r,
        INTERLEAVED,
    )
    out = out_ptr + (token.to(tl.int64) * H + head) * r + pair
    tl.store(out, first.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out + r // 2, second.to(out_ptr.dtype.element_ty), mask=mask)


def token_strides(**tensors: Tensor) -> dict[str, Any]:
    """Arguments stride_<name>_B and _T of tensors [B, T, *]; 0 for a dim of one, whose own stride may be anything."""
    return {
        f"stride_{name}_{letter}": 0 if x.shape[dim] == 1 else x.stride(dim)
        for name, x in tensors.items()
        for dim, letter in enumerate("BT")
    }


def unit_stride(x: Tensor) -> Tensor:
    """`x`, copied only where its last dim isn't dense."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _prepare(q_rope: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Prepared:
    B, H, T, r = q_rope.shape
    out = OPS["rope_heads"].fake(q_rope)
    q, cos, sin = unit_stride(q_rope.transpose(1, 2)), unit_stride(cos), unit_stride(sin)
    block_h = min(BLOCK_H, triton.next_power_of_2(H))
    step = launch_of(
        "rope_heads",
        _rope_heads_kernel,
        (B * T, triton.cdiv(H, block_h)),
        {
            "q_ptr": q,
            "cos_ptr": cos,
            "sin_ptr": sin,
            "out_ptr": out,
            "stride_q_H": q.stride(2),
            **token_strides(q=q, cos=cos, sin=sin),
            "T": T,
        },
        {"H": H, "r": r, "INTERLEAVED": interleaved, "BLOCK_H": block_h, "BLOCK_PAIRS": triton.next_power_of_2(r // 2)},
        config=f"{'interleaved' if interleaved else 'halves'}, BLOCK_H {block_h}",
        num_warps=1,
    )
    return out, [step]


def _supports(site: Site, target: KernelTarget) -> str | None:
    q_rope, cos, sin, _ = site.args
    if q_rope.dtype not in TRITON_TYPE or cos.dtype not in TRITON_TYPE or cos.dtype != sin.dtype:
        return f"q of {q_rope.dtype}, cos of {cos.dtype}, sin of {sin.dtype}; the kernel takes 16- and 32-bit floats"
    if q_rope.shape[3] % 2:
        return f"rope width {q_rope.shape[3]} is odd"
    return None


ROPE_HEADS = register_launches(OPS["rope_heads"], _prepare, _supports)
