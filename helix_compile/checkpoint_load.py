"""Our own DeepSeek-V3 with the weights of a Hugging Face folder, read by the reader that helix_compile("folder/") uses."""

from __future__ import annotations

from pathlib import Path

import torch

from helix_compile.checkpoint_model import open_checkpoint
from helix_compile.models.deepseek_v3 import DeepseekV3
from helix_compile.models.rope import RotaryEmbedding


def load_deepseek_v3(
    folder: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> DeepseekV3:
    """The model of a folder, whole, in eval mode. What is read and what is refused: docs/checkpoints.md.

    Args:
        folder: config.json and safetensors of a DeepseekV3ForCausalLM; FP8 blocks are dequantised.
        dtype: of the weights; default: config.json's, else what is stored. The router's bias stays float32.
        device: where the weights go.

    Raises:
        CheckpointError: what is stored is not what config.json describes; nothing was read then.
    """
    checkpoint = open_checkpoint(Path(folder), dtype, torch.device(device))
    config = checkpoint.model.config
    with torch.device("meta"):
        model = DeepseekV3(config)
    weights = {name: checkpoint.weights[name] for name in model.state_dict()}
    model.load_state_dict(weights, assign=True)
    if weights["lm_head.weight"] is weights["model.embed_tokens.weight"]:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.model.rotary_emb = RotaryEmbedding(config).to(device)
    return model.eval()
