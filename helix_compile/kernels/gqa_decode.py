"""gqa_decode: q [B, T, H, Dk], k_cache [pages, page_size, K, Dk], v_cache [.., K, Dv] -> partial_o [B, T, H, Dv], lse.

    B sequences, T new tokens, H query heads, K KV heads, G = H / K heads a group; rows of a KV head: T * G, t first
    program (row tile, split, b * K + kv head): its rows over one part of the sequence's slots
    then program (row, block of Dv): the parts of a row merged (none where a sequence is not split)

Dots are transposed: the tile of BLOCK_N slots is the M side and the group, padded in the tile, the N side, so that
tensor cores of sm_90 and sm_100 take groups of any size without padding anything in memory:

    s [N, ROWS] = k [N, Dk] . q^T;  acc [Dv, ROWS] += v^T [Dv, N] . p

The number of splits follows from shapes alone; each sequence cuts its own length in that many parts. Loads are TMA where
the target has it and a page is a whole number of tiles, else by pointers. The spec is gqa_decode_reference.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from helix_compile.kernels.launch import launch
from helix_compile.kernels.registry import CompileCase, Kernel, Site, register_kernel
from helix_compile.kernels.target import INTERPRETER, KernelTarget, device_target
from helix_compile.kernels.triton_ops import define_triton_op

TRITON_TYPE = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# finite: -inf - -inf never arises, and only scores below it (fp32's end) would count as unseen
LOWEST = tl.constexpr(-3.0e38)
MAX_WIDTH = 256
MAX_SPLITS = 64
MERGE_BLOCK_D = 128
SPLIT_OVERHEAD = (
    4  # tiles that a part costs on top of its own: start, drain and its share of the merge
)
ROW_TILES = (16, 32, 64)


@triton.jit
def _gqa_decode_kernel(  # type: ignore[no-untyped-def] # Triton types its arguments
    q_ptr, k_src, v_src, table_ptr, visible_ptr, o_ptr, lse_ptr,
    stride_q_B, stride_q_T, stride_q_H, stride_k_page, stride_k_slot, stride_k_K,
    stride_v_page, stride_v_slot, stride_v_K, stride_table_B, stride_visible_B, stride_visible_T,
    stride_o_split, stride_lse_split, scale, T, splits,
    K: tl.constexpr, G: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_DK: tl.constexpr, BLOCK_DV: tl.constexpr,
    TMA: tl.constexpr, WIDE_DOT: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(1)
    b = (tl.program_id(2) // K).to(tl.int64)
    head = tl.program_id(2) % K
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_t = rows // G
    row_h = head * G + rows % G
    live = row_t < T
    limit = tl.load(
        visible_ptr + b * stride_visible_B + row_t * stride_visible_T, mask=live, other=0
    )
    k_columns = tl.arange(0, BLOCK_DK)
    v_columns = tl.arange(0, BLOCK_DV)
    q = tl.load(
        q_ptr + b * stride_q_B + row_t.to(tl.int64)[None, :] * stride_q_T + row_h[None, :] * stride_q_H
        + k_columns[:, None],
        mask=live[None, :] & (k_columns < DK)[:, None], other=0.0,
    )  # fmt: skip
    if WIDE_DOT:
        q = q.to(tl.float32)
    longest = tl.max(limit, 0)
    part = tl.cdiv(tl.cdiv(longest, BLOCK_N), splits) * BLOCK_N
    start = split * part
    end = tl.minimum(start + part, longest)  # an empty part: start >= end

    top = tl.full([BLOCK_ROWS], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    acc = tl.zeros([BLOCK_DV, BLOCK_ROWS], tl.float32)
    for n in tl.range(start, end, BLOCK_N):
        slots = n + tl.arange(0, BLOCK_N)
        if TMA:  # a tile lies in one page
            tl.static_assert(PAGE % BLOCK_N == 0)
            page = tl.load(table_ptr + b * stride_table_B + n // PAGE)
            row = (page * PAGE + n % PAGE).to(tl.int32)
            k = k_src.load([row, head, 0]).reshape(BLOCK_N, BLOCK_DK)
            v = v_src.load([row, head, 0]).reshape(BLOCK_N, BLOCK_DV)
        else:
            inside = slots < end
            page = tl.load(table_ptr + b * stride_table_B + slots // PAGE, mask=inside, other=0)
            place = slots % PAGE
            k_rows = page * stride_k_page + place * stride_k_slot + head * stride_k_K
            v_rows = page * stride_v_page + place * stride_v_slot + head * stride_v_K
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
        if WIDE_DOT:
            k = k.to(tl.float32)
            v = v.to(tl.float32)
        s = tl.dot(k, q, input_precision="ieee") * (scale * LOG2E)
        s = tl.where(slots[:, None] < limit[None, :], s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 0))
        p = tl.exp2(s - new_top[None, :])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 0)
        acc = tl.dot(tl.trans(v), p.to(v.dtype), acc * shrink[None, :], input_precision="ieee")
        top = new_top

    empty = total == 0.0
    divisor = tl.where(empty, 1.0, total)
    o = acc / divisor[None, :]
    lse = tl.where(empty, float("-inf"), (top + tl.log2(divisor)) * LN2)
    out_rows = (b * T + row_t) * (K * G) + row_h
    tl.store(lse_ptr + split.to(tl.int64) * stride_lse_split + out_rows, lse, mask=live)
    tl.store(
        o_ptr + split.to(tl.int64) * stride_o_split + out_rows[None, :] * DV + v_columns[:, None],
        o.to(o_ptr.dtype.element_ty), mask=live[None, :] & (v_columns < DV)[:, None],
    )  # fmt: skip


@triton.jit
def _merge_splits_kernel(  # type: ignore[no-untyped-def] # Triton types its arguments
    parts_ptr, part_lse_ptr, o_ptr, lse_ptr, rows, splits,
    DV: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, BLOCK_S).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    lse = tl.load(part_lse_ptr + split * rows + row, mask=split < splits, other=float("-inf"))
    alive = lse != float("-inf")  # not >: a NaN is a fault that must reach the output
    top = tl.max(tl.where(alive, lse, LOWEST), 0)
    weights = tl.where(alive, tl.exp2((lse - top) * LOG2E), 0.0)
    total = tl.sum(weights, 0)
    divisor = tl.where(total == 0.0, 1.0, total)
    parts = tl.load(
        parts_ptr + (split[:, None] * rows + row) * DV + columns[None, :],
        mask=alive[:, None] & (columns < DV)[None, :], other=0.0,
    )  # fmt: skip
    o = tl.sum(parts * weights[:, None], 0) / divisor
    tl.store(o_ptr + row * DV + columns, o.to(o_ptr.dtype.element_ty), mask=columns < DV)
    if tl.program_id(1) == 0:
        tl.store(lse_ptr + row, tl.where(total == 0.0, float("-inf"), top + tl.log2(divisor) * LN2))


@dataclass(frozen=True)
class _Sizes:
    """What a compilation depends on, out of the op's arguments."""

    dtype: torch.dtype
    G: int
    K: int
    Dk: int
    Dv: int
    page_size: int

    @staticmethod
    def of(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> _Sizes:
        page_size, K, Dk = (int(size) for size in k_cache.shape[1:])
        return _Sizes(q.dtype, int(q.shape[2]) // K, K, Dk, int(v_cache.shape[3]), page_size)

    @property
    def width(self) -> int:
        return max(self.Dk, self.Dv)

    def block_n(self, target: KernelTarget) -> int:
        """Slots of a tile."""
        if target.arch == INTERPRETER:
            return 16  # short test sequences take several steps
        if self.dtype == torch.float32:
            return 32
        # two tiles a page rather than loads by pointers
        return 64 if self.width > 128 or self.page_size % 128 else 128

    def row_tile(self, T: int) -> int:
        rows = T * self.G
        return next((tile for tile in ROW_TILES if rows <= tile), ROW_TILES[-1])

    def can_use_tma(self, target: KernelTarget) -> bool:
        """Rows of whole 16 bytes, and tiles that lie in one page."""
        aligned = all(D * self.dtype.itemsize % 16 == 0 for D in (self.Dk, self.Dv))
        one_page = self.page_size % self.block_n(target) == 0
        return target.capability >= 90 and self.dtype.itemsize == 2 and aligned and one_page


def split_count(programs: int, tiles: int, sm_count: int) -> int:
    """Parts of each sequence that leave the busiest multiprocessor the fewest tiles.

    Args:
        programs: of the launch if nothing were split.
        tiles: of the longest sequence that the page table can hold.
        sm_count: multiprocessors, one program on each at a time.
    """
    return min(
        range(1, max(1, min(MAX_SPLITS, tiles)) + 1),
        key=lambda s: -(-programs * s // sm_count) * (-(-tiles // s) + SPLIT_OVERHEAD),
    )


def _decode_case(
    sizes: _Sizes, target: KernelTarget, row_tile: int, tma: bool, split: bool
) -> CompileCase:
    """The attention kernel; `split`: it leaves float32 parts for the merge."""
    element, block_n = TRITON_TYPE[sizes.dtype], sizes.block_n(target)
    block_dk, block_dv = (max(16, triton.next_power_of_2(D)) for D in (sizes.Dk, sizes.Dv))
    k_type, v_type = (
        f"tensordesc<{element}[{block_n},1,{block}]>" if tma else f"*{element}"
        for block in (block_dk, block_dv)
    )
    strides = [name for name in _gqa_decode_kernel.arg_names if name.startswith("stride_")]
    pointers = ["q_ptr", "table_ptr", "visible_ptr", "o_ptr", "lse_ptr"]
    pointers += [] if tma else ["k_src", "v_src"]
    rows_aligned = [
        name for name in strides if name[7:10] in ("q_B", "q_T", "q_H") or name[7] in "kv"
    ]
    whole = sizes.Dk % 16 == 0 and sizes.Dv % 16 == 0
    return CompileCase(
        kernel="gqa_decode",
        function=_gqa_decode_kernel,
        signature={
            "q_ptr": f"*{element}", "k_src": k_type, "v_src": v_type, "table_ptr": "*i64",
            "visible_ptr": "*i32", "o_ptr": "*fp32" if split else f"*{element}", "lse_ptr": "*fp32",
            **dict.fromkeys(strides, "i32"), "scale": "fp32", "T": "i32", "splits": "i32",
        },
        constexprs={
            "K": sizes.K, "G": sizes.G, "DK": sizes.Dk, "DV": sizes.Dv, "PAGE": sizes.page_size,
            "BLOCK_N": block_n, "BLOCK_ROWS": row_tile, "BLOCK_DK": block_dk, "BLOCK_DV": block_dv,
            "TMA": tma, "WIDE_DOT": target.arch == INTERPRETER,
        },
        options=_options(sizes, target, tma, row_tile),
        divisible_by_16=(*pointers, *(rows_aligned if whole else ())),
        config=f"D {sizes.Dk}/{sizes.Dv}, {row_tile} rows, BLOCK_N {block_n}, {'TMA' if tma else 'pointers'}",
        kv_tokens_per_step=block_n,
        ctas_per_kv_token=sizes.K,
    )  # fmt: skip


def _options(sizes: _Sizes, target: KernelTarget, tma: bool, row_tile: int) -> dict[str, Any]:
    return {"num_warps": 4, "num_stages": 2}


def _merge_case(sizes: _Sizes, splits: int) -> CompileCase:
    element, block_s = TRITON_TYPE[sizes.dtype], triton.next_power_of_2(splits)
    return CompileCase(
        kernel="gqa_merge_splits",
        function=_merge_splits_kernel,
        signature={
            "parts_ptr": "*fp32", "part_lse_ptr": "*fp32", "o_ptr": f"*{element}", "lse_ptr": "*fp32",
            "rows": "i32", "splits": "i32",
        },
        constexprs={"DV": sizes.Dv, "BLOCK_S": block_s, "BLOCK_D": MERGE_BLOCK_D},
        options={"num_warps": 4 if block_s > 8 else 1, "num_stages": 1},
        divisible_by_16=("parts_ptr", "part_lse_ptr", "o_ptr", "lse_ptr"),
        config=f"up to {block_s} parts, BLOCK_D {MERGE_BLOCK_D}",
    )  # fmt: skip


def gqa_decode_triton(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    visible: Tensor,
    scale: float,
    splits: int | None = None,
    tma: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """See gqa_decode_reference; float32, bfloat16 or float16, statistics in float32.

    Args:
        q, k_cache, v_cache, page_table, visible, scale: of the op. The last dims must be contiguous.
        splits: parts of a sequence; default: by the number of multiprocessors.
        tma: load K and V by TMA; default: where the device and the layout allow it.
    """
    B, T, H, _ = q.shape
    sizes, target = _Sizes.of(q, k_cache, v_cache), device_target(q.device)
    assert q.stride(3) == k_cache.stride(3) == v_cache.stride(3) == page_table.stride(1) == 1
    row_tile, block_n = sizes.row_tile(T), sizes.block_n(target)
    row_tiles = triton.cdiv(T * sizes.G, row_tile)
    if splits is None:
        tiles = triton.cdiv(page_table.shape[1] * sizes.page_size, block_n)
        splits = split_count(B * sizes.K * row_tiles, tiles, target.sm_count)
    if tma is None:
        tma = sizes.can_use_tma(target) and all(map(_is_one_block, (k_cache, v_cache)))
    out, lse = q.new_empty((B, T, H, sizes.Dv)), q.new_empty((B, T, H), dtype=torch.float32)
    parts, part_lse = out[None], lse[None]
    if splits > 1:
        parts = q.new_empty((splits, *out.shape), dtype=torch.float32)
        part_lse = q.new_empty((splits, *lse.shape), dtype=torch.float32)
    case = _decode_case(sizes, target, row_tile, tma, splits > 1)
    blocks = case.constexprs["BLOCK_DK"], case.constexprs["BLOCK_DV"]
    k_src, v_src = (
        TensorDescriptor.from_tensor(cache.flatten(0, 1), [block_n, 1, block]) if tma else cache
        for cache, block in zip((k_cache, v_cache), blocks, strict=True)
    )
    launch(
        case,
        (row_tiles, splits, B * sizes.K),
        {
            "q_ptr": q, "k_src": k_src, "v_src": v_src, "table_ptr": page_table, "visible_ptr": visible,
            "o_ptr": parts, "lse_ptr": part_lse,
            "stride_q_B": q.stride(0), "stride_q_T": q.stride(1), "stride_q_H": q.stride(2),
            "stride_k_page": k_cache.stride(0), "stride_k_slot": k_cache.stride(1), "stride_k_K": k_cache.stride(2),
            "stride_v_page": v_cache.stride(0), "stride_v_slot": v_cache.stride(1), "stride_v_K": v_cache.stride(2),
            "stride_table_B": page_table.stride(0), "stride_visible_B": visible.stride(0),
            "stride_visible_T": visible.stride(1), "stride_o_split": parts.stride(0),
            "stride_lse_split": part_lse.stride(0), "scale": scale, "T": T, "splits": splits,
        },
    )  # fmt: skip
    if splits > 1:
        launch(
            _merge_case(sizes, splits),
            (B * T * H, triton.cdiv(sizes.Dv, MERGE_BLOCK_D)),
            {
                "parts_ptr": parts, "part_lse_ptr": part_lse, "o_ptr": out, "lse_ptr": lse,
                "rows": B * T * H, "splits": splits,
            },
        )  # fmt: skip
    return out, lse


def _is_one_block(cache: Tensor) -> bool:
    """All slots of all pages at one stride, from an address that TMA takes."""
    return cache.is_contiguous() and cache.data_ptr() % 16 == 0


def _gqa_decode_fake(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    visible: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    rows = q.shape[:3]
    return q.new_empty((*rows, v_cache.shape[3])), q.new_empty(rows, dtype=torch.float32)


def _supports(site: Site, target: KernelTarget) -> str | None:
    q, k_cache, v_cache, page_table, visible = site.args[:5]
    dtypes = {q.dtype, k_cache.dtype, v_cache.dtype}
    if len(dtypes) > 1 or q.dtype not in TRITON_TYPE:
        return f"q of {q.dtype}, caches of {k_cache.dtype} and {v_cache.dtype}; the kernel takes one 16- or 32-bit float dtype"
    if (page_table.dtype, visible.dtype) != (torch.int64, torch.int32):
        return f"page table of {page_table.dtype}, visible of {visible.dtype}; the kernel takes int64 and int32"
    width = _Sizes.of(q, k_cache, v_cache).width
    if width > MAX_WIDTH:
        return f"a head of width {width}; the kernel holds up to {MAX_WIDTH}"
    return None


def _cases(site: Site, target: KernelTarget) -> list[CompileCase]:
    """Of a decode step (T = 1) first, then the larger row tiles, which several new tokens take; the same by pointers."""
    sizes = _Sizes.of(*site.args[:3])
    tma, block_n, first = sizes.can_use_tma(target), sizes.block_n(target), sizes.row_tile(1)
    programs = site.capacity.max_batch_size * sizes.K * triton.cdiv(sizes.G, first)
    tiles = triton.cdiv(site.capacity.max_slots, block_n)
    splits = split_count(programs, tiles, target.sm_count)
    tiles_of_rows = [tile for tile in ROW_TILES if tile >= first]
    cases = [_decode_case(sizes, target, tile, tma, splits > 1) for tile in tiles_of_rows]
    if splits > 1:
        cases.append(_merge_case(sizes, splits))
    if tma:
        by_pointers = _decode_case(sizes, target, first, False, splits > 1)
        cases.append(replace(by_pointers, kernel="gqa_pointer_decode", fallback=True))
    return cases


GQA_DECODE = register_kernel(
    Kernel(
        op="gqa_decode",
        target=define_triton_op(
            "gqa_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor page_table, Tensor visible,"
            " float scale) -> (Tensor, Tensor)",
            gqa_decode_triton,
            _gqa_decode_fake,
        ),
        supports=_supports,
        cases=_cases,
    )
)
