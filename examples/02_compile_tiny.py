"""Compile a model, step it, read a rank's cache, generate, save and reload. Four virtual ranks, no GPU."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from helix_compile import HelixModule, helix_compile
from helix_compile.models.presets import build_model, preset_config


def main() -> None:
    """Every step checks itself against the unmodified model."""
    torch.manual_seed(0)
    model = build_model(preset_config("tiny"))
    compiled = helix_compile(model, cp=4, tokens_per_block=4, max_batch_size=2, max_seq_len=64)

    # a ragged batch: zeros in the mask are padding and get no place in the cache
    ids = torch.randint(0, 256, (2, 10))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    logits = compiled(ids, mask)
    expected = model(
        ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)
    ).logits
    torch.testing.assert_close(logits[mask > 0], expected[mask > 0], rtol=1e-5, atol=1e-5)

    # blocks of 4 tokens go round robin: ranks 0 and 1 hold 4 of the first sequence's 10 tokens, rank 2 holds 2
    print("tokens of each sequence:", compiled.lengths.tolist())
    first_page = compiled.page_table[0, 0]
    used = [int((rank.cache[0][first_page] != 0).any(-1).sum()) for rank in compiled.ranks]
    print("latents of sequence 0 on each rank:", used)
    assert used == [4, 4, 2, 0]

    # one collective is one node of the lowered graph
    body = compiled.graph.get_submodule("body_0")
    wire = [n.target for n in body.graph.nodes if "_c10d_functional" in str(n.target)]
    print(*wire, sep="\n")

    tokens = compiled.generate(ids, mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
    with tempfile.TemporaryDirectory() as folder:
        compiled.save(Path(folder) / "tiny-cp4")
        reloaded = HelixModule.load(Path(folder) / "tiny-cp4")
    assert torch.equal(reloaded(ids, mask), logits)  # bitwise
    print("new tokens:", tokens[:, 10:].tolist())


if __name__ == "__main__":
    main()
