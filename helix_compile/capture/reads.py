"""Which layers read what an earlier one made besides hidden states: the keys that it chose, K and V that it cached.

Found by running the whole model without values and looking at the tensors that go into the ops of each layer: what a layer is
only handed, and hands on, it does not read.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from helix_compile.capture.returned import run_without_values
from helix_compile.ir.leaves import arguments_of, is_mapping
from helix_compile.ir.sizes import HINT_B, HINT_S, HINT_T

Reads = set[tuple[int, int]]  # (layer that reads, earlier layer that made it)


def reads_of_earlier(
    model: nn.Module, layers: nn.ModuleList, run: Callable[[torch.device, int, int, int], None]
) -> Reads:
    """All (reader, maker) among the layers of a model.

    Args:
        model: whose layers these are.
        layers: in order.
        run: runs the model without values on a device, at B, T, S.
    """
    watch = _Watch()
    handles = [
        handle
        for i, layer in enumerate(layers)
        for handle in (
            layer.register_forward_pre_hook(partial(watch.enter, i)),
            layer.register_forward_hook(partial(watch.leave, i), with_kwargs=True),
        )
    ]
    try:
        with watch:
            run_without_values(model, run, (HINT_B, HINT_T, HINT_S))
    finally:
        for handle in handles:
            handle.remove()
    return watch.reads


class _Watch(TorchDispatchMode):
    """Sees every op; knows which layer runs and who made which tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: Reads = set()
        self._inside: int | None = None
        self._made: dict[int, tuple[int, Tensor]] = {}  # by identity, and kept alive so that no other gets it

    def enter(self, index: int, module: nn.Module, args: Any) -> None:
        self._inside = index

    def leave(self, index: int, module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        self._inside = None
        left = [list(leaf.values()) for _, leaf in arguments_of(args, kwargs)[0] if is_mapping(leaf)]
        for tensor in pytree.tree_leaves((out[1:] if isinstance(out, tuple) else (), left)):
            if isinstance(tensor, Tensor):  # what is handed on stays its maker's
                self._made.setdefault(id(tensor), (index, tensor))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._inside is not None and self._made:
            found = [self._made[id(x)] for x in pytree.tree_leaves((args, kwargs)) if id(x) in self._made]
            self.reads |= {(self._inside, maker) for maker, _ in found if maker != self._inside}
        return func(*args, **(kwargs or {}))
