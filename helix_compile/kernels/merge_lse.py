"""merge_lse: partial_o_P [P, B, T, h, W], lse_P [P, B, T, h] -> o [B, T, h, W], the softmax-weighted sum over peers.

    P peers, B sequences, T tokens, h heads owned here, W width of a head's output (R or V); rows = B * T * h
    program (row block, block of W): all peers of its rows, one pass

Both inputs may be strided views of the packed exchange buffer: they are read where the collective left them. A peer
with lse = -inf is not read at all. The spec is merge_lse_reference.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from helix_compile.kernels.launch import launch
from helix_compile.kernels.registry import CompileCase, Kernel, Site, register_kernel
from helix_compile.kernels.target import KernelTarget
from helix_compile.kernels.triton_ops import define_triton_op

BLOCK_W = 128
TRITON_TYPE = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@triton.jit
def _merge_lse_kernel(  # type: ignore[no-untyped-def] # Triton types its arguments
    o_ptr, lse_ptr, out_ptr,
    stride_o_P, stride_o_row, stride_lse_P, stride_lse_row,
    W, PEERS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    peers = tl.arange(0, BLOCK_P).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    lse = tl.load(lse_ptr + peers * stride_lse_P + row * stride_lse_row, mask=peers < PEERS, other=float("-inf"))  # fmt: skip
    alive = lse != float("-inf")  # not >: a NaN is a fault that must reach the output
    top = tl.max(tl.where(alive, lse, -3.0e38), 0)
    weights = tl.where(alive, tl.exp(lse - top), 0.0)
    total = tl.sum(weights, 0)
    parts = tl.load(
        o_ptr + peers[:, None] * stride_o_P + row * stride_o_row + columns[None, :],
        mask=alive[:, None] & (columns < W)[None, :], other=0.0,
    ).to(tl.float32)  # fmt: skip
    merged = tl.sum(parts * weights[:, None], 0) / tl.where(total > 0.0, total, 1.0)
    tl.store(out_ptr + row * W + columns, merged.to(out_ptr.dtype.element_ty), mask=columns < W)


def _case(peers: int, dtype: torch.dtype) -> CompileCase:
    element = TRITON_TYPE[dtype]
    strides = ("stride_o_P", "stride_o_row", "stride_lse_P", "stride_lse_row", "W")
    return CompileCase(
        kernel="merge_lse",
        function=_merge_lse_kernel,
        signature={"o_ptr": f"*{element}", "lse_ptr": "*fp32", "out_ptr": f"*{element}", **dict.fromkeys(strides, "i32")},
        constexprs={"PEERS": peers, "BLOCK_P": triton.next_power_of_2(peers), "BLOCK_W": BLOCK_W},
        options={"num_warps": 1, "num_stages": 1},
        divisible_by_16=("o_ptr", "lse_ptr", "out_ptr", "W"),
        config=f"{peers} parts, BLOCK_W {BLOCK_W}",
    )  # fmt: skip


def merge_lse_triton(partial_o_P: Tensor, lse_P: Tensor) -> Tensor:
    """See merge_lse_reference; float32, bfloat16 or float16 parts with float32 lse."""
    peers, B, T, h, W = partial_o_P.shape
    parts, lse = partial_o_P.flatten(1, 3), lse_P.flatten(1, 3)
    out = partial_o_P.new_empty((B, T, h, W))
    launch(
        _case(peers, partial_o_P.dtype),
        (B * T * h, triton.cdiv(W, BLOCK_W)),
        {
            "o_ptr": parts, "lse_ptr": lse, "out_ptr": out, "stride_o_P": parts.stride(0),
            "stride_o_row": parts.stride(1), "stride_lse_P": lse.stride(0), "stride_lse_row": lse.stride(1), "W": W,
        },
    )  # fmt: skip
    return out


def _merge_lse_fake(partial_o_P: Tensor, lse_P: Tensor) -> Tensor:
    return partial_o_P.new_empty(partial_o_P.shape[1:])


def _supports(site: Site, target: KernelTarget) -> str | None:
    parts, lse = site.args
    if parts.dtype not in TRITON_TYPE or lse.dtype != torch.float32:
        return f"parts of {parts.dtype} with lse of {lse.dtype}; the kernel takes 16- and 32-bit floats with float32 lse"
    return None


def _cases(site: Site, target: KernelTarget) -> list[CompileCase]:
    return [_case(int(site.args[0].shape[0]), site.args[0].dtype)]


MERGE_LSE = register_kernel(
    Kernel(
        op="merge_lse",
        target=define_triton_op(
            "merge_lse(Tensor partial_o_P, Tensor lse_P) -> Tensor",
            merge_lse_triton,
            _merge_lse_fake,
        ),
        supports=_supports,
        cases=_cases,
    )
)
