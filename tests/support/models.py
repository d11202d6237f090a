"""Small DeepSeek-V3 models of transformers with awkward sizes: every dim differs, few are powers of two."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 72,
    "intermediate_size": 112,
    "moe_intermediate_size": 40,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 2,
    "num_attention_heads": 24,
    "num_key_value_heads": 24,
    "q_lora_rank": 28,
    "kv_lora_rank": 20,
    "qk_rope_head_dim": 6,
    "qk_nope_head_dim": 10,
    "v_head_dim": 14,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "max_position_embeddings": 1024,
    "eos_token_id": None,
    "bos_token_id": None,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "beta_fast": 32,
    "beta_slow": 1,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no_q_lora": {"q_lora_rank": None},
    "attention_bias": {"attention_bias": True},
    "yarn_mscale": {"rope_parameters": YARN},
    "tied": {"tie_word_embeddings": True},
    "two_shared": {"n_shared_experts": 2},
    "v_wider_than_latent": {"v_head_dim": 26},
    "half_rope": {"rope_interleave": False},
    # one dense and one MoE layer: where a step is slow, as in Triton's interpreter
    "short": {"num_hidden_layers": 2, "first_k_dense_replace": 1},
    "short_biased": {"num_hidden_layers": 2, "first_k_dense_replace": 1, "attention_bias": True},
    "short_half_rope": {"num_hidden_layers": 2, "first_k_dense_replace": 1, "rope_interleave": False},
    "short_plain_router": {
        "num_hidden_layers": 2,
        "first_k_dense_replace": 1,
        "norm_topk_prob": False,
        "n_group": 1,
        "topk_group": 1,
    },
}
# of no interest to other tests
FURTHER: dict[str, dict[str, Any]] = {
    # rows that groups of 16 and 32 divide
    "grouped": {
        "num_hidden_layers": 2,
        "first_k_dense_replace": 1,
        "hidden_size": 96,
        "moe_intermediate_size": 96,
        "intermediate_size": 160,
        "q_lora_rank": 32,
        "v_head_dim": 16,
    },
    # more latent values than share a scale in an FP8 cache
    "wide_latent": {"num_hidden_layers": 2, "first_k_dense_replace": 1, "kv_lora_rank": 150},
}


def fresh_model(
    variant: str = "plain",
    dtype: torch.dtype = torch.float64,
    attention: str = "sdpa",
    experts: str = "batched_mm",
    seed: int = 0,
) -> DeepseekV3ForCausalLM:
    """A new model: random biases and router corrections, weights large enough that softmax is not flat."""
    config = DeepseekV3Config(**{**SIZES, **(VARIANTS | FURTHER)[variant]})
    config._attn_implementation = attention
    torch.manual_seed(seed)
    model = DeepseekV3ForCausalLM(config)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith(("bias",)):
                tensor.normal_(std=0.3)
            elif "proj" in name and "mlp" not in name:
                tensor.mul_(4.0)
    model = model.to(dtype).eval()
    model.set_experts_implementation(experts)
    return model


# the same object for the same arguments, so that capture is paid once a worker
tiny_model = cache(fresh_model)
