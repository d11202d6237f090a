"""Every decoder of the installed transformers that has a latent, an indexer, a compressor or a window: found in its sources,
made as a tiny model.

A decoder is a class of a `modeling_*.py` that names a GenerationMixin among its bases. What is found is that whose folder has one
of FIELDS in a configuration, or one of NAMES in its modeling.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig

from tests.support.families import COMMON, FAMILIES, SPARSE

FIELDS = (
    "kv_lora_rank",
    "index_topk",
    "index_n_heads",
    r"indexer_\w+",
    r"compress\w*",
    r"sliding_window\w*",
    r"attention_window\w*",
    "window_size",
    "attention_chunk_size",
    r"local_attention\w*",
    r"\w*local_attn_chunk_length",
)
NAMES = (r"class \w*(?:Indexer|Compressor)\w*", "create_sliding_window_causal_mask", "create_chunked_causal_mask")
_FIELD = re.compile(rf"^    ({'|'.join(FIELDS)})\s*:", re.MULTILINE)
_NAME = re.compile("|".join(NAMES))
_DECODER = re.compile(r"^class (\w+)\(([^)]*GenerationMixin\b[^)]*)\)\s*:", re.MULTILINE)

# sizes of a tiny model, of whatever fields a configuration has
_SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 72,
    "intermediate_size": 58,
    "intermediate_size_mlp": 40,
    "ffn_hidden_size": 58,
    "num_attention_heads": 12,
    "head_dim": 10,
    "max_position_embeddings": 1024,
    "moe_intermediate_size": 22,
    "shared_expert_intermediate_size": 22,
    "num_experts": 8,
    "n_routed_experts": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 1,
    "topk_group": 1,
    "sliding_window": 5,
    "sliding_window_size": 5,
    "attention_window_size": 5,
    "attention_chunk_size": 5,
    "pad_token_id": 0,
}
# of towers for images and sound, which a step of text does not run
_TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "depth": 1,
    "num_heads": 2,
    "encoder_layers": 1,
    "encoder_ffn_dim": 40,
    "out_hidden_size": 72,
}
_IS_TOWER, _IS_CODEC = re.compile("vision|audio|image|vq"), re.compile("codec|audio_encoder")


@dataclass(frozen=True)
class Decoder:
    """A class that the search found: its folder in transformers.models, and what was found there."""

    name: str
    folder: str
    has: tuple[str, ...]


@dataclass(frozen=True)
class Making:
    """How a tiny model of it is made where its fields do not say it.

    Attributes:
        changes: to the configuration.
        text: the same to the configuration of its text part.
        padded: its layers take padding for what it is; else they count columns, and a module that is kept gets rows alone.
        not_made: why none can be made here, and what it is.
    """

    changes: dict[str, Any] | None = None
    text: dict[str, Any] | None = None
    padded: bool = True
    not_made: str = ""


BOTH: dict[str, Any] = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_COMPASS = {**BOTH, "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE}}
_PER_LAYER = {"vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 8}
_SHARED = {"num_hidden_layers": 4, "layer_types": BOTH["layer_types"] * 2, "num_kv_shared_layers": 2, **_PER_LAYER}
_EXPERTS = {
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "mlp_layer_types": ["dense", "sparse"],
}
_ENCODER_DECODER = {
    "d_model": 72,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 12,
    "decoder_attention_heads": 12,
    "encoder_ffn_dim": 58,
    "decoder_ffn_dim": 58,
}
_BLOCKS = {
    "indexer_n_heads": 8,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    "ngram_vocab_size_base": 1000,
    "split_ngram_parts": 2,
    "hc_lowrank": 8,
}
_TOP_BLOCKS = {
    "layer_types": ["full_attention", "minimax_m3_sparse"],
    "index_block_size": 3,
    "index_topk_blocks": 2,
    "index_head_dim": 16,
    "index_n_heads": 4,
}
_SWA_HEADS = {"head_dim": 14, "v_head_dim": 10, "num_key_value_heads": 2}  # layers with windows have twice as many
_SECTIONS = {"rope_parameters": {**_ROPE, "mrope_section": [1, 1, 1]}}  # hidden_size / heads is 6
MAKINGS: dict[str, Making] = {
    "CohereCompassForCausalLM": Making(_COMPASS),
    "CohereCompassForConditionalGeneration": Making(text=_COMPASS),
    "DeepseekOcr2ForConditionalGeneration": Making(text={**_EXPERTS, "num_key_value_heads": 12}),
    "Dots1ForCausalLM": Making({**BOTH, **{k: v for k, v in _EXPERTS.items() if k != "mlp_layer_types"}}),
    "Dots3NoteForConditionalGeneration": Making(
        {
            "vision_config": {
                "num_hidden_layers": 1,
                "mlp_layer_types": ["dense"],
                "per_layer_config": {},
                "adapter_out_dim": 72,
            },
            "audio_config": {"num_hidden_layers": 1, "adapter_out_dim": 72},
        },
        {
            **COMMON,
            **SPARSE,
            "sliding_window": 16,
            "num_hidden_layers": 3,
            "layer_types": None,
            "mlp_layer_types": None,
        },
    ),
    "Exaone4_5_ForConditionalGeneration": Making(text={"model_type": "exaone4_5_text"}),
    "Florence2ForConditionalGeneration": Making({"vision_config": {"projection_dim": 72}}, _ENCODER_DECODER),
    "Gemma4ForConditionalGeneration": Making(text=_SHARED),
    "GPTNeoForCausalLM": Making({"num_layers": 2, "num_heads": 12, "attention_types": [[["global", "local"], 1]]}),
    "Gemma3nForConditionalGeneration": Making(
        not_made="its image tower needs timm; its text part is Gemma3nForCausalLM"
    ),
    "InklingForConditionalGeneration": Making(
        not_made="its sound tower needs scipy; its text part is InklingForCausalLM"
    ),
    "Qwen3OmniMoeForConditionalGeneration": Making(
        not_made="no talker can be made of its configuration; its thinker is Qwen3OmniMoeThinkerForConditionalGeneration"
    ),
    "Inkling2ForConditionalGeneration": Making({"vision_config": {"text_hidden_size": 72}}),
    "KyutaiSpeechToTextForConditionalGeneration": Making({"audio_pad_token_id": 97 + 32 * 2049}),
    "LEDForConditionalGeneration": Making({**_ENCODER_DECODER, "attention_window": [4]}),
    "MiMoV2FlashForCausalLM": Making(_SWA_HEADS),
    "MiniMaxM3VLForCausalLM": Making(_TOP_BLOCKS, padded=False),
    "MiniMaxM3SparseForConditionalGeneration": Making(text=_TOP_BLOCKS, padded=False),
    "MinistralForCausalLM": Making({**BOTH, "head_dim": 10}),
    "MoonshineStreamingForConditionalGeneration": Making({"num_key_value_heads": 12}),
    "DiffusionGemmaForBlockDiffusion": Making(text={"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 22}),
    "Qwen3OmniMoeTalkerForConditionalGeneration": Making(
        {"spatial_merge_size": 2}, {"shared_expert_intermediate_size": 22}
    ),
    "Qwen4ExpForCausalLM": Making(_BLOCKS),
    "Qwen4ExpForConditionalGeneration": Making(text=_BLOCKS),
    "Qwen2VLForConditionalGeneration": Making(text=_SECTIONS),
    "Qwen2_5_VLForConditionalGeneration": Making(text=_SECTIONS),
    "Qwen2_5OmniThinkerForConditionalGeneration": Making(text=_SECTIONS),
    "ReformerModelWithLMHead": Making({"is_decoder": True, "hidden_size": 256, "num_attention_heads": 2}),
    "Step3p7ForConditionalGeneration": Making(text={"sliding_window": 5}),
    "ZayaForCausalLM": Making({"num_experts_per_tok": 1}),
}


MODELS = Path(transformers.__file__).parent / "models"


@cache
def found_decoders(root: Path = MODELS) -> dict[str, Decoder]:
    """Class name -> what was found, in the order of folders."""
    found: dict[str, Decoder] = {}
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        code = "".join(p.read_text(encoding="utf-8") for p in sorted(folder.glob("modeling_*.py")))
        if "GenerationMixin" not in code:
            continue
        said = "".join(p.read_text(encoding="utf-8") for p in sorted(folder.glob("configuration_*.py")))
        has = (*_FIELD.findall(said), *(x.removeprefix("class ") for x in _NAME.findall(code)))
        if has:
            found |= {n: Decoder(n, folder.name, tuple(dict.fromkeys(has))) for n, _ in _DECODER.findall(code)}
    return found


def other_decoders() -> list[str]:
    """Those that FAMILIES has no row for."""
    return [
        n
        for n, found in found_decoders().items()
        if n not in {FAMILIES[f].model for f in FAMILIES if f == found.folder}
    ]


def tiny_decoder(name: str, device: str = "cpu") -> nn.Module:
    """A new model in float64, in eval mode."""
    folder, making = found_decoders()[name].folder, MAKINGS.get(name, Making())
    files = (MODELS / folder).glob("modeling_*.py")
    modules = [importlib.import_module(f"transformers.models.{folder}.{p.stem}") for p in files]
    kind = next(getattr(m, name) for m in modules if hasattr(m, name))
    given = _sizes_of(kind.config_class(), "") | (making.changes or {})
    for part in ("text_config", "decoder", "thinker_config"):
        if making.text and part in given:
            given[part] |= making.text
    config = kind.config_class(**given)
    config._attn_implementation = "sdpa" if kind._supports_sdpa else "eager"
    torch.manual_seed(0)
    with torch.device(device):
        model = kind(config).double().eval()
    if getattr(config.get_text_config(), "_experts_implementation", None) is not None:
        model.set_experts_implementation("batched_mm")
    return model


def _sizes_of(config: Any, part: str) -> dict[str, Any]:
    """Fields of a configuration, small; of a layer of each kind one."""
    parts = {n: v for n, v in vars(config).items() if isinstance(v, PreTrainedConfig)}
    if _IS_CODEC.search(part):  # convolutions of sizes that hang together
        return {"model_type": config.model_type}
    if _IS_TOWER.search(part):
        small = {k: v for k, v in _TOWER.items() if isinstance(getattr(config, k, None), int)}
        if any(k in vars(config) for k in ("depths", "hidden_sizes")):
            small.pop("num_hidden_layers", None)
        return {"model_type": config.model_type, **small, **{n: _sizes_of(v, f"{part}.{n}") for n, v in parts.items()}}
    fields = config.to_dict()
    given = {k: v for k, v in _SIZES.items() if fields.get(k) is not None}
    kinds = list(dict.fromkeys(fields.get("layer_types") or ()))
    layers = max(2, len(kinds))
    if fields.get("num_key_value_heads"):
        given["num_key_value_heads"] = 12 if fields["num_key_value_heads"] == fields.get("num_attention_heads") else 4
    if fields.get("num_hidden_layers"):
        given["num_hidden_layers"] = layers
    if kinds:
        given["layer_types"] = (kinds * 2)[:layers]
    if fields.get("mlp_layer_types"):
        given["mlp_layer_types"] = (list(dict.fromkeys(fields["mlp_layer_types"])) * 4)[:layers]
    return given | {n: _sizes_of(v, n) for n, v in parts.items()}
