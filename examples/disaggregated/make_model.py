"""A small DeepSeek-V3 with random weights and a tokenizer of bytes, as a checkpoint folder: something to serve.

python examples/disaggregated/make_model.py out/disaggregated
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from helix_compile.models.presets import build_model, preset_config

END = "<|end|>"


def build() -> tuple[Any, Any]:
    """(model, tokenizer): 255 bytes (no text of UTF-8 holds the last one) and an end; weights so large that every token tells."""
    letters = sorted({*pre_tokenizers.ByteLevel.alphabet()} - {"\u00ff"})
    words = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=END)
    model: Any = build_model(preset_config("tiny"))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:  # not the norms
                weight.mul_(10)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model, tokenizer


def main(folder: Path) -> None:
    """Write both."""
    for part in build():
        part.save_pretrained(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
