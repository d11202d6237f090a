"""moe_router by Triton against its reference and against transformers' router: the same choice, ties included."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

import helix_compile.kernels.moe.router as moe_router
from helix_compile.ir.ops import helix
from helix_compile.kernels.registry import Capacity, Site
from helix_compile.kernels.target import offline_target

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
kernel = moe_router.MOE_ROUTER.target
drawn = settings(
    max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), phases=[Phase.generate]
)
# few values, so that ties are common; their sigmoids have no sum in common, so that near-ties are not
GRID = torch.tensor([-2.3, -0.4, 0.0, 0.7, 2.1])
BIAS_GRID = torch.tensor([-0.5, 0.0, 0.0, 0.25])
Options = tuple[int, int, int, bool, float]


@st.composite
def cases(draw: st.DrawFn) -> tuple[int, int, int, Options]:
    """A seed, N, E and the rest of the arguments."""
    n_group, size = draw(st.integers(1, 9)), draw(st.integers(1, 33))
    E = n_group * size
    topk_group = draw(st.integers(1, n_group))
    # up to all experts: then some come from groups that were dropped
    top_k = draw(st.integers(1, min(E, 8)))
    options = (n_group, topk_group, top_k, draw(st.booleans()), draw(st.sampled_from([1.0, 2.5])))
    return draw(st.integers(0, 10**6)), draw(st.integers(1, 6)), E, options


def on_grid(seed: int, N: int, E: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = GRID[torch.randint(len(GRID), (N, E), generator=generator)]
    bias = BIAS_GRID[torch.randint(len(BIAS_GRID), (E,), generator=generator)]
    return logits.to(DEVICE), bias.to(DEVICE)


def check_exactly(logits: Tensor, bias: Tensor, options: Options) -> None:
    ids, weights = kernel(logits, bias, *options)
    expected_ids, expected = helix.moe_router(logits, bias, *options)
    assert ids.dtype == torch.int64 and weights.dtype == torch.float32
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected, rtol=2e-6, atol=0, equal_nan=True)


@drawn
@given(cases())
def test_the_same_choice_with_ties(case: tuple[int, int, int, Options]) -> None:
    seed, N, E, options = case
    check_exactly(*on_grid(seed, N, E), options)


@drawn
@given(cases())
def test_random_scores(case: tuple[int, int, int, Options]) -> None:
    """Sigmoids may differ in the last bits, so two that close may swap; nothing further apart may."""
    seed, N, E, (_, _, top_k, normalize, scale) = case
    generator = torch.Generator().manual_seed(seed)
    logits, bias = torch.randn(N, E, generator=generator), torch.randn(E, generator=generator) / 9
    logits, bias = logits.to(DEVICE), bias.to(DEVICE)
    check_within_two_ulps(logits, bias, (1, 1, top_k, normalize, scale))


def test_near_ties() -> None:
    """Logits one to seven float32 steps apart."""
    logits = 0.3 + torch.randint(8, (40, 64), device=DEVICE) * 2.0**-25
    check_within_two_ulps(logits, torch.zeros(64, device=DEVICE), (1, 1, 6, True, 1.0))


def check_within_two_ulps(logits: Tensor, bias: Tensor, options: Options) -> None:
    ids, weights = kernel(logits, bias, *options)
    expected_ids, expected = helix.moe_router(logits, bias, *options)
    choice = logits.sigmoid() + bias
    got, best = choice.gather(1, ids), choice.gather(1, expected_ids)
    ulp = torch.finfo(torch.float32).eps * best.abs().clamp(min=0.5)
    assert ((got - best).abs() <= 2 * ulp).all()
    assert all(len(set(row)) == len(row) for row in ids.tolist())
    same = ids == expected_ids
    torch.testing.assert_close(weights[same], expected[same], rtol=4e-6, atol=0)


def test_deepseek_v3_as_transformers_routes() -> None:
    """256 experts in 8 groups; transformers leaves the order of the chosen open."""
    config = DeepseekV3Config(hidden_size=16)
    router = DeepseekV3TopkRouter(config).to(DEVICE)
    torch.nn.init.normal_(router.weight)
    torch.nn.init.normal_(router.e_score_correction_bias, std=0.1)
    with torch.no_grad():
        logits, expected, expected_ids = router(torch.randn(20, 16, device=DEVICE))
    options = (
        config.n_group,
        config.topk_group,
        config.num_experts_per_tok,
        config.norm_topk_prob,
        config.routed_scaling_factor,
    )
    ids, weights = kernel(logits, router.e_score_correction_bias, *options)
    own, theirs = ids.sort(dim=1), expected_ids.sort(dim=1)
    assert torch.equal(own.values, theirs.values)
    torch.testing.assert_close(weights.gather(1, own.indices), expected.gather(1, theirs.indices), rtol=2e-6, atol=0)
    check_exactly(logits, router.e_score_correction_bias, options)


@pytest.mark.parametrize("options", [(1, 1, 3, True, 1.0), (4, 1, 3, False, 2.5), (4, 2, 8, True, 1.0)])
def test_all_equal_takes_the_lowest_numbers(options: Options) -> None:
    logits = torch.zeros(2, 12, device=DEVICE)
    ids, _ = kernel(logits, torch.zeros(12, device=DEVICE), *options)
    assert ids.tolist() == [list(range(options[2]))] * 2
    check_exactly(logits, torch.zeros(12, device=DEVICE), options)


def test_faults_are_ranked_first_and_end() -> None:
    logits, bias = on_grid(0, 5, 12)
    logits[0], logits[1, 7], logits[2, 3], logits[3, 5] = torch.nan, torch.nan, torch.inf, -torch.inf
    logits[4, 2:9] = torch.nan
    check_exactly(logits, bias, (3, 2, 4, False, 1.0))
    # the sign of a NaN means nothing
    bias[[2, 9]] = torch.tensor(-4194304, dtype=torch.int32, device=DEVICE).view(torch.float32)
    check_exactly(logits, bias, (3, 2, 4, False, 1.0))


def test_extreme_logits() -> None:
    """Scores that are 1, tiny or 0 are ranked as torch ranks them."""
    logits = torch.tensor([[-1e9, -120.0, -88.0, -87.0, -30.0, 20.0, 60.0, 1e9]], device=DEVICE)
    ids, _ = kernel(logits, torch.zeros(8, device=DEVICE), 1, 1, 8, False, 1.0)
    assert torch.equal(ids, helix.moe_router(logits, torch.zeros(8, device=DEVICE), 1, 1, 8, False, 1.0)[0])


def test_strided_logits_and_a_bias_in_bfloat16() -> None:
    logits, bias = on_grid(1, 6, 24)
    options = (4, 2, 5, True, 2.5)
    wide = torch.full((6, 30), torch.nan, device=DEVICE)
    wide[:, 3:27] = logits
    check_exactly(wide[:, 3:27], bias.bfloat16(), options)
    check_exactly(logits.T.contiguous().T, bias, options)


def test_no_tokens() -> None:
    ids, weights = kernel(torch.zeros(0, 8, device=DEVICE), torch.zeros(8, device=DEVICE), 2, 1, 3, True, 1.0)
    assert ids.shape == weights.shape == (0, 3)


@pytest.mark.parametrize(
    ("E", "options", "reason"),
    [(2048, (1, 1, 8, True, 1.0), "2048 experts"), (10, (4, 2, 2, True, 1.0), "2 of 4 groups")],
)
def test_refusals(E: int, options: Options, reason: str) -> None:
    site = Site("moe_router", (torch.zeros(1, E), torch.zeros(E), *options), Capacity(1, 128))
    assert reason in (moe_router.MOE_ROUTER.supports(site, offline_target("sm_90")) or "")


def test_schema_and_fake() -> None:
    torch.library.opcheck(
        kernel, (*on_grid(0, 3, 8), 2, 1, 3, True, 2.5), test_utils=("test_schema", "test_faketensor")
    )
