"""cache_append into FP8, alone and with norm and rope, and gqa_decode out of it: kernels against their references."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import helix_compile.kernels.catalog  # noqa: F401  registers the kernels
from helix_compile.kernels.reference import cache_append_reference, gqa_decode_reference
from helix_compile.kernels.reference_fp8 import FP8, entries_of_rows, quantize
from helix_compile.kernels.reference_fused import cache_append_norm_rope_reference
from helix_compile.layout.cache_bytes import ds_mla_bytes, index_key_at, rope_at, scales_at
from tests.kernels.test_reference_fp8 import hard_values
from tests.support.gqa import GqaStep
from tests.support.mla import mismatch

helix_triton = torch.ops.helix_triton
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PAGE, PAGES, B, T = 5, 4, 3, 4


def step(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Page table, slots with some that are not this rank's, visible."""
    slots = torch.randint(0, PAGE * PAGES - T, (B, 1), generator=generator) + torch.arange(T)
    slots[torch.rand(B, T, generator=generator) < 0.3] = -1
    return torch.randperm(B * PAGES, generator=generator).view(B, PAGES), slots, (slots + 1).int()


def values(width: int, dtype: torch.dtype, generator: torch.Generator, *heads: int) -> Tensor:
    """Ties of e4m3, values a hair beside them, some far beyond 448, one block of zeros."""
    hard = torch.from_numpy(hard_values())
    hard = hard[hard.abs() < 6e4].float()  # what float16 holds
    drawn = torch.randint(0, len(hard), (B, T, *heads, width), generator=generator)
    picked = hard[drawn].to(dtype)
    picked[0, 0] = 0
    return picked


def both(op: Any, reference: Any, cache: Tensor, *args: Any, **keywords: Any) -> None:
    mine, theirs = cache.clone(), cache.clone()
    out = op(mine, *args, **keywords)
    assert torch.equal(out, reference(theirs, *args, **keywords))
    assert torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8))


def _unused(name: str, R: int, r: int, width: int, key_bytes: int) -> Tensor:
    """Bytes of a row that stand between its parts."""
    body, used = (R + r, R + r) if name == "e4m3" else (ds_mla_bytes(R, r), rope_at(R) + 2 * r)
    unused = torch.ones(width, dtype=torch.bool)
    unused[:used] = False
    if name == "ds_mla":
        unused[R : scales_at(R)] = True
    if key_bytes:
        unused[index_key_at(body) : index_key_at(body) + key_bytes] = False
    return unused


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("R", "r"), [(20, 6), (150, 8), (512, 64)])
@pytest.mark.parametrize("index", [0, 16])
@pytest.mark.parametrize("name", ["e4m3", "ds_mla"])
def test_bits_of_an_append(name: str, index: int, R: int, r: int, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    keywords: dict[str, Tensor] = {"cache_scale": torch.tensor(0.7)} if name == "e4m3" else {}
    width = R + r if name == "e4m3" else ds_mla_bytes(R, r)
    if index:
        keywords["index_key"] = torch.randn(B, T, index, generator=draw).to(dtype)
        width = index_key_at(index_key_at(width) + index * dtype.itemsize)
    cache = torch.full((B * PAGES, PAGE, width), 0x55, dtype=torch.uint8)
    cache[..., _unused(name, R, r, width, index * dtype.itemsize)] = 0  # the reference writes whole rows
    cache = cache.view(FP8) if name == "e4m3" and not index else cache
    parts = values(R, dtype, draw), values(r, dtype, draw)
    both(helix_triton.cache_append, cache_append_reference, cache, *step(draw), *parts, **keywords)


def test_bits_of_heads() -> None:
    draw, K, D = torch.Generator().manual_seed(0), 3, 16
    cache = torch.full((B * PAGES, PAGE, K, 2 * D), 0x55, dtype=torch.uint8).view(FP8)
    parts = [values(D, torch.bfloat16, draw, K) for _ in range(2)]
    scale = torch.tensor(0.3)
    both(helix_triton.cache_append, cache_append_reference, cache, *step(draw), *parts, cache_scale=scale)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("name", ["e4m3", "ds_mla"])
def test_norm_and_rope_before_it(name: str, interleaved: bool) -> None:
    """Norm and rope are sums whose order is the kernel's: rarely an entry is the neighbouring value of e4m3."""
    draw, R, r = torch.Generator().manual_seed(0), 150, 8
    keywords: dict[str, Tensor] = {"cache_scale": torch.tensor(0.01)} if name == "e4m3" else {}
    width = R + r if name == "e4m3" else ds_mla_bytes(R, r)
    cache = torch.zeros(B * PAGES, PAGE, width, dtype=torch.uint8)
    cache = cache.view(FP8) if name == "e4m3" else cache
    latent, k_rope = torch.randn(B, T, R, generator=draw), torch.randn(B, T, r, generator=draw)
    angle = torch.randn(B, T, r // 2, generator=draw).repeat(1, 1, 2)
    weight = torch.rand(R, generator=draw) + 0.5
    args = (*step(draw), latent, k_rope, weight, 1e-6, angle.cos(), angle.sin(), interleaved)
    mine, theirs = cache.clone(), cache.clone()
    helix_triton.cache_append.norm_rope(mine, *args, **keywords)
    cache_append_norm_rope_reference(theirs, *args, **keywords)
    got, wanted = (entries_of_rows(c.flatten(0, 1), R, r, torch.float64, *keywords.values()) for c in (mine, theirs))
    off = (got - wanted).abs() / wanted.abs().clamp(min=1e-3)
    assert float(off.max()) <= 1 / 8 + 1e-6 and float((off > 1e-6).double().mean()) <= 0.002
    assert float((wanted != 0).double().mean()) > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gqa_decode(dtype: torch.dtype) -> None:
    scale = torch.tensor(0.011)
    q, k, v, *rest = GqaStep((33, 0, 1, 17), 2, 2, 3, 24, 16, 8, dtype).arguments(0)
    k, v = (quantize(x, scale) for x in (k, v))
    first = (rest[1] - 9).clamp(min=0)
    for window in (None, first):
        got = helix_triton.gqa_decode(q, k, v, *rest, first=window, cache_scale=scale)
        wanted = gqa_decode_reference(q.double(), k, v, *rest, first=window, cache_scale=scale)
        if dtype is torch.float32:
            assert mismatch(got, wanted) is None
        else:
            torch.testing.assert_close(got[0].double(), wanted[0], rtol=0, atol=0.02 * float(wanted[0].abs().max()))
