"""Tiles of gqa_decode: how many rows and slots a program holds by dtype, width and target, and how a sequence is split."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from helix_compile.kernels.target import INTERPRETER, KernelTarget

MAX_SPLITS = 64


# tiles that a part costs on top of its own: start, drain and its share of the merge. An estimate, not measured
SPLIT_OVERHEAD = 4


@dataclass(frozen=True)
class GqaTile:
    """What one program holds: rows of the group (and of new tokens), slots of a step."""

    rows: int
    slots: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class GqaSizes:
    """What a compilation depends on, out of the op's arguments."""

    dtype: torch.dtype
    G: int
    K: int
    Dk: int
    Dv: int
    page_size: int

    @staticmethod
    def of(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> GqaSizes:
        page_size, K, Dk = (int(size) for size in k_cache.shape[1:])
        return GqaSizes(q.dtype, int(q.shape[2]) // K, K, Dk, int(v_cache.shape[3]), page_size)

    @property
    def width(self) -> int:
        return max(self.Dk, self.Dv)

    def tile(self, B: int, T: int, target: KernelTarget, tma: bool, scaled: bool = False) -> GqaTile:
        """The tile that holds T * G rows, or the largest; compiled for sm_80, sm_90 and sm_100, none spills more than 16 bytes.

        Of an FP8 cache (`scaled`) those of one token spill nothing at 64, 128 and 256 channels, but by pointers (216 bytes at 256 on
        sm_100); nor do others, but for more than 16 rows of 256 channels on sm_90 (488 bytes).

        A step of 128 slots hides latency where few programs share a card. Where B * K of them fill it twice, 64 slots
        and two warps leave room for more programs: 238 us for 321 on an H200 (B 64, 64 on 8 heads, 4,096 tokens). That
        gives wgmma up for mma, so Blackwell, where it is unmeasured, keeps four warps and tcgen05.
        """
        if target.arch == INTERPRETER:  # short test sequences take several steps
            return GqaTile(rows=16, slots=16, num_warps=4, num_stages=1)
        if self.dtype == torch.float32:  # no tensor cores: operands live in registers
            return GqaTile(rows=16, slots=16, num_warps=4, num_stages=1)
        sizes = (16, 32) if self.width > 128 else (16, 32, 64)
        rows = next((size for size in sizes if T * self.G <= size), sizes[-1])
        if not tma:
            large = 90 <= target.capability < 120  # shared memory of 227 KiB
            slots = 64 if self.width <= 128 or (large and rows == 16) else 32
            return GqaTile(rows, slots, num_warps=4 if rows == 16 else 8, num_stages=2)
        # three stages: the page number of a tile is fetched one step before its rows
        full = target.capability < 100 and B * self.K >= 2 * target.sm_count
        if full and rows == 16 and self.width <= 128:
            return GqaTile(rows, 64, num_warps=2, num_stages=3)
        wide_step = rows == 16 and self.width <= 128 and self.page_size % 128 == 0
        # what an FP8 tile becomes lies in registers: of 4 warps a wide one would spill (104 bytes at 128 x 128 on sm_100)
        wide = self.width > 128 and target.capability >= 100
        spread = scaled and (wide or (wide_step and self.width > 64))
        return GqaTile(rows, 128 if wide_step else 64, num_warps=8 if rows == 64 or spread else 4, num_stages=3)

    def can_use_tma(self, target: KernelTarget) -> bool:
        """A box of TMA is a tile: it lies in one page, and a head's width is a power of two."""
        aligned = all(D >= 16 and D & (D - 1) == 0 for D in (self.Dk, self.Dv))
        # sm_120 has TMA but not the shared memory for these tiles
        return 90 <= target.capability < 120 and self.dtype.itemsize == 2 and aligned and self.page_size % 64 == 0


@cache
def split_count(programs: int, tiles: int, sm_count: int) -> int:
    """Parts of each sequence, a power of two, that leave the busiest multiprocessor the fewest tiles.

    Args:
        programs: of the launch if nothing were split.
        tiles: of the longest sequence that the page table can hold.
        sm_count: multiprocessors, one program on each at a time.
    """
    powers = (1 << n for n in range(MAX_SPLITS.bit_length()))
    return min(
        (s for s in powers if s <= max(1, tiles)),
        key=lambda s: -(-programs * s // sm_count) * (-(-tiles // s) + SPLIT_OVERHEAD),
    )
