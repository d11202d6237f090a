"""Process 2: decode on four Helix ranks from what prefill.py wrote; prints the new tokens of each sequence.

python examples/04_handover/decode.py FOLDER                              # four ranks in this process
torchrun --nproc-per-node 4 examples/04_handover/decode.py FOLDER         # the same, one process a rank
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from helix_compile import helix_compile, read_cache
from helix_compile.models.presets import build_model, preset_config

NEW_TOKENS = 24


def main(folder: Path) -> list[list[int]]:
    """New tokens of each sequence, the first of them made by the prefill."""
    compiled = helix_compile(build_model(preset_config("tiny")), cp=4, tokens_per_block=8, max_seq_len=128)
    compiled.import_cache(*read_cache(folder / "cache.safetensors"))
    tokens = [torch.tensor(json.loads((folder / "first_tokens.json").read_text()))[:, None]]
    while len(tokens) < NEW_TOKENS:
        tokens.append(compiled(tokens[-1])[:, -1:].argmax(-1))
    new = torch.cat(tokens, dim=1).tolist()
    if os.environ.get("RANK", "0") == "0":  # every rank has the same tokens
        print(json.dumps(new))
    return new


if __name__ == "__main__":
    main(Path(sys.argv[1]))
