"""merge_splits: partial_o_S [B, T, H, S, R], lse_S [B, T, H, S] -> partial_o [B, T, H, R], lse [B, T, H].

    S splits of one rank's shard; program (row, block of BLOCK_R channels): all its splits, one pass

The sum of merge_lse over the splits of one rank, with the lse that the merge over ranks needs. A split with lse = -inf
is not read; a row that no split has seen gets 0 and -inf.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from helix_compile.kernels.launch import launch
from helix_compile.kernels.merge_lse import softmax_weights
from helix_compile.kernels.registry import CompileCase
from helix_compile.kernels.triton_ops import TRITON_TYPE

BLOCK_R = 128


@triton.jit
def merge_splits_kernel(  # type: ignore[no-untyped-def] # Triton types its arguments
    o_S_ptr, lse_S_ptr, o_ptr, lse_ptr,
    R: tl.constexpr, SPLITS: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    splits = tl.arange(0, SPLITS)
    channels = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    lse_S = tl.load(lse_S_ptr + row * SPLITS + splits)
    weights, total, lse = softmax_weights(lse_S, 0)
    parts = tl.load(
        o_S_ptr + (row * SPLITS + splits)[:, None] * R + channels[None, :],
        mask=(lse_S != float("-inf"))[:, None] & (channels < R)[None, :], other=0.0,
    )  # fmt: skip
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
    )  # fmt: skip


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
