"""mla_decode by TMA, in two forms. Query rows on the M side of the dots, for 64 rows and more:

    q [rows, R] and [rows, r] stay; per tile of BLOCK_N slots: one page look-up, TMA loads k [N, R], k_rope [N, r]
    raw = q k^T + q_rope k_rope^T -> p -> acc [rows, R] += p k     (the values are the keys' first R channels)

A site without rope (r = 0) has one dot and one load less, and no descriptor of k_rope.

TRANSPOSED, KV slots on the M side: for few rows, tensor cores from 16 rows on.

    raw = k q^T + k_rope q_rope^T [N, rows] -> p -> acc [R, rows] += k^T p

tcgen05 and wgmma want 64 or 128 on the M side: slots and channels are that many where the rows are not. Sums over slots
would go across lanes and warps, so that loop keeps the sum of each slot's place in the tile and adds them up at the end.

With PARTS = 2 the channels of k, q and acc come as two halves. Blackwell's warp-specialised loop wants that: the warps
that rescale the accumulators have few registers, half an accumulator fits and a whole one spills. Hopper is better off
with one part.

A cache in fp8_e4m3 has one scale, which scores and output are times; its tiles become q's dtype on the way to the dot.

A tile lies in one page. Rows past kv_len in it are read, finite (the cache is zeroed when it is allocated), and masked.

With a list of slots (mla_decode_slots, as in pointer.py) rows are gathered, four an instruction, which Blackwell's TMA can:
they may lie in any page. Places past kv_len name the last chosen row once more.
"""

from __future__ import annotations

import triton
import triton.language as tl

from helix_compile.kernels.mla.tiles import (
    START,
    natural_lse,
    output_rows,
    query_offsets,
    rescale,
    row_limits,
    sequence_length,
    sequence_start,
    softmax_step,
    split_range,
    tile_row,
)


@triton.jit(do_not_specialize=["T", "queries", "stride_table", "stride_slots"])
def mla_tma_kernel(  # type: ignore[no-untyped-def] # Triton types its arguments
    q_ptr,
    q_rope_ptr,
    k_desc,
    k_rope_desc,
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
    SCALED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr,
    STORE_DEAD: tl.constexpr,
    WIDE_DOT: tl.constexpr,
    WINDOWED: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
    PACKED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    tl.static_assert(slots_ptr is not None or PAGE % BLOCK_N == 0)
    WIDTH: tl.constexpr = R // PARTS
    SLOT_AXIS: tl.constexpr = 0 if TRANSPOSED else 1  # of scores; q, acc and o have channels there
    ROW_AXIS: tl.constexpr = 1 - SLOT_AXIS
    b = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    channels = tl.arange(0, WIDTH)
    inside = rows < T * H
    limit = row_limits(visible_ptr, rows, b, T, H)
    kv_len = sequence_length(visible_ptr, b, T)
    base = 0
    if WINDOWED:
        low = row_limits(first_ptr, rows, b, T, H)
        oldest = sequence_start(first_ptr, visible_ptr, b, T, kv_len)
        base = oldest // BLOCK_N * BLOCK_N
    start, end = split_range(base, kv_len, BLOCK_N)

    q_rows = query_offsets(rows, b, T, H, stride_q_token, stride_q_head)
    q_ptrs = q_ptr + tl.expand_dims(q_rows, SLOT_AXIS) + tl.expand_dims(channels, ROW_AXIS)
    mask = tl.expand_dims(inside, SLOT_AXIS)
    q = tl.load(q_ptrs, mask=mask, other=0.0)
    if SCALED:
        cache_scale = tl.load(cache_scale_ptr)
        scale_log2 *= cache_scale
    if WIDE_DOT:  # the interpreter's dot takes no bfloat16
        q = q.to(tl.float32)
    if ROPE > 0:
        q_rows = query_offsets(rows, b, T, H, stride_q_rope_token, stride_q_rope_head)
        rope_ptrs = q_rope_ptr + tl.expand_dims(q_rows, SLOT_AXIS) + tl.expand_dims(tl.arange(0, ROPE), ROW_AXIS)
        q_rope = tl.load(rope_ptrs, mask=mask, other=0.0).to(q.dtype)
    acc = tl.zeros([WIDTH, BLOCK_H] if TRANSPOSED else [BLOCK_H, WIDTH], tl.float32)
    if PARTS == 2:
        q_1 = tl.load(q_ptrs + WIDTH, mask=mask, other=0.0).to(q.dtype)
        acc_1 = tl.zeros([WIDTH, BLOCK_H] if TRANSPOSED else [BLOCK_H, WIDTH], tl.float32)

    m = tl.full([BLOCK_H], START, tl.float32)
    total = tl.zeros([BLOCK_N, BLOCK_H] if TRANSPOSED else [BLOCK_H], tl.float32)
    for first in tl.range(start, end, BLOCK_N, warp_specialize=WARP_SPECIALIZE):
        if slots_ptr is None:
            row = tile_row(page_table_ptr, b, stride_table, first, PAGE)
            k = k_desc.load([row, 0]).to(q.dtype)
            if ROPE > 0:
                k_rope = k_rope_desc.load([row, R]).to(q.dtype)
        else:
            place = tl.minimum(first + tl.arange(0, BLOCK_N), kv_len - 1)
            slot = tl.load(slots_ptr + b.to(tl.int64) * stride_slots + place)
            page = tl.load(page_table_ptr + (b // queries).to(tl.int64) * stride_table + slot // PAGE)
            row = page.to(tl.int32) * PAGE + slot % PAGE
            k = k_desc.gather(row, 0).to(q.dtype)
            if ROPE > 0:
                k_rope = k_rope_desc.gather(row, R).to(q.dtype)
        raw = tl.dot(k, q) if TRANSPOSED else tl.dot(q, k.T)
        if PARTS == 2:
            if slots_ptr is None:
                k_1 = k_desc.load([row, WIDTH]).to(q.dtype)
            else:
                k_1 = k_desc.gather(row, WIDTH).to(q.dtype)
            raw = tl.dot(k_1, q_1, raw) if TRANSPOSED else tl.dot(q_1, k_1.T, raw)
        if ROPE > 0:
            raw = tl.dot(k_rope, q_rope, raw) if TRANSPOSED else tl.dot(q_rope, k_rope.T, raw)
        slots = first + tl.arange(0, BLOCK_N)
        seen = tl.expand_dims(slots, ROW_AXIS) < tl.expand_dims(limit, SLOT_AXIS)
        if WINDOWED:
            seen = seen & (tl.expand_dims(slots, ROW_AXIS) >= tl.expand_dims(low, SLOT_AXIS))
        p, shrink, m = softmax_step(tl.where(seen, raw, float("-inf")), m, scale_log2, SLOT_AXIS)
        total = total * shrink[None, :] + p if TRANSPOSED else total * shrink + tl.sum(p, 1)
        p = p.to(q.dtype)
        acc = rescale(acc, shrink, SLOT_AXIS, PACKED)
        acc = tl.dot(k.T, p, acc) if TRANSPOSED else tl.dot(p, k, acc)
        if PARTS == 2:
            acc_1 = rescale(acc_1, shrink, SLOT_AXIS, PACKED)
            acc_1 = tl.dot(k_1.T, p, acc_1) if TRANSPOSED else tl.dot(p, k_1, acc_1)

    if TRANSPOSED:
        total = tl.sum(total, 0)
    lse, divisor = natural_lse(m, total)
    out = output_rows(rows, b, T, H)
    tl.store(lse_ptr + out, lse, mask=inside)
    if not STORE_DEAD:  # the merge doesn't read a dead part
        inside = inside & (total != 0.0)
    if SCALED:
        acc *= cache_scale
        if PARTS == 2:
            acc_1 *= cache_scale
    o_ptrs = o_ptr + tl.expand_dims(out, SLOT_AXIS) * R + tl.expand_dims(channels, ROW_AXIS)
    o = (acc / tl.expand_dims(divisor, SLOT_AXIS)).to(o_ptr.dtype.element_ty)
    tl.store(o_ptrs, o, mask=tl.expand_dims(inside, SLOT_AXIS))
    if PARTS == 2:
        o = (acc_1 / tl.expand_dims(divisor, SLOT_AXIS)).to(o_ptr.dtype.element_ty)
        tl.store(o_ptrs + WIDTH, o, mask=tl.expand_dims(inside, SLOT_AXIS))
