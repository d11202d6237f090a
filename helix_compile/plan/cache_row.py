"""What a cached attention holds for one token, and the shapes of its cache."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from helix_compile.config.options import FP8_DS_MLA, PAGE_SIZE, HelixOptions
from helix_compile.layout.cache_bytes import ds_mla_bytes, index_key_at
from helix_compile.layout.degrees import HelixLayout
from helix_compile.layout.ledger import local_length


def pages_per_sequence(options: HelixOptions, kvp: int) -> int:
    """Pages of one sequence of max_seq_len tokens on the fullest rank (CP rank 0)."""
    slots = local_length(options.max_seq_len, 0, kvp, options.tokens_per_block)
    return max(1, -(-slots // PAGE_SIZE))


def cache_shape(stored: StoredRow, options: HelixOptions, layout: HelixLayout, ring: int = 0) -> tuple[int, ...]:
    """[pages, page size, R + r] of one rank's cache of one attention site, or [pages, page size, K / parts, Dk + Dv].

    `ring`: pages of a sequence, where the cache holds its last tokens alone.
    """
    pages = options.max_batch_size * (ring or pages_per_sequence(options, layout.kvp))
    return pages, PAGE_SIZE, *stored.tail


def rows_of_rank(entries: Tensor, row: CacheRow, part: int, parts: int) -> Tensor:
    """What a rank caches of entries [n, first + second] of all heads: [n, R + r], or one of `parts` of the heads [n, K / parts, Dk + Dv]."""
    if not row.heads:
        return entries
    sides = entries.split(row.widths, dim=-1)
    by_head = torch.cat([side.unflatten(-1, (row.heads, -1)) for side in sides], dim=-1)
    local = row.tail(parts)[0]
    missing = local * parts - row.heads
    if missing:
        by_head = torch.cat([by_head, by_head.new_zeros(*by_head.shape[:-2], missing, by_head.shape[-1])], dim=-2)
    return by_head.narrow(-2, part * local, local)


def parts_of_rows(rows: Tensor, row: CacheRow) -> tuple[Tensor, Tensor]:
    """Both parts of cached rows of all heads [..., R + r + I] or [..., K, Dk + Dv]: [..., first] and [..., the rest].

    Rows may have zero heads behind the K of the model.
    """
    if row.heads:
        rows = rows.narrow(-2, 0, row.heads)
    first, second = rows.split([row.first, row.second + row.index], dim=-1)
    if row.heads:
        first, second = first.flatten(-2), second.flatten(-2)
    return first.contiguous(), second.contiguous()


@dataclass(frozen=True)
class CacheRow:
    """What one token leaves in the cache: a latent and a rope part, or K and V of `heads` KV heads.

    `first` and `second` are the widths: R and r, or Dk and Dv of one head. `heads` is 0 where all heads share the row.
    `index` is the width I of an indexer's key, which lies behind the rope part and goes with it; 0: there is none.
    """

    first: int
    second: int
    heads: int = 0
    index: int = 0

    @property
    def widths(self) -> tuple[int, int]:
        """Numbers of both parts, all heads together."""
        return self.first * (self.heads or 1), (self.second + self.index) * (self.heads or 1)

    def tail(self, parts: int) -> tuple[int, ...]:
        """Trailing sizes of a rank's cache: (R + r + I), or (ceil(K / parts), Dk + Dv); `parts`: AttentionPlan.kv_parts."""
        width = self.first + self.second + self.index
        return (-(-self.heads // parts), width) if self.heads else (width,)

    def stored(self, cache_dtype: str, dtype: torch.dtype, parts: int) -> StoredRow:
        """How a rank's cache holds it, for a choice of `cache_dtype` and the dtype of the model."""
        tail, attended = self.tail(parts), self.first + self.second
        if cache_dtype == "auto":
            return StoredRow(dtype, tail, attended, attended)
        if cache_dtype == FP8_DS_MLA:
            attended = ds_mla_bytes(self.first, self.second)
        start = index_key_at(attended)
        if self.index:
            return StoredRow(torch.uint8, (index_key_at(start + self.index * dtype.itemsize),), attended, start)
        if cache_dtype == FP8_DS_MLA:
            return StoredRow(torch.uint8, (attended,), attended, attended)
        return StoredRow(torch.float8_e4m3fn, tail, attended, attended)


@dataclass(frozen=True)
class StoredRow:
    """How a rank's cache holds what a token leaves.

    Attributes:
        dtype: of the tensor [pages, page size, *tail]; uint8 where a row is of several dtypes (layout/cache_bytes.py).
        tail: its trailing sizes.
        attended: elements of it that attention reads.
        index_at: element at which an index key begins, where there is one.
    """

    dtype: torch.dtype
    tail: tuple[int, ...]
    attended: int
    index_at: int

    @property
    def nbytes(self) -> int:
        """Bytes of one token on one rank."""
        return math.prod(self.tail) * self.dtype.itemsize
