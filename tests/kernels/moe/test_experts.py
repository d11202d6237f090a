"""moe_experts by Triton against its reference, in memory that is NaN wherever it isn't ours."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

import helix_compile.kernels.moe.experts as moe_experts
import helix_compile.kernels.registry as registry
from helix_compile.ir.ops import helix
from helix_compile.kernels.registry import Capacity, CompileCase, Site, launch
from helix_compile.kernels.target import device_target, offline_target

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
kernel = moe_experts.MOE_EXPERTS.target


@pytest.fixture(autouse=True)
def allocations_are_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    fill, torch.utils.deterministic.fill_uninitialized_memory = (
        torch.utils.deterministic.fill_uninitialized_memory,
        True,
    )
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(False)


def within_nan(values: Tensor, before: int, after: int) -> Tensor:
    """A view of a stack that is NaN around it, in the last two axes."""
    *outer, rows, columns = values.shape
    stack = values.new_full((*outer, rows + before + after, columns + before + after), float("nan"))
    view = stack[..., before : before + rows, before : before + columns]
    view.copy_(values)
    return view


def experts(
    N: int,
    D: int,
    F: int,
    e: int,
    k: int,
    total: int,
    *,
    dtype: torch.dtype = torch.float32,
    around: tuple[int, int] = (1, 2),
) -> list[Tensor]:
    """x, ids, weights, gate_up, down; ids are drawn from `total` experts."""
    generator = torch.Generator().manual_seed(N * 131 + D * 17 + F)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    order = torch.rand((N, total), generator=generator).argsort(dim=1)
    args = [
        randn(N, D).to(dtype),
        order[:, :k].contiguous(),
        torch.rand((N, k), generator=generator),
        (randn(e, 2, F, D) / D**0.5).to(dtype),
        (randn(e, D, F) / F**0.5).to(dtype),
    ]
    x, ids, weights, gate_up, down = (a.to(DEVICE) for a in args)
    return [x, ids, weights, within_nan(gate_up, *around), within_nan(down, *around)]


def expert_number(number: int) -> Tensor:
    return torch.tensor(number, device=DEVICE)


def check(args: list[Tensor], first: int) -> Tensor:
    args = [*args, expert_number(first)]
    expected = helix.moe_experts(*args)
    got = kernel(*args)
    assert got.dtype == expected.dtype and got.shape == expected.shape
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-6 * float(expected.abs().max()))
    return got


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[Tensor], int]:
    e, first, beyond = (draw(st.integers(low, 4)) for low in (1, 0, 0))
    total = max(first + e + beyond, draw(st.integers(1, 8)))
    N, k = draw(st.integers(1, 20)), draw(st.integers(1, min(8, total)))
    D, F = draw(st.integers(1, 70)), draw(st.integers(1, 40))
    around = draw(st.tuples(st.integers(0, 3), st.integers(0, 3)))
    return experts(N, D, F, e, k, total, around=around), first


@settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), phases=[Phase.generate]
)
@given(cases())
def test_agrees_with_the_reference(case: tuple[list[Tensor], int]) -> None:
    check(*case)


@pytest.mark.parametrize("N", [16, 17, 33])
def test_all_tokens_to_one_expert(N: int) -> None:
    args = experts(N, 40, 12, 3, 1, 3)
    args[1].fill_(4)
    check(args, first=3)


def test_nobody_comes() -> None:
    args = experts(5, 8, 4, 2, 2, 4)
    assert torch.equal(check(args, first=100), torch.zeros(5, 8, device=DEVICE))


def test_one_expert_twice_in_a_token() -> None:
    args = experts(4, 8, 4, 2, 2, 2)
    args[1].fill_(1)
    check(args, first=0)


def test_wide_tiles_of_many_tokens() -> None:
    check(experts(moe_experts.FEW_TOKENS + 9, 10, 5, 2, 1, 2), first=0)


def test_more_pairs_than_a_block_of_the_sort() -> None:
    check(experts(170, 6, 3, 2, 8, 9), first=2)


def test_what_goes_elsewhere_is_not_read() -> None:
    """A token and routing weights of other ranks' experts may hold anything."""
    args = experts(3, 8, 4, 2, 2, 4)
    args[1].copy_(torch.tensor([[0, 3], [1, 0], [2, 3]]))
    args[0][2] = float("nan")
    args[2][2], args[2][0, 1] = float("nan"), float("nan")
    assert torch.equal(check(args, first=0)[2], torch.zeros(8, device=DEVICE))


@pytest.mark.parametrize(("N", "k"), [(0, 2), (3, 0)])
def test_without_pairs_the_sum_is_zero(N: int, k: int) -> None:
    args = experts(3, 8, 4, 2, 2, 2)
    x, ids, weights = args[0][:N], args[1][:N, :k], args[2][:N, :k]
    got = kernel(x, ids, weights, *args[3:], expert_number(0))
    assert torch.equal(got, torch.zeros(N, 8, device=DEVICE))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_within_two_ulps(dtype: torch.dtype) -> None:
    """Against the reference in float32: gate, up and the sum over f are not rounded, h and the result are."""
    args = [*experts(9, 70, 33, 4, 3, 8, dtype=dtype), expert_number(2)]
    got = kernel(*args)
    wide = helix.moe_experts(*(a.float() if a.is_floating_point() else a for a in args))
    limit = 2 * torch.finfo(dtype).eps * float(wide.abs().max())
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), wide, rtol=0, atol=limit)


def test_equal_inputs_give_equal_bits() -> None:
    args = [*experts(20, 33, 9, 4, 4, 8), expert_number(1)]
    assert torch.equal(kernel(*args), kernel(*args))


def test_strided_tokens_and_ids() -> None:
    args = experts(6, 8, 4, 3, 2, 4)
    for i in (0, 1, 2):
        args[i] = args[i].T.contiguous().T
    check(args, first=1)


def test_a_strided_last_axis_is_refused() -> None:
    args = [*experts(2, 8, 4, 2, 2, 2), expert_number(0)]
    args[4] = args[4].transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(ValueError, match="down has stride 8 along its last axis"):
        kernel(*args)


def test_float64_is_left_to_the_reference() -> None:
    args = (*experts(2, 8, 4, 2, 2, 2, dtype=torch.float64), expert_number(0))
    reason = moe_experts.MOE_EXPERTS.supports(
        Site("moe_experts", tuple(args), Capacity(2, 128)), offline_target("sm_90")
    )
    assert reason is not None and "float64" in reason


def test_what_is_compiled_is_what_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[tuple[CompileCase, tuple[int, ...]]] = []

    def record(case: CompileCase, grid: tuple[int, ...], arguments: dict) -> None:
        launched.append((case, grid))
        launch(case, grid, arguments)

    monkeypatch.setattr(registry, "launch", record)
    args = [*experts(4, 40, 8, 3, 2, 3), expert_number(0)]
    kernel(*args)
    site = Site("moe_experts", tuple(args), Capacity(4, 128))
    compiled = [c for c in moe_experts.MOE_EXPERTS.cases(site, device_target(args[0].device)) if not c.fallback]
    assert [c.kernel for c in compiled] == [c.kernel for c, _ in launched]
    for ours, (theirs, _) in zip(compiled, launched, strict=True):
        assert ours.function is theirs.function and ours.options == theirs.options
        assert theirs.constexprs.items() <= ours.constexprs.items()
    grids = [grid for _, grid in launched]
    args[1] = args[1].flip(0) + 1
    kernel(*args)
    assert [grid for _, grid in launched[4:]] == grids, "a grid depends on the ids"


def test_schema_and_fake() -> None:
    torch.library.opcheck(
        kernel, (*experts(3, 8, 4, 2, 2, 3), expert_number(0)), test_utils=("test_schema", "test_faketensor")
    )
