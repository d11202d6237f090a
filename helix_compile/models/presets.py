"""Model presets by name: transformers' own DeepseekV3ForCausalLM with a configuration, random weights or none.

Single-device definitions that know nothing of ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

# Every size differs on purpose, so that a swapped dim can't pass unseen.
TINY: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 192,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "q_lora_rank": 40,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 24,
    "v_head_dim": 20,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "max_position_embeddings": 4096,
    "eos_token_id": None,
    "bos_token_id": None,
}


# The geometry TensorRT-LLM's own Helix test uses (DeepSeek-V3-Lite: 32 heads, hidden 2560), fewer layers and experts.
DEEPSEEK_V3_LITE: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 1,
    "topk_group": 1,
    "max_position_embeddings": 32768,
    "eos_token_id": None,
    "bos_token_id": None,
}


PRESETS: dict[str, dict[str, Any]] = {
    "tiny": TINY,
    "deepseek-v3-lite": DEEPSEEK_V3_LITE,
    "deepseek-v3": {"max_position_embeddings": 163840},  # the rest are the class's defaults: 61 layers, 671 B
}


def preset_config(name: str) -> DeepseekV3Config:
    """Configuration of a preset; KeyError lists the names there are."""
    if name not in PRESETS:
        raise KeyError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
    return DeepseekV3Config(**PRESETS[name])


def build_model(
    config: Any, *, dtype: torch.dtype = torch.float32, meta: bool = False, seed: int = 0, model_class: Any = None
) -> nn.Module:
    """A causal language model with random weights (or on the meta device, without any), in eval mode.

    `model_class` is transformers' class to build; None: the one that its table has for the configuration. The router's correction bias gets random values: zeros would make its place in the graph untestable.
    """
    from transformers import AutoModelForCausalLM  # slow to import; presets' own class is above

    if isinstance(config, DeepseekV3Config):
        model_class = DeepseekV3ForCausalLM
    build = AutoModelForCausalLM.from_config if model_class is None else model_class._from_config
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.device("meta" if meta else "cpu"):
            model = build(config)
    finally:
        torch.set_default_dtype(before)
    if not meta:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name.endswith("e_score_correction_bias"):
                    buffer.normal_(std=0.05)
    return model.eval()
