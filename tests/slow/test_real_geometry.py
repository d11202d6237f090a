"""DeepSeek-V3's real layer geometry through the whole spine, bf16, four ranks, contexts up to 4K.

Limit as everywhere in bf16: the compiled model's rel-RMSE of the logits may be 1.25x the original's own, pooled over
the cases. The reference is the same weights in fp32, not fp64 (9.4 GB): its own error is 1000x below bf16's.

A near-tie in the router that rounding turns to another expert costs a token 0.3 where rounding alone costs 0.012. One
such token more or less decides the pooled figure (1.17 and 1.50 were both seen, by the sample of tokens). So the limit
is for tokens that all three route alike, read off the router's own top-k, and the others are counted.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from transformers import DeepseekV3Config, DynamicCache

from helix_compile import HelixModule, helix_compile
from helix_compile.models.presets import build_model
from tests.support.routing import Routing

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning")]

# One dense and one MoE layer of the class's default sizes (H=128, R=512, r=64, V=128, hidden 7168); fewer experts.
FEW_EXPERTS = {
    "vocab_size": 1000,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
}
LATENT, ROPE = 512, 64
CONTEXTS = (1, 31, 130, 512, 1000, 2048, 3333, 4080)  # the last steps cross 4096
STEPS = (16, 1)
PROMPTS = (8, 48)
CP = 4
MAX_FLIPPED = 0.05  # share of tokens that original or compiled routes otherwise than the reference


@dataclass(frozen=True)
class Outcome:
    """Logits [tokens, vocab] of one case, and the experts [tokens, k] of each token."""

    logits: Tensor
    experts: Tensor


def prompts() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, FEW_EXPERTS["vocab_size"], PROMPTS, generator=generator)


def prefilled(context: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Latents and rotated keys of both layers, [1, S, width], and the ids of the steps that follow."""
    generator = torch.Generator().manual_seed(context)
    latents, k_ropes = (
        [torch.randn(1, context, width, generator=generator).bfloat16() for _ in range(2)] for width in (LATENT, ROPE)
    )
    ids = [torch.randint(0, FEW_EXPERTS["vocab_size"], (1, T), generator=generator) for T in STEPS]
    return latents, k_ropes, ids


def unmodified(model: nn.Module) -> dict[str, Outcome]:
    """Transformers' own model on the prompts, and on the steps behind each context."""

    def behind(context: int) -> Tensor:
        latents, k_ropes, ids = prefilled(context)
        cache = DynamicCache(config=model.config)
        for layer, pair in enumerate(zip(latents, k_ropes, strict=True)):
            cache.update(*(x[:, None].to(model.dtype) for x in pair), layer)
        steps = [model(input_ids=x, past_key_values=cache).logits for x in ids]
        return torch.cat(steps, dim=1)

    with torch.no_grad():
        return outcomes(lambda: model(prompts()).logits, behind, ranks=1)


def rewritten(compiled: HelixModule) -> dict[str, Outcome]:
    """The same of the compiled model; every context is imported over the one before."""

    def behind(context: int) -> Tensor:
        latents, k_ropes, ids = prefilled(context)
        compiled.reset()
        compiled.import_cache(latents, k_ropes, [context])
        return torch.cat([compiled(x) for x in ids], dim=1)

    return outcomes(lambda: compiled(prompts()), behind, ranks=CP)


def outcomes(prompt: Callable[[], Tensor], behind: Callable[[int], Tensor], ranks: int) -> dict[str, Outcome]:
    """Run both cases. Every rank routes every token, and all alike."""
    found = {}
    cases = {"prompts": lambda: [prompt()], "contexts": lambda: [behind(c) for c in CONTEXTS]}
    for name, run in cases.items():
        with Routing(FEW_EXPERTS["num_experts_per_tok"]) as routing:
            logits = torch.cat([x.float().flatten(0, 1) for x in run()])
        by_rank = [torch.cat(routing.chosen[rank::ranks]) for rank in range(ranks)]
        assert all(torch.equal(x, by_rank[0]) for x in by_rank)
        found[name] = Outcome(logits, by_rank[0])
        assert len(logits) == len(by_rank[0])
    return found


@pytest.fixture(scope="module")
def outcome() -> dict[str, dict[str, Outcome]]:
    """Of the fp32 reference, which is freed before the others run, of the bf16 original and of the compiled model."""
    model = build_model(DeepseekV3Config(**FEW_EXPERTS), dtype=torch.bfloat16)
    twin = copy.deepcopy(model).float()
    found = {"reference": unmodified(twin)}
    del twin
    found["original"] = unmodified(model)
    compiled = helix_compile(model, cp=CP, max_batch_size=PROMPTS[0], max_seq_len=4097)
    found["compiled"] = rewritten(compiled)
    return found


@pytest.mark.parametrize("case", ["prompts", "contexts"])
def test_bf16_error_is_the_originals(outcome: dict[str, dict[str, Outcome]], case: str) -> None:
    reference = outcome["reference"][case]
    flipped = {who: (outcome[who][case].experts != reference.experts).any(dim=1) for who in ("original", "compiled")}
    alike = ~(flipped["original"] | flipped["compiled"])
    every = torch.ones_like(alike)
    for tokens, label in ((every, "all tokens"), (alike, "routed alike")):
        own, ours = (rel_rmse(outcome[who][case].logits[tokens], reference.logits[tokens]) for who in flipped)
        print(f"{case}, {label} ({int(tokens.sum())}): {own:.4f}, {ours:.4f}, {ours / own:.3f}x")
    print(f"{case}, routed otherwise: { {who: int(f.sum()) for who, f in flipped.items()} }")
    assert all(f.float().mean() <= MAX_FLIPPED for f in flipped.values())
    assert own < 0.02
    assert ours <= 1.25 * own


def rel_rmse(got: Tensor, expected: Tensor) -> float:
    return float(((got - expected).square().mean() / expected.square().mean()).sqrt())
