"""The mode that makes a float64 comparison sharp.

DeepSeek-V3 computes norms and the router in float32 whatever its dtype. In float64 these islands swallow small faults
(a clean module then shows a deviation of exactly 0) and turn noise of 1e-15 into one float32 ulp of 1e-8 at random
(capture-and-match, sections 10 and 11). Run both sides with the islands widened instead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class WidenedIslands(TorchDispatchMode):
    """While open, a cast of a float64 tensor to float32 is a copy in float64. Use it around both sides.

    Args:
        captured_dtype: evaluate a graph that was captured in this dtype on float64 tensors: casts to it and new tensors
            in it are float64 too.
    """

    def __init__(self, captured_dtype: torch.dtype = torch.float64):
        super().__init__()
        self.captured_dtype = captured_dtype

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func`, but for the casts."""
        kwargs = dict(kwargs or {})
        target = kwargs.get("dtype")
        cast = func is torch.ops.aten._to_copy.default and target in (
            torch.float32,
            self.captured_dtype,
        )
        if cast and args[0].dtype is torch.float64:
            return args[0].clone()
        if target is self.captured_dtype:  # not float32: position tables stay as they are
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)
