"""Numbers to try two paths of a module with: its own weights, or small random ones in the same shapes; and how far apart is apart.

A module on meta, or one of many gigabytes, is tried with views of one random buffer: every shape and dtype is the
module's, matrices are dense in memory (others would be copied at each product), and no more than the largest is held.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from helix_compile.capture.structure import tensors_of

COMPARED_BYTES = 2**29  # of a module's weights, up to which they are used themselves
_LARGEST = 2**27  # numbers of a matrix that the buffer is made for; a larger one overlaps itself
_PERIOD = 4_194_301  # a prime: no row of a matrix is like the one above
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
        self._length = max((_reach(n, t) for n, t in tensors.items() if _is_dense(t)), default=0)
        self._buffers: dict[torch.dtype, Tensor] = {}
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
            return {n: self._draw(first[id(t)], t, wide) for n, t in self._tensors.items()}
        return {n: widened(t) if wide else t for n, t in self._tensors.items()}

    def of_graph(self) -> Tensors:
        """The same with the constants of the graph."""
        return {**self._constants, **self.weights()}

    def _draw(self, name: str, like: Tensor, wide: bool) -> Tensor:
        if not like.is_floating_point():
            return torch.zeros((), dtype=like.dtype).expand(like.shape)
        dtype = widened(torch.empty(0, dtype=like.dtype)).dtype if wide else like.dtype
        if _is_dense(like):
            return self._buffer(like.dtype, dtype)[_offset(name) :].as_strided(tuple(like.shape), _strides(like))
        strides = tuple(range(like.dim(), 0, -1))
        count = 1 + sum((n - 1) * s for n, s in zip(like.shape, strides, strict=True))
        buffer = torch.randn(max(count, 1), generator=torch.Generator().manual_seed(_offset(name)))
        buffer = 0.05 * buffer if like.dim() > 1 else 1 + 0.1 * buffer
        return buffer.to(like.dtype).to(dtype).as_strided(tuple(like.shape), strides)

    def _buffer(self, narrow: torch.dtype, dtype: torch.dtype) -> Tensor:
        """The numbers of all matrices, as `narrow` rounds them."""
        if dtype not in self._buffers:
            period = 0.05 * torch.randn(_PERIOD, generator=torch.Generator().manual_seed(0))
            times = -(-self._length // _PERIOD)
            self._buffers[dtype] = period.to(narrow).to(dtype).repeat(times)
        return self._buffers[dtype]


def _is_dense(like: Tensor) -> bool:
    return like.is_floating_point() and like.dim() > 1 and like.shape[-2:].numel() <= _LARGEST


def _strides(like: Tensor) -> tuple[int, ...]:
    """Of matrices one behind the other: each begins a few numbers after the one before."""
    return (*(7 * k for k in range(like.dim() - 2, 0, -1)), like.shape[-1], 1)


def _offset(name: str) -> int:
    return zlib.crc32(name.encode()) % 65521


def _reach(name: str, like: Tensor) -> int:
    """Numbers of the buffer up to the last that a tensor reads."""
    last = sum((n - 1) * s for n, s in zip(like.shape, _strides(like), strict=True))
    return _offset(name) + last + 1


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
