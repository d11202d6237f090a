"""topk_candidates: scores [B, T, n], visible [B, T] -> this rank's best m keys of each query, as (score bits, position).

    B sequences, T new tokens, n slots of the shard, m = min(top_k, n); a row is one (b, t)
    program (row, part): a radix search for the m-th key of its slots (order.py), then the chosen in the order of slots by
    prefix sums; of ties at the threshold the first slots

Long rows of few queries are shared: each part leaves its own m best as (score bits, slot), and a second launch, one
program a row, chooses among these. A key that is among the m best of the row is among the m best of its part.
The spec is topk_candidates_reference.
"""

from __future__ import annotations

from math import isqrt
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from helix_compile.kernels.ops import OPS
from helix_compile.kernels.registry import Launch, Prepared, Site, cases_of, launch_of, register_kernel, run
from helix_compile.kernels.sparse.order import (
    DIGITS,
    HIGHEST_KEY,
    LOWEST_KEY,
    NO_ENTRY,
    NOWHERE,
    count_digits,
    entry_of,
    key_of_entry,
    narrow,
    order_key,
    parts_for,
    position_of,
    selection_tile,
)
from helix_compile.kernels.target import KernelTarget, device_target


@triton.jit
def _load(in_ptr, index, end, ENTRIES: tl.constexpr):  # type: ignore[no-untyped-def] # Triton types its arguments
    """Keys, slots and which are there; ENTRIES: what parts left, not scores."""
    inside = index < end
    if ENTRIES:
        entry = tl.load(in_ptr + index, mask=inside, other=NO_ENTRY)
        slot = (entry >> 32).to(tl.int32)
        key = key_of_entry(entry)
        inside = inside & (slot != NOWHERE)
    else:
        key = order_key(tl.load(in_ptr + index, mask=inside, other=0.0))
        slot = index
    return key, slot, inside


@triton.jit(do_not_specialize=["n", "chunk"])
def _topk_kernel(  # type: ignore[no-untyped-def] # Triton types its arguments
    in_ptr,
    visible_ptr,
    rank_ptr,
    out_ptr,
    n,
    chunk,
    M: tl.constexpr,
    CP: tl.constexpr,
    TOKENS_PER_BLOCK: tl.constexpr,
    ENTRIES: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    in_ptr += row * n
    out_ptr += (row * tl.num_programs(1) + part) * M
    visible = tl.load(visible_ptr + row)
    start = part * chunk
    end = tl.minimum(start + chunk, n)
    if not ENTRIES:
        end = tl.minimum(end, visible)
        visible = tl.maximum(end - start, 0)

    low = tl.full([], LOWEST_KEY, tl.int32)
    high = tl.full([], HIGHEST_KEY, tl.int32)
    matched = visible
    wanted = tl.minimum(visible, M)
    shift = tl.full([], 32, tl.int32)
    while (shift > 0) & (matched > wanted):
        shift -= 8
        counts = tl.zeros([DIGITS], tl.int32)
        for first in range(start, end, BLOCK):
            key, _, inside = _load(in_ptr, first + tl.arange(0, BLOCK), end, ENTRIES)
            counts += count_digits(key, inside, low, high, shift)
        low, high, matched, wanted = narrow(counts, low, shift, wanted)

    before_low = tl.zeros([], tl.int32)  # chosen above the range, and seen in it, so far
    in_range = tl.zeros([], tl.int32)
    for first in range(start, end, BLOCK):
        key, slot, inside = _load(in_ptr, first + tl.arange(0, BLOCK), end, ENTRIES)
        above = inside & (key > high)
        tied = inside & (key >= low) & (key <= high)
        both = above.to(tl.int32) + (tied.to(tl.int32) << 16)  # one scan for two sums, each below 2^16
        earlier = tl.cumsum(both, 0) - both
        ties = in_range + (earlier >> 16)
        chosen = above | (tied & (ties < wanted))
        place = before_low + (earlier & 0xFFFF) + tl.minimum(ties, wanted)
        if LAST:
            slot = position_of(slot, tl.load(rank_ptr), CP, TOKENS_PER_BLOCK)
        tl.store(out_ptr + place, entry_of(key, slot), mask=chosen)
        added = tl.sum(both, 0)
        before_low += added & 0xFFFF
        in_range += added >> 16
    for first in range(before_low + tl.minimum(in_range, wanted), M, BLOCK):
        place = first + tl.arange(0, BLOCK)
        tl.store(out_ptr + place, tl.full([BLOCK], NO_ENTRY, tl.int64), mask=place < M)


def _prepare(
    scores: Tensor,
    visible: Tensor,
    rank: Tensor,
    top_k: int,
    cp: int,
    tokens_per_block: int,
    *,
    target: KernelTarget,
    parts: int | None = None,
) -> Prepared:
    """`parts`: programs a row; default: by the number of multiprocessors."""
    out = OPS["topk_candidates"].fake(scores, visible, rank, top_k)
    B, T, n = scores.shape
    m, rows = out.shape[2], B * T
    block, num_warps = selection_tile(target)
    if parts is None:  # a row takes n / parts + parts * m steps one after the other: fewest at the root
        parts = max(1, min(parts_for(rows, target), isqrt(n // m)))
    chunk = triton.cdiv(triton.cdiv(n, parts), block) * block
    parts = triton.cdiv(n, chunk)

    def step(source: Tensor, into: Tensor, length: int, chunk: int, parts: int, **form: bool) -> Launch:
        first, last = not form["ENTRIES"], form["LAST"]
        return launch_of(
            "topk_candidates",
            _topk_kernel,
            (rows, parts),
            {
                "in_ptr": source,
                "visible_ptr": visible.contiguous(),
                "rank_ptr": rank,
                "out_ptr": into,
                "n": length,
                "chunk": chunk,
            },
            {"M": m, "CP": cp, "TOKENS_PER_BLOCK": tokens_per_block, **form, "BLOCK": block},
            config=f"top {m} of {'scores' if first else 'the parts'}{'' if last else ', a part'}, BLOCK {block}",
            num_warps=num_warps,
        )

    scores = scores.contiguous()
    if parts == 1:
        return out, [step(scores, out.view(torch.int64), n, n, 1, ENTRIES=False, LAST=True)]
    entries = out.new_empty((rows, parts, m), dtype=torch.int64)
    return out, [
        step(scores, entries, n, chunk, parts, ENTRIES=False, LAST=False),
        step(entries, out.view(torch.int64), parts * m, parts * m, 1, ENTRIES=True, LAST=True),
    ]


def topk_candidates_triton(
    scores: Tensor, visible: Tensor, rank: Tensor, top_k: int, cp: int, tokens_per_block: int, parts: int | None = None
) -> Any:
    """See topk_candidates_reference; float32 scores. `parts`: programs that share a row, by default as many as pay."""
    target = device_target(scores.device)
    return run(_prepare(scores, visible, rank, top_k, cp, tokens_per_block, target=target, parts=parts))


def _supports(site: Site, target: KernelTarget) -> str | None:
    return refusal(site.args[0], site.args[1])


def refusal(scores: Tensor, visible: Tensor) -> str | None:
    """Why scores of these dtypes can't be selected from, or None."""
    if scores.dtype != torch.float32 or visible.dtype != torch.int32:
        return f"scores of {scores.dtype}, visible of {visible.dtype}; the kernel takes float32 (its keys are 32 bits) and int32"
    return None


TOPK_CANDIDATES = register_kernel(
    OPS["topk_candidates"],
    topk_candidates_triton,
    _supports,
    lambda site, target: cases_of(_prepare(*site.args, target=target)),
)
