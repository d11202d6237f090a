"""rope_heads: q_rope [B, H, T, r] of any strides -> roped [B, T, H, r], contiguous: rope and the layout of absorbed q.

    B sequences, T tokens, H query heads, r rope width (even), cos and sin [B, T, r] or [1, T, r]
    program (token, head block): both halves of each head's pairs

    interleaved: pair i of the input is channels (2i, 2i + 1), else (i, i + r/2); of the output always (i, i + r/2)
    y[i] = x0 * cos[i] - x1 * sin[i],  y[i + r/2] = x1 * cos[i + r/2] + x0 * sin[i + r/2]

In float32, rounded once. The spec is rope_heads_reference; kernels/cache_append.py rotates k by the same function.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from helix_compile.kernels.ops import OPS
from helix_compile.kernels.registry import CompileCase, Site, launch, register_kernel, specialize
from helix_compile.kernels.target import KernelTarget
from helix_compile.kernels.triton_ops import TRITON_TYPE

BLOCK_H = 8


STRIDES = ("stride_q_B", "stride_q_H", "stride_q_T", "stride_cos_B", "stride_cos_T", "stride_sin_B", "stride_sin_T")


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


def token_strides(x: Tensor) -> tuple[Any, Any]:
    """Strides of dims B and T of [B, T, *]; 0 for a dim of one, whose own stride may be anything."""
    return tuple(0 if x.shape[dim] == 1 else x.stride(dim) for dim in (0, 1))  # type: ignore[return-value]


def unit_stride(x: Tensor) -> Tensor:
    """`x`, copied only where its last dim isn't dense."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _case(q: torch.dtype, angle: torch.dtype, H: int, r: int, interleaved: bool) -> CompileCase:
    block_h = min(BLOCK_H, triton.next_power_of_2(H))
    return CompileCase(
        kernel="rope_heads",
        function=_rope_heads_kernel,
        signature={
            "q_ptr": f"*{TRITON_TYPE[q]}",
            "cos_ptr": f"*{TRITON_TYPE[angle]}",
            "sin_ptr": f"*{TRITON_TYPE[angle]}",
            "out_ptr": f"*{TRITON_TYPE[q]}",
            **dict.fromkeys((*STRIDES, "T"), "i32"),
        },
        constexprs={
            "H": H,
            "r": r,
            "INTERLEAVED": interleaved,
            "BLOCK_H": block_h,
            "BLOCK_PAIRS": triton.next_power_of_2(r // 2),
        },
        options={"num_warps": 1, "num_stages": 1},
        config=f"{'interleaved' if interleaved else 'halves'}, BLOCK_H {block_h}",
    )


def _arguments(q_rope: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> dict[str, Any]:
    q, cos, sin = unit_stride(q_rope.transpose(1, 2)), unit_stride(cos), unit_stride(sin)
    values = (*token_strides(q), *token_strides(cos), *token_strides(sin))
    names = ("stride_q_B", "stride_q_T", "stride_cos_B", "stride_cos_T", "stride_sin_B", "stride_sin_T")
    return {
        "q_ptr": q,
        "cos_ptr": cos,
        "sin_ptr": sin,
        "out_ptr": out,
        "stride_q_H": q.stride(2),
        **dict(zip(names, values, strict=True)),
        "T": q.shape[1],
    }


def rope_heads_triton(q_rope: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """See rope_heads_reference; float32, bfloat16 or float16, cos and sin of one dtype of these."""
    B, H, T, r = q_rope.shape
    out = q_rope.new_empty((B, T, H, r))
    case = _case(q_rope.dtype, cos.dtype, H, r, interleaved)
    grid = (B * T, triton.cdiv(H, case.constexprs["BLOCK_H"]))
    launch(case, grid, _arguments(q_rope, cos, sin, out))
    return out


def _supports(site: Site, target: KernelTarget) -> str | None:
    q_rope, cos, sin, _ = site.args
    if q_rope.dtype not in TRITON_TYPE or cos.dtype not in TRITON_TYPE or cos.dtype != sin.dtype:
        return f"q of {q_rope.dtype}, cos of {cos.dtype}, sin of {sin.dtype}; the kernel takes 16- and 32-bit floats"
    if q_rope.shape[3] % 2:
        return f"rope width {q_rope.shape[3]} is odd"
    return None


def _cases(site: Site, target: KernelTarget) -> list[CompileCase]:
    q_rope, cos, sin, interleaved = site.args
    H, r = int(q_rope.shape[1]), int(q_rope.shape[3])
    case = _case(q_rope.dtype, cos.dtype, H, r, interleaved)
    return [specialize(case, _arguments(q_rope, cos, sin, OPS["rope_heads"].fake(*site.args)))]


ROPE_HEADS = register_kernel(OPS["rope_heads"], rope_heads_triton, _supports, _cases)
