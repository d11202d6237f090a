"""Caches after a step: only the new tokens' slots changed, each on its owner, and they hold the original's entries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from helix_compile.matches import AttentionMatch
from helix_compile.options import PAGE_SIZE
from helix_compile.verifier.report import Finding
from helix_compile.verifier.scratch import STALE, Scratch, deal

# a new entry is rounded once; its inputs passed two norms and a linear in the module's dtype
ENTRY = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}


def check_cache(
    attention: AttentionMatch,
    scratch: Scratch,
    site: int,
    expected: dict[str, Any],
    before: list[list[Tensor]],
    pasts: tuple[int, ...],
    T: int,
    where: str,
) -> list[Finding]:
    """Only the new tokens' slots changed, each on its owner, and they hold the original's latent and roped key."""
    plan, dtype = scratch.compiled.plan, getattr(torch, scratch.compiled.plan.dtype)
    cp, tpb = plan.layout.kvp, plan.options.tokens_per_block
    new = torch.cat([expected[attention.latent], expected[attention.k_rope]], dim=-1)[:, 0].double()
    scale, limit = float(new.abs().max()), ENTRY[dtype]
    for rank, caches in enumerate(scratch.caches):
        cache, old = caches[site].cpu(), before[rank][site].cpu()
        untouched = torch.ones(cache.shape[:2], dtype=torch.bool)
        for row, past in enumerate(pasts):
            mine = deal(past + T, cp, tpb)[rank % cp]
            for slot, position in enumerate(mine):
                if position < past:
                    continue
                page = int(scratch.page_table[row, slot // PAGE_SIZE])
                untouched[page, slot % PAGE_SIZE] = False
                got = cache[page, slot % PAGE_SIZE].double()
                allowed = _allowed(position, attention, dtype) * scale
                off = (got - new[row, position - past]).abs().nan_to_num(torch.inf)
                if bool((off > allowed).any()):
                    at = f"{where}, rank {rank}, sequence {row}, position {position}"
                    text, family = _entry_fault(
                        got, new[row, position - past], attention, limit * scale
                    )
                    return [Finding("HX404", at, text, f"the original's latent and k_rope to {limit:.0e}", family, "numeric")]  # fmt: skip
        changed = (cache != old) & ~(cache.isnan() & old.isnan())
        wrong = (changed.any(dim=-1) & untouched).nonzero()
        if len(wrong):
            page, slot = wrong[0].tolist()
            at = f"{where}, rank {rank}, page {page}, slot {slot}"
            return [Finding("HX404", at, f"written ({len(wrong)} slots)", "left alone: not a slot of a new token of this rank", 4, "numeric")]  # fmt: skip
    return []


def _allowed(position: int, attention: AttentionMatch, dtype: torch.dtype) -> Tensor:
    """Limit of each channel [R + r]. An angle is position * frequency, rounded in float32 or wider: its error, and with
    it that of the roped key, grows with the position.
    """
    allowed = torch.full((attention.kv_lora_rank + attention.qk_rope_head_dim,), ENTRY[dtype], dtype=torch.float64)  # fmt: skip
    angle = position * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    allowed[attention.kv_lora_rank :] += angle
    return allowed


def _entry_fault(
    got: Tensor, wanted: Tensor, attention: AttentionMatch, limit: float
) -> tuple[str, int]:
    if bool((got == STALE).all()):
        return "never written", 7
    error = (got - wanted).abs().nan_to_num(torch.inf)
    latent, rope = error[: attention.kv_lora_rank], error[attention.kv_lora_rank :]
    if float(latent.max()) <= limit:
        return f"k_rope off by {float(rope.max()):.2e}, the latent is right", 8
    return f"another entry: the latent is off by {float(latent.max()):.2e}", 4
