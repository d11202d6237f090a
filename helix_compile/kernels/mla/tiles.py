"""What the forms of mla_decode share: rows of a tile, the split's slots, one step of the softmax, the store.

    grid (row tiles, B, splits): row tiles innermost, so the CTAs that share KV tokens meet in L2
    row = t * H + h of a sequence; it sees local slots < limit = visible[b, t]
    split s of S covers ceil(tiles / S) tiles of BLOCK_N slots; an empty split has start >= end

Statistics are float32 in base 2 with a finite start, so that no -inf meets another: a fully masked tile adds nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from helix_compile.kernels.merge import LN2

START = tl.constexpr(-1.0e30)  # below any score, and START - START is 0


@triton.jit
def query_offsets(rows, b, T, H: tl.constexpr, stride_token, stride_head):  # type: ignore[no-untyped-def] # Triton types its arguments
    """Element offsets of each row's query in a tensor [B, T, H, *]."""
    token = b.to(tl.int64) * T + rows // H
    return token * stride_token + (rows % H).to(tl.int64) * stride_head


@triton.jit
def row_limits(visible_ptr, rows, b, T, H: tl.constexpr):  # type: ignore[no-untyped-def] # Triton types its arguments
    """Slots that each row sees; 0 for the padding of the tile."""
    return tl.load(visible_ptr + b.to(tl.int64) * T + rows // H, mask=rows < T * H, other=0)


@triton.jit
def sequence_length(visible_ptr, b, T):  # type: ignore[no-untyped-def] # Triton types its arguments
    """Slots that any row of sequence b sees.

    Scalar loads, not the maximum of row_limits: that one goes through shuffles, and the compiler then takes the loop
    over tiles for divergent and moves each tensor-core descriptor through vector registers (1.5 times the instructions).
    """
    visible_ptr += b.to(tl.int64) * T
    kv_len = tl.load(visible_ptr)
    for t in range(1, T):
        kv_len = tl.maximum(kv_len, tl.load(visible_ptr + t))
    return kv_len


@triton.jit
def sequence_start(first_ptr, visible_ptr, b, T, kv_len):  # type: ignore[no-untyped-def] # Triton types its arguments
    """First slot that any row of sequence b sees; kv_len where none sees any. Scalar loads, as in sequence_length."""
    first_ptr += b.to(tl.int64) * T
    visible_ptr += b.to(tl.int64) * T
    oldest = kv_len
    for t in range(0, T):
        first = tl.load(first_ptr + t)
        oldest = tl.where(first < tl.load(visible_ptr + t), tl.minimum(oldest, first), oldest)
    return oldest


@triton.jit
def split_range(base, kv_len, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def] # Triton types its arguments
    """First slot of this program's split and the end of it; the tiles begin at slot `base`."""
    tiles = tl.cdiv(kv_len - base, BLOCK_N)
    per_split = tl.cdiv(tiles, tl.num_programs(2))
    start = base + tl.program_id(2) * per_split * BLOCK_N
    return start, tl.minimum(start + per_split * BLOCK_N, kv_len)


@triton.jit
def tile_row(page_table_ptr, b, stride_table, first, PAGE: tl.constexpr):  # type: ignore[no-untyped-def] # Triton types its arguments
    """Row of the cache [pages * PAGE, R + r] that slot `first` of sequence b lies in."""
    # unsigned, so that division by a power of two is a shift; Triton 3.6 can't partition a loop with tl.assume
    slot = tl.cast(first, tl.uint32)
    page = tl.load(page_table_ptr + b.to(tl.int64) * stride_table + (slot // PAGE).to(tl.int32))
    return page.to(tl.int32) * PAGE + (slot % PAGE).to(tl.int32)


@triton.jit
def softmax_step(raw, m, scale_log2, AXIS: tl.constexpr):  # type: ignore[no-untyped-def] # Triton types its arguments
    """Fold raw scores (-inf: hidden) into the running maximum m of each row; AXIS is the one of the KV slots.

    Returns p, what old sums are multiplied by, and the new maximum.
    """
    top = tl.maximum(m, tl.max(raw, AXIS) * scale_log2)
    p = tl.exp2(raw * scale_log2 - tl.expand_dims(top, AXIS))
    return p, tl.exp2(m - top), top


@triton.jit
def rescale(acc, shrink, AXIS: tl.constexpr, PACKED: tl.constexpr):  # type: ignore[no-untyped-def] # Triton types its arguments
    """Multiply acc by shrink, where AXIS is the one that shrink lacks; PACKED: two products an instruction (sm_100 on)."""
    factor = tl.expand_dims(shrink, AXIS)
    if not PACKED:
        return acc * factor
    acc, factor = tl.broadcast(acc, factor)
    return tl.inline_asm_elementwise(
        "{ .reg .b64 x, y; mov.b64 x, {$2, $3}; mov.b64 y, {$4, $5}; mul.f32x2 x, x, y; mov.b64 {$0, $1}, x; }",
        "=r,=r,r,r,r,r",
        [acc, factor],
        dtype=tl.float32,
        is_pure=True,
        pack=2,
    )


@triton.jit
def natural_lse(m, total):  # type: ignore[no-untyped-def] # Triton types its arguments
    """Natural-log lse of each row, -inf where it saw nothing, and what its sums are divided by."""
    seen = total != 0.0
    divisor = tl.where(seen, total, 1.0)
    return tl.where(seen, (m + tl.log2(divisor)) * LN2, float("-inf")), divisor


@triton.jit
def output_rows(rows, b, T, H: tl.constexpr):  # type: ignore[no-untyped-def] # Triton types its arguments
    """Index of each row's part in [B, T, H, splits]."""
    return (b.to(tl.int64) * T * H + rows) * tl.num_programs(2) + tl.program_id(2)
