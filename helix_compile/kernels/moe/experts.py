"""moe_experts: x [N, D], expert_ids [N, k], weights [N, k] -> [N, D], summed over the experts of this rank.

    N tokens, D model width, k choices a token; e experts and f of their FFN width here; pairs = N * k (token, choice)
    1 dispatch  program (expert):      order [pairs]: local pairs sorted by expert; starts [e + 1]
    2 gate_up   program (f, tile):     h [pairs, f] = silu(x gate^T) * (x up^T), rows in that order
    3 down      program (D, tile):     y [pairs, D] = (h down^T) * routing weight, float32, rows by pair
    4 combine   program (token, D):    out [N, D] = sum of y over the local choices, in their order

A tile is up to BLOCK_N rows of one expert: pairs // BLOCK_N + e of them are launched whatever the ids are, and those
beyond the last exit. The weights are the M side of the dots, so that tensor cores run with a few tokens. gate_up
[e, 2, f, D] and down [e, D, f] are strided views; rows of other ranks' experts are neither computed nor read. Without
atomics, so equal inputs give equal bits. The spec is moe_experts_reference.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from helix_compile.kernels.moe.tiles import BLOCK_PAIRS, moe_dispatch_kernel, rows_of_tile
from helix_compile.kernels.ops import OPS
from helix_compile.kernels.registry import CompileCase, Prepared, Site, launch_of, register_kernel, run, specialize
from helix_compile.kernels.target import INTERPRETER, KernelTarget, device_target
from helix_compile.kernels.triton_ops import TRITON_TYPE

BLOCK_D = 1024


FEW_TOKENS = 256  # up to here an expert rarely gets more than 16 rows: tiles of 16, else of 64


@dataclass(frozen=True)
class _Blocks:
    """M: rows of the weights, K: channels summed a step."""

    M: int
    K: int
    num_warps: int
    num_stages: int


# chosen by static tables: tensor cores, no spills, 110 (gate_up) and 55 KB (down) of loads in flight, two or more steps
# ahead, and programs for most SMs at small batches; weights by TMA take more instructions a step (Triton 3.7.0: 189 for
# 162 on sm_100, 147 for 119 on sm_90)
GATE_UP, DOWN = _Blocks(64, 128, 4, 4), _Blocks(128, 64, 4, 4)
FLOAT32, INTERPRETED = _Blocks(32, 32, 4, 2), _Blocks(32, 32, 4, 1)


@triton.jit
def _load_tile(ptrs, mask, EVEN: tl.constexpr, WIDE_DOT: tl.constexpr):  # type: ignore[no-untyped-def] # Triton types its arguments
    tile = tl.load(ptrs) if EVEN else tl.load(ptrs, mask=mask, other=0.0)
    return tile.to(tl.float32) if WIDE_DOT else tile  # the interpreter's dot misreads bfloat16


@triton.jit
def _gate_up_kernel(  # type: ignore[no-untyped-def] # Triton types its arguments
    x_ptr,
    gate_up_ptr,
    order_ptr,
    starts_ptr,
    h_ptr,
    stride_x_n,
    stride_w_e,
    stride_w_half,
    stride_w_f,
    D,
    F,
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE_DOT: tl.constexpr,
):
    expert, row0, end = rows_of_tile(starts_ptr, tl.program_id(1), EXPERTS, BLOCK_E, BLOCK_N)
    if row0 >= end:
        return
    rows = row0 + tl.arange(0, BLOCK_N)
    # clamped, not masked: what lies past the end is computed from valid memory and not stored
    tokens = tl.load(order_ptr + tl.minimum(rows, end - 1)) // TOP_K
    features = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    gate_ptrs = (
        gate_up_ptr + expert * stride_w_e + tl.minimum(features, F - 1)[:, None].to(tl.int64) * stride_w_f + k[None, :]
    )
    up_ptrs = gate_ptrs + stride_w_half
    x_ptrs = x_ptr + tokens[None, :].to(tl.int64) * stride_x_n + k[:, None]
    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k0 in range(0, D, BLOCK_K):
        x = _load_tile(x_ptrs + k0, (k0 + k < D)[:, None], EVEN, WIDE_DOT)
        w = _load_tile(gate_ptrs + k0, (k0 + k < D)[None, :], EVEN, WIDE_DOT)
        gate = tl.dot(w, x, gate, input_precision="ieee")
        w = _load_tile(up_ptrs + k0, (k0 + k < D)[None, :], EVEN, WIDE_DOT)
        up = tl.dot(w, x, up, input_precision="ieee")
    h = gate / (1.0 + tl.exp(-gate)) * up
    out = h_ptr + rows[None, :].to(tl.int64) * F + features[:, None]
    tl.store(out, h.to(h_ptr.dtype.element_ty), mask=(features < F)[:, None] & (rows < end)[None, :])


@triton.jit
def _down_kernel(  # type: ignore[no-untyped-def] # Triton types its arguments
    h_ptr,
    down_ptr,
    weights_ptr,
    order_ptr,
    starts_ptr,
    y_ptr,
    stride_w_e,
    stride_w_d,
    D,
    F,
    EXPERTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE_DOT: tl.constexpr,
):
    expert, row0, end = rows_of_tile(starts_ptr, tl.program_id(1), EXPERTS, BLOCK_E, BLOCK_N)
    if row0 >= end:
        return
    rows = row0 + tl.arange(0, BLOCK_N)
    inside = tl.minimum(rows, end - 1)
    channels = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    w_ptrs = (
        down_ptr + expert * stride_w_e + tl.minimum(channels, D - 1)[:, None].to(tl.int64) * stride_w_d + k[None, :]
    )
    h_ptrs = h_ptr + inside[None, :].to(tl.int64) * F + k[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k0 in range(0, F, BLOCK_K):
        h = _load_tile(h_ptrs + k0, (k0 + k < F)[:, None], EVEN, WIDE_DOT)
        w = _load_tile(w_ptrs + k0, (k0 + k < F)[None, :], EVEN, WIDE_DOT)
        acc = tl.dot(w, h, acc, input_precision="ieee")
    pairs = tl.load(order_ptr + inside)
    acc = acc * tl.load(weights_ptr + pairs).to(tl.float32)[None, :]
    out = y_ptr + pairs[None, :].to(tl.int64) * D + channels[:, None]
    tl.store(out, acc, mask=(channels < D)[:, None] & (rows < end)[None, :])


@triton.jit
def _combine_kernel(  # type: ignore[no-untyped-def] # Triton types its arguments
    y_ptr,
    ids_ptr,
    first_ptr,
    out_ptr,
    D,
    TOP_K: tl.constexpr,
    BLOCK_J: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    choice = tl.arange(0, BLOCK_J)
    pair = token * TOP_K + choice
    local = tl.load(ids_ptr + pair, mask=choice < TOP_K, other=-1) - tl.load(first_ptr)
    mine = (local >= 0) & (local < EXPERTS)
    y = tl.load(y_ptr + pair[:, None] * D + channels[None, :], mask=mine[:, None] & (channels < D)[None, :], other=0.0)
    tl.store(out_ptr + token * D + channels, tl.sum(y, 0).to(out_ptr.dtype.element_ty), mask=channels < D)


def _launches(
    target: KernelTarget,
    x: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    first_expert: Tensor,
) -> Prepared:
    """The result and what fills it. Meta tensors are good enough: nothing is read here."""
    (N, k), (e, D, F) = expert_ids.shape, down.shape
    pairs = N * k
    out = x.new_empty((N, D))
    order, starts = (x.new_empty(n, dtype=torch.int32) for n in (pairs, e + 1))
    h, y = x.new_empty((pairs, F)), x.new_empty((pairs, D), dtype=torch.float32)
    block_n = 16 if N <= FEW_TOKENS else 64
    tiles = pairs // block_n + min(e, pairs)
    # no tensor core computes in IEEE float32: small tiles, in registers
    gate_up_blocks, down_blocks = (GATE_UP, DOWN) if x.dtype != torch.float32 else (FLOAT32, FLOAT32)
    if target.arch == INTERPRETER:
        gate_up_blocks = down_blocks = INTERPRETED

    def grouped(block: _Blocks, channels: int) -> dict[str, Any]:
        return {
            "EXPERTS": e,
            "BLOCK_E": triton.next_power_of_2(e),
            "BLOCK_M": block.M,
            "BLOCK_N": block_n,
            "BLOCK_K": block.K,
            "EVEN": channels % block.K == 0,
            "WIDE_DOT": target.arch == INTERPRETER,
        }

    sorting = {"order_ptr": order, "starts_ptr": starts}
    return out, [
        launch_of(
            "moe_experts.dispatch",
            moe_dispatch_kernel,
            (e + 1,),
            {"ids_ptr": expert_ids, "first_ptr": first_expert, **sorting, "pairs": pairs},
            {"EXPERTS": e, "BLOCK_PAIRS": BLOCK_PAIRS},
        ),
        launch_of(
            "moe_experts.gate_up",
            _gate_up_kernel,
            (triton.cdiv(F, gate_up_blocks.M), tiles),
            {
                "x_ptr": x,
                "gate_up_ptr": gate_up,
                **sorting,
                "h_ptr": h,
                "stride_x_n": x.stride(0),
                "stride_w_e": gate_up.stride(0),
                "stride_w_half": gate_up.stride(1),
                "stride_w_f": gate_up.stride(2),
                "D": D,
                "F": F,
            },
            {"TOP_K": k, **grouped(gate_up_blocks, D)},
            num_warps=gate_up_blocks.num_warps,
            num_stages=gate_up_blocks.num_stages,
        ),
        launch_of(
            "moe_experts.down",
            _down_kernel,
            (triton.cdiv(D, down_blocks.M), tiles),
            {
                "h_ptr": h,
                "down_ptr": down,
                "weights_ptr": weights,
                **sorting,
                "y_ptr": y,
                "stride_w_e": down.stride(0),
                "stride_w_d": down.stride(1),
                "D": D,
                "F": F,
            },
            grouped(down_blocks, F),
            num_warps=down_blocks.num_warps,
            num_stages=down_blocks.num_stages,
        ),
        launch_of(
            "moe_experts.combine",
            _combine_kernel,
            (N, triton.cdiv(D, BLOCK_D)),
            {"y_ptr": y, "ids_ptr": expert_ids, "first_ptr": first_expert, "out_ptr": out, "D": D},
            {"TOP_K": k, "BLOCK_J": triton.next_power_of_2(k), "EXPERTS": e, "BLOCK_D": BLOCK_D},
        ),
    ]


def moe_experts_triton(
    x: Tensor, expert_ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, first_expert: Tensor
) -> Tensor:
    """See moe_experts_reference; float32, bfloat16 or float16, the weights in x's dtype.

    Raises:
        ValueError: the last axis of gate_up or down is strided.
    """
    for name, tensor in (("gate_up", gate_up), ("down", down)):
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{name} has stride {tensor.stride(-1)} along its last axis; it must be 1")
    if expert_ids.numel() == 0:
        return x.new_zeros(x.shape)
    tokens = x.contiguous(), expert_ids.contiguous(), weights.contiguous()
    return run(_launches(device_target(x.device), *tokens, gate_up, down, first_expert))


def _supports(site: Site, target: KernelTarget) -> str | None:
    x, expert_ids, weights, gate_up, down, first_expert = site.args
    dtypes = {t.dtype for t in (x, gate_up, down)}
    if len(dtypes) > 1 or x.dtype not in TRITON_TYPE or weights.dtype not in TRITON_TYPE:
        return (
            f"x in {x.dtype}, experts in {gate_up.dtype} and {down.dtype}, routing weights in {weights.dtype}; the kernel"
            " takes one 16- or 32-bit float for x and experts, and such routing weights"
        )
    if expert_ids.dtype != torch.int64 or first_expert.dtype != torch.int64:
        return f"expert numbers in {expert_ids.dtype} and {first_expert.dtype}; the kernel takes int64"
    return None


def _cases(site: Site, target: KernelTarget) -> list[CompileCase]:
    """What one token a sequence takes; the tiles of a step with more tokens are the fallback."""
    x, expert_ids, weights, *held = site.args
    selected = site.capacity.max_batch_size
    cases: list[CompileCase] = []
    for N in (selected, max(selected, FEW_TOKENS + 1)):
        rows = [torch.empty((N, int(t.shape[1])), dtype=t.dtype, device="meta") for t in (x, expert_ids, weights)]
        _, launches = _launches(target, *rows, *held)
        known = [(c.kernel, c.constexprs) for c in cases]
        for step in launches:
            facts = {n: v for n, v in step.arguments.items() if n != "pairs"}  # not specialised
            case = replace(specialize(step.case, facts), fallback=N != selected)
            if (case.kernel, case.constexprs) not in known:
                cases.append(case)
    return cases


MOE_EXPERTS = register_kernel(OPS["moe_experts"], moe_experts_triton, _supports, _cases)
