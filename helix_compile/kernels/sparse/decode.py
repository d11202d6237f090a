"""mla_decode_slots: mla_decode over chosen slots, q_latent [B, T, H, R], q_rope [B, T, H, r], slots [B, T, m], count [B, T].

    program (heads, query, split): BLOCK_H heads of one (b, t) over one part of the first `count` places of its list;
    per tile of BLOCK_N places: slot -> page -> row of the cache, whose channels then load as in mla_decode
    merge_splits then merges the parts (not launched where a list is not split)

Each query has rows of its own, so the T queries of a sequence share nothing but the page table. Places behind `count` are not
read; a list of none gives o = 0 and lse = -inf. The cache may be a part of wider rows. The loops are those of mla_decode
(kernels/mla): its TMA forms where TMA can gather rows (sm_100), else the pointer form. The spec is mla_decode_slots_reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from helix_compile.kernels.merge import merge_splits, merge_splits_case
from helix_compile.kernels.mla.decode import mixed_dtypes
from helix_compile.kernels.mla.launch import TMA_BYTES, decode_case, decode_parts, is_for_tma
from helix_compile.kernels.mla.probe import specialises_halves
from helix_compile.kernels.mla.tuning import MlaConfig, MlaShape, pointer_config, slots_config, split_count
from helix_compile.kernels.ops import OPS
from helix_compile.kernels.reference_fp8 import FP8
from helix_compile.kernels.registry import CompileCase, Site, register_kernel
from helix_compile.kernels.target import INTERPRETER, KernelTarget, device_target, no_fp8


def mla_decode_slots_triton(
    q_latent: Tensor,
    q_rope: Tensor,
    cache: Tensor,
    page_table: Tensor,
    visible: Tensor,
    slots: Tensor,
    count: Tensor,
    scale: float,
    num_splits: int | None = None,
    config: MlaConfig | None = None,
    *,
    cache_scale: Tensor | None = None,
    batch: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See mla_decode_slots_reference; float32, bfloat16 or float16, scale > 0, cache in the same or in FP8.

    `visible` is not read: it says that the cache was written before. `num_splits`: parts of a list. `config` stands in for
    the table's.
    """
    target = device_target(q_latent.device)
    B, T, H, R = q_latent.shape
    if config is None:
        config = _config(_shape(q_latent, q_rope, cache, cache.data_ptr() % TMA_BYTES == 0), target)
    sequences = B if batch is None else batch.shape[0]
    splits = num_splits or _splits(sequences * T, H, slots.shape[2], target, config)
    step = q_latent, q_rope, cache, page_table, count, scale, cache_scale
    parts, lse = decode_parts(config, *step, splits=splits, direct=splits == 1, slots=slots)
    if splits == 1:
        return parts.view(B, T, H, R), lse.view(B, T, H)
    return merge_splits(parts, lse, q_latent.dtype)


def _config(shape: MlaShape, target: KernelTarget) -> MlaConfig:
    return slots_config(shape, target, specialises_halves(target.capability))


def _shape(q_latent: Tensor, q_rope: Tensor, cache: Tensor, aligned: bool = True) -> MlaShape:
    (_, _, H, R), r, page_size = q_latent.shape, q_rope.shape[3], cache.shape[1]
    # rows of FP8 are gathered by pointers: a tile of TMA gathers is of q's dtype
    alike = cache.dtype is q_latent.dtype
    return MlaShape(H, R, r, page_size, q_latent.dtype.itemsize, tma=alike and aligned and is_for_tma(cache))


def _splits(queries: int, H: int, m: int, target: KernelTarget, config: MlaConfig) -> int:
    return split_count(queries, 1, H, m, target, config.block_h, config.block_n)


def _supports(site: Site, target: KernelTarget) -> str | None:
    _, _, cache, page_table, _, slots, count, scale = site.args
    if reason := mixed_dtypes(site) or no_fp8(cache.dtype, target):
        return reason
    if (page_table.dtype, slots.dtype, count.dtype) != (torch.int64, torch.int32, torch.int32):
        return (
            f"page_table {page_table.dtype}, slots {slots.dtype}, count {count.dtype}; the kernel takes int64, int32 and "
            "int32"
        )
    if cache.stride(2) != 1:
        return f"channels of the cache have stride {cache.stride(2)}; the kernel reads rows"
    if not scale > 0:
        return f"scale {scale}; the kernel takes the maximum before it scales, so it needs scale > 0"
    return None


def _cases(site: Site, target: KernelTarget) -> list[CompileCase]:
    """The kernel, once a way to store, the pointer form behind it, and the merge of each number of splits."""
    q_latent, q_rope, cache, _, _, slots = site.args[:6]
    shape = _shape(q_latent, q_rope, cache)
    config, behind = _config(shape, target), pointer_config(shape, target)
    T = q_latent.shape[1] if isinstance(q_latent.shape[1], int) else 1
    counts = {
        _splits(B * T, shape.rows, slots.shape[2], target, config) for B in range(1, site.capacity.max_batch_size + 1)
    }

    def case(config: MlaConfig, direct: bool, fallback: bool = False) -> CompileCase:
        return decode_case(
            config,
            shape.rows,
            shape.R,
            shape.r,
            shape.page_size,
            q_latent.dtype,
            cache.dtype,
            strides=(cache.stride(0), cache.stride(1)),
            chosen=True,
            scaled=cache.dtype is FP8,
            direct=direct,
            interpreted=target.arch == INTERPRETER,
            kv_ctas=-(-shape.rows // config.block_h),
            fallback=fallback,
        )

    cases = [case(config, direct) for direct in sorted({splits == 1 for splits in counts})]
    if config != behind:
        cases.append(case(behind, direct=False, fallback=True))
    return cases + [merge_splits_case(n, shape.R, q_latent.dtype) for n in sorted(counts - {1})]


MLA_DECODE_SLOTS = register_kernel(OPS["mla_decode_slots"], mla_decode_slots_triton, _supports, _cases)
