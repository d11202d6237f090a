"""Process 1: prefill with the unmodified model, write its cache and the first new tokens for decode.py.

python examples/04_handover/prefill.py FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import DynamicCache

from helix_compile import CacheEntries, write_cache
from helix_compile.models.presets import build_model, preset_config

PROMPT_LENGTH = 50


def main(folder: Path) -> None:
    """Two prompts, no padding; the folder then holds cache.safetensors and first_tokens.json."""
    model = build_model(preset_config("tiny"))
    prompts = torch.randint(0, 256, (2, PROMPT_LENGTH), generator=torch.Generator().manual_seed(1))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        logits = model(input_ids=prompts, past_key_values=cache).logits
    latents = [layer.keys.squeeze(1) for layer in cache.layers]  # [B, S, R]: MLA keeps one for all heads
    k_ropes = [layer.values.squeeze(1) for layer in cache.layers]
    lengths = torch.full((2,), PROMPT_LENGTH)
    write_cache(folder / "cache.safetensors", CacheEntries(latents, k_ropes, lengths))
    (folder / "first_tokens.json").write_text(json.dumps(logits[:, -1].argmax(-1).tolist()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
