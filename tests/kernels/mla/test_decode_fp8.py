"""mla_decode.scaled: an FP8 cache with a scale per block of tokens, against its reference and against float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from helix_compile.kernels.mla.tuning import POINTER, ROWS, TRANSPOSED, MlaConfig
from helix_compile.kernels.reference import mla_decode_reference
from helix_compile.kernels.reference_fused import (
    dequantize_cache_reference,
    mla_decode_scaled_reference,
    quantize_cache_reference,
)
from tests.support.mla import MlaInputs, mismatch, mla_inputs, run_form

helix, helix_triton = torch.ops.helix, torch.ops.helix_triton
FORMS = [
    MlaConfig(ROWS, 16, 16, 4, 2),
    MlaConfig(ROWS, 64, 16, 4, 2, parts=2),
    MlaConfig(TRANSPOSED, 16, 16, 4, 2),
    MlaConfig(POINTER, 16, 16, 4, 2),
]
RANKS = 4


@pytest.fixture(autouse=True, scope="module")
def nan_memory() -> Iterator[None]:
    """What torch.empty returns is NaN: outputs and workspaces that a kernel leaves unwritten show."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def quantized(inputs: MlaInputs, tokens_per_scale: int) -> tuple[MlaInputs, Tensor]:
    """The inputs with an FP8 cache, and its scales; pages that were NaN keep NaN scales."""
    values, cache_scale = quantize_cache_reference(inputs.cache, tokens_per_scale)
    cache_scale[inputs.cache.isnan().all(dim=2).all(dim=1)] = torch.nan
    return replace(inputs, cache=values), cache_scale


@pytest.mark.parametrize("tokens_per_scale", [1, 8, 16])
@pytest.mark.parametrize("config", FORMS, ids=str)
def test_each_form_agrees_with_reference(config: MlaConfig, tokens_per_scale: int) -> None:
    inputs, cache_scale = quantized(mla_inputs([40, 0, 1, 17], T=2, H=20), tokens_per_scale)
    wanted = mla_decode_scaled_reference(*inputs.args, cache_scale)
    for splits in (1, 4):
        assert mismatch(run_form(config, inputs, splits, cache_scale), wanted) is None


@pytest.mark.parametrize(("R", "r", "page_size"), [(32, 16, 16), (24, 8, 10)])
def test_op_agrees_with_reference(R: int, r: int, page_size: int) -> None:
    raw = mla_inputs([33, 9], H=5, R=R, r=r, page_size=page_size)
    inputs, cache_scale = quantized(raw, page_size // 2)
    got = helix_triton.mla_decode.scaled(*inputs.args, cache_scale)
    assert mismatch(got, mla_decode_scaled_reference(*inputs.args, cache_scale)) is None


def test_quantiser_keeps_the_largest_value_and_rounds_to_3_bits() -> None:
    cache = torch.randn(3, 8, 32)
    cache[1] = 0.0
    values, scales = quantize_cache_reference(cache, 4)
    assert values.dtype == torch.float8_e4m3fn and scales.shape == (3, 2)
    back = dequantize_cache_reference(values, scales, torch.float64)
    assert (back[1] == 0).all()
    largest = cache.view(3, 2, -1).abs().amax(dim=2)
    torch.testing.assert_close(back.view(3, 2, -1).abs().amax(dim=2), largest.double())
    normal = cache.abs() > (largest / 448 * 2**-6).repeat_interleave(4, 1)[..., None]
    relative = ((back - cache) / cache)[normal].abs().max()
    assert relative <= 2**-4 + 1e-6  # half a step of a 3-bit mantissa


def test_fake_says_what_the_kernel_returns() -> None:
    inputs, cache_scale = quantized(mla_inputs([3, 20], T=2, H=5), 8)
    torch.library.opcheck(
        helix_triton.mla_decode.scaled,
        (*inputs.args, cache_scale),
        test_utils="test_faketensor",  # the schema check would multiply FP8 values
    )


def relative_rms(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b).norm() / b.norm()).item()


# e4m3 has 3 mantissa bits: a value is off by up to 2**-4, 2.6 % rms. That is the error of the values, and times the
# spread of the scores (q and k normal, width R + r) the error of the scores, which weights inherit. It doesn't shrink
# with the number of slots, nor by the merge: the output is itself such an average, as small as its error.
# Measured: 3.6 % to 4.9 % a rank, 3.7 % to 5.4 % after the merge of 4.
VALUE_ERROR, SCALE, R, ROPE = 0.026, 0.2, 64, 16
BOUND = 1.2 * VALUE_ERROR * math.hypot(1.0, SCALE * math.sqrt(R + ROPE))
KERNEL_BOUND = 2e-6  # what the kernel's own float32 arithmetic may add


def test_error_against_float64_per_rank_and_after_the_merge() -> None:
    parts, lses, exact_parts, exact_lses = [], [], [], []
    query = mla_inputs([1], H=16, R=R, r=ROPE, scale=SCALE)
    for rank in range(RANKS):
        own = mla_inputs([48 + 8 * rank], H=16, R=R, r=ROPE, scale=SCALE, seed=rank)
        shard = replace(own, q_latent=query.q_latent, q_rope=query.q_rope)
        inputs, cache_scale = quantized(shard, 8)
        o, lse = helix_triton.mla_decode.scaled(*inputs.args, cache_scale)
        exact_o, exact_lse = mla_decode_reference(*shard.to(torch.float64).args)
        assert relative_rms(o, exact_o) <= BOUND
        dequantized = dequantize_cache_reference(inputs.cache, cache_scale, torch.float64)
        same = replace(shard.to(torch.float64), cache=dequantized)
        assert relative_rms(o, mla_decode_reference(*same.args)[0]) <= KERNEL_BOUND
        parts, lses = [*parts, o], [*lses, lse]
        exact_parts, exact_lses = [*exact_parts, exact_o], [*exact_lses, exact_lse]
    merged = helix.merge_lse(torch.stack(parts), torch.stack(lses))
    exact = helix.merge_lse(torch.stack(exact_parts), torch.stack(exact_lses))
    assert relative_rms(merged, exact) <= BOUND
