"""Formats of weights and of the cache that a planner compares: bytes of a value, and which peak its matmuls have."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from helix_compile.config.options import FP8_DS_MLA, FP8_E4M3
from helix_compile.errors import HelixError
from helix_compile.layout.cache_bytes import ds_mla_bytes
from helix_compile.plan.matches import AttentionMatch


@dataclass(frozen=True)
class WeightFormat:
    """One format of the weights of matmuls in layers; None: as the model has them.

    Attributes:
        bytes: of a value, scales included.
        peak: whose flops its matmuls reach.
    """

    name: str
    bytes: Fraction | None
    peak: str
    meaning: str


WEIGHTS = {
    f.name: f
    for f in (
        WeightFormat("auto", None, "bf16", "weights as the model has them"),
        WeightFormat("bf16", Fraction(2), "bf16", "weights in bfloat16"),
        WeightFormat(
            "fp8", Fraction(1), "fp8", "weights of matmuls in FP8 (block scales not counted), activations too"
        ),
        WeightFormat(
            "nvfp4", Fraction(9, 16), "fp4", "weights of matmuls in NVFP4 (a scale byte for 16), activations too"
        ),
        WeightFormat(
            "mxfp4", Fraction(17, 32), "fp4", "weights of matmuls in MXFP4 (a scale byte for 32), activations too"
        ),
        WeightFormat(
            "fp4", Fraction(1, 2), "fp4", "weights of matmuls at half a byte, scales not counted, as the paper does"
        ),
    )
}


@dataclass(frozen=True)
class CacheFormat:
    """One format of the cache; `option` is the cache_dtype of a plan, None where helix_compile has none."""

    name: str
    option: str | None
    peak: str
    meaning: str


CACHES = {
    f.name: f
    for f in (
        CacheFormat("auto", "auto", "bf16", "the cache in the model's dtype"),
        CacheFormat("fp8", FP8_E4M3, "fp8", "the cache in FP8, one scale; attention at the FP8 peak"),
        CacheFormat(
            FP8_DS_MLA, FP8_DS_MLA, "fp8", "the cache in FP8 with a scale for 128 values; attention at the FP8 peak"
        ),
        CacheFormat(
            "fp4",
            None,
            "fp4",
            "the cache at half a byte a value and attention at the FP4 peak, as the paper does: no plan of ours can hold it",
        ),
    )
}


def weight_format(name: str) -> WeightFormat:
    """By name.

    Raises:
        HelixError: no such format.
    """
    if name not in WEIGHTS:
        raise HelixError(f"--weights {name!r} is unknown; expected one of {', '.join(WEIGHTS)}")
    return WEIGHTS[name]


def cache_format(name: str) -> CacheFormat:
    """By name; fp8_e4m3, as the option says it, is fp8.

    Raises:
        HelixError: no such format.
    """
    name = "fp8" if name == FP8_E4M3 else name
    if name not in CACHES:
        raise HelixError(f"--kv-dtype {name!r} is unknown; expected one of {', '.join(CACHES)}")
    return CACHES[name]


def read_factor(cache: CacheFormat, sites: list[AttentionMatch], itemsize: int) -> float:
    """What attention reads of a token in this format, over what it reads in the model's dtype.

    Raises:
        HelixError: a format of latents, of an attention that caches K and V; sites of several widths in it.
    """
    if cache.name == "auto":
        return 1.0
    if cache.name == "fp4":
        return 0.5 / itemsize
    if cache.name == "fp8":
        return 1.0 / itemsize
    if any(a.cache.heads for a in sites):
        raise HelixError(
            f"--kv-dtype {cache.name} is a format of latents (MLA), and this model caches K and V; nearest: fp8"
        )
    factors = {
        ds_mla_bytes(a.cache.first, a.cache.second) / ((a.cache.first + a.cache.second) * itemsize) for a in sites
    }
    if len(factors) > 1:
        raise HelixError(f"--kv-dtype {cache.name}: latents of several widths are not costed; nearest: fp8")
    return factors.pop()
