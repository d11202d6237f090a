"""Define ops of the helix_triton:: provider: schema, fake, and one implementation for CPU and CUDA tensors; their dtypes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# floats that kernels take, and how a Triton signature spells them
TRITON_TYPE = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_LIBRARY = torch.library.Library(
    "helix_triton", "DEF"
)  # kept alive: dropping it unregisters the ops


def define_triton_op(schema: str, launcher: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register `helix_triton::schema` and return its OpOverload.

    On the CPU the launcher runs by Triton's interpreter. A plain operator, not a triton_op: neither export nor Inductor
    looks inside, both keep it as one node.
    """
    name = schema.split("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, launcher, key)
    torch.library.register_fake(f"helix_triton::{name}", fake, lib=_LIBRARY)
    base, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.helix_triton, base), overload or "default")
