"""mla_decode by pointer loads: any R, r, page size and dtype; what runs where no TMA form does.

    q [rows, R] and [rows, r] stay; per tile of BLOCK_N slots: page of each slot -> k [N, R], k_rope [N, r]
    raw = q k^T + q_rope k_rope^T -> p -> acc [rows, R] += p k     (the values are the keys' first R channels)

A cache in fp8_e4m3 has one scale, which scores and output are times. In fp8_ds_mla (BLOCKED) a row is values, scales and rope part
of their own dtypes: each of the latent's values is times its block's scale when it is loaded.

R and r are padded to powers of two in the tile and masked. Rows of the cache past kv_len are not read at all. The cache
may be a part of wider rows.

With a list of slots (mla_decode_slots) kv_len counts places of the list, and each query is a sequence of one token with a
list of its own; QUERIES of them share a page table.
"""

from __future__ import annotations

import triton
import triton.language as tl

from helix_compile.kernels.mla.tiles import (
    START,
    natural_lse,
    output_rows,
    query_offsets,
    row_limits,
    sequence_length,
    sequence_start,
    softmax_step,
    split_range,
)


@triton.jit(do_not_specialize=["T", "queries", "stride_table", "stride_slots"])
def mla_pointer_kernel(  # type: ignore[no-untyped-def] # Triton types its arguments
    q_ptr,
    q_rope_ptr,
    cache_ptr,
    scales_ptr,
    rope_ptr,
    page_table_ptr,
    slots_ptr,
    visible_ptr,
    first_ptr,
    cache_scale_ptr,
    o_ptr,
    lse_ptr,
    scale_log2,
    T,
    queries,
    stride_table,
    stride_slots,
    stride_q_token,
    stride_q_head,
    stride_q_rope_token,
    stride_q_rope_head,
    H: tl.constexpr,
    R: tl.constexpr,
    ROPE: tl.constexpr,
    PAGE: tl.constexpr,
    PAGE_STRIDE: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCKED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_ROPE: tl.constexpr,
    STORE_DEAD: tl.constexpr,
    WIDE_DOT: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    b = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    channels = tl.arange(0, BLOCK_R)
    rope_channels = tl.arange(0, BLOCK_ROPE)
    limit = row_limits(visible_ptr, rows, b, T, H)
    kv_len = sequence_length(visible_ptr, b, T)
    base = 0
    if WINDOWED:
        low = row_limits(first_ptr, rows, b, T, H)
        oldest = sequence_start(first_ptr, visible_ptr, b, T, kv_len)
        base = oldest // BLOCK_N * BLOCK_N
    start, end = split_range(base, kv_len, BLOCK_N)

    inside = (rows < T * H)[:, None]
    q_offsets = query_offsets(rows, b, T, H, stride_q_token, stride_q_head)[:, None] + channels[None, :]
    q = tl.load(q_ptr + q_offsets, mask=inside & (channels < R)[None, :], other=0.0)
    if SCALED:
        cache_scale = tl.load(cache_scale_ptr)
        scale_log2 *= cache_scale
    if WIDE_DOT:  # the interpreter's dot takes no bfloat16
        q = q.to(tl.float32)
    if ROPE > 0:
        q_offsets = (
            query_offsets(rows, b, T, H, stride_q_rope_token, stride_q_rope_head)[:, None] + rope_channels[None, :]
        )
        q_rope = tl.load(q_rope_ptr + q_offsets, mask=inside & (rope_channels < ROPE)[None, :], other=0.0).to(q.dtype)

    m = tl.full([BLOCK_H], START, tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([BLOCK_H, BLOCK_R], tl.float32)
    page_table_ptr += (b // queries).to(tl.int64) * stride_table
    for first in tl.range(start, end, BLOCK_N):
        slots = first + tl.arange(0, BLOCK_N)
        used = slots < kv_len
        if WINDOWED:
            used = used & (slots >= oldest)
        at = slots
        if slots_ptr is not None:
            at = tl.load(slots_ptr + b.to(tl.int64) * stride_slots + slots, mask=used, other=0)
        page = tl.load(page_table_ptr + at // PAGE, mask=used, other=0)
        # int64, as the table. Page and slot are multiplied one by one: Triton 3.6 takes page * PAGE + slot for a multiple
        # of what its first slot is one of, reads a row of 26 in pieces of 4, and that is "misaligned address"
        k_ptrs = cache_ptr + (page * PAGE_STRIDE + at % PAGE * ROW_STRIDE)[:, None]
        k = tl.load(k_ptrs + channels[None, :], mask=used[:, None] & (channels < R)[None, :], other=0.0)
        rope_ptrs = k_ptrs + R
        if BLOCKED:  # strides are bytes, of 4 to a scale and 2 to a rope channel
            blocks = scales_ptr + (page * (PAGE_STRIDE // 4) + at % PAGE * (ROW_STRIDE // 4))[:, None]
            scales = tl.load(
                blocks + (channels // 128)[None, :], mask=used[:, None] & (channels < R)[None, :], other=0.0
            )
            k = k.to(tl.float32) * scales
            rope_ptrs = rope_ptr + (page * (PAGE_STRIDE // 2) + at % PAGE * (ROW_STRIDE // 2))[:, None]
        k = k.to(q.dtype)
        raw = tl.dot(q, k.T, input_precision="ieee")
        if ROPE > 0:
            k_rope = tl.load(
                rope_ptrs + rope_channels[None, :], mask=used[:, None] & (rope_channels < ROPE)[None, :], other=0.0
            )
            raw = tl.dot(q_rope, k_rope.to(q.dtype).T, raw, input_precision="ieee")
        seen = slots[None, :] < limit[:, None]
        if WINDOWED:
            seen = seen & (slots[None, :] >= low[:, None])
        raw = tl.where(seen, raw, float("-inf"))
        p, shrink, m = softmax_step(raw, m, scale_log2, 1)
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(q.dtype), k, acc * shrink[:, None], input_precision="ieee")

    lse, divisor = natural_lse(m, total)
    out = output_rows(rows, b, T, H)
    inside = rows < T * H
    tl.store(lse_ptr + out, lse, mask=inside)
    if not STORE_DEAD:  # the merge doesn't read a dead part
        inside = inside & (total != 0.0)
    o = acc / divisor[:, None]
    if SCALED:
        o *= cache_scale
    tl.store(
        o_ptr + (out * R)[:, None] + channels[None, :],
        o.to(o_ptr.dtype.element_ty),
        mask=inside[:, None] & (channels < R)[None, :],
    )
