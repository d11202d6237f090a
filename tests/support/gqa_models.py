"""Small grouped-query models of transformers with awkward sizes: head_dim is not hidden / heads, few are powers of two."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import transformers

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 36,
    "intermediate_size": 58,
    "num_hidden_layers": 2,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 10,
    "max_position_embeddings": 1024,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama_biased": ("Llama", {"attention_bias": True, "num_key_value_heads": 3, "head_dim": 6}),
    "llama_mha": ("Llama", {"num_key_value_heads": 12}),
    "llama_mqa": ("Llama", {"num_key_value_heads": 1}),
    "qwen3": ("Qwen3", {"head_dim": 14}),
    "cohere": ("Cohere", {}),
    "glm": ("Glm", {}),
    "ernie": ("Ernie4_5", {"use_bias": True, "num_key_value_heads": 2}),
    "glm4": ("Glm4", {}),
    "gemma3": ("Gemma3", {"layer_types": ["full_attention"] * 2, "sliding_window": 8}),
    "mistral": ("Mistral", {}),
    "olmo3": ("Olmo3", {}),
    "llama4": ("Llama4", {"num_local_experts": 4, "attention_chunk_size": 8}),
    "mixtral": ("Mixtral", {"num_local_experts": 8, "num_experts_per_tok": 3, "num_key_value_heads": 6}),
}


def fresh_gqa(name: str = "llama", dtype: torch.dtype = torch.float64, attention: str = "sdpa", **changes: Any) -> Any:
    """A new model in eval mode: random biases, weights large enough that softmax is not flat."""
    kind, sizes = MODELS[name]
    of_text = getattr(transformers, f"{kind}TextConfig", None)  # of models for images too
    config = (of_text or getattr(transformers, f"{kind}Config"))(**{**SIZES, **sizes, **changes})
    config._attn_implementation = attention
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for parameter, tensor in model.named_parameters():
            if parameter.endswith("bias"):
                tensor.normal_(std=0.3)
            elif "proj" in parameter and "mlp" not in parameter:
                tensor.mul_(8.0)
            elif "_norm" in parameter:
                tensor.add_(torch.randn_like(tensor) * 0.3)
    model = model.to(dtype).eval()
    if getattr(config, "num_local_experts", None):
        model.set_experts_implementation("batched_mm")
    return model


# the same object for the same arguments, so that capture is paid once a worker
tiny_gqa = cache(fresh_gqa)
