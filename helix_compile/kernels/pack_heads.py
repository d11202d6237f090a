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

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from helix_compile.kernels.merge import merge_tile, refusal, softmax_weights
from helix_compile.kernels.ops import OPS
from helix_compile.kernels.registry import CompileCase, Site, launch, register_kernel, specialize
from helix_compile.kernels.target import KernelTarget
from helix_compile.kernels.triton_ops import TRITON_TYPE

INTEGERS = (
    "stride_o_row",
    "stride_o_S",
    "stride_lse_row",
    "stride_lse_S",
    "stride_out_o_P",
    "stride_out_lse_P",
    "rows",
)


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


def _case(splits: int | None, H: int, peers: int, W: int, o: torch.dtype, out: torch.dtype) -> CompileCase:
    """The case of `splits` parts of dtype `o` (None: merged already, a copy) packed as `out`."""
    blocks, num_warps = merge_tile(splits or 1, W)
    lse_out = "*fp32" if out == torch.float32 else "*i16"
    what = "copy" if splits is None else f"{splits} splits"
    return CompileCase(
        kernel="pack_heads" if splits is None else "pack_heads.splits",
        function=_pack_heads_kernel,
        signature={
            "o_ptr": f"*{TRITON_TYPE[o]}",
            "lse_ptr": "*fp32",
            "out_o_ptr": f"*{TRITON_TYPE[out]}",
            "out_lse_ptr": lse_out,
            **dict.fromkeys(INTEGERS, "i32"),
        },
        constexprs={
            "MERGE": splits is not None,
            "SPLITS": splits or 1,
            "H": H,
            "CHUNK_H": H // peers,
            "W": W,
            **blocks,
        },
        options={"num_warps": num_warps, "num_stages": 1},
        config=f"{what}, BLOCK_ROWS {blocks['BLOCK_ROWS']}, BLOCK_W {blocks['BLOCK_W']}",
    )


def _arguments(o: Tensor, lse: Tensor, buffer: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of a launch over o [rows, S, W] and lse [rows, S]; tensors may be fake."""
    rows = lse.shape[0]
    chunk_rows = rows // buffer.shape[0]
    if buffer.dtype == lse.dtype:
        out_lse, out_o = buffer, buffer[:, chunk_rows:]
    else:
        out_lse = buffer.view(torch.int16)
        out_o = buffer.view(dtype)[:, chunk_rows * lse.dtype.itemsize // dtype.itemsize :]
    return {
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
    }


def _rows(partial_o: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Views o [rows, S, W] and lse [rows, S]; copies only where no view exists."""
    o, lse = partial_o.flatten(0, 2), lse.flatten(0, 2)
    return o if o.stride(2) == 1 else o.contiguous(), lse


def _launch(case: CompileCase, arguments: dict[str, Any]) -> None:
    constants = case.constexprs
    grid = (triton.cdiv(arguments["rows"], constants["BLOCK_ROWS"]), triton.cdiv(constants["W"], constants["BLOCK_W"]))
    launch(case, grid, arguments)


def pack_heads_triton(partial_o: Tensor, lse: Tensor, peers: int) -> Tensor:
    """See pack_heads_reference; float32, bfloat16 or float16 o with float32 lse."""
    H, W = partial_o.shape[2:]
    buffer = OPS["pack_heads"].fake(partial_o, lse, peers)
    rows = _rows(partial_o.unsqueeze(3), lse.unsqueeze(3))
    case = _case(None, H, peers, W, partial_o.dtype, partial_o.dtype)
    _launch(case, _arguments(*rows, buffer, partial_o.dtype))
    return buffer


def pack_splits_triton(partial_o: Tensor, lse: Tensor, peers: int, dtype: torch.dtype) -> Tensor:
    """See pack_splits_reference."""
    H, splits, W = partial_o.shape[2:]
    buffer = OPS["pack_heads.splits"].fake(partial_o, lse, peers, dtype)
    case = _case(splits, H, peers, W, partial_o.dtype, dtype)
    _launch(case, _arguments(*_rows(partial_o, lse), buffer, dtype))
    return buffer


def _supports(site: Site, target: KernelTarget) -> str | None:
    partial_o, lse = site.args[:2]
    return refusal(f"o of {partial_o.dtype}", lse, partial_o.dtype)


def _cases(site: Site, target: KernelTarget) -> list[CompileCase]:
    partial_o, lse, peers = site.args
    H, W = (int(size) for size in partial_o.shape[2:])
    buffer = OPS["pack_heads"].fake(partial_o, lse, peers)
    rows = _rows(partial_o.unsqueeze(3), lse.unsqueeze(3))
    case = _case(None, H, peers, W, partial_o.dtype, partial_o.dtype)
    return [specialize(case, _arguments(*rows, buffer, partial_o.dtype))]


def _pack_splits_supports(site: Site, target: KernelTarget) -> str | None:
    partial_o, lse, _, dtype = site.args
    return refusal(f"splits of {partial_o.dtype} packed as {dtype}", lse, partial_o.dtype, dtype)


def _pack_splits_cases(site: Site, target: KernelTarget) -> list[CompileCase]:
    partial_o, lse, peers, dtype = site.args
    H, splits, W = (int(size) for size in partial_o.shape[2:])
    buffer = OPS["pack_heads.splits"].fake(*site.args)
    case = _case(splits, H, peers, W, partial_o.dtype, dtype)
    return [specialize(case, _arguments(*_rows(partial_o, lse), buffer, dtype))]


PACK_HEADS = register_kernel(OPS["pack_heads"], pack_heads_triton, _supports, _cases)


PACK_SPLITS = register_kernel(OPS["pack_heads.splits"], pack_splits_triton, _pack_splits_supports, _pack_splits_cases)
