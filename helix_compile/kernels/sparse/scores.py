"""index_scores: q [B, T, J, I], w [B, T, J], index keys [pages, page_size, I] -> scores [B, T, n] of this rank's slots.

    B sequences, T new tokens, J index heads, I their width, n slots that the page table holds
    program (t, split, b): q stays; per tile of BLOCK_N slots: page of each slot -> k [N, I]
    raw [N, J] = k q^T -> relu(raw * scale) * w, summed over heads in registers -> scores [N]

Splits share the tiles that hold visible slots; the tiles behind are -inf, and nothing of them is read. Slots are the M side
of the dot, so tensor cores of sm_90 and sm_100 take any number of heads. A score is the same sum in the same order wherever
its slot lies, so ranks agree. The keys may be a part of wider rows. The spec is index_scores_reference.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from helix_compile.kernels.ops import OPS
from helix_compile.kernels.registry import Prepared, Site, cases_of, launch_of, register_kernel, run
from helix_compile.kernels.rope_heads import token_strides, unit_stride
from helix_compile.kernels.target import INTERPRETER, KernelTarget, device_target
from helix_compile.kernels.triton_ops import TRITON_TYPE

MAX_HEADS, MAX_WIDTH = 128, 256


@triton.jit(do_not_specialize=["n"])
def _index_scores_kernel(  # type: ignore[no-untyped-def] # Triton types its arguments
    q_ptr,
    w_ptr,
    keys_ptr,
    page_table_ptr,
    visible_ptr,
    out_ptr,
    stride_q_B,
    stride_q_T,
    stride_q_J,
    stride_w_B,
    stride_w_T,
    stride_keys_page,
    stride_keys_slot,
    stride_table_B,
    scale,
    n,
    J: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_W: tl.constexpr,
    WIDE_DOT: tl.constexpr,
):
    t, split, b = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = b * tl.num_programs(0) + t
    visible = tl.load(visible_ptr + row)
    out_ptr += row * n
    page_table_ptr += b * stride_table_B
    heads, channels = tl.arange(0, BLOCK_J), tl.arange(0, BLOCK_W)
    q = tl.load(
        q_ptr + b * stride_q_B + t * stride_q_T + heads[None, :] * stride_q_J + channels[:, None],
        mask=(heads < J)[None, :] & (channels < WIDTH)[:, None],
        other=0.0,
    )
    w = tl.load(w_ptr + b * stride_w_B + t * stride_w_T + heads, mask=heads < J, other=0.0).to(tl.float32)
    if WIDE_DOT:  # the interpreter's dot takes no bfloat16
        q = q.to(tl.float32)

    tiles = tl.cdiv(visible, BLOCK_N)
    share = tl.cdiv(tiles, tl.num_programs(1)) * BLOCK_N
    for first in tl.range(split * share, tl.minimum(split * share + share, visible), BLOCK_N):
        slots = first + tl.arange(0, BLOCK_N)
        used = slots < visible
        page = tl.load(page_table_ptr + slots // PAGE, mask=used, other=0)
        rows = page * stride_keys_page + slots % PAGE * stride_keys_slot
        k = tl.load(
            keys_ptr + rows[:, None] + channels[None, :], mask=used[:, None] & (channels < WIDTH)[None, :], other=0.0
        )
        raw = tl.dot(k.to(q.dtype), q, input_precision="ieee") * scale
        positive = tl.where(raw < 0, 0.0, raw)  # not a maximum: a NaN must reach the score
        terms = positive * w[None, :]
        if BLOCK_J != J:
            terms = tl.where((heads < J)[None, :], terms, 0.0)
        tl.store(out_ptr + slots, tl.where(used, tl.sum(terms, 1), float("-inf")), mask=slots < n)
    rest = tl.cdiv(tl.cdiv(n, BLOCK_N) - tiles, tl.num_programs(1))
    for tile in range(tiles + split * rest, tiles + split * rest + rest):
        slots = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        tl.store(out_ptr + slots, tl.full([BLOCK_N], float("-inf"), tl.float32), mask=slots < n)


def _prepare(
    q: Tensor,
    w: Tensor,
    index_cache: Tensor,
    page_table: Tensor,
    visible: Tensor,
    scale: float,
    *,
    target: KernelTarget,
    splits: int | None = None,
) -> Prepared:
    """`splits`: programs that share a row's slots; default: what fills the card twice, a tile each at least."""
    out = OPS["index_scores"].fake(q, w, index_cache, page_table)
    (B, T, J, width), page_size = q.shape, index_cache.shape[1]
    n = out.shape[2]
    q, w, page_table = unit_stride(q), unit_stride(w), unit_stride(page_table)
    interpreted = target.arch == INTERPRETER
    block_n = 16 if interpreted else 64 if q.dtype == torch.float32 else 128
    if splits is None:
        splits = 2 if interpreted else max(1, min(2 * target.sm_count // max(1, B * T), triton.cdiv(n, block_n)))
    step = launch_of(
        "index_scores",
        _index_scores_kernel,
        (T, splits, B),
        {
            "q_ptr": q,
            "w_ptr": w,
            "keys_ptr": index_cache,
            "page_table_ptr": page_table,
            "visible_ptr": visible.contiguous(),
            "out_ptr": out,
            "stride_q_J": q.stride(2),
            **token_strides(q=q, w=w),
            "stride_keys_page": index_cache.stride(0),
            "stride_keys_slot": index_cache.stride(1),
            "stride_table_B": page_table.stride(0),
            "scale": float(scale),
            "n": n,
        },
        {
            "J": J,
            "WIDTH": width,
            "PAGE": page_size,
            "BLOCK_N": block_n,
            "BLOCK_J": max(16, triton.next_power_of_2(J)),
            "BLOCK_W": max(16, triton.next_power_of_2(width)),
            "WIDE_DOT": interpreted and q.dtype == torch.bfloat16,
        },
        config=f"{J} heads of {width}, BLOCK_N {block_n}",
        num_warps=4,
        num_stages=3,
    )
    case = replace(step.case, kv_tokens_per_step=block_n)
    return out, [step._replace(case=case)]


def index_scores_triton(
    q: Tensor,
    w: Tensor,
    index_cache: Tensor,
    page_table: Tensor,
    visible: Tensor,
    scale: float,
    splits: int | None = None,
) -> Any:
    """See index_scores_reference; q and keys in one of float32, bfloat16 and float16, w in any. `splits`: see _prepare."""
    target = device_target(q.device)
    return run(_prepare(q, w, index_cache, page_table, visible, scale, target=target, splits=splits))


def _supports(site: Site, target: KernelTarget) -> str | None:
    q, w, index_cache, page_table, visible = site.args[:5]
    if q.dtype != index_cache.dtype or not {q.dtype, w.dtype} <= set(TRITON_TYPE):
        return (
            f"q of {q.dtype}, w of {w.dtype}, keys of {index_cache.dtype}; the kernel takes 16- and 32-bit floats, q and "
            "keys alike"
        )
    if page_table.dtype != torch.int64 or visible.dtype != torch.int32:
        return f"page_table {page_table.dtype}, visible {visible.dtype}; the kernel takes int64 and int32"
    if index_cache.stride(2) != 1:
        return f"channels of the keys have stride {index_cache.stride(2)}; the kernel reads rows"
    if q.shape[2] > MAX_HEADS or q.shape[3] > MAX_WIDTH:
        return f"{q.shape[2]} index heads of width {q.shape[3]}; the kernel holds up to {MAX_HEADS} of {MAX_WIDTH}"
    return None


INDEX_SCORES = register_kernel(
    OPS["index_scores"],
    index_scores_triton,
    _supports,
    lambda site, target: cases_of(_prepare(*site.args, target=target)),
)
