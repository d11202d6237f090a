"""select_slots: scores [B, T, n] and the k-th key of all ranks -> this rank's chosen slots, ascending, and their count.

    B sequences, T new tokens, n slots of the shard, m = min(top_k, n) slots of a list; a row is one (b, t)
    program (row, part): its slots that are not behind the k-th key, in order, by prefix sums

Long rows of few queries are shared: a first launch counts what each part will write, which says where it begins.
The spec is select_slots_reference.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from helix_compile.kernels.ops import OPS
from helix_compile.kernels.registry import Launch, Prepared, Site, cases_of, launch_of, register_kernel, run
from helix_compile.kernels.sparse.order import order_key, parts_for, position_of, selection_tile
from helix_compile.kernels.sparse.topk import refusal
from helix_compile.kernels.target import KernelTarget, device_target


@triton.jit(do_not_specialize=["n", "chunk"])
def _select_kernel(  # type: ignore[no-untyped-def] # Triton types its arguments
    scores_ptr,
    visible_ptr,
    kth_score_ptr,
    kth_position_ptr,
    rank_ptr,
    parts_ptr,
    slots_ptr,
    count_ptr,
    n,
    chunk,
    M: tl.constexpr,
    CP: tl.constexpr,
    TOKENS_PER_BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    WRITE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    rank = tl.load(rank_ptr)
    kth = order_key(tl.load(kth_score_ptr + row))
    kth_position = tl.load(kth_position_ptr + row).to(tl.int32)
    start = part * chunk
    end = tl.minimum(start + chunk, tl.load(visible_ptr + row))
    slots_ptr += row * M

    count = tl.zeros([], tl.int32)
    if WRITE and PARTS > 1:
        parts = tl.arange(0, BLOCK_PARTS)
        count = tl.sum(tl.load(parts_ptr + row * PARTS + parts, mask=parts < part, other=0), 0)
    for first in range(start, end, BLOCK):
        slot = first + tl.arange(0, BLOCK)
        key = order_key(tl.load(scores_ptr + row * n + slot, mask=slot < end, other=0.0))
        position = position_of(slot, rank, CP, TOKENS_PER_BLOCK)
        chosen = (slot < end) & ((key > kth) | ((key == kth) & (position <= kth_position)))
        one = chosen.to(tl.int32)
        if WRITE:
            place = count + tl.cumsum(one, 0) - one
            tl.store(slots_ptr + place, slot, mask=chosen & (place < M))
        count += tl.sum(one, 0)
    if not WRITE:
        tl.store(parts_ptr + row * PARTS + part, count)
    elif part == PARTS - 1:
        tl.store(count_ptr + row, count)
        for first in range(count, M, BLOCK):
            place = first + tl.arange(0, BLOCK)
            tl.store(slots_ptr + place, tl.zeros([BLOCK], tl.int32), mask=place < M)


def _prepare(
    scores: Tensor,
    visible: Tensor,
    kth_score: Tensor,
    kth_position: Tensor,
    rank: Tensor,
    top_k: int,
    cp: int,
    tokens_per_block: int,
    *,
    target: KernelTarget,
    parts: int | None = None,
) -> Prepared:
    """`parts`: programs a row; default: by the number of multiprocessors."""
    slots, count = OPS["select_slots"].fake(scores, visible, kth_score, kth_position, rank, top_k)
    B, T, n = scores.shape
    m, rows = slots.shape[2], B * T
    block, num_warps = selection_tile(target)
    if parts is None:
        parts = min(parts_for(rows, target), triton.cdiv(n, 2 * block))
    chunk = triton.cdiv(triton.cdiv(n, parts), block) * block
    parts = triton.cdiv(n, chunk)
    of_parts = count if parts == 1 else count.new_empty((rows, parts))

    def step(write: bool) -> Launch:
        return launch_of(
            "select_slots",
            _select_kernel,
            (rows, parts),
            {
                "scores_ptr": scores.contiguous(),
                "visible_ptr": visible.contiguous(),
                "kth_score_ptr": kth_score.contiguous(),
                "kth_position_ptr": kth_position.contiguous(),
                "rank_ptr": rank,
                "parts_ptr": of_parts,
                "slots_ptr": slots,
                "count_ptr": count,
                "n": n,
                "chunk": chunk,
            },
            {
                "M": m,
                "CP": cp,
                "TOKENS_PER_BLOCK": tokens_per_block,
                "PARTS": parts,
                "BLOCK_PARTS": triton.next_power_of_2(parts),
                "WRITE": write,
                "BLOCK": block,
            },
            config=f"{'write' if write else 'count'}, {parts} parts, BLOCK {block}",
            num_warps=num_warps,
        )

    return (slots, count), [step(write) for write in ([True] if parts == 1 else [False, True])]


def select_slots_triton(
    scores: Tensor,
    visible: Tensor,
    kth_score: Tensor,
    kth_position: Tensor,
    rank: Tensor,
    top_k: int,
    cp: int,
    tokens_per_block: int,
    parts: int | None = None,
) -> Any:
    """See select_slots_reference; float32 scores. `parts`: programs that share a row, by default as many as pay."""
    target = device_target(scores.device)
    arguments = (scores, visible, kth_score, kth_position, rank, top_k, cp, tokens_per_block)
    return run(_prepare(*arguments, target=target, parts=parts))


def _supports(site: Site, target: KernelTarget) -> str | None:
    scores, visible, kth_score = site.args[:3]
    if kth_score.dtype != torch.float32:
        return f"the k-th score is {kth_score.dtype}; the kernel takes float32"
    return refusal(scores, visible)


SELECT_SLOTS = register_kernel(
    OPS["select_slots"],
    select_slots_triton,
    _supports,
    lambda site, target: cases_of(_prepare(*site.args, target=target)),
)
