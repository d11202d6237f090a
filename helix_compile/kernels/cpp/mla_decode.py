"""mla_decode on a CPU in C++ (mla_decode.cpp): a shard is read once, where the reference reads it for scores and for values.

Float32, bfloat16, float16 or float64, alike for queries and cache; any strides but of a cache's channels. Windows, FP8 caches, and
machines where nothing can be built keep the reference. On more threads than there is work for, a sequence is cut in parts: what is
summed where then follows the number of threads.
"""

from __future__ import annotations

import ctypes
import logging
from pathlib import Path

import torch
from torch import Tensor

from helix_compile.kernels.cpp.build import CPP_TYPE, library
from helix_compile.kernels.ops import OPS
from helix_compile.kernels.reference import accumulation_dtype, mla_decode_reference
from helix_compile.kernels.registry import Site, register_cpp_kernel
from helix_compile.kernels.target import KernelTarget

SOURCE = Path(__file__).with_suffix(".cpp")


def mla_decode_cpp(
    q_latent: Tensor,
    q_rope: Tensor,
    cache: Tensor,
    page_table: Tensor,
    visible: Tensor,
    scale: float,
    *,
    first: Tensor | None = None,
    cache_scale: Tensor | None = None,
    batch: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See mla_decode_reference, which computes what this can't."""
    reason = _refused(q_latent, q_rope, cache, page_table, visible, first)
    code = library(SOURCE, q_latent.dtype) if reason is None else reason
    if isinstance(code, str):
        logging.getLogger(__name__).info("mla_decode by its reference: %s", code)
        tensors = q_latent, q_rope, cache, page_table, visible
        return mla_decode_reference(*tensors, scale, first=first, cache_scale=cache_scale)
    B, T, H, R = q_latent.shape
    partial_o = q_latent.new_empty((B, T, H, R))
    lse = q_latent.new_empty((B, T, H), dtype=accumulation_dtype(q_latent.dtype))
    numbers = (ctypes.c_int64 * 19)(
        *(B, T, H, R, q_rope.shape[3], cache.shape[1], page_table.shape[1], torch.get_num_threads()),
        B if batch is None else batch.shape[0],
        *(*q_latent.stride(), *q_rope.stride(), *cache.stride()[:2]),
    )
    code.mla_decode_work.restype = ctypes.c_int64
    work = lse.new_empty(code.mla_decode_work(numbers))
    tensors = q_latent, q_rope, cache, page_table.contiguous(), visible.contiguous()  # held until the call is over
    addresses = (ctypes.c_void_p * 8)(*(t.data_ptr() for t in (*tensors, partial_o, lse, work)))
    code.mla_decode(addresses, numbers, ctypes.c_double(scale))
    return partial_o, lse


def _refused(
    q_latent: Tensor, q_rope: Tensor, cache: Tensor, page_table: Tensor, visible: Tensor, first: Tensor | None
) -> str | None:
    """Why the reference computes these, tensors or fakes."""
    dtypes = {q_latent.dtype, q_rope.dtype, cache.dtype}
    if len(dtypes) > 1 or q_latent.dtype not in CPP_TYPE:
        return (
            f"q_latent {q_latent.dtype}, q_rope {q_rope.dtype}, cache {cache.dtype}; C++ takes one float for all three"
        )
    if first is not None:
        return "a window; C++ reads from the first slot on"
    if page_table.dtype != torch.int64 or visible.dtype != torch.int32:
        return f"page_table {page_table.dtype}, visible {visible.dtype}; C++ takes int64 and int32"
    if cache.stride(2) != 1:
        return f"channels of the cache have stride {cache.stride(2)}; C++ reads rows"
    return None


def _supports(site: Site, target: KernelTarget) -> str | None:
    q_latent, q_rope, cache, page_table, visible = site.args[:5]
    reason = _refused(q_latent, q_rope, cache, page_table, visible, site.keywords.get("first"))
    if reason is not None:
        return reason
    code = library(SOURCE, site.args[0].dtype)
    return code if isinstance(code, str) else None


MLA_DECODE_CPP = register_cpp_kernel(OPS["mla_decode"], mla_decode_cpp, _supports)
