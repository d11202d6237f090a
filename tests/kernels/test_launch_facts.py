"""specialize: facts of a launch hold for every batch size and token count, or are not stated."""

from __future__ import annotations

import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from helix_compile.kernels.registry import CompileCase, specialize


def test_ones_multiples_and_aligned_views() -> None:
    shapes = ShapeEnv()
    mode = FakeTensorMode(shape_env=shapes)
    dynamic = [DimDynamic.DYNAMIC, DimDynamic.DYNAMIC, DimDynamic.STATIC]
    x = mode.from_tensor(
        torch.empty(6, 3, 80, dtype=torch.bfloat16), symbolic_context=StatelessSymbolicContext(dynamic_sizes=dynamic)
    )
    arguments = {
        "whole_ptr": x,
        "aligned_ptr": x[..., 8:],
        "shifted_ptr": x[..., 4:],
        "eps": 16.0,
        "stride_B": x.stride(0),
        "stride_T": x.stride(1),
        "stride_odd": x.shape[0] * 5,
        "T": x.shape[1],
        "one": 1,
    }
    case = CompileCase("k", None, dict.fromkeys(arguments, "i32"), {"W": 5}, {})
    known = specialize(case, arguments)
    assert set(known.divisible_by_16) == {"whole_ptr", "aligned_ptr", "stride_B", "stride_T"}
    assert known.constexprs == {"W": 5, "one": 1}
    assert set(known.signature) == set(arguments) - {"one"}
    assert not shapes.guards  # nothing was assumed about B and T
