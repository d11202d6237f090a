"""A hand-over of more than 64K tokens: one layer of the unmodified model goes on from the same cache."""

from __future__ import annotations

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, DynamicCache

from helix_compile import HelixModule, helix_compile
from helix_compile.verifier.numeric.reference import WidenedIslands
from tests.support.driver import deviation
from tests.support.models import SIZES

LENGTHS = [70_003, 65_537]
CHUNK = 16_384


def long_model() -> DeepseekV3ForCausalLM:
    config = DeepseekV3Config(
        **{
            **SIZES,
            "num_hidden_layers": 1,
            "first_k_dense_replace": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 131_072,
        }
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    return DeepseekV3ForCausalLM(config).to(torch.float64).eval()


@pytest.mark.slow
@pytest.mark.parametrize(("cp", "tokens_per_block"), [(4, 32), (2, 1000)])
def test_more_than_64k_tokens(cp: int, tokens_per_block: int) -> None:
    """Left-padded, chunk by chunk; then steps over a block boundary. Some of the first keys are needles."""
    model, columns = long_model(), max(LENGTHS)
    mask = torch.tensor([[0] * (columns - n) + [1] * n for n in LENGTHS])
    latent, k_rope = torch.randn(2, columns, 20, dtype=torch.float64), torch.randn(2, columns, 6, dtype=torch.float64)
    latent[:, 5_000:5_010] *= 20.0
    cache = DynamicCache(config=model.config)
    cache.update(latent[:, None], k_rope[:, None], 0)
    compiled = helix_compile(model, cp=cp, tokens_per_block=tokens_per_block, max_seq_len=columns + 40)
    for start in range(0, columns, CHUNK):
        part = mask[:, start : start + CHUNK]
        compiled.import_cache(
            [latent[:, start : start + CHUNK]], [k_rope[:, start : start + CHUNK]], part.sum(1), part, append=True
        )
    assert compiled.lengths.tolist() == LENGTHS
    check_export(compiled, latent, k_rope)
    ones = torch.ones(2, 1, dtype=torch.int64)
    with WidenedIslands(), torch.no_grad():
        for _ in range(34):
            ids = torch.randint(0, 97, (2, 1))
            mask = torch.cat([mask, ones], dim=1)
            logits = model(
                input_ids=ids, attention_mask=mask, position_ids=mask.sum(1, keepdim=True) - 1, past_key_values=cache
            ).logits
            assert deviation(compiled(ids), logits, ones) <= 1e-9  # angles of 70,000 are rounded


def check_export(compiled: HelixModule, latent: torch.Tensor, k_rope: torch.Tensor) -> None:
    """What comes out is what went in, left-aligned."""
    out = compiled.export_cache()
    for row, n in enumerate(LENGTHS):
        assert torch.equal(out.latents[0][row, :n], latent[row, -n:])
        assert torch.equal(out.k_ropes[0][row, :n], k_rope[row, -n:])
        assert not out.latents[0][row, n:].any()
