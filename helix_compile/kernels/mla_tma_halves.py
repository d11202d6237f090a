"""mla_decode by TMA with two accumulators [BLOCK_H, R / 2]: the form for Blackwell, tcgen05 and warp specialisation.

    q_0, q_1 [rows, R / 2] and q_rope [rows, r] stay; per tile of BLOCK_N slots: one page look-up, three TMA loads
    raw = q_0 k_0^T + q_1 k_1^T + q_rope k_rope^T -> p -> acc_0 += p k_0, acc_1 += p k_1

The warps that rescale the accumulators have few registers: half an accumulator fits, a whole one spills. A tile lies in
one page. Rows past kv_len in it are read, finite (the cache is zeroed when it is allocated), and masked.
"""

from __future__ import annotations

import triton
import triton.language as tl

from helix_compile.kernels.mla_tiles import (
    START,
    natural_lse,
    output_rows,
    query_offsets,
    row_limits,
    softmax_step,
    split_range,
)


@triton.jit(do_not_specialize=["T"])
def mla_halves_kernel(  # type: ignore[no-untyped-def] # Triton types its arguments
    q_ptr, q_rope_ptr, k_desc, k_rope_desc, page_table_ptr, visible_ptr, cache_scale_ptr, o_ptr, lse_ptr,
    scale_log2, T, stride_table,
    stride_q_token, stride_q_head, stride_q_rope_token, stride_q_rope_head,
    H: tl.constexpr, R: tl.constexpr, ROPE: tl.constexpr, PAGE: tl.constexpr, TOKENS_PER_SCALE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr,
    STORE_DEAD: tl.constexpr, WIDE_DOT: tl.constexpr, WARP_SPECIALIZE: tl.constexpr,
):  # fmt: skip
    tl.static_assert(PAGE % BLOCK_N == 0)
    b = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    HALF: tl.constexpr = R // 2
    channels = tl.arange(0, HALF)
    inside = rows < T * H
    limit = row_limits(visible_ptr, rows, b, T, H)
    kv_len = tl.max(limit, 0)
    start, end = split_range(kv_len, BLOCK_N)

    q_rows = query_offsets(rows, b, T, H, stride_q_token, stride_q_head)
    q_ptrs = q_ptr + q_rows[:, None] + channels[None, :]
    q_0 = tl.load(q_ptrs, mask=inside[:, None], other=0.0)
    q_1 = tl.load(q_ptrs + HALF, mask=inside[:, None], other=0.0)
    q_rows = query_offsets(rows, b, T, H, stride_q_rope_token, stride_q_rope_head)
    q_rope = tl.load(
        q_rope_ptr + q_rows[:, None] + tl.arange(0, ROPE)[None, :], mask=inside[:, None], other=0.0
    )
    if WIDE_DOT:  # the interpreter's dot takes no bfloat16
        q_0 = q_0.to(tl.float32)
        q_1 = q_1.to(tl.float32)
        q_rope = q_rope.to(tl.float32)

    m = tl.full([BLOCK_H], START, tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    acc_0 = tl.zeros([BLOCK_H, HALF], tl.float32)
    acc_1 = tl.zeros([BLOCK_H, HALF], tl.float32)
    for first in tl.range(start, end, BLOCK_N, warp_specialize=WARP_SPECIALIZE):
        page = tl.load(page_table_ptr + b.to(tl.int64) * stride_table + first // PAGE)
        row = page.to(tl.int32) * PAGE + first % PAGE
        k_0 = k_desc.load([row, 0]).to(q_0.dtype)
        k_1 = k_desc.load([row, HALF]).to(q_0.dtype)
        k_rope = k_rope_desc.load([row, R]).to(q_0.dtype)
        raw = tl.dot(q_0, k_0.T)
        raw = tl.dot(q_1, k_1.T, raw)
        raw = tl.dot(q_rope, k_rope.T, raw)
        slots = first + tl.arange(0, BLOCK_N)
        if TOKENS_PER_SCALE > 0:
            block = (row + slots - first) // TOKENS_PER_SCALE
            k_scale = tl.load(cache_scale_ptr + block, mask=slots < kv_len, other=0.0)
            raw *= k_scale[None, :]
        raw = tl.where(slots[None, :] < limit[:, None], raw, float("-inf"))
        p, shrink, m, total = softmax_step(raw, m, total, scale_log2, 1)
        if TOKENS_PER_SCALE > 0:
            p *= k_scale[None, :]
        p = p.to(q_0.dtype)
        acc_0 = tl.dot(p, k_0, acc_0 * shrink[:, None])
        acc_1 = tl.dot(p, k_1, acc_1 * shrink[:, None])

    lse, divisor = natural_lse(m, total)
    out = output_rows(rows, b, T, H)
    tl.store(lse_ptr + out, lse, mask=inside)
    if not STORE_DEAD:  # the merge doesn't read a dead part
        inside = inside & (total != 0.0)
    o_ptrs = o_ptr + out[:, None] * R + channels[None, :]
    tl.store(o_ptrs, (acc_0 / divisor[:, None]).to(o_ptr.dtype.element_ty), mask=inside[:, None])
    tl.store(
        o_ptrs + HALF, (acc_1 / divisor[:, None]).to(o_ptr.dtype.element_ty), mask=inside[:, None]
    )
