"""Every family of transformers whose configuration has a `kv_lora_rank`, and some with grouped-query attention, as tiny
models of awkward sizes.

Tests and the generator of docs/families.md share this file. tests/whole/test_every_family.py fails when the installed
transformers ships a family that is not listed here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from tests.support.gqa_models import SIZES

COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 72,
    "intermediate_size": 58,
    "num_hidden_layers": 3,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "q_lora_rank": 28,
    "kv_lora_rank": 20,
    "qk_rope_head_dim": 6,
    "qk_nope_head_dim": 10,
    "v_head_dim": 14,
    "max_position_embeddings": 1024,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
EXPERTS: dict[str, Any] = {
    "moe_intermediate_size": 22,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
}
GROUPS: dict[str, Any] = {"n_group": 4, "topk_group": 2}
HYBRID_EXPERTS = {**EXPERTS, **GROUPS, "num_local_experts": 8}
# with few index heads relu makes exact zeros of many scores, and at a tie the model itself is not defined
SPARSE: dict[str, Any] = {**EXPERTS, "index_topk": 4, "index_head_dim": 16, "index_n_heads": 8, "num_hidden_layers": 2}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
    "beta_fast": 32,
    "beta_slow": 1,
}
LLAMA4 = {**YARN, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 8, "partial_rotary_factor": 6 / 16}


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        model: name of the class in transformers.models.NAME.
        config: name of the configuration class.
        sizes: what differs from COMMON; None removes nothing, it is passed on.
        refused: part of the message it is refused with, or "" where it is rewritten.
        variants: other configurations of the same family, name -> what differs again.
        common: what `sizes` differ from.
        options: of helix_compile, without which it is refused.
    """

    model: str
    config: str
    sizes: dict[str, Any]
    refused: str = ""
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    common: dict[str, Any] = field(default_factory=lambda: COMMON)
    options: dict[str, Any] = field(default_factory=dict)


FAMILIES: dict[str, Family] = {
    "deepseek_v3": Family(
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {**EXPERTS, **GROUPS, "first_k_dense_replace": 1},
        variants={"yarn": {"rope_parameters": YARN}, "no_q_lora": {"q_lora_rank": None}},
    ),
    "deepseek_v2": Family(
        "DeepseekV2ForCausalLM",
        "DeepseekV2Config",
        {**EXPERTS, "first_k_dense_replace": 1, "topk_method": "group_limited_greedy", **GROUPS},
        variants={"lite": {"q_lora_rank": None, "topk_method": "greedy"}},
    ),
    "glm4_moe_lite": Family(
        "Glm4MoeLiteForCausalLM",
        "Glm4MoeLiteConfig",
        {**EXPERTS, "num_attention_heads": 20, "num_key_value_heads": 20, "v_head_dim": 18},
    ),
    "youtu": Family(
        "YoutuForCausalLM",
        "YoutuConfig",
        {"v_head_dim": 6},
        variants={"six_heads": {"num_attention_heads": 6, "num_key_value_heads": 6}},
    ),
    "minicpm3": Family(
        "MiniCPM3ForCausalLM",
        "MiniCPM3Config",
        {"hidden_size": 80, "num_attention_heads": 40, "num_key_value_heads": 40, "dim_model_base": 16},
    ),
    "axk1": Family("AXK1ForCausalLM", "AXK1Config", {**EXPERTS, **GROUPS}),
    "mistral4": Family(
        "Mistral4ForCausalLM", "Mistral4Config", {**EXPERTS, "first_k_dense_replace": 1, "rope_parameters": LLAMA4}
    ),
    "kimi_linear": Family(
        "KimiLinearForCausalLM",
        "KimiLinearConfig",
        {
            **HYBRID_EXPERTS,
            "num_hidden_layers": 4,
            "linear_head_dim": 18,
            "linear_num_heads": 4,
            "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
        },
    ),
    "bailing_hybrid": Family(
        "BailingHybridForCausalLM",
        "BailingHybridConfig",
        {
            **HYBRID_EXPERTS,
            "num_hidden_layers": 4,
            "head_dim": 16,
            "first_k_dense_replace": 1,
            "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
        },
    ),
    "longcat_flash": Family(
        "LongcatFlashForCausalLM",
        "LongcatFlashConfig",
        {
            "num_hidden_layers": 4,
            "ffn_hidden_size": 58,
            "n_routed_experts": 6,
            "zero_expert_num": 3,
            "moe_topk": 3,
            "expert_ffn_hidden_size": 22,
            "head_dim": 6,
        },
    ),
    "deepseek_v32": Family(
        "DeepseekV32ForCausalLM", "DeepseekV32Config", {**SPARSE, **GROUPS, "first_k_dense_replace": 1}
    ),
    "glm_moe_dsa": Family(
        "GlmMoeDsaForCausalLM",
        "GlmMoeDsaConfig",
        {
            **SPARSE,
            "num_hidden_layers": 4,
            "first_k_dense_replace": 1,
            "indexer_types": ["full", "shared", "full", "shared"],
        },
    ),
    "axk2": Family("AXK2ForCausalLM", "AXK2Config", {**SPARSE, **GROUPS}),
    "hy_v4": Family(
        "HYV4ForCausalLM",
        "HYV4Config",
        SPARSE,
        options={"unmatched": "keep"},  # its experts clamp what they gate: in no pattern, they stay whole
    ),
    "glm5_next": Family(
        "Glm5NextForConditionalGeneration", "Glm5NextConfig", SPARSE, "the size of a value depends on data"
    ),
    "dots3_note": Family(
        "Dots3NoteForCausalLM",
        "Dots3NoteTextConfig",
        {**SPARSE, "sliding_window": 16, "num_hidden_layers": 3},
        variants={"sliding": {"layer_types": ["sliding_attention"] * 3}},
    ),
    "mistral_large4": Family(
        "MistralLarge4ForConditionalGeneration",
        "MistralLarge4Config",
        SPARSE,
        # layers 2 and 3 read the latents of 0 (with rope) and 1 (without), and attend to the keys that 1 chose
        variants={
            "shared": {
                "num_hidden_layers": 4,
                "kv_source_layers": [0, 1, 0, 1],
                "no_rope_layers": [1, 0, 1, 0],
                "indexer_types": ["full", "full", "shared", "shared"],
                "mlp_layer_types": ["dense"] * 4,
            }
        },
    ),
}

GROUPED = {
    "llama": Family(
        "LlamaForCausalLM",
        "LlamaConfig",
        {"num_key_value_heads": 3},
        variants={"plain_heads": {"num_key_value_heads": 12}, "one_kv_head": {"num_key_value_heads": 1}},
        common=SIZES,
    ),
    "qwen3": Family("Qwen3ForCausalLM", "Qwen3Config", {"head_dim": 14}, common=SIZES),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 22,
            "mlp_only_layers": [0],
            "num_hidden_layers": 3,
            "head_dim": 14,
        },
        common=SIZES,
    ),
    "glm4": Family("Glm4ForCausalLM", "Glm4Config", {}, common=SIZES),
    "cohere": Family("CohereForCausalLM", "CohereConfig", {}, common=SIZES),
    "ernie4_5": Family("Ernie4_5ForCausalLM", "Ernie4_5Config", {"use_bias": True}, common=SIZES),
    "mistral": Family(
        "MistralForCausalLM",
        "MistralConfig",
        {"sliding_window": None},
        variants={"window": {"sliding_window": 5}},
        common=SIZES,
    ),
    "mixtral": Family(
        "MixtralForCausalLM", "MixtralConfig", {"num_local_experts": 8, "num_experts_per_tok": 3}, common=SIZES
    ),
}
WINDOW: dict[str, Any] = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
WINDOWED = {
    "gemma3": Family("Gemma3ForCausalLM", "Gemma3TextConfig", WINDOW, common=SIZES),
    "olmo3": Family("Olmo3ForCausalLM", "Olmo3Config", WINDOW, common=SIZES),
    # its NoPE layers scale q by the column that a token stands in, its experts take all tokens: refused; else chunks
    "llama4": Family(
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {"attention_chunk_size": 5, "no_rope_layers": [1, 0], "num_local_experts": 4, "intermediate_size_mlp": 40},
        "routed experts",
        variants={"dense": {"moe_layers": [], "attn_temperature_tuning": False}},
        common=SIZES,
    ),
    "gpt_oss": Family(
        "GptOssForCausalLM",
        "GptOssConfig",
        {
            **WINDOW,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        common=SIZES,
        options={"unmatched": "keep"},  # its experts (biases, a clamp) are in no pattern, and stay whole
    ),
    # the last layers read what an earlier one of their kind caches
    "gemma4": Family(
        "Gemma4ForCausalLM",
        "Gemma4TextConfig",
        {
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 7,
            "vocab_size_per_layer_input": 97,
            "global_head_dim": 16,
            "use_double_wide_mlp": True,
        },
        variants={
            "k_is_v": {
                "attention_k_eq_v": True,
                "num_global_key_value_heads": 2,
                "num_kv_shared_layers": 0,
                "num_hidden_layers": 2,
                "layer_types": ["sliding_attention", "full_attention"],
                "hidden_size_per_layer_input": 0,
            }
        },
        common=SIZES,
    ),
    "gemma3n": Family(
        "Gemma3nForCausalLM",
        "Gemma3nTextConfig",
        {
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            "num_hidden_layers": 3,
            "num_kv_shared_layers": 1,
            "hidden_size_per_layer_input": 7,
            "vocab_size_per_layer_input": 97,
            "activation_sparsity_pattern": [0.0] * 3,
            "laurel_rank": 5,
        },
        common=SIZES,
    ),
    "granite_swa": Family("GraniteSWAForCausalLM", "GraniteSWAConfig", WINDOW, common=SIZES),
}
GROUPED |= WINDOWED
FAMILIES |= GROUPED

# models for images too: what differs in the text part, and a small other part (1.6 billion parameters by default)
_TEXT: dict[str, dict[str, int]] = {
    "glm5_next": {"qk_rope_head_dim": 0, "index_topk": 16, "num_hidden_layers": 4},
    "mistral_large4": {},
}
_IMAGES: dict[str, dict[str, int]] = {
    "glm5_next": {
        "depth": 1,
        "hidden_size": 32,
        "num_heads": 2,
        "intermediate_size": 40,
        "out_hidden_size": 72,
        "projection_intermediate_size": 40,
    },
    "mistral_large4": {
        "num_hidden_layers": 1,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "intermediate_size": 40,
        "head_dim": 16,
        "model_type": "pixtral",
    },
}


def shipped_families() -> list[str]:
    """Folders of the installed transformers whose configuration has a kv_lora_rank."""
    root = Path(transformers.__file__).parent / "models"
    files = root.glob("*/configuration_*.py")
    return sorted({f.parent.name for f in files if "kv_lora_rank" in f.read_text(encoding="utf-8")})


def config_of(name: str, variant: str = "", **changes: Any) -> Any:
    """The tiny configuration of a family, or of one of its variants."""
    family = FAMILIES[name]
    module = importlib.import_module(f"transformers.models.{name}.configuration_{name}")
    sizes = {**family.common, **family.sizes, **family.variants.get(variant, {}), **changes}
    if name in _TEXT:
        text = {**sizes, **_TEXT[name]}
        return getattr(module, family.config)(text_config=text, vision_config=dict(_IMAGES[name]))
    return getattr(module, family.config)(**sizes)


def fresh_family(
    name: str, variant: str = "", dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any
) -> nn.Module:
    """A new model in eval mode: random biases, weights large enough that softmax is not flat."""
    config = config_of(name, variant, **changes)
    config._attn_implementation = "eager" if name in ("hy_v4", "gpt_oss", "granite_swa") else "sdpa"
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    torch.manual_seed(seed)
    model = getattr(module, FAMILIES[name].model)(config)
    with torch.no_grad():
        for tensor_name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor_name.endswith("bias") or tensor_name.endswith("softmax_scaling.scale"):
                tensor.normal_(std=0.3)
            elif tensor_name.endswith("sinks"):
                tensor.normal_(std=2.0)
            elif "proj" in tensor_name and "mlp" not in tensor_name:
                tensor.mul_(4.0)
    model = model.to(dtype).eval()
    if getattr(config, "_experts_implementation", None) is not None:
        model.set_experts_implementation("batched_mm")
    return model


tiny_family: Callable[..., Any] = cache(fresh_family)
