"""What a launch knows about its arguments and compiles in: integers that are 1, multiples of 16, aligned pointers.

Triton reads these facts off the values when it launches. Offline compilation has example tensors instead, whose strides
may be symbolic in B and T: a fact holds there only if it holds for every B and T.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from helix_compile.kernels.registry import CompileCase


def specialize(case: CompileCase, arguments: dict[str, Any]) -> CompileCase:
    """`case` as a launch with `arguments` compiles it: ones become constants, multiples of 16 are known as such.

    Args:
        case: what a launcher builds.
        arguments: the value of every argument that is no constexpr; tensors may be fake, integers symbolic.
    """
    integers = {
        name: value
        for name, value in arguments.items()
        if not isinstance(value, (Tensor, float)) and name in case.signature
    }
    ones = {name: 1 for name, value in integers.items() if statically_known_true(value == 1)}
    # an allocation is aligned, so only the place of a view inside of it counts
    byte_offsets = {
        name: value.storage_offset() * value.dtype.itemsize
        for name, value in arguments.items()
        if isinstance(value, Tensor)
    }
    divisible = tuple(
        name
        for name, value in {**byte_offsets, **integers}.items()
        if statically_known_true(value % 16 == 0)
    )
    signature = {name: kind for name, kind in case.signature.items() if name not in ones}
    return replace(
        case,
        signature=signature,
        constexprs={**case.constexprs, **ones},
        divisible_by_16=divisible,
    )
