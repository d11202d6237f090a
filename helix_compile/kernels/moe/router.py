"""moe_router: logits [N, E], bias [E] -> expert_ids [N, k], weights [N, k]: biased grouped top-k as in DeepSeek-V3.

    N tokens, E experts = G groups of S neighbours, k experts a token
    program (token): its E scores as a tile [G, S], both padded to powers of two

Every comparison is one of 64-bit keys: the score's bits in an order-preserving form above, the inverted index below. No
two keys are equal, so ties go to the lower index and a NaN ranks first, as in the spec, moe_router_reference.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from helix_compile.kernels.merge import LOG2E
from helix_compile.kernels.ops import OPS
from helix_compile.kernels.registry import Prepared, Site, launch_of, register_launches
from helix_compile.kernels.target import KernelTarget
from helix_compile.kernels.triton_ops import TRITON_TYPE

MAX_EXPERTS = 1024


WARP_SCORES = 512  # scores that one warp holds; more experts take more warps


# ln 2 in two parts; times an integer below 2^9 the first is exact in float32
LN2_HIGH = tl.constexpr(0.693145751953125)


LN2_LOW = tl.constexpr(1.42860682030941723e-06)


REMOVED = tl.constexpr(-(2**63))


INDEX_TOP = tl.constexpr(2**31 - 1)


INDEX_BITS = tl.constexpr(2**32 - 1)


@triton.jit
def _sigmoid(x):  # type: ignore[no-untyped-def] # Triton types its arguments
    # tl.sigmoid multiplies by log2(e) before the hardware's exp2: an error that grows with |x| and can flip a choice
    y = tl.minimum(tl.maximum(-x, -90.0, tl.PropagateNan.ALL), 90.0, tl.PropagateNan.ALL)
    n = tl.floor(y * LOG2E + 0.5)
    r = (y - n * LN2_HIGH) - n * LN2_LOW
    # n - 1: 2^128 alone would overflow where its product with exp(r) does not
    return tl.math.div_rn(1.0, 1.0 + tl.exp(r) * tl.exp2(n - 1.0) * 2.0)


@triton.jit
def _keys(values, indices):  # type: ignore[no-untyped-def] # Triton types its arguments
    bits = values.to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ INDEX_TOP, bits)  # as integers, in the order of the floats
    bits = tl.where(values != values, INDEX_TOP, bits)
    return (bits.to(tl.int64) << 32) + (INDEX_TOP - indices)


@triton.jit
def _value_of(keys):  # type: ignore[no-untyped-def] # Triton types its arguments
    bits = (keys >> 32).to(tl.int32)
    return tl.where(bits < 0, bits ^ INDEX_TOP, bits).to(tl.float32, bitcast=True)


@triton.jit
def _moe_router_kernel(  # type: ignore[no-untyped-def] # Triton types its arguments
    logits_ptr,
    bias_ptr,
    ids_ptr,
    weights_ptr,
    stride_logits_n,
    scale,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    TOP_K: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    groups, members = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_S)
    experts = groups[:, None] * SIZE + members[None, :]
    real = (groups < GROUPS)[:, None] & (members < SIZE)[None, :]
    logits = tl.load(logits_ptr + token * stride_logits_n + experts, mask=real, other=0.0)
    bias = tl.load(bias_ptr + experts, mask=real, other=0.0).to(tl.float32)
    scores = _sigmoid(logits)
    keys = tl.where(real, _keys(scores + bias, experts), REMOVED)

    if TOP_GROUPS < GROUPS:
        best = tl.max(keys, 1)
        group_score = _value_of(best)
        if SIZE > 1:
            second = tl.max(tl.where(keys == best[:, None], REMOVED, keys), 1)
            group_score += _value_of(second)
        group_keys = tl.where(groups < GROUPS, _keys(group_score, groups), REMOVED)
        left = group_keys
        for _ in range(TOP_GROUPS):
            last = tl.max(left, 0)
            left = tl.where(left == last, REMOVED, left)
        kept = (group_keys > left)[:, None]  # what the loop took is REMOVED in `left` alone
        dropped = _keys(tl.full([BLOCK_G, BLOCK_S], float("-inf"), tl.float32), experts)
        keys = tl.where(real & (kept == 0), dropped, keys)

    lanes = tl.arange(0, BLOCK_K)
    ids = tl.zeros([BLOCK_K], tl.int64)
    weights = tl.zeros([BLOCK_K], tl.float32)
    for i in range(TOP_K):
        top = tl.max(tl.max(keys, 1), 0)
        chosen = keys == top
        ids = tl.where(lanes == i, INDEX_TOP - (top & INDEX_BITS), ids)
        weights = tl.where(lanes == i, tl.sum(tl.sum(tl.where(chosen, scores, 0.0), 1), 0), weights)
        keys = tl.where(chosen, REMOVED, keys)
    if NORMALIZE:
        weights = tl.math.div_rn(weights, tl.sum(weights, 0) + 1e-20)
    out = token * TOP_K + lanes
    tl.store(ids_ptr + out, ids, mask=lanes < TOP_K)
    tl.store(weights_ptr + out, weights * scale, mask=lanes < TOP_K)


def _prepare(
    logits: Tensor, bias: Tensor, n_group: int, topk_group: int, top_k: int, normalize: bool, scale: float
) -> Prepared:
    """See moe_router_reference; float32 logits, bias in float32, bfloat16 or float16."""
    N, E = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    expert_ids, weights = OPS["moe_router"].fake(logits, bias, n_group, topk_group, top_k, normalize, scale)
    block_g, block_s = triton.next_power_of_2(n_group), triton.next_power_of_2(E // n_group)
    step = launch_of(
        "moe_router",
        _moe_router_kernel,
        (N,),
        {
            "logits_ptr": logits,
            "bias_ptr": bias.contiguous(),
            "ids_ptr": expert_ids,
            "weights_ptr": weights,
            "stride_logits_n": logits.stride(0),
            "scale": float(scale),
        },
        {
            "GROUPS": n_group,
            "SIZE": E // n_group,
            "TOP_GROUPS": topk_group,
            "TOP_K": top_k,
            "NORMALIZE": normalize,
            "BLOCK_G": block_g,
            "BLOCK_S": block_s,
            "BLOCK_K": triton.next_power_of_2(top_k),
        },
        config=f"{E} experts, {topk_group} of {n_group} groups, top {top_k}",
        num_warps=min(4, triton.cdiv(block_g * block_s, WARP_SCORES)),
    )
    return (expert_ids, weights), [step]


def _supports(site: Site, target: KernelTarget) -> str | None:
    logits, bias, n_group, topk_group, top_k = site.args[:5]
    E = int(logits.shape[1])
    if logits.dtype != torch.float32 or bias.dtype not in TRITON_TYPE:
        return (
            f"logits of {logits.dtype} with bias of {bias.dtype}; the kernel takes float32 logits and no float64 bias"
        )
    if E > MAX_EXPERTS:
        return f"{E} experts; the kernel keeps a token's scores in registers, up to {MAX_EXPERTS}"
    if E % n_group or not 1 <= topk_group <= n_group or not 1 <= top_k <= E:
        return f"{topk_group} of {n_group} groups and {top_k} of {E} experts is no choice the kernel knows"
    return None


MOE_ROUTER = register_launches(OPS["moe_router"], _prepare, _supports)
