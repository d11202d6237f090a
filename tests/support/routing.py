"""Which experts a router chooses, read off its own top-k."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Routing(TorchDispatchMode):
    """Writes down the experts that a router's top-k chooses, sorted, one tensor [tokens, k] a call."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k
        self.chosen: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.topk.default and args[1] == self.k:
            self.chosen.append(out[1].sort(dim=-1).values)
        return out
