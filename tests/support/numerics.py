"""One table of limits, and the mode that makes an fp64 comparison sharp."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

LIMIT = {torch.float64: 1e-10, torch.float32: 1e-5}


class WidenedIslands(TorchDispatchMode):
    """Casts of fp64 values to fp32 do nothing: the model's own fp32 islands (norms, router) would swallow small
    faults and turn noise of 1e-15 into one fp32 ulp. Used around both sides.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        cast = func is torch.ops.aten._to_copy.default
        if cast and kwargs.get("dtype") is torch.float32 and args[0].dtype is torch.float64:
            return args[0].clone()
        return func(*args, **kwargs)
