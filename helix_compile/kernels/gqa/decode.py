"""gqa_decode: q [B, T, H, Dk], k_cache [pages, page_size, K, Dk], v_cache [.., K, Dv] -> partial_o [B, T, H, Dv], lse.

    B sequences, T new tokens, H query heads, K KV heads, G = H / K heads a group; rows of a KV head: T * G, t first
    program (row tile, split, b * K + kv head): its rows over one part of the sequence's slots
    merge_splits then merges the parts of a row (not launched where a sequence is not split)

Dots are transposed: the tile of BLOCK_N slots is the M side and the group, padded in the tile, the N side, so that
tensor cores of sm_90 and sm_100 take groups of any size without padding anything in memory; slots below the tile of the
first one that a row sees (a window) are not read:

    s [N, ROWS] = k [N, Dk] . q^T;  acc [Dv, ROWS] += v^T [Dv, N] . p

The number of splits follows from shapes alone; each sequence cuts its own length in that many parts. Loads are TMA where
the target has it and a page is a whole number of tiles, else by pointers. Tiles of a cache in fp8_e4m3 become q's dtype on the way to
the dots; its one scale is folded into the scores' and the output. The spec is gqa_decode_reference.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from helix_compile.kernels.gqa.tiles import GqaSizes, GqaTile, split_count
from helix_compile.kernels.merge import LN2, LOG2E, merge_splits, merge_splits_case
from helix_compile.kernels.ops import OPS
from helix_compile.kernels.reference_fp8 import FP8
from helix_compile.kernels.registry import CompileCase, Site, launch, register_kernel
from helix_compile.kernels.target import INTERPRETER, KernelTarget, device_target, no_fp8
from helix_compile.kernels.triton_ops import TRITON_TYPE

# finite: -inf - -inf never arises, and only scores below it (fp32's end) would count as unseen
LOWEST = tl.constexpr(-3.0e38)


MAX_WIDTH = 256


@triton.jit
def _gqa_decode_kernel(  # type: ignore[no-untyped-def] # Triton types its arguments
    q_ptr,
    k_src,
    v_src,
    table_ptr,
    visible_ptr,
    first_ptr,
    cache_scale_ptr,
    o_ptr,
    lse_ptr,
    stride_q_B,
    stride_q_T,
    stride_q_H,
    stride_k_page,
    stride_k_slot,
    stride_k_K,
    stride_v_page,
    stride_v_slot,
    stride_v_K,
    stride_table_B,
    stride_visible_B,
    stride_visible_T,
    scale,
    T,
    splits,
    K: tl.constexpr,
    G: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    TMA: tl.constexpr,
    WIDE_DOT: tl.constexpr,
    WINDOWED: tl.constexpr,
    SCALED: tl.constexpr,
):
    split = tl.program_id(1)
    b = (tl.program_id(2) // K).to(tl.int64)
    head = tl.program_id(2) % K
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_t = rows // G
    row_h = head * G + rows % G
    live = row_t < T
    of_row = b * stride_visible_B + row_t * stride_visible_T
    limit = tl.load(visible_ptr + of_row, mask=live, other=0)
    k_columns = tl.arange(0, BLOCK_DK)
    v_columns = tl.arange(0, BLOCK_DV)
    q = tl.load(
        q_ptr
        + b * stride_q_B
        + row_t.to(tl.int64)[None, :] * stride_q_T
        + row_h[None, :] * stride_q_H
        + k_columns[:, None],
        mask=live[None, :] & (k_columns < DK)[:, None],
        other=0.0,
    )
    if WIDE_DOT:
        q = q.to(tl.float32)
    if SCALED:
        cache_scale = tl.load(cache_scale_ptr)
        scale *= cache_scale
    longest = tl.max(limit, 0)
    base = 0
    if WINDOWED:  # a row that sees nothing keeps no tile from being skipped
        low = tl.load(first_ptr + of_row, mask=live, other=0)
        oldest = tl.min(tl.where(low < limit, low, longest), 0)
        base = oldest // BLOCK_N * BLOCK_N
    part = tl.cdiv(tl.cdiv(longest - base, BLOCK_N), splits) * BLOCK_N
    start = base + split * part
    end = tl.minimum(start + part, longest)  # an empty part: start >= end

    top = tl.full([BLOCK_ROWS], LOWEST, tl.float32)
    totals = tl.zeros(
        [BLOCK_N, BLOCK_ROWS], tl.float32
    )  # summed over slots once, at the end: a sum a step costs shuffles
    acc = tl.zeros([BLOCK_DV, BLOCK_ROWS], tl.float32)
    for n in tl.range(start, end, BLOCK_N):
        slots = n + tl.arange(0, BLOCK_N)
        if TMA:  # a tile lies in one page
            tl.static_assert(PAGE % BLOCK_N == 0)
            page = tl.load(table_ptr + b * stride_table_B + n // PAGE)
            row = (page * PAGE + n % PAGE).to(tl.int32)
            k = k_src.load([row, head * stride_k_K])
            v = v_src.load([row, head * stride_v_K])
        else:
            inside = slots < end
            if WINDOWED:
                inside = inside & (slots >= oldest)
            page = tl.load(table_ptr + b * stride_table_B + slots // PAGE, mask=inside, other=0)
            slot = slots % PAGE
            k_rows = page * stride_k_page + slot * stride_k_slot + head * stride_k_K
            v_rows = page * stride_v_page + slot * stride_v_slot + head * stride_v_K
            k = tl.load(
                k_src + k_rows[:, None] + k_columns[None, :],
                mask=inside[:, None] & (k_columns < DK)[None, :],
                other=0.0,
            )
            v = tl.load(
                v_src + v_rows[:, None] + v_columns[None, :],
                mask=inside[:, None] & (v_columns < DV)[None, :],
                other=0.0,
            )
        k = k.to(q.dtype)
        v = v.to(q.dtype)
        s = tl.dot(k, q, input_precision="ieee") * (scale * LOG2E)
        seen = slots[:, None] < limit[None, :]
        if WINDOWED:
            seen = seen & (slots[:, None] >= low[None, :])
        s = tl.where(seen, s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 0))
        p = tl.exp2(s - new_top[None, :])
        shrink = tl.exp2(top - new_top)
        totals = totals * shrink[None, :] + p
        acc = tl.dot(tl.trans(v), p.to(v.dtype), acc * shrink[None, :], input_precision="ieee")
        top = new_top

    total = tl.sum(totals, 0)
    empty = total == 0.0
    divisor = tl.where(empty, 1.0, total)
    o = acc / divisor[None, :]
    if SCALED:
        o *= cache_scale
    lse = tl.where(empty, float("-inf"), (top + tl.log2(divisor)) * LN2)
    out_rows = ((b * T + row_t) * (K * G) + row_h) * splits + split
    tl.store(lse_ptr + out_rows, lse, mask=live)
    tl.store(
        o_ptr + out_rows[None, :] * DV + v_columns[:, None],
        o.to(o_ptr.dtype.element_ty),
        mask=live[None, :] & (v_columns < DV)[:, None],
    )


def _decode_case(
    sizes: GqaSizes, target: KernelTarget, tile: GqaTile, tma: bool, split: bool, windowed: bool, scaled: bool
) -> CompileCase:
    """The attention kernel; `split`: it leaves float32 parts for the merge; `windowed`: rows have a first slot; `scaled`: the cache is FP8."""
    element = TRITON_TYPE[sizes.dtype]
    cached = "fp8e4nv" if scaled else element
    block_dk, block_dv = (max(16, triton.next_power_of_2(D)) for D in (sizes.Dk, sizes.Dv))
    k_type, v_type = (
        f"tensordesc<{cached}[{tile.slots},{block}]>" if tma else f"*{cached}" for block in (block_dk, block_dv)
    )
    strides = [name for name in _gqa_decode_kernel.arg_names if name.startswith("stride_")]
    pointers = ["q_ptr", "table_ptr", "visible_ptr", "o_ptr", "lse_ptr"]
    pointers += [] if tma else ["k_src", "v_src"]
    pointers += ["first_ptr"] if windowed else []
    pointers += ["cache_scale_ptr"] if scaled else []
    aligned = [name for name in strides if name.startswith(("stride_q", "stride_k", "stride_v_"))]
    return CompileCase(
        kernel="gqa_decode",
        function=_gqa_decode_kernel,
        signature={
            "q_ptr": f"*{element}",
            "k_src": k_type,
            "v_src": v_type,
            "table_ptr": "*i64",
            "visible_ptr": "*i32",
            **({"first_ptr": "*i32"} if windowed else {}),
            **({"cache_scale_ptr": "*fp32"} if scaled else {}),
            "o_ptr": "*fp32" if split else f"*{element}",
            "lse_ptr": "*fp32",
            **dict.fromkeys(strides, "i32"),
            "scale": "fp32",
            "T": "i32",
            "splits": "i32",
        },
        constexprs={
            "K": sizes.K,
            "G": sizes.G,
            "DK": sizes.Dk,
            "DV": sizes.Dv,
            "PAGE": sizes.page_size,
            "BLOCK_N": tile.slots,
            "BLOCK_ROWS": tile.rows,
            "BLOCK_DK": block_dk,
            "BLOCK_DV": block_dv,
            "TMA": tma,
            "WIDE_DOT": target.arch == INTERPRETER,
            "WINDOWED": windowed,
            **({} if windowed else {"first_ptr": None}),
            "SCALED": scaled,
            **({} if scaled else {"cache_scale_ptr": None}),
        },
        options={"num_warps": tile.num_warps, "num_stages": tile.num_stages},
        divisible_by_16=(*pointers, *(aligned if sizes.Dk % 16 == sizes.Dv % 16 == 0 else ())),
        config=f"D {sizes.Dk}/{sizes.Dv}, {tile.rows} rows, BLOCK_N {tile.slots}, {'TMA' if tma else 'pointers'}"
        + (", windowed" if windowed else "")
        + (", FP8 cache" if scaled else ""),
        kv_tokens_per_step=tile.slots,
        ctas_per_kv_token=sizes.K * triton.cdiv(sizes.G, tile.rows),
    )


def gqa_decode_triton(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    visible: Tensor,
    scale: float,
    splits: int | None = None,
    tma: bool | None = None,
    *,
    first: Tensor | None = None,
    cache_scale: Tensor | None = None,
    batch: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See gqa_decode_reference; float32, bfloat16 or float16, caches in the same or in FP8, statistics in float32.

    Args:
        q, k_cache, v_cache, page_table, visible, scale, first, cache_scale, batch: of the op. The last dims must be contiguous.
        splits: parts of a sequence, a power of two; default: by the number of multiprocessors.
        tma: load K and V by TMA; default: where the device and the layout allow it.
    """
    B, T, H, _ = q.shape
    sizes, target = GqaSizes.of(q, k_cache, v_cache), device_target(q.device)
    assert q.stride(3) == k_cache.stride(3) == v_cache.stride(3) == page_table.stride(1) == 1
    if tma is None:
        tma = sizes.can_use_tma(target) and all(map(is_for_tma, (k_cache, v_cache)))
    sequences = B if batch is None else batch.shape[0]
    tile = sizes.tile(sequences, T, target, tma, cache_scale is not None)
    row_tiles = triton.cdiv(T * sizes.G, tile.rows)
    if splits is None:
        steps = triton.cdiv(page_table.shape[1] * sizes.page_size, tile.slots)
        splits = split_count(sequences * sizes.K * row_tiles, steps, target.sm_count)
    dtype = torch.float32 if splits > 1 else q.dtype
    parts = q.new_empty((B, T, H, splits, sizes.Dv), dtype=dtype)
    part_lse = q.new_empty((B, T, H, splits), dtype=torch.float32)
    case = _decode_case(sizes, target, tile, tma, splits > 1, first is not None, cache_scale is not None)
    if first is not None:  # both by the same strides
        visible, first = visible.contiguous(), first.contiguous()
    blocks = case.constexprs["BLOCK_DK"], case.constexprs["BLOCK_DV"]
    k_src, v_src = (
        TensorDescriptor.from_tensor(_slots_by_channels(cache), [tile.slots, block]) if tma else cache
        for cache, block in zip((k_cache, v_cache), blocks, strict=True)
    )
    launch(
        case,
        (row_tiles, splits, B * sizes.K),
        {
            "q_ptr": q,
            "k_src": k_src,
            "v_src": v_src,
            "table_ptr": page_table,
            "visible_ptr": visible,
            **({} if first is None else {"first_ptr": first}),
            **({} if cache_scale is None else {"cache_scale_ptr": cache_scale}),
            "o_ptr": parts,
            "lse_ptr": part_lse,
            "stride_q_B": q.stride(0),
            "stride_q_T": q.stride(1),
            "stride_q_H": q.stride(2),
            "stride_k_page": k_cache.stride(0),
            "stride_k_slot": k_cache.stride(1),
            "stride_k_K": k_cache.stride(2),
            "stride_v_page": v_cache.stride(0),
            "stride_v_slot": v_cache.stride(1),
            "stride_v_K": v_cache.stride(2),
            "stride_table_B": page_table.stride(0),
            "stride_visible_B": visible.stride(0),
            "stride_visible_T": visible.stride(1),
            "scale": scale,
            "T": T,
            "splits": splits,
        },
    )
    if splits > 1:
        return merge_splits(parts, part_lse, q.dtype)
    return parts.view(B, T, H, sizes.Dv), part_lse.view(B, T, H)


def is_for_tma(cache: Tensor) -> bool:
    """All slots of all pages at one stride, as in a view of K or V of one cache; addresses are multiples of 16 bytes."""
    _, page_size, _, _ = cache.shape
    pages, slots, heads, channels = cache.stride()
    aligned = all(stride * cache.itemsize % 16 == 0 for stride in (slots, heads))
    return pages == page_size * slots and channels == 1 and aligned and cache.data_ptr() % 16 == 0


def _slots_by_channels(cache: Tensor) -> Tensor:
    """[pages * page_size, channels]: head h's start at channel h * stride(2); what lies between is another view's."""
    _, _, heads, width = cache.shape
    channels = (heads - 1) * cache.stride(2) + width
    return cache.as_strided((cache.shape[0] * cache.shape[1], channels), (cache.stride(1), 1))


def _supports(site: Site, target: KernelTarget) -> str | None:
    q, k_cache, v_cache, page_table, visible = site.args[:5]
    scaled = site.keywords.get("cache_scale") is not None
    if {k_cache.dtype, v_cache.dtype} != {FP8 if scaled else q.dtype} or q.dtype not in TRITON_TYPE:
        return (
            f"q of {q.dtype}, caches of {k_cache.dtype} and {v_cache.dtype}; the kernel takes one 16- or 32-bit float dtype, or "
            "caches in FP8 with a scale"
        )
    if reason := no_fp8(k_cache.dtype, target):
        return reason
    if (page_table.dtype, visible.dtype) != (torch.int64, torch.int32):
        return f"page table of {page_table.dtype}, visible of {visible.dtype}; the kernel takes int64 and int32"
    width = GqaSizes.of(q, k_cache, v_cache).width
    if width > MAX_WIDTH:
        return f"a head of width {width}; the kernel holds up to {MAX_WIDTH}"
    return None


def _cases(site: Site, target: KernelTarget) -> list[CompileCase]:
    """Of a decode step (T = 1) first, then the larger row tiles, which several new tokens take; by pointers; of an FP8 cache."""
    sizes = GqaSizes.of(*site.args[:3])
    tma = sizes.can_use_tma(target)
    B = site.capacity.max_batch_size
    windowed, scaled = (site.keywords.get(name) is not None for name in ("first", "cache_scale"))
    tiles = list(dict.fromkeys(sizes.tile(B, T, target, tma, scaled) for T in (1, 2, 4, 8, 16, 32, 64)))
    programs = B * sizes.K * triton.cdiv(sizes.G, tiles[0].rows)
    steps = triton.cdiv(site.capacity.max_slots, tiles[0].slots)
    splits = split_count(programs, steps, target.sm_count)
    cases = [_decode_case(sizes, target, tile, tma, splits > 1, windowed, scaled) for tile in tiles]
    if splits > 1:
        cases.append(merge_splits_case(splits, sizes.Dv, sizes.dtype))
    if tma:
        by_pointers = _decode_case(
            sizes, target, sizes.tile(B, 1, target, False, scaled), False, splits > 1, windowed, scaled
        )
        cases.append(replace(by_pointers, kernel="gqa_pointer_decode", fallback=True))
    if sizes.dtype.itemsize == 2 and not scaled and no_fp8(FP8, target) is None:
        of_fp8 = _decode_case(
            sizes, target, sizes.tile(B, 1, target, tma, True), tma, splits > 1, windowed, scaled=True
        )
        cases.append(replace(of_fp8, kernel="gqa_decode.fp8", fallback=True))
    return cases


GQA_DECODE = register_kernel(OPS["gqa_decode"], gqa_decode_triton, _supports, _cases)
