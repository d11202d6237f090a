"""The user's cache object, as the backend sees it, and whether the model is still the one that was compiled.

The latents live in the ranks' shards. What the user's DynamicCache or StaticCache gets are stride-0 views of one NaN:
right shape and dtype, so lengths count, and no memory. They are also the proof that a cache is the current one: each
call must bring the very objects that the last call left, unedited. A view that was cut, copied, selected or written is
another object or has another version, and is refused.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from helix_compile.errors import RuntimeFault

Key = tuple[int, str]  # layer, field
LATENTS = ("keys", "values")  # the fields that a step fills
INDEX_KEYS = "indexer_keys"  # [B, S, I]; likewise, where an indexer chooses keys
STATES = ("conv_states", "recurrent_states")  # of linear attention, which stays a leaf: its own states are on the ranks
_START_OVER = "to start over pass a new cache"


def is_held(field: str) -> bool:
    """True if a stand-in is left there: what it stands for is on the ranks."""
    return field in (*LATENTS, INDEX_KEYS) or field.startswith(STATES)


@dataclass
class UserCache:
    """Which tensors the current cache consists of, and what was fed so far.

    Attributes:
        mask: [B, S] bool on the host: columns fed so far, True = token.
        shifts: per row, the user's position of a token less its place among the row's tokens; None before a token.
    """

    mask: Tensor | None = None
    shifts: list[int | None] = field(default_factory=list)
    _held: dict[Key, tuple[weakref.ref[Tensor], int]] = field(default_factory=dict)

    @property
    def columns(self) -> int:
        """S: columns fed so far, padding included."""
        return 0 if self.mask is None else self.mask.shape[1]

    def check(self, tensors: dict[Key, Tensor], columns: int) -> None:
        """Raise RuntimeFault unless `tensors` are those that the last call left, with `columns` columns."""
        if self.mask is None:
            raise RuntimeFault(
                f"the cache comes with {columns} columns, but this compiled model has filled none: a cache that was "
                f"filled elsewhere (by the model itself, or by another compiled one) holds nothing here; {_START_OVER}"
            )
        for layer, name in self._held:
            if (layer, name) not in tensors:
                raise RuntimeFault(
                    f"the cache's {name} of layer {layer} is missing: that layer was emptied; {_START_OVER}"
                )
        for (layer, name), tensor in tensors.items():
            if not is_held(name):
                continue
            reference, version = self._held.get((layer, name), (None, 0))
            if reference is None or reference() is not tensor:
                raise RuntimeFault(
                    f"the cache's {name} of layer {layer} is not the tensor that the last step left there: this is "
                    f"another cache object, or it was cropped, reordered, copied or refilled. The keys live in the "
                    f"ranks' shards and can't follow; {_START_OVER}"
                )
            if version_of(tensor) != version:
                raise RuntimeFault(
                    f"the cache's {name} of layer {layer} was written in place since the last step; it is a stand-in "
                    f"without memory, and the ranks' shards can't follow; {_START_OVER}"
                )
        if columns != self.columns:
            raise RuntimeFault(
                f"the cache says {columns} columns, {self.columns} were fed: it was rewound or extended outside of "
                f"the compiled model, which the ranks' shards can't follow; {_START_OVER}"
            )

    def hold(self, tensors: dict[Key, Tensor]) -> None:
        """From now on these are the tensors of the current cache."""
        for key, tensor in tensors.items():
            if is_held(key[1]):
                self._held[key] = (weakref.ref(tensor), version_of(tensor))


def check_countable(tensors: dict[Key, Tensor]) -> None:
    """Raise RuntimeFault if edits of these can't be seen, or if a length among them can't be counted up."""
    for (layer, name), tensor in tensors.items():
        if is_held(name):
            version_of(tensor)
        elif tensor.is_inference() and not torch.is_inference_mode_enabled():
            raise RuntimeFault(
                f"the cache's {name} of layer {layer} was made under torch.inference_mode() and can't be written outside "
                "of it; make the cache where the model is called (torch.no_grad() is fine)"
            )


def version_of(tensor: Tensor) -> int:
    """How often a tensor was written in place.

    Raises:
        RuntimeFault: an inference tensor, which does not count.
    """
    if tensor.is_inference():
        raise RuntimeFault(
            "the cache's tensors were made under torch.inference_mode(), where edits can't be seen; make the cache "
            "outside of it (torch.no_grad() is fine)"
        )
    return tensor._version


def stand_in(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A stride-0 view of one NaN: whoever reads a latent from it gets NaN, never a number that looks right."""
    with torch.inference_mode(False), torch.no_grad():
        return torch.full((1,) * len(shape), float("nan"), dtype=dtype, device=device).expand(shape)


_ANEW = "call torch._dynamo.reset() and torch.compile the model again"


@dataclass
class ModelState:
    """What the shards and the graph were made from; Dynamo guards on most of it, but not on weights' values and hooks."""

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
            another = (
                ". If this is another model: Dynamo takes models of one class, compiled with equal options, for one; "
                "give each its own (docs/torch_compile.md, two at a time)"
            )
            raise RuntimeFault(
                f"{len(changed)} weights changed since the model was compiled, {changed[0]} first; the ranks' shards "
                f"were cut from the old ones: {_ANEW}{another if len(changed) == len(weights) > 1 else ''}"
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
    return () if module is None else (*module._forward_hooks, *module._forward_pre_hooks)


def _state(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), 0 if tensor.is_inference() else version_of(tensor)
