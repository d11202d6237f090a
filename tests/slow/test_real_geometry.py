"""DeepSeek-V3's real layer geometry through the whole spine, bf16, four ranks, contexts up to 4K.

Limit as everywhere in bf16: the compiled model's rel-RMSE of the logits may be 1.25x the original's own, pooled over
the cases. The reference is the same weights in fp32, not fp64 (9.4 GB): its own error is 1000x below bf16's.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from transformers import DeepseekV3Config, DynamicCache

from helix_compile import HelixModule, helix_compile
from helix_compile.models.presets import build_model

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning")]

# One dense and one MoE layer of the class's default sizes (H=128, R=512, r=64, V=128, hidden 7168); fewer experts.
FEW_EXPERTS = {
    "vocab_size": 1000, "num_hidden_layers": 2, "first_k_dense_replace": 1, "n_routed_experts": 8,
    "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2,
}  # fmt: skip
LATENT, ROPE = 512, 64
CONTEXTS = (1, 31, 130, 512, 1000, 2048, 3333, 4092)  # the last steps cross 4096
STEPS = (4, 1)
PROMPTS = (8, 48)


def prompts() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, FEW_EXPERTS["vocab_size"], PROMPTS, generator=generator)


def prefilled(context: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Latents and rotated keys of both layers, [1, S, width], and the ids of the steps that follow."""
    generator = torch.Generator().manual_seed(context)
    latents, k_ropes = (
        [torch.randn(1, context, width, generator=generator).bfloat16() for _ in range(2)]
        for width in (LATENT, ROPE)
    )
    ids = [torch.randint(0, FEW_EXPERTS["vocab_size"], (1, T), generator=generator) for T in STEPS]
    return latents, k_ropes, ids


def unmodified_logits(model: nn.Module) -> dict[str, Tensor]:
    """Logits of transformers' own model: of the prompts, and of the steps behind each context."""
    steps = []
    with torch.no_grad():
        for context in CONTEXTS:
            latents, k_ropes, ids = prefilled(context)
            cache = DynamicCache(config=model.config)
            for layer, pair in enumerate(zip(latents, k_ropes, strict=True)):
                cache.update(*(x[:, None].to(model.dtype) for x in pair), layer)
            steps += [model(input_ids=x, past_key_values=cache).logits[0] for x in ids]
        return {"prompts": model(prompts()).logits.float(), "contexts": torch.cat(steps).float()}


def compiled_logits(compiled: HelixModule) -> dict[str, Tensor]:
    """The same of the compiled model; every context is imported over the one before."""
    prompt = compiled(prompts()).float()
    compiled.reset()
    steps = []
    for context in CONTEXTS:
        latents, k_ropes, ids = prefilled(context)
        compiled.import_cache(latents, k_ropes, [context])
        steps += [compiled(x)[0] for x in ids]
    return {"prompts": prompt, "contexts": torch.cat(steps).float()}


@pytest.fixture(scope="module")
def logits() -> Iterator[dict[str, dict[str, Tensor]]]:
    """Of the fp32 reference, which is freed before the others run, of the bf16 original and of the compiled model."""
    model = build_model(DeepseekV3Config(**FEW_EXPERTS), dtype=torch.bfloat16)
    twin = copy.deepcopy(model).float()
    found = {"reference": unmodified_logits(twin)}
    del twin
    found["original"] = unmodified_logits(model)
    compiled = helix_compile(model, cp=4, max_batch_size=PROMPTS[0], max_seq_len=4097)
    found["compiled"] = compiled_logits(compiled)
    yield found


@pytest.mark.parametrize("case", ["prompts", "contexts"])
def test_bf16_error_is_the_originals(logits: dict[str, dict[str, Tensor]], case: str) -> None:
    reference = logits["reference"][case]
    own, ours = (rel_rmse(logits[who][case], reference) for who in ("original", "compiled"))
    print(f"{case}: rel-RMSE original {own:.4f}, compiled {ours:.4f}, ratio {ours / own:.3f}")
    assert own < 0.1
    assert ours <= 1.25 * own


def rel_rmse(got: Tensor, expected: Tensor) -> float:
    return float(((got - expected).square().mean() / expected.square().mean()).sqrt())
