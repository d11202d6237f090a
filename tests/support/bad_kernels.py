"""The kernels command with a registry whose merge_lse has kernels that no device takes, beside its own.

    python -c "from tests.support.bad_kernels import main; main()" --out DIR --arch sm_100

Triton must compile in that process, so it is never the one that runs the tests.
"""

from __future__ import annotations

import dataclasses
import sys

import torch
import triton
import triton.language as tl

from helix_compile.cli import kernel_cases as kernel_selection
from helix_compile.cli.commands import main as helix_compile_main
from helix_compile.kernels.mla.launch import decode_case
from helix_compile.kernels.mla.tuning import ROWS, MlaConfig
from helix_compile.kernels.registry import CompileCase, Kernel, Site, kernel_of
from helix_compile.kernels.target import KernelTarget

BF16 = torch.bfloat16
V3 = (128, 512, 64, 128, BF16, BF16)  # heads, R, r, page size, dtypes of q and cache
TOO_LARGE = MlaConfig(ROWS, 128, 64, 8, 2)  # an accumulator of 128 x 512 fits no tensor memory
LLVM_ERROR = MlaConfig(ROWS, 64, 64, 4, 2, warp_specialize=True)  # what sm_90 makes of it


@triton.jit
def three_lanes_kernel(o_ptr):  # type: ignore[no-untyped-def] # Triton types its arguments
    tl.store(o_ptr + tl.arange(0, 3), 0.0)  # Triton wants a power of 2


@triton.constexpr_function
def end_the_process() -> None:
    raise SystemExit(3)


@triton.jit
def deadly_kernel(o_ptr):  # type: ignore[no-untyped-def] # Triton types its arguments
    end_the_process()  # where it is compiled
    tl.store(o_ptr, 0.0)


BROKEN = CompileCase("broken", three_lanes_kernel, {"o_ptr": "*fp32"}, {}, {"num_warps": 1})
DEADLY = CompileCase("deadly", deadly_kernel, {"o_ptr": "*fp32"}, {}, {"num_warps": 1})
BAD = {"sm_100": [BROKEN, decode_case(TOO_LARGE, *V3)], "sm_90": [DEADLY, decode_case(LLVM_ERROR, *V3)], "sm_80": []}


def kernel_with_bad_cases(op: str) -> Kernel | None:
    """The registered kernel; merge_lse has the bad cases first, every other op has none."""
    kernel = kernel_of(op)
    if kernel is None:
        return None

    def cases(site: Site, target: KernelTarget) -> list[CompileCase]:
        return [*BAD[target.arch], *kernel.cases(site, target)] if op == "merge_lse" else []

    return dataclasses.replace(kernel, cases=cases)


def main() -> None:
    """helix-compile kernels tiny --cp 4 with the arguments of this process."""
    kernel_selection.kernel_of = kernel_with_bad_cases  # type: ignore[attr-defined] # where it is looked up
    sys.argv = ["helix-compile", "kernels", "tiny", "--cp", "4", *sys.argv[1:]]
    helix_compile_main()
