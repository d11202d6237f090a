"""The calls that benchmarks/kernels.py times: inputs, our op, torch's own attention, and other libraries where importable.

A subject is one shape of one op. Attention baselines of torch get a contiguous cache without pages and take the heads of a
group as rows, which is the fastest form that it has for one KV head.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from kernel_costs import Cost, gqa_decode_cost, merge_lse_cost, mla_decode_cost, moe_experts_cost
from torch import Tensor

import helix_compile.kernels.catalog
from helix_compile.ir.ops import helix

PAGE = 128
FLASH_MLA_PAGE = 64
R, ROPE, MLA_HEADS = 512, 64, 128
GQA_HEADS, KV_HEADS, HEAD_DIM = 64, 8, 128
HIDDEN, EXPERT_WIDTH, EXPERTS, TOP_K, EP = 7168, 2048, 256, 8, 8
PEERS = 8
DTYPE, DEVICE = torch.bfloat16, "cuda"
triton_ops = torch.ops.helix_triton
assert helix_compile.kernels.catalog  # importing it registers the ops

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Subject:
    """One shape of one op.

    Attributes:
        op: base name.
        B: sequences, or tokens.
        S: slots of a sequence on this rank; 0 where there are none.
        cost: of a call.
        make: a fresh set of inputs on the device -> name of a provider -> the call, each giving the output o.
    """

    op: str
    B: int
    S: int
    cost: Cost
    make: Callable[[], dict[str, Call]]


def subjects(op: str, batches: list[int], tokens: list[int]) -> list[Subject]:
    """All shapes of an op."""
    if op == "mla_decode":
        return [
            Subject(op, B, S, mla_decode_cost(B, S, MLA_HEADS, R, ROPE), lambda B=B, S=S: _mla(B, S))
            for B in batches
            for S in tokens
        ]
    if op == "gqa_decode":
        cost = (GQA_HEADS, KV_HEADS, HEAD_DIM, HEAD_DIM)
        return [
            Subject(op, B, S, gqa_decode_cost(B, S, *cost), lambda B=B, S=S: _gqa(B, S))
            for B in batches
            for S in tokens
        ]
    if op == "merge_lse":
        heads = MLA_HEADS // PEERS
        return [Subject(op, B, 0, merge_lse_cost(PEERS, B * heads, R), lambda B=B: _merge(B, heads)) for B in batches]
    return [_experts_subject(B) for B in batches]


def _paged(B: int, S: int, *width: int) -> tuple[Tensor, Tensor, Tensor]:
    """A cache [pages, PAGE, *], its page table [B, pages of a sequence] in a row, and visible [B, 1]."""
    pages = -(-S // PAGE)
    cache = torch.randn(B * pages, PAGE, *width, device=DEVICE, dtype=DTYPE)
    table = torch.arange(B * pages, device=DEVICE).view(B, pages)
    return cache, table, torch.full((B, 1), S, dtype=torch.int32, device=DEVICE)


def _mla(B: int, S: int) -> dict[str, Call]:
    cache, table, visible = _paged(B, S, R + ROPE)
    q = torch.randn(B, 1, MLA_HEADS, R + ROPE, device=DEVICE, dtype=DTYPE)
    q_latent, q_rope = q[..., :R].contiguous(), q[..., R:].contiguous()
    scale = 192**-0.5  # of the heads before absorption: 128 + 64 channels
    flat = cache.view(B, 1, -1, R + ROPE)[:, :, :S]
    calls: dict[str, Call] = {
        "helix": lambda: triton_ops.mla_decode(q_latent, q_rope, cache, table, visible, scale)[0],
        "torch sdpa": lambda: torch.nn.functional.scaled_dot_product_attention(
            q.view(B, 1, MLA_HEADS, -1), flat, flat[..., :R], scale=scale
        ).view(B, 1, MLA_HEADS, R),
    }
    if importlib.util.find_spec("flash_mla"):
        calls["FlashMLA"] = _flash_mla(q, cache, table, visible[:, 0], scale)
    if importlib.util.find_spec("flashinfer"):
        calls["FlashInfer"] = _flashinfer_mla(q_latent, q_rope, cache, table, visible[:, 0], scale)
    return calls


def _flash_mla(q: Tensor, cache: Tensor, table: Tensor, lengths: Tensor, scale: float) -> Call:
    """Its pages are of 64 slots: each of ours is two of them. Its schedule is made at the first call and kept."""
    half_pages = cache.view(-1, FLASH_MLA_PAGE, 1, R + ROPE)
    half_table = torch.stack([2 * table, 2 * table + 1], dim=2).flatten(1).int()
    schedule: list[Any] = []

    def call() -> Tensor:
        import flash_mla

        if not schedule:
            schedule.extend(flash_mla.get_mla_metadata(lengths, MLA_HEADS, 1))
        return flash_mla.flash_mla_with_kvcache(q, half_pages, half_table, lengths, R, *schedule, softmax_scale=scale)[
            0
        ]

    return call


@cache
def _workspace() -> Tensor:
    """One for all wrappers of FlashInfer: their calls run one after another."""
    return torch.empty(128 * 2**20, dtype=torch.uint8, device=DEVICE)


def _indptr(table: Tensor) -> Tensor:
    steps = torch.arange(table.shape[0] + 1, dtype=torch.int32, device=DEVICE)
    return steps * table.shape[1]


def _flashinfer_mla(
    q_latent: Tensor, q_rope: Tensor, cache: Tensor, table: Tensor, lengths: Tensor, scale: float
) -> Call:
    planned: list[Any] = []

    def call() -> Tensor:
        import flashinfer

        if not planned:
            wrapper = flashinfer.mla.BatchMLAPagedAttentionWrapper(_workspace())
            rows = torch.arange(len(lengths) + 1, dtype=torch.int32, device=DEVICE)
            wrapper.plan(
                qo_indptr=rows,
                kv_indptr=_indptr(table),
                kv_indices=table.flatten().int(),
                kv_len_arr=lengths,
                num_heads=MLA_HEADS,
                head_dim_ckv=R,
                head_dim_kpe=ROPE,
                page_size=PAGE,
                causal=False,
                sm_scale=scale,
                q_data_type=DTYPE,
                kv_data_type=DTYPE,
            )
            planned.append(wrapper)
        return planned[0].run(
            q_nope=q_latent[:, 0], q_pe=q_rope[:, 0], ckv_cache=cache[..., :R], kpe_cache=cache[..., R:]
        )[:, None]

    return call


def _gqa(B: int, S: int) -> dict[str, Call]:
    """Ours reads K and V as views of one cache, as the rewritten graph does; the others get two tensors."""
    both, table, visible = _paged(B, S, KV_HEADS, 2 * HEAD_DIM)
    k_view, v_view = both[..., :HEAD_DIM], both[..., HEAD_DIM:]
    k_cache, v_cache = k_view.contiguous(), v_view.contiguous()
    q = torch.randn(B, 1, GQA_HEADS, HEAD_DIM, device=DEVICE, dtype=DTYPE)
    scale = HEAD_DIM**-0.5
    k, v = (c.view(B, -1, KV_HEADS, HEAD_DIM)[:, :S].transpose(1, 2) for c in (k_cache, v_cache))
    calls: dict[str, Call] = {
        "helix": lambda: triton_ops.gqa_decode(q, k_view, v_view, table, visible, scale)[0],
        "torch sdpa": lambda: torch.nn.functional.scaled_dot_product_attention(
            q.view(B, KV_HEADS, -1, HEAD_DIM), k, v, scale=scale
        ).view(B, 1, GQA_HEADS, HEAD_DIM),
    }
    if importlib.util.find_spec("flashinfer"):
        calls["FlashInfer"] = _flashinfer_gqa(q, (k_cache, v_cache), table, S, scale)
    return calls


def _flashinfer_gqa(q: Tensor, caches: tuple[Tensor, Tensor], table: Tensor, S: int, scale: float) -> Call:
    planned: list[Any] = []

    def call() -> Tensor:
        import flashinfer

        if not planned:
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(_workspace(), "NHD", use_tensor_cores=True)
            last = torch.full((len(table),), (S - 1) % PAGE + 1, dtype=torch.int32, device=DEVICE)
            wrapper.plan(
                _indptr(table),
                table.flatten().int(),
                last,
                GQA_HEADS,
                KV_HEADS,
                HEAD_DIM,
                PAGE,
                sm_scale=scale,
                q_data_type=DTYPE,
                kv_data_type=DTYPE,
            )
            planned.append(wrapper)
        return planned[0].run(q[:, 0], caches)[:, None]

    return call


def _merge(B: int, heads: int) -> dict[str, Call]:
    parts = torch.randn(PEERS, B, 1, heads, R, device=DEVICE, dtype=DTYPE)
    lse = torch.randn(PEERS, B, 1, heads, device=DEVICE)
    return {"helix": lambda: triton_ops.merge_lse(parts, lse), "torch": lambda: helix.merge_lse(parts, lse)}


def _choices(N: int) -> Tensor:
    """Expert numbers [N, k] over all ranks, each token's different; the same for every run."""
    draw = torch.Generator().manual_seed(0)
    return torch.rand(N, EXPERTS, generator=draw).topk(TOP_K).indices


def _experts_subject(N: int) -> Subject:
    local = _choices(N)
    local = local[local < EXPERTS // EP]
    cost = moe_experts_cost(N, local.numel(), local.unique().numel(), HIDDEN, EXPERT_WIDTH)
    return Subject("moe_experts", N, 0, cost, lambda: _experts(N))


def _experts(N: int) -> dict[str, Call]:
    """Baseline: every expert of the rank over every token, three batched matmuls, which reads each weight once too."""
    held = EXPERTS // EP
    x = torch.randn(N, HIDDEN, device=DEVICE, dtype=DTYPE)
    ids = _choices(N).to(DEVICE)
    weights = torch.rand(N, TOP_K, device=DEVICE, dtype=DTYPE)
    gate_up = torch.randn(held, 2, EXPERT_WIDTH, HIDDEN, device=DEVICE, dtype=DTYPE) / HIDDEN**0.5
    down = torch.randn(held, HIDDEN, EXPERT_WIDTH, device=DEVICE, dtype=DTYPE) / EXPERT_WIDTH**0.5
    first = torch.zeros((), dtype=torch.int64, device=DEVICE)
    routed = torch.zeros(N, EXPERTS, device=DEVICE).scatter_(1, ids, weights.float())[:, :held]

    def dense() -> Tensor:
        tokens = x.expand(held, N, HIDDEN)
        gate, up = (torch.bmm(tokens, gate_up[:, half].mT) for half in (0, 1))
        y = torch.bmm(torch.nn.functional.silu(gate) * up, down.mT)
        return torch.einsum("end,ne->nd", y.float(), routed).to(DTYPE)

    return {"helix": lambda: triton_ops.moe_experts(x, ids, weights, gate_up, down, first), "torch bmm": dense}
