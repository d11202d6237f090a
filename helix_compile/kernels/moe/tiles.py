"""Sort (token, choice) pairs by expert, and find the rows of a tile: what the grouped kernels of moe_experts share.

    expert_ids [pairs] -> order [pairs]: local pairs sorted by expert, then by number; starts [e + 1]: rows of expert i
    are starts[i] .. starts[i + 1]. Entries of order beyond the last local pair are not written.
    tile t: the t-th block of BLOCK_N rows, counting each expert's last block, which may be short

Counting, no atomics: the order is the same each time. Nothing here depends on values but what is stored.
"""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK_PAIRS = 1024


@triton.jit(do_not_specialize=["pairs"])  # one variant for every batch size
def moe_dispatch_kernel(  # type: ignore[no-untyped-def] # Triton types its arguments
    ids_ptr, first_ptr, order_ptr, starts_ptr, pairs, EXPERTS: tl.constexpr, BLOCK_PAIRS: tl.constexpr
):
    expert = tl.program_id(0)  # the last program is no expert: it writes where the last one ends
    first = tl.load(first_ptr)
    lanes = tl.arange(0, BLOCK_PAIRS)
    before = tl.zeros([BLOCK_PAIRS], tl.int32)
    for start in range(0, pairs, BLOCK_PAIRS):
        pair = start + lanes
        local = tl.load(ids_ptr + pair, mask=pair < pairs, other=-1) - first  # past the end: < 0
        before += ((local >= 0) & (local < expert)).to(tl.int32)
    row = tl.sum(before, 0)
    tl.store(starts_ptr + expert, row)
    if expert < EXPERTS:
        for start in range(0, pairs, BLOCK_PAIRS):
            pair = start + lanes
            local = tl.load(ids_ptr + pair, mask=pair < pairs, other=-1) - first
            mine = (local == expert).to(tl.int32)
            tl.store(order_ptr + row + tl.cumsum(mine, 0) - 1, pair, mask=mine == 1)
            row += tl.sum(mine, 0)


@triton.jit
def rows_of_tile(starts_ptr, tile, EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    """(expert, first row, end of the expert's rows); first row >= end for a tile beyond the last."""
    experts = tl.arange(0, BLOCK_E)
    start = tl.load(starts_ptr + experts, mask=experts < EXPERTS, other=0)
    end = tl.load(starts_ptr + experts + 1, mask=experts < EXPERTS, other=0)
    tiles = (end - start + BLOCK_N - 1) // BLOCK_N
    upto = tl.cumsum(tiles, 0)
    expert = tl.sum((upto <= tile).to(tl.int32), 0)
    mine = experts == expert
    inside = tile - tl.sum(tl.where(mine, upto - tiles, 0), 0)
    row = tl.sum(tl.where(mine, start, 0), 0) + inside * BLOCK_N
    return expert.to(tl.int64), row, tl.sum(tl.where(mine, end, 0), 0)
