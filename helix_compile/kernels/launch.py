"""Launch a CompileCase: the object that offline compilation reads is the one that runs."""

from __future__ import annotations

from typing import Any

from helix_compile.kernels.registry import CompileCase


def launch(case: CompileCase, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
    """Run `case.function` on `grid` with `arguments`, the value of every argument that is no constexpr.

    The grid depends on shapes alone, so a launch can be captured in a CUDA graph. An empty grid launches nothing.
    """
    if 0 in grid:
        return
    case.function[grid](**arguments, **case.constexprs, **case.options)
