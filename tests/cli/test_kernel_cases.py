"""The cases by which a device is judged hold on the interpreter, and no op that has a kernel is left out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import helix_compile.kernels.catalog  # noqa: F401
from helix_compile.kernels.registry import kernel_of
from tests.support.kernel_cases import CASES, KernelCase, expected_results, on_device, results, worst_deviation


def registered(op: str) -> bool:
    return kernel_of(op) is not None


def test_every_kernel_has_a_case() -> None:
    ops = {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("helix_triton::")
    }
    assert {op for op in ops if registered(op)} <= {case.op for case in CASES}


@pytest.mark.parametrize("case", [c for c in CASES if registered(c.op)], ids=str)
def test_case_on_the_interpreter(case: KernelCase) -> None:
    for seed in (0, 1):
        arguments = case.arguments(torch.float32, seed)
        expected = expected_results(case, arguments)
        got = results(getattr(torch.ops.helix_triton, case.op), on_device(arguments, "cpu"), case)
        assert worst_deviation(got, expected, case.exact) <= 5e-6


def test_a_wrong_result_is_caught() -> None:
    """A head swapped, a dead row that is not 0, a statistic off by one bit of base."""
    case = next(c for c in CASES if c.op == "gqa_decode" and c.name == "tiny")
    expected = expected_results(case, case.arguments(torch.float32, 0))
    o, lse = expected
    assert worst_deviation([o.flip(2), lse], expected) > 1e-2
    assert worst_deviation([o, lse / 0.6931], expected) > 1e-2
    with pytest.raises(AssertionError):
        worst_deviation([o, lse.nan_to_num(neginf=0.0)], expected)
    exact = replace(case, exact=True)
    with pytest.raises(AssertionError):
        worst_deviation([o + 1e-9, lse], expected, exact.exact)
