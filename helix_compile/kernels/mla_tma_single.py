"""mla_decode by TMA with one accumulator [BLOCK_H, R]: the form for Hopper, wgmma from 64 rows on.

    q [rows, R] and [rows, r] stay; per tile of BLOCK_N slots: one page look-up, two TMA loads k [N, R], k_rope [N, r]
    raw = q k^T + q_rope k_rope^T -> p -> acc [rows, R] += p k     (the values are the keys' first R channels)

A tile lies in one page. Rows past kv_len in it are read, finite (the cache is zeroed when it is allocated), and masked.
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
def mla_single_kernel(  # type: ignore[no-untyped-def] # Triton types its arguments
    q_ptr, q_rope_ptr, k_desc, k_rope_desc, page_table_ptr, visible_ptr, cache_scale_ptr, o_ptr, lse_ptr,
    scale_log2, T, stride_table,
    stride_q_token, stride_q_head, stride_q_rope_token, stride_q_rope_head,
    H: tl.constexpr, R: tl.constexpr, ROPE: tl.constexpr, PAGE: tl.constexpr, TOKENS_PER_SCALE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr,
    STORE_DEAD: tl.constexpr, WIDE_DOT: tl.constexpr,
):  # fmt: skip
    tl.static_assert(PAGE % BLOCK_N == 0)
    b = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    channels = tl.arange(0, R)
    inside = rows < T * H
    limit = row_limits(visible_ptr, rows, b, T, H)
    kv_len = tl.max(limit, 0)
    start, end = split_range(kv_len, BLOCK_N)

    q_rows = query_offsets(rows, b, T, H, stride_q_token, stride_q_head)
    q = tl.load(q_ptr + q_rows[:, None] + channels[None, :], mask=inside[:, None], other=0.0)
    q_rows = query_offsets(rows, b, T, H, stride_q_rope_token, stride_q_rope_head)
    q_rope = tl.load(
        q_rope_ptr + q_rows[:, None] + tl.arange(0, ROPE)[None, :], mask=inside[:, None], other=0.0
    )
    if WIDE_DOT:  # the interpreter's dot takes no bfloat16
        q = q.to(tl.float32)
        q_rope = q_rope.to(tl.float32)

    m = tl.full([BLOCK_H], START, tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([BLOCK_H, R], tl.float32)
    for first in tl.range(start, end, BLOCK_N):
        page = tl.load(page_table_ptr + b.to(tl.int64) * stride_table + first // PAGE)
        row = page.to(tl.int32) * PAGE + first % PAGE
        k = k_desc.load([row, 0]).to(q.dtype)
        k_rope = k_rope_desc.load([row, R]).to(q.dtype)
        raw = tl.dot(q, k.T)
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
        acc = tl.dot(p.to(q.dtype), k, acc * shrink[:, None])

    lse, divisor = natural_lse(m, total)
    out = output_rows(rows, b, T, H)
    tl.store(lse_ptr + out, lse, mask=inside)
    if not STORE_DEAD:  # the merge doesn't read a dead part
        inside = inside & (total != 0.0)
    o = (acc / divisor[:, None]).to(o_ptr.dtype.element_ty)
    tl.store(o_ptr + out[:, None] * R + channels[None, :], o, mask=inside[:, None])
