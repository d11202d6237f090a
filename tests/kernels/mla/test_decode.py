"""mla_decode by Triton against its reference: each form of the kernel, drawn sizes, hostile memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helix_compile.kernels.mla.decode import MLA_DECODE
from helix_compile.kernels.mla.launch import is_for_tma
from helix_compile.kernels.mla.tuning import POINTER, ROWS, TRANSPOSED, MlaConfig, split_count
from helix_compile.kernels.registry import Capacity, Site, select_kernel
from helix_compile.kernels.target import device_target, offline_target
from tests.support.gqa import first_slots, poison_below
from tests.support.mla import MlaInputs, mismatch, mla_inputs, run_form

helix, helix_triton = torch.ops.helix, torch.ops.helix_triton
TMA_FORMS = [
    MlaConfig(ROWS, 64, 16, 4, 2),
    MlaConfig(ROWS, 16, 16, 4, 2, parts=2),
    MlaConfig(TRANSPOSED, 16, 16, 4, 2),
    MlaConfig(TRANSPOSED, 32, 16, 4, 2, parts=2),
]
POINTER_FORM = MlaConfig(POINTER, 16, 16, 4, 2)
FORMS = [*TMA_FORMS, POINTER_FORM]


@pytest.fixture(autouse=True, scope="module")
def nan_memory() -> Iterator[None]:
    """What torch.empty returns is NaN: outputs and workspaces that a kernel leaves unwritten show."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def lengths_of(page_size: int) -> st.SearchStrategy[list[int]]:
    edges = st.sampled_from([0, 1, page_size - 1, page_size, page_size + 1, 3 * page_size + 2])
    return st.lists(edges, min_size=1, max_size=5)


@st.composite
def drawn_inputs(draw: st.DrawFn, widths: list[tuple[int, int]], page_sizes: list[int]) -> MlaInputs:
    page_size = draw(st.sampled_from(page_sizes))
    T, H = draw(st.sampled_from([1, 2, 5])), draw(st.sampled_from([1, 5, 16, 20, 128]))
    R, r = draw(st.sampled_from(widths))
    lengths = draw(lengths_of(page_size))
    lengths = lengths[: max(1, 250 // (T * H))]  # a step of a program takes milliseconds
    return mla_inputs(lengths, T, H, R, r, page_size, seed=draw(st.integers(0, 99)))


EXAMPLES = pytest.mark.parametrize("examples", [8, pytest.param(100, marks=pytest.mark.slow)])


@EXAMPLES
def test_tma_forms_agree_with_reference(examples: int) -> None:
    @settings(max_examples=examples, deadline=None)
    @given(st.sampled_from(TMA_FORMS), drawn_inputs([(32, 16), (64, 32)], [16, 32, 48]), st.sampled_from([1, 2, 4]))
    def agrees(config: MlaConfig, inputs: MlaInputs, splits: int) -> None:
        assert mismatch(run_form(config, inputs, splits), helix.mla_decode(*inputs.args)) is None

    agrees()


@EXAMPLES
def test_pointer_form_takes_any_widths_and_pages(examples: int) -> None:
    @settings(max_examples=examples, deadline=None)
    @given(drawn_inputs([(32, 16), (24, 8), (7, 3), (1, 1)], [1, 3, 16, 20]), st.sampled_from([1, 2, 4]))
    def agrees(inputs: MlaInputs, splits: int) -> None:
        assert mismatch(run_form(POINTER_FORM, inputs, splits), helix.mla_decode(*inputs.args)) is None

    agrees()


@pytest.mark.parametrize("config", FORMS, ids=str)
class TestEachForm:
    def test_all_splits_but_one_are_empty(self, config: MlaConfig) -> None:
        inputs = mla_inputs([16, 3, 0], H=5, page_size=16)
        assert mismatch(run_form(config, inputs, 8), helix.mla_decode(*inputs.args)) is None

    @pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
    def test_without_rope(self, config: MlaConfig, dtype: torch.dtype) -> None:
        """A latent row of R values alone."""
        inputs = mla_inputs([40, 0, 17, 33], T=2, H=5, r=0).to(dtype)
        o, lse = run_form(config, inputs, 2)
        wanted = helix.mla_decode(*inputs.to(torch.float32).args)
        if dtype is torch.float32:
            assert mismatch((o, lse), wanted) is None
        else:
            assert (o.float() - wanted[0]).abs().max() <= 2 * torch.finfo(dtype).eps * wanted[0].abs().max()

    @pytest.mark.parametrize("reach", [1, 7, 40])
    def test_windows(self, config: MlaConfig, reach: int) -> None:
        """What lies below the first slot that a row sees (by TMA: below its tile) is NaN."""
        inputs = mla_inputs([0, 1, 31, 65, 170], T=3)
        first = first_slots(inputs.visible, reach)
        tile = 1 if config.form == POINTER else config.block_n
        poison_below(inputs.cache, inputs.page_table, inputs.visible, first, tile)
        wanted = helix.mla_decode(*inputs.args, first=first)
        for splits in (1, 4):
            assert mismatch(run_form(config, inputs, splits, first=first), wanted) is None

    def test_empty_shard_gives_zero_and_minus_infinity(self, config: MlaConfig) -> None:
        o, lse = run_form(config, mla_inputs([0, 0], T=2))
        assert torch.equal(o, torch.zeros_like(o))
        assert torch.equal(lse, torch.full_like(lse, -torch.inf))

    def test_huge_scores_pick_the_largest(self, config: MlaConfig) -> None:
        # whole numbers: scores up to 1e6 are exact, so that gaps are 100 or 0 and nothing hangs on rounding
        inputs = mla_inputs([40, 17], H=5, magnitude=2.0, scale=100.0)
        whole = replace(
            inputs, q_latent=inputs.q_latent.round(), q_rope=inputs.q_rope.round(), cache=inputs.cache.round()
        )
        assert mismatch(run_form(config, whole), helix.mla_decode(*whole.args)) is None

    def test_tiny_scores_weigh_all_alike(self, config: MlaConfig) -> None:
        inputs = mla_inputs([40, 17], H=5, magnitude=1e-18)
        assert mismatch(run_form(config, inputs, 2), helix.mla_decode(*inputs.args)) is None

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_16_bit_caches(self, config: MlaConfig, dtype: torch.dtype) -> None:
        inputs = mla_inputs([40, 0, 17], T=2, H=5).to(dtype)
        o, lse = run_form(config, inputs, 2)
        o_ref, lse_ref = helix.mla_decode(*inputs.to(torch.float32).args)
        assert o.dtype == dtype and lse.dtype == torch.float32
        slack = 2 * torch.finfo(dtype).eps  # p and o are rounded once each
        assert (o.float() - o_ref).abs().max() <= slack * o_ref.abs().max()
        torch.testing.assert_close(lse, lse_ref, rtol=2e-6, atol=2e-6)

    def test_a_nan_query_reaches_the_output(self, config: MlaConfig) -> None:
        inputs = mla_inputs([20], H=2)
        inputs.q_latent[0, 0, 1, 3] = torch.nan
        o, lse = run_form(config, inputs)
        assert o[0, 0, 1].isnan().all() and lse[0, 0, 1].isnan()
        assert o[0, 0, 0].isfinite().all()

    def test_strided_queries(self, config: MlaConfig) -> None:
        inputs = mla_inputs([20, 33], T=2, H=5)
        by_head = inputs.q_latent.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
        strided = replace(inputs, q_latent=by_head, q_rope=inputs.q_rope.transpose(0, 1).clone().transpose(0, 1))
        assert mismatch(run_form(config, strided), helix.mla_decode(*inputs.args)) is None


@pytest.mark.parametrize(
    "config", [MlaConfig(ROWS, 64, 64, 8, 2, parts=2), MlaConfig(TRANSPOSED, 16, 64, 4, 2), POINTER_FORM], ids=str
)
def test_deepseek_v3_widths(config: MlaConfig) -> None:
    H = 128 if config.form == ROWS else 16
    inputs = mla_inputs([129, 0], H=H, R=512, r=64, page_size=128, scale=0.1)
    assert mismatch(run_form(config, inputs, 2), helix.mla_decode(*inputs.args), channels=512 + 64) is None


@pytest.mark.parametrize("config", FORMS, ids=str)
def test_a_cache_that_is_a_part_of_wider_rows(config: MlaConfig) -> None:
    """Index keys lie beside the latents; what is beside holds NaN, and rows of 16 bytes' multiple go by TMA."""
    inputs = mla_inputs([40, 0, 17], T=2, H=5)
    wide = torch.nn.functional.pad(inputs.cache, (0, 12), value=torch.nan)[..., :48]
    assert is_for_tma(wide) and not wide.is_contiguous()
    got = run_form(config, replace(inputs, cache=wide), 2)
    assert mismatch(got, helix.mla_decode(*inputs.args)) is None


def test_rows_that_tma_cannot_describe_go_by_pointers() -> None:
    inputs = mla_inputs([40, 0, 17], T=2, H=5)
    odd = torch.nn.functional.pad(inputs.cache, (0, 5), value=torch.nan)[..., :48]
    gaps = torch.nn.functional.pad(inputs.cache, (0, 0, 0, 3), value=torch.nan)[:, :16]  # between pages
    wanted = helix.mla_decode(*inputs.args)
    for cache in (odd, gaps):
        assert not is_for_tma(cache)
        site = Site("mla_decode", replace(inputs, cache=cache).args, Capacity(4, 64))
        assert select_kernel(site, offline_target("sm_90")).kernel is not None
        assert all(case.kernel == "mla_pointer_decode" for case in MLA_DECODE.cases(site, offline_target("sm_90"))[:1])
        assert mismatch(helix_triton.mla_decode(*site.args), wanted) is None


@pytest.mark.parametrize("H", [1, 20, 128])
@pytest.mark.parametrize("page_size", [5, 16])
def test_op_agrees_with_reference(H: int, page_size: int) -> None:
    inputs = mla_inputs([0, 1, 40], T=2, H=H, page_size=page_size)
    wanted = helix.mla_decode(*inputs.args)
    assert mismatch(helix_triton.mla_decode(*inputs.args), wanted) is None


def test_no_rope_part() -> None:
    inputs = mla_inputs([0, 1, 40], T=2, H=5, r=0)
    assert mismatch(helix_triton.mla_decode(*inputs.args), helix.mla_decode(*inputs.args)) is None


def test_split_parts_merge_to_the_result() -> None:
    inputs = mla_inputs([0, 1, 70], T=2, H=5)
    o_S, lse_S = helix_triton.mla_decode.splits(*inputs.args, 4)
    assert o_S.shape == (3, 2, 5, 4, 32) and o_S.dtype == torch.float32 and lse_S.shape == (3, 2, 5, 4)
    assert (lse_S == -torch.inf).any()
    parts, lses = o_S.permute(3, 0, 1, 2, 4), lse_S.permute(3, 0, 1, 2)
    o, lse = helix.merge_lse(parts, lses), torch.logsumexp(lses, dim=0)
    assert mismatch((o, lse), helix.mla_decode(*inputs.args)) is None


def test_fakes_say_what_kernels_return() -> None:
    inputs = mla_inputs([3, 20], T=2, H=5)
    for op, args in (
        (helix_triton.mla_decode.default, inputs.args),
        (helix_triton.mla_decode.splits, (*inputs.args, 2)),
    ):
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"q_latent": torch.zeros(1, 1, 5, 32, dtype=torch.float64)}, "float64"),
        ({"page_table": torch.zeros(1, 2, dtype=torch.int32)}, "int64"),
        ({"cache": torch.zeros(48, 16, 2).permute(2, 1, 0)}, "stride 32"),
        ({"scale": 0.0}, "scale"),
    ],
)
def test_refuses_with_a_reason(change: dict, reason: str) -> None:
    site = Site("mla_decode", replace(mla_inputs([3]), **change).args, Capacity(4, 64))
    choice = select_kernel(site, device_target(torch.device("cpu")))
    assert choice.kernel is None and reason in choice.reason


@pytest.mark.parametrize("arch", ["sm_100", "sm_90", "sm_80"])
@pytest.mark.parametrize("H", [16, 128])
@pytest.mark.parametrize("r", [64, 0])
def test_cases_name_every_argument(arch: str, H: int, r: int) -> None:
    inputs = mla_inputs([3], H=H, R=512, r=r, page_size=128).to(torch.bfloat16)
    site = Site("mla_decode", inputs.args, Capacity(8, 32768))
    cases = MLA_DECODE.cases(site, offline_target(arch))
    for case in cases:
        assert set(case.signature).isdisjoint(case.constexprs)
        assert {*case.signature, *case.constexprs} == set(case.function.arg_names)
        assert set(case.divisible_by_16) <= set(case.signature)
    names = [case.kernel for case in cases if not case.fallback]
    assert names[0] == ("mla_pointer_decode" if arch == "sm_80" else "mla_decode")
    assert "merge_splits" in names


@given(
    st.integers(0, 64),
    st.integers(1, 5),
    st.integers(1, 128),
    st.integers(1, 2**20),
    st.sampled_from(["sm_100", "sm_90"]),
)
def test_split_count_fills_the_card_once(B: int, T: int, H: int, max_slots: int, arch: str) -> None:
    target = offline_target(arch)
    splits = split_count(B, T, H, max_slots, target)
    assert splits & (splits - 1) == 0
    assert splits == 1 or splits * B * -(-T * H // 64) <= target.sm_count
    assert splits == 1 or splits <= -(-max_slots // 64)
    assert split_count(B, T, H, max_slots, device_target(torch.device("cpu"))) == 1
