"""pack_heads and pack_heads.splits against their references: the layout to the byte, the merge to rounding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import helix_compile.kernels.catalog  # noqa: F401
from helix_compile.ir.ops import helix
from helix_compile.kernels.pack_heads import PACK_HEADS, PACK_SPLITS
from helix_compile.kernels.reference_fused import pack_splits_reference
from helix_compile.kernels.registry import Site
from tests.support.kernel_checks import (
    CAPACITY,
    INTERPRETED,
    assert_case_is_complete,
    assert_kernel_close,
    check_op,
    drawn,
    packed_by_hand,
    poisoned_memory,
    unpacked_by_hand,
)

triton_ops = torch.ops.helix_triton
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
WIDTHS = (1, 5, 16, 33, 130, 512)


def splits_of(
    shape: tuple[int, ...], dead: float, spread: float, splits_first: bool, seed: int
) -> tuple[Tensor, Tensor]:
    """partial_o [B, T, H, S, W] and lse [B, T, H, S]; dead splits hold NaN; memory in that order or S first."""
    generator = torch.Generator().manual_seed(seed)
    o = torch.randn(shape, generator=generator)
    lse = torch.randn(shape[:-1], generator=generator) * spread
    gone = torch.rand(shape[:-1], generator=generator) < dead
    o.masked_fill_(gone[..., None], torch.nan)
    lse.masked_fill_(gone, -torch.inf)
    if splits_first:
        o, lse = (x.movedim(3, 0).contiguous().movedim(0, 3) for x in (o, lse))
    return o, lse


@drawn(25)
@given(
    peers=st.integers(1, 4),
    B=st.integers(1, 3),
    T=st.sampled_from((1, 2, 5)),
    h=st.sampled_from((1, 2, 5)),
    W=st.sampled_from(WIDTHS),
    dtype=st.sampled_from(FLOATS),
)
def test_pack_is_the_reference_to_the_byte(peers: int, B: int, T: int, h: int, W: int, dtype: torch.dtype) -> None:
    o = torch.randn(B, T, peers * h, W).to(dtype)
    lse = torch.randn(B, T, peers * h)
    o[0, 0, 0], lse[0, 0, 0] = torch.nan, -torch.inf
    with poisoned_memory():
        got = triton_ops.pack_heads(o, lse, peers)
    expected = packed_by_hand(o, lse, peers)
    assert got.dtype == expected.dtype
    assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("dtype", FLOATS)
def test_references_lay_out_alike(dtype: torch.dtype) -> None:
    o, lse = splits_of((2, 3, 8, 4, 6), 0.5, 1.0, False, 7)
    merged, merged_lse = o[..., 0, :].to(dtype).contiguous(), lse[..., 0].contiguous()
    buffer = triton_ops.pack_heads(merged, merged_lse, 4)
    assert torch.equal(buffer.view(torch.uint8), helix.pack_heads(merged, merged_lse, 4).view(torch.uint8))
    got = triton_ops.pack_heads.splits(o, lse, 4, dtype)
    expected = pack_splits_reference(o, lse, 4, dtype)
    assert got.dtype == expected.dtype and got.shape == expected.shape
    for ours, spec in zip(
        helix.unpack_heads(got, merged, merged_lse), helix.unpack_heads(expected, merged, merged_lse), strict=True
    ):
        assert_kernel_close(ours, spec)


@drawn(40)
@given(
    peers=st.integers(1, 4),
    B=st.integers(1, 3),
    T=st.sampled_from((1, 2, 5)),
    h=st.sampled_from((1, 2, 3)),
    splits=st.sampled_from((1, 2, 3, 4, 8, 9, 20)),
    W=st.sampled_from(WIDTHS),
    dead=st.sampled_from((0.0, 0.5, 1.0)),
    spread=st.sampled_from((1e-3, 1.0, 80.0, 1e4)),
    dtype=st.sampled_from(FLOATS),
    splits_first=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_splits_are_merged_into_the_buffer(
    peers: int,
    B: int,
    T: int,
    h: int,
    splits: int,
    W: int,
    dead: float,
    spread: float,
    dtype: torch.dtype,
    splits_first: bool,
    seed: int,
) -> None:
    o, lse = splits_of((B, T, peers * h, splits, W), dead, spread, splits_first, seed)
    with poisoned_memory():
        got = triton_ops.pack_heads.splits(o, lse, peers, dtype)
    o_like = o.new_empty(o[..., 0, :].shape, dtype=dtype)
    got_o, got_lse = unpacked_by_hand(got, o_like, lse[..., 0])
    assert_kernel_close(got_lse, torch.logsumexp(lse, 3))
    assert_kernel_close(got_o, helix.merge_lse(o.movedim(3, 0), lse.movedim(3, 0)))


def test_all_splits_dead_but_one() -> None:
    o, lse = splits_of((2, 1, 4, 5, 24), 0.0, 2.0, False, 1)
    o[:, :, :, [0, 1, 2, 4]] = torch.nan
    lse[:, :, :, [0, 1, 2, 4]] = -torch.inf
    got = triton_ops.pack_heads.splits(o, lse, 2, torch.float32)
    expected = helix.pack_heads(o[:, :, :, 3].contiguous(), lse[:, :, :, 3].contiguous(), 2)
    assert torch.equal(got, expected)


def test_a_nan_of_a_live_split_reaches_the_buffer() -> None:
    o, lse = splits_of((1, 1, 2, 3, 4), 0.0, 1.0, False, 2)
    lse[0, 0, 0, 1] = torch.nan
    rows = triton_ops.pack_heads.splits(o, lse, 2, torch.float32)
    assert rows[0].isnan().all() and rows[1].isfinite().all()


def test_lse_of_far_apart_splits_is_natural_log() -> None:
    lse = torch.tensor([[[[700.0, 700.0, -700.0]]], [[[-3e4, -torch.inf, -3e4]]]])
    buffer = triton_ops.pack_heads.splits(torch.ones(2, 1, 1, 3, 2), lse, 1, torch.float32)
    expected = torch.tensor([700.0, -3e4]) + torch.log(torch.tensor(2.0))
    torch.testing.assert_close(buffer[0, :2], expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_they_refuse_and_what_they_compile(dtype: torch.dtype) -> None:
    lse = torch.zeros(1, 2, 128)
    site = Site("pack_heads", (torch.zeros(1, 2, 128, 512, dtype=dtype), lse, 4), CAPACITY)
    assert PACK_HEADS.supports(site, INTERPRETED) is None
    doubles = (torch.zeros(1, 2, 128, 512, dtype=torch.float64), lse.double(), 4)
    assert "float64" in str(PACK_HEADS.supports(Site("pack_heads", doubles, CAPACITY), INTERPRETED))
    splits = (torch.zeros(1, 2, 128, 4, 512), torch.zeros(1, 2, 128, 4), 4, dtype)
    fused = Site("pack_heads.splits", splits, CAPACITY)
    assert PACK_SPLITS.supports(fused, INTERPRETED) is None
    wide = Site("pack_heads.splits", (*splits[:3], torch.float64), CAPACITY)
    assert "float64" in str(PACK_SPLITS.supports(wide, INTERPRETED))
    for case in (*PACK_HEADS.cases(site, INTERPRETED), *PACK_SPLITS.cases(fused, INTERPRETED)):
        assert_case_is_complete(case)
        assert {"o_ptr", "out_o_ptr", "stride_o_row", "stride_out_o_P"} <= set(case.divisible_by_16)


@pytest.mark.parametrize("dtype", FLOATS)
def test_ops_are_what_their_fakes_say(dtype: torch.dtype) -> None:
    o, lse = splits_of((2, 1, 4, 3, 6), 0.3, 1.0, False, 3)
    check_op(triton_ops.pack_heads.splits, o, lse, 2, dtype)
    check_op(triton_ops.pack_heads.default, o[:, :, :, 0].to(dtype).contiguous(), lse[..., 0].contiguous(), 2)
