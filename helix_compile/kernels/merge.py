"""Sums of parts weighted by softmax: of peers (merge_lse), and of the splits of one rank's shard (merge_splits).

    merge_lse      partial_o_P [P, B, T, h, W], lse_P [P, B, T, h] -> o [B, T, h, W]
                   P peers, B sequences, T tokens, h heads owned here, W width of a head's output (R or V);
                   rows = B * T * h; program (row block, block of W): all peers of its rows, one pass
                   tile [BLOCK_ROWS, BLOCK_P, BLOCK_W]: several rows where W is small
    merge_splits   partial_o_S [B, T, H, S, R], lse_S [B, T, H, S] -> partial_o [B, T, H, R], lse [B, T, H]
                   S splits; program (row, block of BLOCK_R channels): all its splits, one pass

merge_lse may get strided views of the packed exchange buffer: they are read where the collective left them. A part with
lse = -inf is not read at all; a row that no part has seen gets 0 (and lse -inf). The spec is merge_lse_reference.
kernels/pack_heads.py merges the splits of one rank by the same weights.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from helix_compile.kernels.exchange import NATIVE
from helix_compile.kernels.ops import OPS
from helix_compile.kernels.registry import (
    CompileCase,
    Prepared,
    Site,
    cases_of,
    launch,
    launch_of,
    register_kernel,
    run,
)
from helix_compile.kernels.target import KernelTarget
from helix_compile.kernels.triton_ops import TRITON_TYPE

LOG2E = tl.constexpr(1.4426950408889634)


LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def softmax_weights(lse, axis: tl.constexpr):  # type: ignore[no-untyped-def] # Triton types its arguments
    """Unnormalised weights of parts, their sum (0: all parts dead) and the lse of all (natural log)."""
    alive = lse != float("-inf")  # not >: a NaN is a fault that must reach the output
    top = tl.max(lse, axis, keep_dims=True)
    top = tl.where(top == float("-inf"), 0.0, top)  # -inf - -inf is NaN
    weights = tl.where(alive, tl.exp(lse - top), 0.0)
    total = tl.sum(weights, axis, keep_dims=True)
    dead = total == 0.0
    lse_all = tl.where(dead, float("-inf"), top + tl.log(tl.where(dead, 1.0, total)))
    return weights, total, lse_all


@triton.jit
def _merge_lse_kernel(  # type: ignore[no-untyped-def] # Triton types its arguments
    o_ptr,
    lse_ptr,
    out_ptr,
    stride_o_P,
    stride_o_row,
    stride_lse_P,
    rows,
    PEERS: tl.constexpr,
    W: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    row = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    peer = tl.arange(0, BLOCK_P).to(tl.int64)
    column = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    inside = (row < rows)[:, None] & (peer < PEERS)[None, :]
    lse = tl.load(lse_ptr + row[:, None] + peer[None, :] * stride_lse_P, mask=inside, other=float("-inf"))
    weights, total, _ = softmax_weights(lse, 1)
    parts = tl.load(
        o_ptr + (row[:, None] * stride_o_row + peer[None, :] * stride_o_P)[:, :, None] + column[None, None, :],
        mask=(lse != float("-inf"))[:, :, None] & (column < W)[None, None, :],
        other=0.0,
    ).to(tl.float32)
    o = tl.sum(parts * weights[:, :, None], 1) / tl.where(total == 0.0, 1.0, total)
    tl.store(
        out_ptr + row[:, None] * W + column[None, :],
        o.to(out_ptr.dtype.element_ty),
        mask=(row < rows)[:, None] & (column < W)[None, :],
    )


def merge_tile(parts: int, W: int) -> tuple[dict[str, int], int]:
    """Sizes of a tile over rows, parts and W, and its warps: about 1,024 elements for a warp, 2,048 at most."""
    block_parts = triton.next_power_of_2(parts)
    block_w = min(triton.next_power_of_2(W), 128, max(16, 8192 // block_parts))
    block_rows = max(1, 1024 // (block_parts * block_w))
    blocks = {"BLOCK_ROWS": block_rows, "BLOCK_P": block_parts, "BLOCK_W": block_w}
    return blocks, max(1, block_rows * block_parts * block_w // 2048)


def _prepare(partial_o_P: Tensor, lse_P: Tensor) -> Prepared:
    """See merge_lse_reference; float32, bfloat16 or float16 parts with float32 lse."""
    peers, B, T, h, W = partial_o_P.shape
    # views of the packed buffer flatten to views; anything else is copied
    parts, lse = partial_o_P.flatten(1, 3), lse_P.flatten(1, 3)
    parts = parts if parts.stride(2) == 1 else parts.contiguous()
    lse = lse if lse.stride(1) == 1 else lse.contiguous()
    out = partial_o_P.new_empty((B, T, h, W))
    rows = B * T * h
    blocks, num_warps = merge_tile(peers, W)
    step = launch_of(
        "merge_lse",
        _merge_lse_kernel,
        (triton.cdiv(rows, blocks["BLOCK_ROWS"]), triton.cdiv(W, blocks["BLOCK_W"])),
        {
            "o_ptr": parts,
            "lse_ptr": lse,
            "out_ptr": out,
            "stride_o_P": parts.stride(0),
            "stride_o_row": parts.stride(1),
            "stride_lse_P": lse.stride(0),
            "rows": rows,
        },
        {"PEERS": peers, "W": W, **blocks},
        config=f"{peers} parts, BLOCK_ROWS {blocks['BLOCK_ROWS']}, BLOCK_W {blocks['BLOCK_W']}",
        num_warps=num_warps,
    )
    return out, [step]


def refusal(what: str, lse: Tensor, *dtypes: torch.dtype) -> str | None:
    """Why parts of these dtypes can't be merged or packed, or None."""
    if set(dtypes) <= set(TRITON_TYPE) and lse.dtype == torch.float32:
        return None
    return f"{what} with lse of {lse.dtype}; the kernel takes 16- and 32-bit floats with float32 lse"


def _supports(site: Site, target: KernelTarget) -> str | None:
    parts, lse = site.args
    return refusal(f"parts of {parts.dtype}", lse, parts.dtype)


def _cases(site: Site, target: KernelTarget) -> list[CompileCase]:
    # fake views of the packed buffer are contiguous; the real ones begin behind lse and have its strides
    peers, B, T, h = site.args[1].shape
    o, lse = (part.new_empty((B, T, peers * h, *part.shape[4:])) for part in site.args)
    return cases_of(_prepare(*NATIVE.unpack(NATIVE.buffer(o, lse, peers), o, lse)))


MERGE_LSE = register_kernel(OPS["merge_lse"], lambda *args: run(_prepare(*args)), _supports, _cases)


BLOCK_R = 128


@triton.jit
def merge_splits_kernel(  # type: ignore[no-untyped-def] # Triton types its arguments
    o_S_ptr, lse_S_ptr, o_ptr, lse_ptr, R: tl.constexpr, SPLITS: tl.constexpr, BLOCK_R: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    splits = tl.arange(0, SPLITS)
    channels = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    lse_S = tl.load(lse_S_ptr + row * SPLITS + splits)
    weights, total, lse = softmax_weights(lse_S, 0)
    parts = tl.load(
        o_S_ptr + (row * SPLITS + splits)[:, None] * R + channels[None, :],
        mask=(lse_S != float("-inf"))[:, None] & (channels < R)[None, :],
        other=0.0,
    )
    o = tl.sum(parts * weights[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(o_ptr + row * R + channels, o.to(o_ptr.dtype.element_ty), mask=channels < R)
    tl.store(lse_ptr + row + tl.arange(0, 1), lse)


def merge_splits_case(splits: int, R: int, dtype: torch.dtype) -> CompileCase:
    """The merge of a power of two of splits."""
    return CompileCase(
        kernel="merge_splits",
        function=merge_splits_kernel,
        signature={"o_S_ptr": "*fp32", "lse_S_ptr": "*fp32", "o_ptr": f"*{TRITON_TYPE[dtype]}", "lse_ptr": "*fp32"},
        constexprs={"R": R, "SPLITS": splits, "BLOCK_R": BLOCK_R},
        options={"num_warps": 4, "num_stages": 1},
        divisible_by_16=("o_S_ptr", "lse_S_ptr", "o_ptr", "lse_ptr"),
        config=f"{splits} splits, BLOCK_R {BLOCK_R}",
    )


def merge_splits(partial_o_S: Tensor, lse_S: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """partial_o in `dtype` and lse of float32 parts that mla_decode's splits wrote."""
    B, T, H, splits, R = partial_o_S.shape
    o = partial_o_S.new_empty((B, T, H, R), dtype=dtype)
    lse = lse_S.new_empty((B, T, H))
    launch(
        merge_splits_case(splits, R, dtype),
        (B * T * H, triton.cdiv(R, BLOCK_R)),
        {"o_S_ptr": partial_o_S, "lse_S_ptr": lse_S, "o_ptr": o, "lse_ptr": lse},
    )
    return o, lse
