"""Hand-over of a cache by file, against a plain copy of the same bytes: write_cache, read_cache and import_cache.

    python benchmarks/handover.py [--tokens 32768] [--layers 4] [--repeats 7] [--folder DIR]

Latents of DeepSeek-V3's widths (R=512, r=64), bf16, one sequence, cp=4 in one process. The copy is shutil.copyfile of the
file that write_cache wrote, into the same folder. All take turns; nothing is flushed to the disk, and what is read is in
the page cache, for both sides alike. read_cache maps the file, so import_cache is what reads it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from pathlib import Path

import torch
from measuring import MB, format_machine, median_ms, print_table
from transformers import DeepseekV3Config

from helix_compile import HelixModule, helix_compile
from helix_compile.cache.file import read_cache, write_cache
from helix_compile.cache.shards import CacheEntries
from helix_compile.models.presets import PRESETS, build_model

R, ROPE = 512, 64


def main() -> None:
    """One row an action: time, bandwidth, and time as a multiple of the copy's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="where the files go; default: the system's temporary folder")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    receiver = _receiver(chosen.layers, chosen.tokens)
    sent = CacheEntries(*_random_parts(chosen.layers, chosen.tokens), torch.tensor([chosen.tokens]))
    with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
        rows, size = _measure(receiver, sent, Path(folder), chosen.repeats)
    print(f"{format_machine()}; load {os.getloadavg()[0]:.1f}; {size / MB:.0f} MB\n")
    print_table(["action", "time", "bandwidth", "x copy"], rows)


def _measure(receiver: HelixModule, sent: CacheEntries, folder: Path, repeats: int) -> tuple[list[list[str]], int]:
    file, copy = folder / "cache.safetensors", folder / "copy.safetensors"
    write_cache(file, sent)
    size = file.stat().st_size

    def overwrite() -> None:
        copy.unlink(missing_ok=True)  # as write_cache: a new file each time
        shutil.copyfile(file, copy)

    def hand_over() -> None:
        write_cache(file, sent)
        receiver.import_cache(*read_cache(file))

    actions = {
        "plain copy of the file": overwrite,
        "write_cache": lambda: write_cache(file, sent),
        "read_cache + import_cache": lambda: receiver.import_cache(*read_cache(file)),
        "import_cache, from memory": lambda: receiver.import_cache(*sent),
        "all three": hand_over,
    }
    ms = median_ms(actions, repeats)
    back = receiver.export_cache()
    assert all(torch.equal(a, b) for a, b in zip(back.latents, sent.latents, strict=True))
    base = ms["plain copy of the file"]
    return [[n, f"{t:.1f} ms", f"{size / t / 1e6:.2f} GB/s", f"{t / base:.2f}"] for n, t in ms.items()], size


def _receiver(layers: int, tokens: int) -> HelixModule:
    sizes = {"kv_lora_rank": R, "qk_rope_head_dim": ROPE, "num_hidden_layers": layers}
    config = DeepseekV3Config(**{**PRESETS["tiny"], **sizes, "max_position_embeddings": tokens + 64})
    model = build_model(config, dtype=torch.bfloat16)
    return helix_compile(model, cp=4, world="virtual", max_batch_size=1, max_seq_len=tokens + 64)


def _random_parts(layers: int, tokens: int) -> list[list[torch.Tensor]]:
    return [[torch.randn(1, tokens, width).bfloat16() for _ in range(layers)] for width in (R, ROPE)]


if __name__ == "__main__":
    main()
