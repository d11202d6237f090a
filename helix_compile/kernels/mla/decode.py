"""mla_decode: q_latent [B, T, H, R], q_rope [B, T, H, r], paged cache [pages, page_size, R + r] -> partial_o, lse.

    mla_decode          one split: the kernel writes partial_o [B, T, H, R] and lse [B, T, H] itself;
                        more: float32 parts of each split, then merge_splits
    mla_decode.splits   the parts as they are: partial_o_S [B, T, H, S, R], lse_S [B, T, H, S]

A cache in fp8_e4m3 (with cache_scale) is read by either form, one in fp8_ds_mla (uint8) by pointers alone. The forms of the kernel lie in tma.py and pointer.py; tuning.py chooses, launch.py launches.
Lengths are read on the device, grids follow from shapes. The spec is mla_decode_reference.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from helix_compile.kernels.merge import merge_splits, merge_splits_case
from helix_compile.kernels.mla.launch import TMA_BYTES, decode_case, decode_parts, is_for_tma
from helix_compile.kernels.mla.probe import specialises_halves
from helix_compile.kernels.mla.tuning import MlaConfig, MlaShape, mla_config, pointer_config, split_count
from helix_compile.kernels.ops import OPS, Op
from helix_compile.kernels.reference_fp8 import BYTES, FP8
from helix_compile.kernels.registry import CompileCase, Site, register_kernel
from helix_compile.kernels.target import INTERPRETER, KernelTarget, device_target, no_fp8
from helix_compile.kernels.triton_ops import TRITON_TYPE


def _config(shape: MlaShape, target: KernelTarget, scaled: bool = False) -> MlaConfig:
    return mla_config(shape, target, scaled, specialises_halves(target.capability))


def mla_decode_triton(
    q_latent: Tensor,
    q_rope: Tensor,
    cache: Tensor,
    page_table: Tensor,
    visible: Tensor,
    scale: float,
    num_splits: int | None = None,
    config: MlaConfig | None = None,
    *,
    first: Tensor | None = None,
    cache_scale: Tensor | None = None,
    batch: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See mla_decode_reference; float32, bfloat16 or float16, scale > 0, cache in the same or in FP8.

    Tiles of an FP8 cache become q's dtype. With `num_splits` the results
    are the parts of so many splits. `config` stands in for the table's.
    """
    target = device_target(q_latent.device)
    B, T, H, R = q_latent.shape
    if config is None:
        r = q_rope.shape[3]
        tma = is_for_tma(cache) and cache.data_ptr() % TMA_BYTES == 0
        shape = MlaShape(T * H, R, r, cache.shape[1], q_latent.dtype.itemsize, tma)
        config = _config(shape, target, scaled=cache.dtype == FP8)
    max_slots = page_table.shape[1] * cache.shape[1]
    sequences = B if batch is None else batch.shape[0]
    splits = num_splits or split_count(sequences, T, H, max_slots, target, config.block_h, config.block_n)
    direct = num_splits is None and splits == 1
    parts, lse_S = decode_parts(
        config,
        *(q_latent, q_rope, cache, page_table, visible, scale, cache_scale),
        first=first,
        splits=splits,
        direct=direct,
    )
    if direct:
        return parts.view(B, T, H, R), lse_S.view(B, T, H)
    return (parts, lse_S) if num_splits else merge_splits(parts, lse_S, q_latent.dtype)


def mla_decode_splits_triton(
    q_latent: Tensor,
    q_rope: Tensor,
    cache: Tensor,
    page_table: Tensor,
    visible: Tensor,
    scale: float,
    num_splits: int,
    *,
    first: Tensor | None = None,
    cache_scale: Tensor | None = None,
    batch: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Float32 parts of each split; a split that saw nothing has lse = -inf, and its part is not written."""
    step = q_latent, q_rope, cache, page_table, visible, scale, num_splits
    return mla_decode_triton(*step, first=first, cache_scale=cache_scale)


def _mla_decode_splits_fake(q_latent: Tensor, *others: Any, **_: Any) -> tuple[Tensor, Tensor]:
    *rows, R = q_latent.shape
    lse = q_latent.new_empty((*rows, others[-1]), dtype=torch.float32)
    return lse.new_empty((*rows, others[-1], R)), lse


def mixed_dtypes(site: Site) -> str | None:
    """Why a kernel does not take these dtypes: q and cache are alike, or the cache is in FP8."""
    q_latent, q_rope, cache = site.args[:3]
    own = BYTES if site.keywords.get("cache_scale") is None else FP8
    dtypes = {q_latent.dtype, q_rope.dtype, *({cache.dtype} - {own})}
    if len(dtypes) > 1 or q_latent.dtype not in TRITON_TYPE:
        return (
            f"q_latent {q_latent.dtype}, q_rope {q_rope.dtype}, cache {cache.dtype}; the kernel takes one of float32, "
            "bfloat16 and float16 for all three, or a cache in FP8"
        )
    return None


def _supports(site: Site, target: KernelTarget) -> str | None:
    _, _, cache, page_table, visible, scale = site.args[:6]
    if reason := mixed_dtypes(site) or no_fp8(cache.dtype, target):
        return reason
    if page_table.dtype != torch.int64 or visible.dtype != torch.int32:
        return f"page_table {page_table.dtype}, visible {visible.dtype}; the kernel takes int64 and int32"
    if cache.stride(2) != 1:
        return f"channels of the cache have stride {cache.stride(2)}; the kernel reads rows"
    if not scale > 0:
        return f"scale {scale}; the kernel takes the maximum before it scales, so it needs scale > 0"
    return None


def _site_shape(site: Site) -> MlaShape:
    """Sizes of a site. T that a graph leaves open stands for plain decode, one token a sequence."""
    q_latent, q_rope, cache = site.args[:3]
    _, tokens, H, R = q_latent.shape
    rows = (tokens if isinstance(tokens, int) else 1) * H
    return MlaShape(rows, R, q_rope.shape[3], cache.shape[1], q_latent.dtype.itemsize, is_for_tma(cache))


def _form_cases(site: Site, target: KernelTarget, directs: list[bool]) -> list[CompileCase]:
    """The selected form, once a way to store, and the pointer form behind it; the same of a cache in FP8, if this one is not."""
    shape, (q_latent, _, cache) = _site_shape(site), site.args[:3]

    def case(config: MlaConfig, cache_dtype: torch.dtype = cache.dtype, **options: Any) -> CompileCase:
        return decode_case(
            config,
            q_latent.shape[2],
            shape.R,
            shape.r,
            shape.page_size,
            q_latent.dtype,
            cache_dtype,
            strides=(cache.stride(0), cache.stride(1)),
            scaled=cache_dtype is FP8,
            interpreted=target.arch == INTERPRETER,
            kv_ctas=-(-shape.rows // config.block_h),
            windowed=site.keywords.get("first") is not None,
            **options,
        )

    config = _config(shape, target, scaled=cache.dtype is FP8)
    behind = pointer_config(shape, target, scaled=cache.dtype is FP8)
    cases = [case(config, direct=direct) for direct in directs]
    if config != behind:
        cases.append(case(behind, fallback=True))
    if shape.itemsize == 2 and cache.dtype is q_latent.dtype and no_fp8(FP8, target) is None:
        config = _config(dataclasses.replace(shape, tma=is_for_tma(cache, FP8.itemsize)), target, scaled=True)
        of_fp8 = case(config, FP8, fallback=True)  # leaves each split's parts
        cases.append(dataclasses.replace(of_fp8, kernel="mla_decode.fp8", config=f"FP8 cache, {config}"))
    return cases


def _cases(site: Site, target: KernelTarget) -> list[CompileCase]:
    """The kernel, and the merge of each number of splits that a batch can get."""
    shape = _site_shape(site)
    config = _config(shape, target, scaled=site.args[2].dtype is FP8)
    H = site.args[0].shape[2]
    counts = {
        split_count(B, shape.rows // H, H, site.capacity.max_slots, target, config.block_h, config.block_n)
        for B in range(1, site.capacity.max_batch_size + 1)
    }
    cases = _form_cases(site, target, sorted({count == 1 for count in counts}))
    return cases + [merge_splits_case(n, shape.R, site.args[0].dtype) for n in sorted(counts - {1})]


MLA_DECODE = register_kernel(OPS["mla_decode"], mla_decode_triton, _supports, _cases)


# what a split holds is a matter of tiles, so there is no reference: the launcher's signature is the op's
_SPLITS = Op("mla_decode.splits", mla_decode_splits_triton, _mla_decode_splits_fake)
MLA_DECODE_SPLITS = register_kernel(
    _SPLITS, mla_decode_splits_triton, _supports, lambda site, target: _form_cases(site, target, [False])
)
