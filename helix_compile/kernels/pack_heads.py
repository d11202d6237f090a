"""pack_heads: partial_o [B, T, H, W], lse [B, T, H] -> buffer [peers, n] for the exchange over heads, row j = [lse, o].

    pack_heads.splits: partial_o [B, T, H, S, W], lse [B, T, H, S], S splits of one rank's attention
        -> the same buffer of the merged (o in `dtype`, lse): no kernel of its own merges splits or packs

    H query heads, h = H / peers heads of a chunk, W width of a head's output (R); rows = B * T * H
    row (bt, head) -> buffer[head // h], row bt * h + head % h of lse [B*T*h] and of o [B*T*h, W]
    program (row block, block of W): all splits of its rows, one pass

A split with lse = -inf is not read; where all are, o = 0 and lse = -inf. A 16-bit o makes the buffer bytes, and a peer's
row of an odd count of o leaves the next peer's lse at an odd multiple of 2 bytes: lse is stored as two 16-bit halves.
The specs are pack_heads_reference and pack_splits_reference.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from helix_compile.kernels.merge import merge_tile, refusal, softmax_weights
from helix_compile.kernels.ops import OPS
from helix_compile.kernels.registry import Prepared, Site, launch_of, register_launches
from helix_compile.kernels.target import KernelTarget


@triton.jit
def _pack_heads_kernel(  # type: ignore[no-untyped-def] # Triton types its arguments
    o_ptr,
    lse_ptr,
    out_o_ptr,
    out_lse_ptr,
    stride_o_row,
    stride_o_S,
    stride_lse_row,
    stride_lse_S,
    stride_out_o_P,
    stride_out_lse_P,
    rows,
    MERGE: tl.constexpr,
    SPLITS: tl.constexpr,
    H: tl.constexpr,
    CHUNK_H: tl.constexpr,
    W: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    inside = (row < rows)[:, None]
    if MERGE:
        split = tl.arange(0, BLOCK_P).to(tl.int64)
        lse_parts = tl.load(
            lse_ptr + row[:, None] * stride_lse_row + split[None, :] * stride_lse_S,
            mask=inside & (split < SPLITS)[None, :],
            other=float("-inf"),
        )
        weights, total, lse = softmax_weights(lse_parts, 1)
        parts = tl.load(
            o_ptr + (row[:, None] * stride_o_row + split[None, :] * stride_o_S)[:, :, None] + column[None, None, :],
            mask=(lse_parts != float("-inf"))[:, :, None] & (column < W)[None, None, :],
            other=0.0,
        ).to(tl.float32)
        o = tl.sum(parts * weights[:, :, None], 1) / tl.where(total == 0.0, 1.0, total)
    else:
        lse = tl.load(lse_ptr + row[:, None] * stride_lse_row, mask=inside, other=0.0)
        o = tl.load(
            o_ptr + row[:, None] * stride_o_row + column[None, :], mask=inside & (column < W)[None, :], other=0.0
        )
    head = row % H
    peer = (head // CHUNK_H)[:, None]
    out_row = (row // H * CHUNK_H + head % CHUNK_H)[:, None]
    tl.store(
        out_o_ptr + peer * stride_out_o_P + out_row * W + column[None, :],
        o.to(out_o_ptr.dtype.element_ty),
        mask=inside & (column < W)[None, :],
    )
    if tl.program_id(1) == 0:
        if out_lse_ptr.dtype.element_ty == tl.int16:
            bits = lse.to(tl.int32, bitcast=True)
            halves = out_lse_ptr + peer * stride_out_lse_P + out_row * 2
            tl.store(halves, (bits & 0xFFFF).to(tl.int16), mask=inside)
            tl.store(halves + 1, (bits >> 16).to(tl.int16), mask=inside)
        else:
            tl.store(out_lse_ptr + peer * stride_out_lse_P + out_row, lse, mask=inside)


def _prepare(partial_o: Tensor, lse: Tensor, buffer: Tensor, dtype: torch.dtype, merge: bool) -> Prepared:
    """Pack partial_o [B, T, H, S, W] and lse [B, T, H, S] as `dtype`; S = 1 without `merge`, which is a copy."""
    H, splits, W = partial_o.shape[2:]
    # views; a copy only where no view exists
    o, lse = partial_o.flatten(0, 2), lse.flatten(0, 2)
    o = o if o.stride(2) == 1 else o.contiguous()
    rows, peers = lse.shape[0], buffer.shape[0]
    chunk_rows = rows // peers
    if buffer.dtype == lse.dtype:
        out_lse, out_o = buffer, buffer[:, chunk_rows:]
    else:
        out_lse = buffer.view(torch.int16)
        out_o = buffer.view(dtype)[:, chunk_rows * lse.dtype.itemsize // dtype.itemsize :]
    blocks, num_warps = merge_tile(splits, W)
    what = f"{splits} splits" if merge else "copy"
    step = launch_of(
        "pack_heads.splits" if merge else "pack_heads",
        _pack_heads_kernel,
        (triton.cdiv(rows, blocks["BLOCK_ROWS"]), triton.cdiv(W, blocks["BLOCK_W"])),
        {
            "o_ptr": o,
            "lse_ptr": lse,
            "out_o_ptr": out_o,
            "out_lse_ptr": out_lse,
            "stride_o_row": o.stride(0),
            "stride_o_S": o.stride(1),
            "stride_lse_row": lse.stride(0),
            "stride_lse_S": lse.stride(1),
            "stride_out_o_P": out_o.stride(0),
            "stride_out_lse_P": out_lse.stride(0),
            "rows": rows,
        },
        {"MERGE": merge, "SPLITS": splits, "H": H, "CHUNK_H": H // peers, "W": W, **blocks},
        config=f"{what}, BLOCK_ROWS {blocks['BLOCK_ROWS']}, BLOCK_W {blocks['BLOCK_W']}",
        num_warps=num_warps,
    )
    return buffer, [step]


def _pack_heads(partial_o: Tensor, lse: Tensor, peers: int) -> Prepared:
    """See pack_heads_reference; float32, bfloat16 or float16 o with float32 lse."""
    buffer = OPS["pack_heads"].fake(partial_o, lse, peers)
    return _prepare(partial_o.unsqueeze(3), lse.unsqueeze(3), buffer, partial_o.dtype, merge=False)


def _pack_splits(partial_o: Tensor, lse: Tensor, peers: int, dtype: torch.dtype) -> Prepared:
    """See pack_splits_reference."""
    buffer = OPS["pack_heads.splits"].fake(partial_o, lse, peers, dtype)
    return _prepare(partial_o, lse, buffer, dtype, merge=True)


def _supports(site: Site, target: KernelTarget) -> str | None:
    partial_o, lse = site.args[:2]
    return refusal(f"o of {partial_o.dtype}", lse, partial_o.dtype)


def _pack_splits_supports(site: Site, target: KernelTarget) -> str | None:
    partial_o, lse, _, dtype = site.args
    return refusal(f"splits of {partial_o.dtype} packed as {dtype}", lse, partial_o.dtype, dtype)


PACK_HEADS = register_launches(OPS["pack_heads"], _pack_heads, _supports)


PACK_SPLITS = register_launches(OPS["pack_heads.splits"], _pack_splits, _pack_splits_supports)
