"""Models whose heads, KV heads and experts the ranks do not divide, and what a padded one must show."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from helix_compile import HelixModule, HelixPlan, helix_compile
from tests.support.driver import random_ids, worst_deviation
from tests.support.gqa_models import fresh_gqa
from tests.support.models import SIZES

RAGGED = [5, 2, 9]


@cache
def mla_of(heads: int, dtype: torch.dtype = torch.float64, **changes: Any) -> DeepseekV3ForCausalLM:
    """A dense and an MoE layer of DeepSeek-V3 with q and output biases; the same object for the same arguments."""
    sizes = {"num_hidden_layers": 2, "first_k_dense_replace": 1, "attention_bias": True, "hidden_size": 40}
    config = DeepseekV3Config(
        **{**SIZES, **sizes, "num_attention_heads": heads, "num_key_value_heads": heads, **changes}
    )
    torch.manual_seed(heads)
    model = DeepseekV3ForCausalLM(config)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith("bias"):
                tensor.normal_(std=0.3)
            elif "proj" in name and "mlp" not in name:
                tensor.mul_(4.0)
    model = model.to(dtype).eval()
    model.set_experts_implementation("batched_mm")
    return model


@cache
def gqa_of(heads: int, kv_heads: int, name: str = "qwen3", **changes: Any) -> Any:
    """Two layers with norms of q and k; the same object for the same arguments."""
    return fresh_gqa(name, num_attention_heads=heads, num_key_value_heads=kv_heads, **changes)


def padded(model: Any, **options: Any) -> HelixModule:
    """Compiled with pad_heads in the virtual world."""
    asked = {"tokens_per_block": 2, "max_batch_size": 3, "max_seq_len": 64, "pad_heads": True, **options}
    return helix_compile(model, world="virtual", **asked)


def check_exact(model: Any, compiled: HelixModule) -> None:
    """Fp64 logits over a ragged prompt and steps of T in {1, 3, 4} against the unmodified model; a plan that can be read back."""
    assert worst_deviation(model, compiled, RAGGED) <= 1e-10
    assert HelixPlan.from_json(compiled.plan.to_json()) == compiled.plan


def check_bytes(model: Any, compiled: HelixModule) -> None:
    """The plan's bytes of parameters, cache and exchange are those that the virtual world counts."""
    plan, world_size = compiled.plan, compiled.plan.layout.world_size
    held = {sum(t.numel() * t.itemsize for t in rank.params.values()) for rank in compiled.ranks}
    if not plan.leaves:  # whose parameters are the model's own
        assert held == {plan.params_bytes_per_rank}
    compiled.reset()
    before = list(compiled.world.sent_bytes)
    for T in (5, 1, 3):
        compiled(random_ids(model, 3, T))
    sent = {after - start for after, start in zip(compiled.world.sent_bytes, before, strict=True)}
    assert sent == {plan.egress_bytes_per_rank_per_token * 27} and len(compiled.ranks) == world_size
    caches = compiled.ranks[-1].cache
    slots = caches[0].shape[0] * caches[0].shape[1]
    per_slot = sum(c.numel() * c.itemsize for c in caches) // slots
    assert plan.kv_bytes_per_token_per_rank * plan.layout.kvp == per_slot
