"""merge_lse against its reference: parts where the exchange left them, dead peers, rows that nobody saw."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import helix_compile.kernels.catalog  # noqa: F401
from helix_compile.ir.ops import helix
from helix_compile.kernels.merge import MERGE_LSE
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


def parts_of(
    shape: tuple[int, ...], dead: float, spread: float, dtype: torch.dtype, seed: int
) -> tuple[Tensor, Tensor]:
    """Parts `shape` and their lse; a share `dead` of them is dead and holds NaN."""
    generator = torch.Generator().manual_seed(seed)
    parts = torch.randn(shape, generator=generator)
    lse = torch.randn(shape[:-1], generator=generator) * spread
    gone = torch.rand(shape[:-1], generator=generator) < dead
    return parts.masked_fill(gone[..., None], torch.nan).to(dtype), lse.masked_fill(gone, -torch.inf)


@drawn(40)
@given(
    peers=st.integers(1, 9),
    B=st.integers(1, 3),
    T=st.sampled_from((1, 2, 5)),
    h=st.sampled_from((1, 2, 5)),
    W=st.sampled_from((1, 2, 5, 16, 33, 128, 130, 512)),
    dead=st.sampled_from((0.0, 0.5, 1.0)),
    spread=st.sampled_from((1e-3, 1.0, 80.0, 1e4)),
    dtype=st.sampled_from((torch.float32, torch.float32, torch.bfloat16, torch.float16)),
    packed=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_parts_of_any_shape(
    peers: int, B: int, T: int, h: int, W: int, dead: float, spread: float, dtype: torch.dtype, packed: bool, seed: int
) -> None:
    if packed and peers > 1:  # where all_to_all leaves them: strided views of one buffer
        o, lse = parts_of((B, T, peers * h, W), dead, spread, dtype, seed)
        parts, lse_P = helix.unpack_heads(packed_by_hand(o, lse, peers), o, lse)
    else:
        parts, lse_P = parts_of((peers, B, T, h, W), dead, spread, dtype, seed)
    with poisoned_memory():
        got = triton_ops.merge_lse(parts, lse_P)
    assert got.dtype == dtype
    # the reference on wide parts: the kernel's one rounding is all that may differ
    assert_kernel_close(got, helix.merge_lse(parts.float(), lse_P))


def test_transposed_inputs() -> None:
    parts, lse = parts_of((3, 2, 2, 4, 6), 0.3, 1.0, torch.float32, 1)
    turned = parts.transpose(3, 4).contiguous().transpose(3, 4)
    got = triton_ops.merge_lse(turned, lse.transpose(2, 3).contiguous().transpose(2, 3))
    assert_kernel_close(got, helix.merge_lse(parts, lse))


def test_all_dead_but_one_is_that_part() -> None:
    parts, lse = parts_of((4, 2, 1, 3, 20), 0.0, 1.0, torch.float32, 2)
    lse[[0, 1, 3]] = -torch.inf
    parts[[0, 1, 3]] = torch.nan
    assert torch.equal(triton_ops.merge_lse(parts, lse), parts[2])


@pytest.mark.parametrize("where", ["lse", "part"])
def test_a_nan_of_a_live_part_reaches_the_output(where: str) -> None:
    parts, lse = parts_of((3, 2, 1, 2, 8), 0.0, 1.0, torch.float32, 3)
    (lse if where == "lse" else parts)[1, 0, 0, 1] = torch.nan
    got = triton_ops.merge_lse(parts, lse)
    assert got[0, 0, 1].isnan().all()
    assert got.isnan().sum() == got.shape[-1]


@drawn(10)
@given(
    groups=st.integers(1, 4), splits=st.integers(1, 5), dead=st.sampled_from((0.0, 0.4, 0.8)), seed=st.integers(0, 1000)
)
def test_two_levels_are_one_level(groups: int, splits: int, dead: float, seed: int) -> None:
    B, T, H, W = 2, 1, 3, 12
    parts, lse = parts_of((groups, B, T, H, splits, W), dead, 3.0, torch.float32, seed)
    flat = (x.movedim(4, 1).flatten(0, 1) for x in (parts, lse))
    merged = []
    for o, lse_part in zip(parts, lse, strict=True):
        buffer = triton_ops.pack_heads.splits(o, lse_part, 1, torch.float32)
        merged.append(unpacked_by_hand(buffer, o[:, :, :, 0], lse_part[..., 0]))
    outer = [torch.stack(x) for x in zip(*merged, strict=True)]
    assert_kernel_close(triton_ops.merge_lse(*outer), triton_ops.merge_lse(*flat))


def test_what_it_refuses_and_what_it_compiles() -> None:
    parts, lse = parts_of((4, 2, 1, 32, 512), 0.0, 1.0, torch.bfloat16, 4)
    site = Site("merge_lse", (parts, lse), CAPACITY)
    assert MERGE_LSE.supports(site, INTERPRETED) is None
    wide = Site("merge_lse", (parts.double(), lse.double()), CAPACITY)
    assert "float64" in str(MERGE_LSE.supports(wide, INTERPRETED))
    (case,) = MERGE_LSE.cases(site, INTERPRETED)
    assert_case_is_complete(case)
    assert set(case.divisible_by_16) == set(case.signature)
    odd = Site("merge_lse", (parts[..., :1, :5], lse[..., :1]), CAPACITY)
    (case,) = MERGE_LSE.cases(odd, INTERPRETED)  # a view behind one lse is aligned to 4 bytes only
    assert set(case.divisible_by_16) == {"lse_ptr", "out_ptr"}


def test_op_is_what_its_fake_says() -> None:
    check_op(triton_ops.merge_lse.default, *parts_of((3, 2, 1, 2, 8), 0.3, 1.0, torch.float32, 5))
