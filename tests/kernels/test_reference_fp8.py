"""Rounding of FP8 caches against tables written down by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from helix_compile.kernels.reference_fp8 import FP8, entries_of_rows, pack_ds_mla, quantize, rounded_once, unpack_ds_mla
from helix_compile.layout.cache_bytes import ds_mla_bytes
from tests.support.fp8 import VALUES, by_way_of_float32, ds_mla_latent, to_bfloat16, to_nearest

HALFWAY = (VALUES[1:] + VALUES[:-1]) / 2


def hard_values() -> np.ndarray:
    """Every value of e4m3, every tie, both by a hair more and less than float32 can say, and what lies beyond."""
    grid = np.concatenate([VALUES, HALFWAY, [463.9, 464.0, 480.0, 1e9, 1e-30]])
    near = np.concatenate([grid, grid * (1 + 2.0**-40), grid * (1 - 2.0**-40)])
    return np.concatenate([near, -near])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_e4m3_is_to_nearest_even_and_clamped(dtype: torch.dtype) -> None:
    x = torch.from_numpy(hard_values()).to(dtype)
    got = quantize(x, torch.tensor(1.0))
    expected = to_nearest(x.double().numpy())
    assert got.dtype is FP8 and np.array_equal(got.double().numpy(), expected)


def test_rounding_twice_would_show() -> None:
    x = hard_values()
    assert (to_nearest(x) != by_way_of_float32(x)).sum() > 100  # what torch makes of float64 by itself


def test_every_value_survives_its_scale() -> None:
    for scale in (1.0, 0.37, 3e-5, 1e4):
        one = torch.tensor(scale)
        stored = quantize(torch.from_numpy(VALUES) * one.double(), one)
        assert np.array_equal(entries_of_rows(stored, 0, 0, torch.float64, one), VALUES * one.double().item())


def test_bfloat16_is_rounded_once() -> None:
    x = torch.randn(4000, dtype=torch.float64) * torch.logspace(-20, 20, 4000, dtype=torch.float64)
    ties = torch.randn(4000).bfloat16().double() * (1 + 2.0**-8)
    x = torch.cat([x, ties, ties * (1 + 2.0**-40), ties * (1 - 2.0**-40)])
    got = rounded_once(x, torch.bfloat16)
    assert got.dtype is torch.bfloat16 and np.array_equal(got.double().numpy(), to_bfloat16(x.numpy()))


@pytest.mark.parametrize("R", [512, 128, 150, 20, 7])
def test_rows_of_ds_mla(R: int) -> None:
    """The last block of 150 has 22 values; a block of zeros stays zeros."""
    r, n = 6, 5
    latent = torch.randn(n, R, dtype=torch.float64) * torch.tensor([1e-4, 1.0, 30.0, 1e3, 0.0])[:, None]
    rope = torch.randn(n, r, dtype=torch.float64)
    rows = pack_ds_mla(latent, rope)
    assert rows.dtype is torch.uint8 and rows.shape == (n, ds_mla_bytes(R, r))
    back = unpack_ds_mla(rows, R, r, torch.float64).numpy()
    assert np.array_equal(back[:, :R], ds_mla_latent(latent.numpy()))
    assert np.array_equal(back[:, R:], to_bfloat16(rope.numpy()))
    assert (back[4, :R] == 0).all()


def test_656_bytes_as_vllm_lays_them_out() -> None:
    """512 e4m3, then 4 float32 scales, then 64 bfloat16."""
    latent, rope = torch.randn(3, 512), torch.randn(3, 64)
    (rows, *_) = (pack_ds_mla(latent, rope),)
    assert rows.shape == (3, 656)
    scales = rows[:, 512:528].contiguous().view(torch.float32)
    assert torch.equal(scales, latent.view(3, 4, 128).abs().amax(-1) / 448)
    assert torch.equal(rows[:, 528:].contiguous().view(torch.bfloat16), rope.bfloat16())
    assert torch.equal(rows[:, :512].view(FP8).float().view(3, 4, 128).abs().amax(-1), torch.full((3, 4), 448.0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_nan_stays_one(dtype: torch.dtype) -> None:
    x = torch.tensor([[1.0, torch.nan]], dtype=dtype)
    assert quantize(x, torch.tensor(1.0)).double().isnan().tolist() == [[False, True]]
    assert unpack_ds_mla(pack_ds_mla(x, x), 2, 2, torch.float64).isnan().tolist() == [[True, True, False, True]]
