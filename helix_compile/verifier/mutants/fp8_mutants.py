"""Faults of caches in FP8: how an entry is rounded, and by which scale it is read."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from helix_compile.ir.graph import input_named
from helix_compile.module import HelixModule
from helix_compile.verifier.mutants.mutant import A2A, FP8_CATALOGUE, kernel_mutant, mutant
from helix_compile.verifier.numeric.cache_format import of_codes, to_codes

SCALES = (0.004, 0.02, 0.01, 0.03)  # at the first many entries lie beyond 448 times it
E4M3: dict[str, Any] = {**A2A, "cache_dtype": "fp8_e4m3", "cache_scale": SCALES}
DS_MLA: dict[str, Any] = {**A2A, "cache_dtype": "fp8_ds_mla"}
_e4m3 = partial(kernel_mutant, options=E4M3, catalogue=FP8_CATALOGUE)
_ds_mla = partial(kernel_mutant, options=DS_MLA, catalogue=FP8_CATALOGUE)
_append, _decode = torch.ops.helix.cache_append, torch.ops.helix.mla_decode


def _toward_zero(x: Tensor, scale: Tensor) -> Tensor:
    """Float64 values of e4m3 times the scale: cut off. They are cached as they are."""
    wide = x.double() / scale.double()
    codes = to_codes(wide)
    return of_codes(torch.where(of_codes(codes).abs() > wide.abs(), codes - 1, codes)) * scale.double()


@_e4m3("an entry in FP8 is rounded toward zero", 4, "cache_append", kind="cache")
def rounded_toward_zero(cache: Tensor, table: Tensor, slots: Tensor, visible: Tensor, *parts: Tensor, **k: Any) -> Any:
    return _append(cache, table, slots, visible, *(_toward_zero(x, k["cache_scale"]) for x in parts), **k)


@_e4m3("what lies beyond 448 times the scale is not clamped", 4, "cache_append", kind="cache")
def not_clamped(cache: Tensor, table: Tensor, slots: Tensor, visible: Tensor, *parts: Tensor, **k: Any) -> Any:
    beyond = (torch.where(x.abs() > 448 * k["cache_scale"], torch.nan, x) for x in parts)
    return _append(cache, table, slots, visible, *beyond, **k)


@_e4m3("an entry is times the scale, not divided by it", 4, "cache_append", kind="cache")
def multiplied(cache: Tensor, table: Tensor, slots: Tensor, visible: Tensor, *parts: Tensor, **k: Any) -> Any:
    return _append(cache, table, slots, visible, *parts, cache_scale=1 / k["cache_scale"])


@_e4m3("the cache is read without its scale", 8, "mla_decode")
def read_without_scale(*args: Any, **k: Any) -> Any:
    return _decode(*args, **{**k, "cache_scale": torch.ones_like(k["cache_scale"])})


@_e4m3("scores are of scaled keys, the output of values that are not", 8, "mla_decode")
def values_without_scale(*args: Any, **k: Any) -> Any:
    o, lse = _decode(*args, **k)
    return o / k["cache_scale"].to(o.dtype), lse


@_ds_mla("the rope part is in FP8 too", 8, "cache_append", kind="cache")
def rope_in_fp8(cache: Tensor, table: Tensor, slots: Tensor, visible: Tensor, latent: Tensor, rope: Tensor) -> Any:
    scale = (rope.abs().amax(-1, keepdim=True) / 448).double().clamp(min=1e-12)
    return _append(cache, table, slots, visible, latent, (of_codes(to_codes(rope / scale)) * scale).to(rope.dtype))


@_ds_mla("the latent is rounded by the scale of the step's largest", 4, "cache_append", kind="cache")
def one_scale_a_step(cache: Tensor, table: Tensor, slots: Tensor, visible: Tensor, latent: Tensor, rope: Tensor) -> Any:
    scale = (latent.abs().amax() / 448).double().clamp(min=1e-12)
    rounded = (of_codes(to_codes(latent / scale)) * scale).to(latent.dtype)
    return _append(cache, table, slots, visible, rounded, rope)


@mutant("two layers read by each other's scale", 4, "graph", E4M3, FP8_CATALOGUE)
def scales_change_places(compiled: HelixModule) -> None:
    graph = compiled.graph.graph
    first, second = (input_named(graph, "scale", f"cache_scale_{site}") for site in (0, 1))
    for call in [n for n in graph.nodes if n.op == "call_module"]:
        swapped = {first: second, second: first}
        call.args = tuple(swapped.get(a, a) for a in call.args)


@mutant("a rank holds another scale than the plan states", 4, "cache", E4M3, FP8_CATALOGUE)
def another_scale(compiled: HelixModule) -> None:
    compiled.ranks[1].scales[2] = compiled.ranks[1].scales[2] * 2
