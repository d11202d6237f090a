"""Is the model still the one that was compiled? Dynamo guards on most of it, but neither on weights' values nor on hooks."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

from torch import Tensor, nn

from helix_compile.dynamo_cache import version_of
from helix_compile.errors import RuntimeFault

_ANEW = "call torch._dynamo.reset() and torch.compile the model again"


@dataclass
class ModelState:
    """What the shards and the graph were made from."""

    _weights: dict[str, tuple[int, int]] = field(default_factory=dict)
    _modules: list[tuple[str, weakref.ref[nn.Module]]] = field(default_factory=list)
    _hooks: list[tuple[int, ...]] = field(default_factory=list)

    def remember_weights(self, weights: dict[str, Tensor]) -> None:
        """Those that one more graph takes."""
        for name, tensor in weights.items():
            self._weights.setdefault(name, _state(tensor))

    def remember_hooks(self, model: nn.Module) -> None:
        """Of every module."""
        self._modules = [(name, weakref.ref(module)) for name, module in model.named_modules()]
        self._hooks = [_hooks_of(reference()) for _, reference in self._modules]

    def check(self, weights: dict[str, Tensor]) -> None:
        """Raise RuntimeFault if a weight was replaced or written, or a hook of the forward added or removed."""
        changed = [n for n, t in weights.items() if self._weights.get(n) != _state(t)]
        if changed:
            told = ""
            if len(changed) == len(weights) > 1:
                told = (
                    ". If this is another model: Dynamo takes models of one class, compiled with equal options, for one; "
                    "give each its own (docs/torch_compile.md, two at a time)"
                )
            raise RuntimeFault(
                f"{len(changed)} weights changed since the model was compiled, {changed[0]} first; the ranks' shards "
                f"were cut from the old ones: {_ANEW}{told}"
            )
        for (name, reference), before in zip(self._modules, self._hooks, strict=True):
            now = _hooks_of(reference())
            if now != before:
                raise RuntimeFault(
                    f"{name or 'the model'} has {len(now)} forward hooks, and {len(before)} when it was compiled, or others; "
                    f"the compiled graph holds what they did then: {_ANEW}"
                )


def _hooks_of(module: nn.Module | None) -> tuple[int, ...]:
    """Handles of the forward's hooks; they count up and are never used twice."""
    if module is None:
        return ()
    return (*module._forward_hooks, *module._forward_pre_hooks)


def _state(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), 0 if tensor.is_inference() else version_of(tensor)
