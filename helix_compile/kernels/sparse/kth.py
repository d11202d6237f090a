"""kth_candidate: candidates [P, B, T, m, 2] of all ranks -> the last key that is chosen, score and position [B, T].

    P ranks, B sequences, T new tokens, m candidates a rank; a row is one (b, t)
    program (row): a radix search over the P * m keys of 64 bits, score above, position below (the lower one is better)

Candidates are read as int64 (order.py's entries), in any order. Where fewer than top_k keys are visible the k-th is a
filler, -inf and NOWHERE: it orders behind all of them. The spec is kth_candidate_reference.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from helix_compile.kernels.ops import OPS
from helix_compile.kernels.registry import Prepared, Site, cases_of, launch_of, register_kernel, run
from helix_compile.kernels.sparse.order import (
    DIGITS,
    NOWHERE,
    count_digits,
    key_of_entry,
    narrow,
    score_bits,
    selection_tile,
)
from helix_compile.kernels.target import KernelTarget, device_target

FIRST = tl.constexpr(-(2**63))


LAST = tl.constexpr(2**63 - 1)


@triton.jit
def _load_keys(entries_ptr, index, stride_P, M: tl.constexpr, PEERS: tl.constexpr):  # type: ignore[no-untyped-def] # Triton types its arguments
    inside = index < PEERS * M
    entry = tl.load(entries_ptr + (index // M).to(tl.int64) * stride_P + index % M, mask=inside, other=0)
    nearness = (entry >> 32) ^ NOWHERE  # NOWHERE - position: the lower one is better
    return (key_of_entry(entry).to(tl.int64) << 32) + nearness, inside


@triton.jit
def _kth_kernel(  # type: ignore[no-untyped-def] # Triton types its arguments
    entries_ptr,
    score_ptr,
    position_ptr,
    stride_P,
    M: tl.constexpr,
    PEERS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    entries_ptr += row * M
    low = tl.full([], FIRST, tl.int64)
    high = tl.full([], LAST, tl.int64)
    matched = tl.full([], PEERS * M, tl.int32)
    wanted = tl.full([], TOP_K, tl.int32)
    shift = tl.full([], 64, tl.int32)
    while (shift > 0) & (matched > wanted):
        shift -= 8
        counts = tl.zeros([DIGITS], tl.int32)
        for first in range(0, PEERS * M, BLOCK):
            key, inside = _load_keys(entries_ptr, first + tl.arange(0, BLOCK), stride_P, M, PEERS)
            counts += count_digits(key, inside, low, high, shift)
        low, high, matched, wanted = narrow(counts, low, shift, wanted)

    # all that is left in the range is chosen, or equal: its last key is the k-th
    last = tl.full([], LAST, tl.int64)
    for first in range(0, PEERS * M, BLOCK):
        key, inside = _load_keys(entries_ptr, first + tl.arange(0, BLOCK), stride_P, M, PEERS)
        last = tl.minimum(last, tl.min(tl.where(inside & (key >= low) & (key <= high), key, LAST), 0))
    bits = score_bits((last >> 32).to(tl.int32))
    tl.store(score_ptr + row, bits.to(tl.float32, bitcast=True))
    tl.store(position_ptr + row, (last & NOWHERE) ^ NOWHERE)


def _prepare(candidates_P: Tensor, top_k: int, *, target: KernelTarget) -> Prepared:
    score, position = OPS["kth_candidate"].fake(candidates_P, top_k)
    peers, B, T, m, _ = candidates_P.shape
    if peers * m < top_k:  # all that is visible is chosen
        return (score.fill_(-torch.inf), position.fill_(NOWHERE.value)), []
    entries = candidates_P.contiguous()
    entries = entries if entries.storage_offset() % 2 == 0 else entries.clone()
    entries = entries.view(torch.int64)
    block, num_warps = selection_tile(target, bits=64)
    step = launch_of(
        "kth_candidate",
        _kth_kernel,
        (B * T,),
        {"entries_ptr": entries, "score_ptr": score, "position_ptr": position, "stride_P": B * T * m},
        {"M": m, "PEERS": peers, "TOP_K": top_k, "BLOCK": block},
        config=f"{top_k} of {peers} x {m}, BLOCK {block}",
        num_warps=num_warps,
    )
    return (score, position), [step]


def kth_candidate_triton(candidates_P: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """See kth_candidate_reference; candidates of float32 scores."""
    score, position = run(_prepare(candidates_P, top_k, target=device_target(candidates_P.device)))
    return score, position


def _supports(site: Site, target: KernelTarget) -> str | None:
    candidates_P = site.args[0]
    if candidates_P.dtype != torch.int32:
        return (
            f"candidates of {candidates_P.dtype}, which hold float64 scores; the kernel takes int32, of float32 scores"
        )
    return None


KTH_CANDIDATE = register_kernel(
    OPS["kth_candidate"],
    kth_candidate_triton,
    _supports,
    lambda site, target: cases_of(_prepare(*site.args, target=target)),
)
