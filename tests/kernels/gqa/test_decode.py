"""gqa_decode against torch's own attention, and the kernel against the reference by Triton's interpreter."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import helix_compile.kernels.catalog  # noqa: F401
from helix_compile.ir.ops import helix
from helix_compile.kernels import reference as reference_gqa
from helix_compile.kernels.gqa.decode import gqa_decode_triton, is_for_tma
from helix_compile.kernels.gqa.tiles import split_count
from helix_compile.kernels.registry import Capacity, Site, kernel_of, select_kernel
from helix_compile.kernels.target import KernelTarget, offline_target
from tests.support.gqa import GqaStep, first_slots, poison_below

PAGES = (1, 5, 16, 24)
GROUPS = ((1, 1), (4, 1), (1, 4), (2, 3), (1, 5), (1, 8), (1, 20))  # K KV heads, G query heads each
triton_gqa = torch.ops.helix_triton.gqa_decode


def deviation(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> float:
    """Largest deviation of o and lse over the largest value of each; rows without a key must be exact."""
    (o, lse), (expected_o, expected_lse) = got, expected
    dead = expected_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, dead) and torch.count_nonzero(o[dead]) == 0
    worst = 0.0
    for a, b in ((o[~dead], expected_o[~dead]), (lse[~dead], expected_lse[~dead])):
        assert torch.isfinite(a).all()
        if a.numel():
            worst = max(worst, float((a.double() - b.double()).abs().max() / b.abs().max()))
    return worst


@st.composite
def steps(draw: st.DrawFn) -> GqaStep:
    """Lengths around the borders of a page, empty sequences among them."""
    page = draw(st.sampled_from(PAGES))
    borders = st.sampled_from([0, 1, page - 1, page, page + 1, 2 * page, 3 * page + 1])
    K, G = draw(st.sampled_from(GROUPS))
    return GqaStep(
        lengths=tuple(draw(st.lists(borders, min_size=1, max_size=3))),
        T=draw(st.sampled_from([1, 2, 5])),
        K=K,
        G=G,
        Dk=draw(st.sampled_from([3, 16, 20, 64])),
        Dv=draw(st.sampled_from([5, 16, 40])),
        page_size=page,
        size=draw(st.sampled_from([1e-4, 1.0, 30.0])),
    )


@pytest.mark.parametrize("examples", [15, pytest.param(100, marks=pytest.mark.slow)])
def test_kernel_agrees_with_reference(examples: int) -> None:
    drawn = given(step=steps(), splits=st.sampled_from([None, 2, 8]), seed=st.integers(0, 9))
    settings(max_examples=examples, deadline=None)(drawn(_agrees))()


def _agrees(step: GqaStep, splits: int | None, seed: int) -> None:
    args = step.arguments(seed)
    got = triton_gqa(*args) if splits is None else gqa_decode_triton(*args, splits=splits)
    expected = helix.gqa_decode(*args)
    # the last bit of a score s moves its weight by s * 2^-23, in the reference too
    largest = float(torch.where(expected[1].isfinite(), expected[1], 0.0).abs().max())
    rounding = largest * 2**-23 if step.size > 1 else 0.0
    assert deviation(got, expected) <= 2e-6 + rounding


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("widths", [(16, 32), (64, 64)], ids=str)
@pytest.mark.parametrize("joint", [False, True])
def test_tma_form_agrees_with_reference(splits: int, widths: tuple[int, int], joint: bool) -> None:
    """The interpreter runs descriptors too; stale slots are read there, with weight 0.

    `joint`: K and V are views of one cache, as in the rewritten graph.
    """
    Dk, Dv = widths
    args = GqaStep((0, 1, 31, 33, 64), T=2, K=2, G=5, Dk=Dk, Dv=Dv, page_size=32).arguments()
    expected = helix.gqa_decode(*args)
    q, k_cache, v_cache, *rest = args
    if joint:
        both = torch.cat([k_cache, v_cache], dim=-1)
        k_cache, v_cache = both[..., :Dk], both[..., Dk:]
    assert is_for_tma(k_cache) and is_for_tma(v_cache)
    got = gqa_decode_triton(q, k_cache, v_cache, *rest, splits=splits, tma=True)
    assert deviation(got, expected) <= 2e-6


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("reach", [1, 7, 40, 500])
def test_windows(splits: int, tma: bool, reach: int) -> None:
    """What lies below the first slot that a row sees (by TMA: below its tile) is NaN; rows that see nothing are among them."""
    args = GqaStep((0, 1, 31, 65, 170), T=3, K=2, G=5, Dk=16, Dv=32, page_size=32).arguments()
    first = first_slots(args[4], reach)
    for cache in args[1:3]:
        poison_below(cache, args[3], args[4], first, 32 if tma else 1)
    expected = helix.gqa_decode(*args, first=first)
    assert deviation(gqa_decode_triton(*args, splits=splits, tma=tma, first=first), expected) <= 2e-6
    whole = helix.gqa_decode(*args, first=torch.zeros_like(first))
    assert reach < 500 or torch.equal(whole[0][:, 1], helix.gqa_decode(*args)[0][:, 1])


@pytest.mark.parametrize(
    ("shape", "strides", "offset"),
    [
        ((3, 16, 2, 16), (16 * 2 * 20, 40, 20, 1), 0),  # a slot of 80 bytes, but a head of 40
        ((3, 16, 2, 16), (16 * 2 * 16, 32, 16, 1), 4),  # an address that is no multiple of 16
        ((3, 16, 2, 16), (17 * 2 * 16, 32, 16, 1), 0),  # a gap between pages
        ((3, 16, 2, 16), (16 * 2 * 32, 64, 32, 2), 0),  # every second channel
    ],
)
def test_what_tma_can_not_describe_goes_by_pointers(shape: Any, strides: Any, offset: int) -> None:
    memory = torch.zeros(4000, dtype=torch.bfloat16)
    assert not is_for_tma(memory.as_strided(shape, strides, offset))


@pytest.mark.parametrize("width", [128, 192, 256])
def test_real_widths(width: int) -> None:
    args = GqaStep((130, 127), K=1, G=8, Dk=width, Dv=128, page_size=128).arguments()
    assert deviation(triton_gqa(*args), helix.gqa_decode(*args)) <= 2e-6


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_16_bit(dtype: torch.dtype, limit: float) -> None:
    """Looser than a device: the interpreter cuts bfloat16 off instead of rounding it."""
    args = GqaStep((40, 0, 17), T=2, G=5, dtype=dtype).arguments()
    exact = helix.gqa_decode(*(a.double() if a.is_floating_point() else a for a in args[:5]), args[5])
    for splits in (1, 2):
        o, lse = gqa_decode_triton(*args, splits=splits)
        assert o.dtype is dtype and lse.dtype is torch.float32
        assert deviation((o, lse), exact) <= limit


def test_workspaces_may_hold_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and parts come from new_empty: filled with NaN, none of it shows."""
    args = GqaStep((33, 0, 1), T=2).arguments()
    expected = helix.gqa_decode(*args)
    real = Tensor.new_empty

    def poisoned(self: Tensor, *sizes: object, **options: object) -> Tensor:
        made = real(self, *sizes, **options)  # type: ignore[arg-type]
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(Tensor, "new_empty", poisoned)
    for splits in (1, 4):
        assert deviation(gqa_decode_triton(*args, splits=splits), expected) <= 2e-6


def test_a_nan_that_is_seen_reaches_the_output() -> None:
    for cache in (1, 2):
        for splits in (1, 4):
            args = GqaStep((33,), G=2).arguments()
            args[cache][args[3][0, 1], 2, 0] = torch.nan
            for o in (helix.gqa_decode(*args)[0], gqa_decode_triton(*args, splits=splits)[0]):
                assert o[:, :, :2].isnan().all() and o[:, :, 2:].isfinite().all()


@pytest.mark.parametrize("cp", [2, 3])
def test_shards_merge_to_the_whole(cp: int) -> None:
    """Slots dealt to ranks, one rank empty: merge_lse over their partials is attention over all slots."""
    args = GqaStep((16,), T=1, K=2, G=3, page_size=16).arguments()
    whole = helix.gqa_decode(*args)[0]
    q, k, v, table, visible, scale = args
    bounds = [0, 0, 5, 16] if cp == 3 else [0, 16, 16]
    parts = []
    for first, last in pairwise(bounds):
        shard = [c[table[0, :1], first:last] for c in (k, v)]
        shard = [torch.cat([s, s.new_zeros(1, 1, *s.shape[2:])], 1).contiguous() for s in shard]
        seen = torch.full_like(visible, last - first)
        parts.append(triton_gqa(q, *shard, torch.zeros(1, 1, dtype=torch.int64), seen, scale))
    merged = helix.merge_lse(*(torch.stack(p) for p in zip(*parts, strict=True)))
    torch.testing.assert_close(merged, whole, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(("K", "G"), GROUPS)
def test_reference_is_attention(K: int, G: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against scaled_dot_product_attention in float64, whole and in chunks of queries."""
    step = GqaStep((11, 4, 1), T=3, K=K, G=G, Dk=20, Dv=12, page_size=4, dtype=torch.float64)
    q, k_cache, v_cache, table, visible, scale = args = step.arguments()
    o, lse = helix.gqa_decode(*args)
    for b, length in enumerate(step.lengths):
        k, v = (c[table[b]].flatten(0, 1)[:length].movedim(0, 1) for c in (k_cache, v_cache))
        mask = torch.arange(length) < visible[b, :, None]
        alive = visible[b] > 0
        expected = torch.nn.functional.scaled_dot_product_attention(
            q[b].movedim(0, 1)[None], k[None], v[None], mask, scale=scale, enable_gqa=True
        )[0].movedim(0, 1)
        scores = q[b].movedim(0, 1) @ k.repeat_interleave(G, 0).mT * scale
        expected_lse = scores.masked_fill(~mask, -torch.inf).logsumexp(-1).T
        torch.testing.assert_close(o[b, alive], expected[alive], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(lse[b], expected_lse, rtol=1e-12, atol=1e-12)
        assert torch.count_nonzero(o[b, ~alive]) == 0
    monkeypatch.setattr(reference_gqa, "SCORE_BYTES", 1)
    assert all(torch.allclose(a, b, rtol=1e-14) for a, b in zip(helix.gqa_decode(*args), (o, lse), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_fakes_agree(dtype: torch.dtype) -> None:
    args = GqaStep((5, 7), T=2, Dv=12, dtype=dtype).arguments()
    real = helix.gqa_decode(*args)
    fakes = [helix.gqa_decode(*(a.to("meta") for a in args[:5]), args[5])]
    if dtype is not torch.float64:
        fakes.append(triton_gqa(*(a.to("meta") for a in args[:5]), args[5]))
    for fake in fakes:
        for a, b in zip(real, fake, strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype


def site(width: int = 128, dtype: torch.dtype = torch.bfloat16, page_size: int = 128) -> Site:
    with FakeTensorMode():
        q = torch.empty(8, 1, 16, width, dtype=dtype)
        cache = torch.empty(64, page_size, 2, width, dtype=dtype)
        table, visible = torch.empty(8, 8, dtype=torch.int64), torch.empty(8, 1, dtype=torch.int32)
    return Site("gqa_decode", (q, cache, cache, table, visible, 0.1), Capacity(8, 32768))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("width", [64, 128, 192, 256])
def test_cases_of_a_target(arch: str, width: int) -> None:
    """TMA where there is one and a head's width is a power of two; pointers are kept as what a launch falls back to."""
    target = offline_target(arch)
    assert select_kernel(site(width), target).kernel is not None
    kernel = kernel_of("gqa_decode")
    assert kernel is not None
    cases = kernel.cases(site(width), target)
    tma = arch != "sm_80" and width != 192
    assert cases[0].constexprs["TMA"] is tma and cases[0].constexprs["BLOCK_ROWS"] == 16
    assert [c.fallback for c in cases] == sorted(c.fallback for c in cases)
    behind = ["gqa_pointer_decode"] * tma + ["gqa_decode.fp8"] * (arch != "sm_80")
    assert [c.kernel for c in cases if c.fallback] == behind
    for case in cases:
        named = {*case.signature, *case.constexprs}
        assert named == set(case.function.arg_names)
        assert set(case.divisible_by_16) <= set(case.signature)


def test_an_fp8_cache_where_there_is_no_fp8() -> None:
    """Triton compiles e4m3 from sm_89 on: before, the reference reads such a cache, of latents and of K and V."""
    scale, (q, cache, _, table, visible, _) = torch.ones(()), site().args
    with q.fake_mode:
        rows, small = cache.new_empty((8, 8, 48), dtype=torch.float8_e4m3fn), q.new_empty((8, 1, 16, 32))
        narrow = cache.new_empty(cache.shape, dtype=torch.float8_e4m3fn)
    of_heads = Site("gqa_decode", (q, narrow, narrow, table, visible, 0.1), Capacity(8, 32768), {"cache_scale": scale})
    of_latents = Site(
        "mla_decode", (small, small[..., :16], rows, table, visible, 0.1), Capacity(8, 64), {"cache_scale": scale}
    )
    for wanted in (of_heads, of_latents):
        assert "sm_80 has no e4m3" in select_kernel(wanted, offline_target("sm_80")).reason
        assert select_kernel(wanted, offline_target("sm_90")).kernel is not None


def test_what_it_does_not_take() -> None:
    target = offline_target("sm_90")
    for refused, word in ((site(dtype=torch.float64), "float64"), (site(width=288), "288")):
        choice = select_kernel(refused, target)
        assert choice.kernel is None and word in choice.reason


def test_small_pages_and_small_shared_memory_load_by_pointers() -> None:
    kernel = kernel_of("gqa_decode")
    assert kernel is not None
    for case in kernel.cases(site(page_size=16), offline_target("sm_90")):
        assert not case.constexprs.get("TMA", False)
    for case in kernel.cases(site(), KernelTarget("sm_120", 170)):
        assert not case.constexprs.get("TMA", False)


def test_split_count() -> None:
    """One wave of programs, no part without a tile, no split where sequences alone fill the card."""
    assert split_count(programs=8, tiles=1000, sm_count=132) == 16
    assert split_count(programs=1, tiles=3, sm_count=132) == 2
    assert split_count(programs=1320, tiles=1000, sm_count=132) == 1
    assert split_count(programs=1, tiles=0, sm_count=132) == 1
