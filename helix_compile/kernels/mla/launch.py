"""Build and launch one form of mla_decode: the CompileCase of a config, the arguments of a call.

decode_case(config, sizes, ...) -> CompileCase      what the offline compiler reads
decode_parts(config, tensors, ...) -> parts, lse    one launch of it, grid (row tiles, B, splits)
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from helix_compile.kernels.merge import LOG2E
from helix_compile.kernels.mla.pointer import mla_pointer_kernel
from helix_compile.kernels.mla.tma import mla_tma_kernel
from helix_compile.kernels.mla.tuning import POINTER, TRANSPOSED, MlaConfig
from helix_compile.kernels.reference_fp8 import BYTES, FP8, scales_and_rope
from helix_compile.kernels.registry import CompileCase, launch
from helix_compile.kernels.triton_ops import TRITON_TYPE
from helix_compile.layout.cache_bytes import BLOCK

TMA_BYTES = 16  # alignment of a tensor's base and of its rows


CACHE_TYPE = {**TRITON_TYPE, FP8: "fp8e4nv", BYTES: "fp8e4nv"}


SIZES = ("T", "queries", "stride_table", "stride_slots")


STRIDES = ("stride_q_token", "stride_q_head", "stride_q_rope_token", "stride_q_rope_head")


@functools.lru_cache(maxsize=256)
def decode_case(
    config: MlaConfig,
    H: int,
    R: int,
    r: int,
    page_size: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    *,
    strides: tuple[int, int] | None = None,
    chosen: bool = False,
    scaled: bool = False,
    windowed: bool = False,
    direct: bool = False,
    interpreted: bool = False,
    kv_ctas: int = 1,
    fallback: bool = False,
) -> CompileCase:
    """The kernel of one form.

    Args:
        config: form and block sizes.
        H: query heads of this rank.
        R: latent width.
        r: rope width.
        page_size: slots of a page.
        dtype: of q.
        cache_dtype: of the cache; uint8: rows of fp8_ds_mla.
        strides: elements from a page of the cache to the next, from a slot to the next; None: nothing lies between.
        chosen: each query has a list of slots: mla_decode_slots.
        scaled: the cache has a scale (fp8_e4m3).
        windowed: rows have a first slot.
        direct: there is one split, and it writes the op's output: q's dtype, and 0 where nothing was seen.
        interpreted: whether Triton's interpreter runs it.
        kv_ctas: for tables, CTAs that visit each KV token.
        fallback: for tables, whether the plan would select another.
    """
    element, cache_element = TRITON_TYPE[dtype], CACHE_TYPE[cache_dtype]
    typed = {
        "q_ptr": f"*{element}",
        "q_rope_ptr": f"*{element}",
        "page_table_ptr": "*i64",
        "visible_ptr": "*i32",
        "o_ptr": f"*{element}" if direct else "*fp32",
        "lse_ptr": "*fp32",
        **dict.fromkeys(STRIDES, "i32"),
    }
    constexprs: dict[str, Any] = {
        "H": H,
        "R": R,
        "ROPE": r,
        "PAGE": page_size,
        "SCALED": scaled,
        "BLOCK_H": config.block_h,
        "BLOCK_N": config.block_n,
        "STORE_DEAD": direct,
        "WIDE_DOT": interpreted and dtype == torch.bfloat16,
        "WINDOWED": windowed,
    }
    if windowed:
        typed["first_ptr"] = "*i32"
    else:
        constexprs["first_ptr"] = None
    if config.form == POINTER:
        row = R + r if strides is None else strides[1]
        constexprs |= {"BLOCKED": cache_dtype is BYTES, "scales_ptr": None, "rope_ptr": None}
        if cache_dtype is BYTES:
            del constexprs["scales_ptr"], constexprs["rope_ptr"]
            typed |= {"scales_ptr": "*fp32", "rope_ptr": "*bf16"}
        constexprs |= {"PAGE_STRIDE": page_size * row if strides is None else strides[0], "ROW_STRIDE": row}
        constexprs |= {"BLOCK_R": _padded(R), "BLOCK_ROPE": _padded(r)}
        typed["cache_ptr"] = f"*{cache_element}"
    else:
        constexprs |= {
            "PARTS": config.parts,
            "WARP_SPECIALIZE": config.warp_specialize,
            "PACKED": config.packed,
            "TRANSPOSED": config.form == TRANSPOSED,
        }
        if r == 0:
            constexprs["k_rope_desc"] = None
    if chosen:
        typed["slots_ptr"] = "*i32"
    else:
        constexprs["slots_ptr"] = None
    if scaled:
        typed["cache_scale_ptr"] = "*fp32"
    else:
        constexprs["cache_scale_ptr"] = None
    descriptors = {
        name: f"tensordesc<{cache_element}[{block[0]},{block[1]}]>"
        for name, block in _tma_blocks(config, R, r, chosen).items()
    }
    name = "mla_decode_slots" if chosen else "mla_pointer_decode" if config.form == POINTER else "mla_decode"
    return CompileCase(
        kernel=name,
        function=mla_pointer_kernel if config.form == POINTER else mla_tma_kernel,
        signature={**typed, **descriptors, "scale_log2": "fp32", **dict.fromkeys(SIZES, "i32")},
        constexprs=constexprs,
        options={"num_warps": config.num_warps, "num_stages": config.num_stages},
        # parts of a row lie wherever the ones before them end
        divisible_by_16=tuple(name for name in typed if name not in ("scales_ptr", "rope_ptr") or R % BLOCK == 0),
        config=f"{config}, windowed" if windowed else str(config),
        kv_tokens_per_step=config.block_n,
        ctas_per_kv_token=kv_ctas,
        fallback=fallback,
    )


def _padded(width: int) -> int:
    return max(16, triton.next_power_of_2(width))  # a dot takes no less than 16


def _tma_blocks(config: MlaConfig, R: int, r: int, chosen: bool = False) -> dict[str, list[int]]:
    """Descriptors over the cache [slots, R + r]: each loads one tile of latent, or of rope, channels (of none, where r is 0); chosen: by rows."""
    if config.form == POINTER:
        return {}
    rows = 1 if chosen else config.block_n
    latent = {"k_desc": [rows, R // config.parts]}
    return {**latent, "k_rope_desc": [rows, r]} if r else latent


def decode_parts(
    config: MlaConfig,
    q_latent: Tensor,
    q_rope: Tensor,
    cache: Tensor,
    page_table: Tensor,
    visible: Tensor,
    scale: float,
    cache_scale: Tensor | None,
    *,
    first: Tensor | None = None,
    splits: int,
    direct: bool,
    slots: Tensor | None = None,
    case: CompileCase | None = None,
) -> tuple[Tensor, Tensor]:
    """Run one form: parts [B, T, H, splits, R] (q's dtype if direct, else float32) and lse [B, T, H, splits].

    `slots` [B, T, m]: each query sees the first `visible` of its own list. `case` stands in for the one
    that the config gives: an edited kernel, say.
    """
    B, T, H, R = q_latent.shape
    page_size, r = cache.shape[1], q_rope.shape[3]
    o = q_latent.new_empty((B, T, H, splits, R), dtype=q_latent.dtype if direct else torch.float32)
    lse = q_latent.new_empty((B, T, H, splits), dtype=torch.float32)
    if o.numel() == 0:
        return o, lse
    q_latent, q_rope = _one_token_stride(q_latent), _one_token_stride(q_rope)
    page_table, visible = page_table.contiguous(), visible.contiguous()
    case = case or decode_case(
        config,
        H,
        R,
        r,
        page_size,
        q_latent.dtype,
        cache.dtype,
        strides=(cache.stride(0), cache.stride(1)),
        chosen=slots is not None,
        scaled=cache_scale is not None,
        windowed=first is not None,
        direct=direct,
        interpreted=not q_latent.is_cuda,
    )
    arguments = {
        "q_ptr": q_latent,
        "q_rope_ptr": q_rope,
        "page_table_ptr": page_table,
        "visible_ptr": visible,
        "o_ptr": o,
        "lse_ptr": lse,
        "scale_log2": scale * LOG2E.value,
        "T": T,
        "queries": 1,
        "stride_table": page_table.stride(0),
        "stride_slots": 0,
        "stride_q_token": q_latent.stride(1),
        "stride_q_head": q_latent.stride(2),
        "stride_q_rope_token": q_rope.stride(1),
        "stride_q_rope_head": q_rope.stride(2),
    }
    if first is not None:
        arguments["first_ptr"] = first.contiguous()
    if cache_scale is not None:
        arguments["cache_scale_ptr"] = cache_scale
    if cache.dtype is BYTES:
        parts = (cache[..., :R].view(FP8), *scales_and_rope(cache, R, r))
        arguments |= dict(zip(("cache_ptr", "scales_ptr", "rope_ptr"), parts, strict=True))
    elif config.form == POINTER:
        arguments["cache_ptr"] = cache
    else:
        rows = cache.as_strided((cache.shape[0] * page_size, R + r), (cache.stride(1), 1))
        for name, block in _tma_blocks(config, R, r, slots is not None).items():
            arguments[name] = TensorDescriptor.from_tensor(rows, block)
    tokens, sequences = T, B
    if slots is not None:  # a query is a sequence of one token
        slots = slots.contiguous()
        tokens, sequences = 1, B * T
        arguments |= {"slots_ptr": slots, "T": tokens, "queries": T, "stride_slots": slots.stride(1)}
    launch(case, (triton.cdiv(tokens * H, config.block_h), sequences, splits), arguments)
    return o, lse


def is_for_tma(cache: Tensor, itemsize: int = 0) -> bool:
    """A cache [pages, page_size, R + r] whose slots all lie at one stride, aligned to 16 bytes; itemsize: if not its own."""
    if cache.dtype is BYTES:
        return False
    pages, slots, channels = cache.stride()
    return channels == 1 and pages == cache.shape[1] * slots and slots * (itemsize or cache.itemsize) % TMA_BYTES == 0


def _one_token_stride(q: Tensor) -> Tensor:
    """The query [B, T, H, *] as it is where rows lie contiguous and (b, t) is one stride, else a copy."""
    B, T = q.shape[:2]
    one_stride = B == 1 or T == 1 or q.stride(0) == T * q.stride(1)
    if q.stride(3) != 1 or not one_stride:
        return q.contiguous()
    return q if T > 1 else q.as_strided(q.shape, (q.stride(0), q.stride(0), *q.stride()[2:]))
