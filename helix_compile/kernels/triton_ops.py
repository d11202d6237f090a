"""Define ops of the helix_triton:: provider, one implementation for CPU and CUDA tensors; their dtypes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from helix_compile.kernels.ops import Op
from helix_compile.kernels.target import device_target

# floats that kernels take, and how a Triton signature spells them
TRITON_TYPE = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


_POINTED = {**TRITON_TYPE, torch.float8_e4m3fn: "fp8e4nv", torch.int64: "i64", torch.int32: "i32", torch.int16: "i16"}


_LIBRARY = torch.library.Library("helix_triton", "DEF")  # kept alive: dropping it unregisters the ops


def triton_type(value: Any) -> str:
    """The type of a launch's argument in a Triton signature."""
    if isinstance(value, Tensor):
        return f"*{_POINTED[value.dtype]}"
    if isinstance(value, float):
        return "fp32"
    return "i64" if isinstance(value, int) and value >= 2**31 else "i32"


def define_triton_op(op: Op, launcher: Callable[..., Any]) -> Any:
    """Register `launcher` as helix_triton::op and return its OpOverload.

    On the CPU the launcher runs by Triton's interpreter. A plain operator, not a triton_op: neither export nor Inductor
    looks inside, both keep it as one node.
    """
    _LIBRARY.define(op.schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(op.name, launcher, "CUDA")
    _LIBRARY.impl(op.name, _interpreted(launcher), "CPU")
    torch.library.register_fake(f"helix_triton::{op.name}", op.fake, lib=_LIBRARY)
    base, _, overload = op.name.partition(".")
    return getattr(getattr(torch.ops.helix_triton, base), overload or "default")


def _interpreted(launcher: Callable[..., Any]) -> Callable[..., Any]:
    """The launcher where Triton interprets; else LoweringUnavailable instead of Triton's "0 active drivers"."""

    @functools.wraps(launcher)
    def launch(*args: Any, **keywords: Any) -> Any:
        device_target(torch.device("cpu"))
        return launcher(*args, **keywords)

    return launch
