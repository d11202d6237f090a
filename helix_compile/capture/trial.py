"""Numbers to try two paths of a module with: its own weights, or small random ones in the same shapes; and how far apart is apart.

A module on meta, or one of many gigabytes, is tried with views of small random buffers, w[i, j] = buffer[2 i + j]: every shape and
dtype is the module's, and nothing of its size is held.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from helix_compile.capture.structure import tensors_of

COMPARED_BYTES = 2**29  # of a module's weights, up to which they are used themselves
Tensors = dict[str, Tensor]


class Trial:
    """Weights of one module for a trial.

    Attributes:
        device: where they are, and where inputs belong.
    """

    def __init__(self, tensors: Mapping[str, Tensor], constants: Mapping[str, Tensor]):
        """Args:
        tensors: parameters, buffers and attributes of the module by name.
        constants: what else its graph takes as a parameter.
        """
        size = sum(t.numel() * t.itemsize for t in tensors.values())
        self._tensors, self._constants = dict(tensors), dict(constants)
        self._drawn = size > COMPARED_BYTES or any(t.device.type == "meta" for t in tensors.values())
        first = next(iter(tensors.values()), torch.empty(0))
        self.device = torch.device("cpu") if self._drawn else first.device

    @classmethod
    def of(cls, module: nn.Module, constants: Mapping[str, Tensor]) -> Trial:
        """All tensors of a module."""
        return cls(tensors_of(module), constants)

    def weights(self, wide: bool = False) -> Tensors:
        """Name -> tensor; `wide`: what has 16 bits in float32."""
        if self._drawn:
            first = {id(t): n for n, t in reversed(self._tensors.items())}  # a tied tensor has one value
            return {n: _drawn(first[id(t)], t, wide) for n, t in self._tensors.items()}
        return {n: widened(t) if wide else t for n, t in self._tensors.items()}

    def of_graph(self) -> Tensors:
        """The same with the constants of the graph."""
        return {**self._constants, **self.weights()}


def _drawn(name: str, like: Tensor, wide: bool) -> Tensor:
    if not like.is_floating_point():
        return torch.zeros((), dtype=like.dtype).expand(like.shape)
    strides = tuple(range(like.dim(), 0, -1))
    count = 1 + sum((n - 1) * s for n, s in zip(like.shape, strides, strict=True))
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    buffer = torch.randn(max(count, 1), generator=generator)
    buffer = 0.05 * buffer if like.dim() > 1 else 1 + 0.1 * buffer
    buffer = buffer.to(like.dtype)
    return (widened(buffer) if wide else buffer).as_strided(tuple(like.shape), strides)


def widened(tensor: Tensor) -> Tensor:
    """In float32 if it has 16 bits."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def relative_gap(got: Tensor, own: Tensor, wide: Tensor) -> float:
    """RMS of got - wide over that of wide; 0.0 if it is within what rounding explains: 4 times what `own` is off."""
    if got.shape != wide.shape:
        return float("inf")
    narrow, (got, own, wide) = own.dtype, (x.double() for x in (got, own, wide))
    rms = wide.square().mean().sqrt()
    if not rms.isfinite():
        raise ValueError("the module gives no finite numbers for small random weights")
    error, rounding = (float((x - wide).square().mean().sqrt() / rms.clamp_min(1e-300)) for x in (got, own))
    limit = 4 * rounding + (1e-9 if narrow is torch.float64 else 1e-4)
    return error if not error <= limit else 0.0


class Replay(fx.Interpreter):
    """Runs a graph on the CPU though it was captured on meta, with functions in place of opaque ops."""

    def __init__(self, module: fx.GraphModule, device: torch.device, opaque: Mapping[Any, Callable[..., Any]]):
        super().__init__(module)
        self._device, self._opaque = device, opaque

    def call_function(self, target: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """One node."""
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": self._device}
        return super().call_function(self._opaque.get(target, target), args, kwargs)
