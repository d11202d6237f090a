"""The unmodified model whose cached entries are rounded as an FP8 cache rounds them: an oracle that shares no code with ours.

Rounding is done in numpy, from the table of all values of e4m3 and on the bits of float64; it happens where transformers'
own cache gets an entry: MLA caches the normed latent as its keys and the roped key as its values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from tests.support.driver import Reference

Array = NDArray[Any]
Rounding = Callable[[Array], Array]  # of float64 values, to values of e4m3


def _values_of_e4m3() -> Array:
    """The finite values that are not negative, by their codes: 4 bits of exponent, 3 of mantissa; code 127 is NaN."""
    codes = np.arange(127)
    exponent, mantissa = codes >> 3, codes & 7
    return np.where(exponent == 0, mantissa * 2.0**-9, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))


VALUES = _values_of_e4m3()


def to_nearest(x: Array) -> Array:
    """The nearest value of e4m3, of two the one whose code is even; 448 and -448 beyond these."""
    low = np.clip(np.searchsorted(VALUES, np.abs(x), side="right") - 1, 0, 126)
    high = np.minimum(low + 1, 126)
    below, above = np.abs(x) - VALUES[low], VALUES[high] - np.abs(x)
    up = (above < below) | ((above == below) & (low % 2 == 1))
    return np.copysign(VALUES[np.where(up, high, low)], x)


def toward_zero(x: Array) -> Array:
    """Wrong: cut off."""
    low = np.clip(np.searchsorted(VALUES, np.abs(x), side="right") - 1, 0, 126)
    return np.copysign(VALUES[low], x)


def without_clamp(x: Array) -> Array:
    """Wrong: what is beyond 448 stays as it is."""
    return np.where(np.abs(x) > 448, x, to_nearest(x))


def by_way_of_float32(x: Array) -> Array:
    """Wrong: rounded twice."""
    return to_nearest(x.astype(np.float32).astype(np.float64))


def to_bfloat16(x: Array) -> Array:
    """The nearest bfloat16, ties to even; of normal numbers."""
    bits = np.ascontiguousarray(x).view(np.uint64)
    last = (bits >> np.uint64(45)) & np.uint64(1)
    kept = (bits + np.uint64(2**44 - 1) + last) >> np.uint64(45) << np.uint64(45)
    return kept.view(np.float64)


def e4m3(x: Array, scale: float, rounding: Rounding = to_nearest) -> Array:
    """What an entry becomes in fp8_e4m3."""
    wide = np.float64(np.float32(scale))
    return rounding(x / wide) * wide


def ds_mla_latent(x: Array, rounding: Rounding = to_nearest, block: int = 128) -> Array:
    """What a latent [.., R] becomes in fp8_ds_mla."""
    rounded = np.empty_like(x)
    for start in range(0, x.shape[-1], block):
        part = x[..., start : start + block]
        scale = np.maximum((np.abs(part).max(-1, keepdims=True) / 448).astype(np.float32), np.float32(1e-12))
        rounded[..., start : start + block] = rounding(part / scale.astype(np.float64)) * scale.astype(np.float64)
    return rounded


@dataclass(frozen=True)
class CacheRounding:
    """What becomes of both parts of an entry of one layer, as the transformers cache gets them.

    Attributes:
        scales: of fp8_e4m3, one for all layers or one each; None: fp8_ds_mla.
        rounding: to_nearest, or a wrong one.
        block: of fp8_ds_mla, latent values that share a scale.
    """

    scales: float | tuple[float, ...] | None = 1.0
    rounding: Rounding = to_nearest
    block: int = 128

    def __call__(self, layer: int, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Float64 keys and values [B, heads, T, width] of a layer."""
        assert first.dtype == torch.float64
        a, b = first.numpy(), second.numpy()
        if self.scales is None:
            parts = ds_mla_latent(a, self.rounding, self.block), to_bfloat16(b)
        else:
            scale = self.scales[layer] if isinstance(self.scales, tuple) else self.scales
            parts = e4m3(a, scale, self.rounding), e4m3(b, scale, self.rounding)
        return torch.from_numpy(parts[0]), torch.from_numpy(parts[1])


class RoundedCache(DynamicCache):
    """transformers' own cache, which gets rounded entries."""

    def __init__(self, config: Any, rounding: CacheRounding) -> None:
        super().__init__(config=config)
        self.rounding = rounding

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        rounded = self.rounding(layer_idx, key_states, value_states)
        return super().update(*rounded, layer_idx, *args, **kwargs)


def rounded_reference(model: Any, rounding: CacheRounding) -> Reference:
    """The model beside a RoundedCache."""
    reference = Reference(model)
    reference.cache = RoundedCache(model.config, rounding)
    return reference


def poison(compiled: Any) -> None:
    """NaN in every slot of the caches, whatever they are in."""
    for rank in compiled.ranks:
        for cache in rank.cache:
            cache.view(torch.uint8).fill_(0xFF)
