"""cache_append and cache_append.norm_rope against their references: the whole cache is compared, poison included."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import helix_compile.kernels.catalog  # noqa: F401
from helix_compile.ir.ops import helix
from helix_compile.kernels.cache_append import CACHE_APPEND, CACHE_APPEND_NORM_ROPE
from helix_compile.kernels.reference_fused import cache_append_norm_rope_reference
from helix_compile.kernels.registry import Site
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


@dataclass
class Step:
    """The arguments of an append; unused pages hold NaN, unused slots of used pages 1e4, skipped tokens NaN."""

    cache: Tensor
    page_table: Tensor
    slots: Tensor
    visible: Tensor
    latent: Tensor
    k_rope: Tensor

    def args(self, cache: Tensor, wide: bool = False) -> tuple[Tensor, ...]:
        values = (self.latent, self.k_rope)
        latent, k_rope = (x.float() for x in values) if wide else values
        return cache, self.page_table, self.slots, self.visible, latent, k_rope


def step_of(B: int, T: int, R: int, r: int, page: int, mine: float, dtype: torch.dtype, seed: int) -> Step:
    generator = torch.Generator().manual_seed(seed)
    pages = -(-2 * T // page) + 1  # of a sequence; the last one stays unused
    order = torch.randperm(B * pages + 3, generator=generator)
    page_table = order[: B * pages].view(B, pages).clone()
    cache = torch.full((B * pages + 3, page, R + r), torch.nan)
    cache[page_table[:, :-1].flatten()] = 1e4
    slots = torch.stack([torch.randperm(2 * T, generator=generator)[:T] for _ in range(B)])
    slots[torch.rand(B, T, generator=generator) >= mine] = -1
    page_table[(slots == -1).all(1)] = -(2**40)  # nothing of these is written
    kv = torch.randn(B, T, R + r, generator=generator).to(dtype)
    kv[slots == -1] = torch.nan
    visible = torch.randint(0, 99, (B, T), generator=generator, dtype=torch.int32)
    return Step(cache.to(dtype), page_table, slots, visible, kv[..., :R], kv[..., R:])


SIZES = {
    "B": st.integers(1, 3),
    "T": st.sampled_from((1, 2, 5)),
    "R": st.sampled_from((1, 8, 24, 33)),
    "r": st.sampled_from((2, 6, 16)),
    "page": st.sampled_from((1, 5, 16)),
    "mine": st.sampled_from((0.0, 0.5, 1.0)),
    "seed": st.integers(0, 1000),
}
DTYPES = st.sampled_from((torch.float32, torch.bfloat16, torch.float16))


@drawn(40)
@given(**SIZES, dtype=DTYPES)
def test_append_writes_mine_and_nothing_else(
    B: int, T: int, R: int, r: int, page: int, mine: float, seed: int, dtype: torch.dtype
) -> None:
    step = step_of(B, T, R, r, page, mine, dtype, seed)
    got, expected = step.cache.clone(), step.cache.clone()
    with poisoned_memory():
        seen = triton_ops.cache_append(*step.args(got))
    helix.cache_append(*step.args(expected))
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(seen, step.visible) and seen.data_ptr() != step.visible.data_ptr()


@pytest.mark.parametrize("by_kernel", [False, True])
def test_heads_of_k_and_v_lie_side_by_side(by_kernel: bool) -> None:
    """Slot by slot, against a loop; K and V as they come, [B, K, T, D] transposed; nothing else is touched."""
    B, T, K, Dk, Dv, page = 2, 3, 3, 6, 10, 4
    cache = torch.full((B * 2, page, K, Dk + Dv), 7.0)
    table, slots = torch.tensor([[3, 0], [2, 1]]), torch.tensor([[2, -1, 5], [-1, 0, 7]])
    k, v = (torch.randn(B, K, T, D).transpose(1, 2) for D in (Dk, Dv))
    wanted = cache.clone()
    for b in range(B):
        for t in range(T):
            if (slot := int(slots[b, t])) >= 0:
                for head in range(K):
                    wanted[table[b, slot // page], slot % page, head] = torch.cat([k[b, t, head], v[b, t, head]])
    visible = torch.arange(B * T, dtype=torch.int32).view(B, T)
    append = triton_ops.cache_append if by_kernel else helix.cache_append
    assert torch.equal(append(cache, table, slots, visible, k, v), visible)
    assert torch.equal(cache, wanted)


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float16])
def test_append_rounds_to_the_dtype_of_the_cache(cache_dtype: torch.dtype) -> None:
    step = step_of(2, 2, 8, 4, 4, 1.0, torch.float32, 1)
    got, expected = step.cache.to(cache_dtype), step.cache.clone()
    triton_ops.cache_append(*step.args(got))
    helix.cache_append(*step.args(expected))
    kept = expected < 1e3
    assert_kernel_close(got[kept], expected[kept])


def assert_norm_rope(step: Step, interleaved: bool, rows: str, eps: float, seed: int) -> None:
    """The kernel's cache is the reference's in float32, but for roundings to the dtype of the step."""
    dtype = step.latent.dtype
    generator = torch.Generator().manual_seed(seed)
    B, T, r = step.k_rope.shape
    weight = torch.randn(step.latent.shape[2], generator=generator).to(dtype)
    angles = torch.randn(2, B if rows == "batch" else 1, T, r, generator=generator).to(dtype)
    cos, sin = angles.expand(2, B, T, r) if rows == "expanded" else angles
    got, expected = step.cache.clone(), step.cache.float().clone()
    with poisoned_memory():
        seen = triton_ops.cache_append.norm_rope(*step.args(got), weight, eps, cos, sin, interleaved)
    wide = (weight.float(), eps, cos.float(), sin.float(), interleaved)
    cache_append_norm_rope_reference(*step.args(expected, wide=True), *wide)
    assert torch.equal(seen, step.visible)
    written = (expected != step.cache.float()) & expected.isfinite()
    torch.testing.assert_close(got[~written], step.cache[~written], rtol=0, atol=0, equal_nan=True)
    # two roundings: the normed latent before its weight, and the product
    assert_kernel_close(got[written], expected[written], ulps=2)


@drawn(40)
@given(
    **SIZES,
    dtype=DTYPES,
    interleaved=st.booleans(),
    rows=st.sampled_from(("batch", "one", "expanded")),
    eps=st.sampled_from((1e-6, 1e-2)),
)
def test_norm_and_rope_of_any_shape(
    B: int,
    T: int,
    R: int,
    r: int,
    page: int,
    mine: float,
    seed: int,
    dtype: torch.dtype,
    interleaved: bool,
    rows: str,
    eps: float,
) -> None:
    step = step_of(B, T, R, r, page, mine, dtype, seed)
    assert_norm_rope(step, interleaved, rows, eps, seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_and_rope_at_real_widths(dtype: torch.dtype) -> None:
    assert_norm_rope(step_of(4, 2, 512, 64, 128, 0.7, dtype, 2), True, "batch", 1e-6, 2)


def test_tiny_and_huge_latents() -> None:
    step = step_of(2, 2, 24, 6, 4, 1.0, torch.float32, 3)
    step.latent[0] *= 1e-4  # eps of 1e-6 counts here
    step.latent[1] *= 1e4
    assert_norm_rope(step, False, "batch", 1e-6, 3)


def test_rows_of_any_layout() -> None:
    step = step_of(3, 2, 8, 4, 4, 1.0, torch.float32, 4)
    plain = step.cache.clone()
    helix.cache_append(*step.args(plain))
    turned = Step(
        step.cache,
        step.page_table.T.contiguous().T,
        step.slots.T.contiguous().T,
        step.visible.T.contiguous().T,
        step.latent.mT.contiguous().mT,
        step.k_rope.transpose(0, 1).contiguous().transpose(0, 1),
    )
    both = torch.full((*step.cache.shape[:2], 2 * step.cache.shape[2]), torch.nan)
    inner = both[..., : step.cache.shape[2]].copy_(step.cache)  # a view with wider slots
    assert torch.equal(triton_ops.cache_append(*turned.args(inner)), step.visible)
    torch.testing.assert_close(inner, plain, rtol=0, atol=0, equal_nan=True)
    assert both[..., step.cache.shape[2] :].isnan().all()


def test_what_they_refuse_and_what_they_compile() -> None:
    step = step_of(2, 1, 512, 64, 128, 1.0, torch.bfloat16, 5)
    args = step.args(step.cache)
    site = Site("cache_append", args, CAPACITY)
    assert CACHE_APPEND.supports(site, INTERPRETED) is None
    wide = Site("cache_append", (args[0].double(), *args[1:]), CAPACITY)
    assert "float64" in str(CACHE_APPEND.supports(wide, INTERPRETED))
    turned = Site("cache_append", (args[0].mT, *args[1:]), CAPACITY)
    assert "stride" in str(CACHE_APPEND.supports(turned, INTERPRETED))
    angle = torch.zeros(2, 1, 64, dtype=torch.bfloat16)
    more = (torch.ones(512, dtype=torch.bfloat16), 1e-6, angle, angle, True)
    fused = Site("cache_append.norm_rope", (*args, *more), CAPACITY)
    assert CACHE_APPEND_NORM_ROPE.supports(fused, INTERPRETED) is None
    cases = (*CACHE_APPEND.cases(site, INTERPRETED), *CACHE_APPEND_NORM_ROPE.cases(fused, INTERPRETED))
    for case in cases:
        assert_case_is_complete(case)
        wanted = {"cache_ptr", "latent_ptr", "k_rope_ptr", "stride_cache_slot", "stride_latent_B"}
        assert wanted <= set(case.divisible_by_16)


def test_ops_are_what_their_fakes_say() -> None:
    step = step_of(2, 2, 8, 4, 4, 1.0, torch.float32, 6)
    args, angle = step.args(step.cache), torch.randn(2, 2, 4)
    check_op(triton_ops.cache_append.default, *args)
    check_op(triton_ops.cache_append.norm_rope, *args, torch.randn(8), 1e-6, angle, angle, True)
