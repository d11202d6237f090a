"""What every kernel test does: poisoned memory, one tolerance table, the form of a compile case, ops as torch sees them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

from helix_compile.kernels.registry import Capacity, CompileCase
from helix_compile.kernels.target import KernelTarget

RELATIVE = 2e-6  # of the largest reference value: float32 sums in another order
# one unit in the last place: Triton's interpreter truncates float32 to bfloat16, a GPU rounds
ULP = {torch.float32: 0.0, torch.bfloat16: 2**-7, torch.float16: 2**-10}
INTERPRETED = KernelTarget("interpreter", 1)
CAPACITY = Capacity(max_batch_size=8, max_slots=1024)


def drawn(max_examples: int) -> settings:
    """Settings of a drawn kernel test: the same examples each time, no deadline (the interpreter is slow)."""
    return settings(
        max_examples=max_examples, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
    )


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """New tensors hold NaN (floats) or the largest value (integers) until they are written."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def assert_kernel_close(got: Tensor, expected: Tensor, ulps: int = 1) -> None:
    """Equal to the reference but for summation order and `ulps` of got's dtype; infinities and NaN in the same places.

    `expected` may be wider than `got`: then the kernel's rounding is all that the ulps have to cover.
    """
    assert got.shape == expected.shape
    wide, spec = got.double(), expected.double()
    finite = spec.isfinite()
    torch.testing.assert_close(wide[~finite], spec[~finite], equal_nan=True, rtol=0, atol=0)
    wide, spec = wide[finite], spec[finite]
    if spec.numel() == 0:
        return
    allowed = RELATIVE * spec.abs().max() + ulps * ULP[got.dtype] * spec.abs()
    excess = (wide - spec).abs() - allowed
    assert not (excess > 0).any() and not wide.isnan().any(), (
        f"off by {(wide - spec).abs().max():.3g}; largest value {spec.abs().max():.3g}"
    )


def assert_case_is_complete(case: CompileCase) -> None:
    """Each argument of the function has a type or a value, never both."""
    names = set(case.function.arg_names)
    assert set(case.signature) | set(case.constexprs) == names
    assert not set(case.signature) & set(case.constexprs)
    assert set(case.divisible_by_16) <= set(case.signature)


def packed_by_hand(o: Tensor, lse: Tensor, peers: int) -> Tensor:
    """The exchange buffer [peers, n] of o [B, T, H, W] and lse [B, T, H], peer by peer: [lse, o], bytes if they differ."""
    rows = [
        torch.cat([_as_bytes(lse_part), _as_bytes(o_part)])
        for o_part, lse_part in zip(o.chunk(peers, 2), lse.chunk(peers, 2), strict=True)
    ]
    buffer = torch.stack(rows)
    return buffer.view(o.dtype) if o.dtype == lse.dtype else buffer


def unpacked_by_hand(buffer: Tensor, o: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Copies of o and lse in a buffer of packed_by_hand; the arguments o and lse give shape and dtype."""
    peers, count = len(buffer), lse.numel() // len(buffer) * lse.itemsize
    parts: list[list[Tensor]] = [[], []]
    for row in buffer.view(torch.uint8):
        for out, like, piece in zip(parts, (o, lse), (row[count:], row[:count]), strict=True):
            chunk = like.chunk(peers, 2)[0]
            out.append(piece.clone().view(like.dtype).view(chunk.shape))
    return torch.cat(parts[0], 2), torch.cat(parts[1], 2)


def _as_bytes(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)


def check_op(op: Any, *args: Any) -> None:
    """Schema and fake agree with what the op does (strides too)."""
    torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))
