"""Compile a small DeepSeek-V3 for four ranks, step through a ragged batch, read the shards, save and reload."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from helix_compile import HelixModule, helix_compile
from helix_compile.models.presets import build_model, preset_config


def main() -> None:
    """Prefill two left-padded prompts, decode three tokens, look at the cache, reset one row."""
    torch.manual_seed(0)
    model = build_model(preset_config("tiny"))
    compiled = helix_compile(model, cp=4, tokens_per_block=8, max_seq_len=128)
    mask = torch.tensor([[0] * 10 + [1] * 20, [1] * 30])
    prompt = torch.randint(0, 256, mask.shape)
    logits = compiled(prompt, mask)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = model(input_ids=prompt, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(logits[mask > 0], expected[mask > 0], rtol=1e-4, atol=1e-5)
    logits_of_prompt = logits
    for _ in range(3):
        logits = compiled(logits[:, -1:].argmax(-1))
    print("tokens of each sequence:", compiled.lengths.tolist())

    # blocks of 8 tokens go round robin: of 33 tokens rank 0 holds blocks 0 and 4 (9 tokens), the others one block each
    page = compiled.page_table[1, 0]
    held = [int(rank.cache[0][page].ne(0).any(dim=-1).sum()) for rank in compiled.ranks]
    print("latents of sequence 1 on each rank:", held)

    compiled.reset(rows=[0])
    print("after reset(rows=[0]):", compiled.lengths.tolist())

    with tempfile.TemporaryDirectory() as folder:
        compiled.save(Path(folder) / "tiny-cp4")
        reloaded = HelixModule.load(Path(folder) / "tiny-cp4")
    assert torch.equal(reloaded(prompt, mask), logits_of_prompt)
    print("a reloaded module is bitwise equal")


if __name__ == "__main__":
    main()
