"""rope_heads against its reference, and the reference against transformers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek

import helix_compile.kernels.catalog  # noqa: F401
from helix_compile.kernels.reference_fused import rms_norm_reference, rope_heads_reference, rope_reference
from helix_compile.kernels.registry import Site
from helix_compile.kernels.rope_heads import ROPE_HEADS
from tests.support.kernel_checks import (
    CAPACITY,
    INTERPRETED,
    assert_case_is_complete,
    assert_kernel_close,
    check_op,
    drawn,
    poisoned_memory,
)

triton_ops = torch.ops.helix_triton


@pytest.mark.parametrize("interleaved", [True, False])
def test_reference_is_the_formula_of_transformers(interleaved: bool) -> None:
    q, angle = torch.randn(2, 3, 4, 6), torch.randn(2, 4, 3).repeat(1, 1, 2)
    apply = deepseek.apply_rotary_pos_emb_interleave if interleaved else deepseek.apply_rotary_pos_emb
    expected, _ = apply(q, q, angle.cos(), angle.sin())
    got = rope_reference(q, angle.cos()[:, None], angle.sin()[:, None], interleaved)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_reference_is_the_formula_of_transformers(dtype: torch.dtype) -> None:
    norm = deepseek.DeepseekV3RMSNorm(24, eps=1e-3)
    norm.weight.data.normal_()
    norm, x = norm.to(dtype), torch.randn(5, 24).to(dtype)
    assert torch.equal(norm(x), rms_norm_reference(x, norm.weight, 1e-3))


@drawn(40)
@given(
    B=st.integers(1, 3),
    T=st.sampled_from((1, 2, 5)),
    H=st.sampled_from((1, 5, 16, 20, 128)),
    r=st.sampled_from((2, 6, 20, 64)),
    interleaved=st.booleans(),
    rows=st.sampled_from(("batch", "one", "expanded")),
    dtypes=st.sampled_from(
        (
            (torch.float32, torch.float32),
            (torch.bfloat16, torch.bfloat16),
            (torch.float16, torch.float16),
            (torch.bfloat16, torch.float32),
        )
    ),
)
def test_heads_of_any_shape(
    B: int, T: int, H: int, r: int, interleaved: bool, rows: str, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    q_dtype, angle_dtype = dtypes
    # as the model has it: the last r channels of a head, heads and tokens swapped
    q = torch.randn(B, T, H, r + 7).to(q_dtype).transpose(1, 2)[..., 7:]
    # halves that differ: cos and sin are read at both
    cos, sin = torch.randn(2, B if rows == "batch" else 1, T, r).to(angle_dtype)
    if rows == "expanded":
        cos, sin = cos.expand(B, T, r), sin.expand(B, T, r)
    with poisoned_memory():
        got = triton_ops.rope_heads(q, cos, sin, interleaved)
    assert got.dtype == q_dtype and got.is_contiguous()
    assert_kernel_close(got, rope_heads_reference(q.float(), cos.float(), sin.float(), interleaved))


def test_channels_that_are_not_dense() -> None:
    q, cos = torch.randn(2, 3, 8, 2).transpose(2, 3), torch.randn(2, 8, 2).transpose(1, 2)
    got = triton_ops.rope_heads(q, cos, cos, True)
    assert_kernel_close(got, rope_heads_reference(q, cos, cos, True))


def test_what_it_refuses_and_what_it_compiles() -> None:
    q = torch.zeros(2, 128, 1, 192, dtype=torch.bfloat16)[..., 128:]
    cos = torch.zeros(2, 1, 64, dtype=torch.bfloat16)

    def site(q: torch.Tensor) -> Site:
        return Site("rope_heads", (q, cos, cos, True), CAPACITY)

    assert ROPE_HEADS.supports(site(q), INTERPRETED) is None
    assert "float64" in str(ROPE_HEADS.supports(site(q.double()), INTERPRETED))
    assert "odd" in str(ROPE_HEADS.supports(site(q[..., :7]), INTERPRETED))
    (case,) = ROPE_HEADS.cases(site(q), INTERPRETED)
    assert_case_is_complete(case)
    assert {"q_ptr", "stride_q_B", "stride_q_H", "stride_q_T"} <= set(case.divisible_by_16)


def test_op_is_what_its_fake_says() -> None:
    q, cos = torch.randn(2, 5, 3, 8), torch.randn(2, 3, 8)
    check_op(triton_ops.rope_heads.default, q, cos, cos, True)
