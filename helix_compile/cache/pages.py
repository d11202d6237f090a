"""The paged latent cache of one rank and the ledger of a batch: page table, lengths, capacity.

Per attention site [num_pages, page_size, R + r], or [num_pages, page_size, K / tpa, Dk + Dv] where K and V are cached. `tokens_per_block` is the round-robin unit between ranks, `page_size`
the unit inside a rank's shard; the two are independent. Every rank has the same page table: shards differ in content.

Where every rank holds the last tokens of a window by itself, slots are positions, and a table of its own wraps (plan/ring.py).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from helix_compile.config.options import FP8_E4M3, PAGE_SIZE, HelixOptions
from helix_compile.errors import PlanError, RuntimeFault
from helix_compile.layout.degrees import HelixLayout
from helix_compile.layout.ledger import local_slot, positions_on_rank
from helix_compile.plan.cache_row import CacheRow, cache_shape, pages_per_sequence
from helix_compile.plan.helix_plan import AttentionPlan, HelixPlan
from helix_compile.plan.ring import first_held, ring_table


def allocate_caches(
    rows: Sequence[CacheRow], plan: HelixPlan, dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """Zeroed caches of one rank of a model of this dtype: stale NaN in the tail of a page would reach an output as 0 * NaN in a kernel."""
    options, layout = plan.options, plan.layout
    stored = [
        row.stored(options.cache_dtype, dtype, site.kv_parts(layout))
        for row, site in zip(rows, plan.cached, strict=True)
    ]
    shapes = [cache_shape(row, options, layout, site.ring) for row, site in zip(stored, plan.cached, strict=True)]
    size = sum(math.prod(shape) * row.dtype.itemsize for shape, row in zip(shapes, stored, strict=True))
    room = _memory_of(device)
    if room is not None and size > room:
        raise PlanError(
            f"the caches of one rank take {size / 1e9:,.1f} GB (max_batch_size={options.max_batch_size}, "
            f"max_seq_len={options.max_seq_len}), {device} has {room / 1e9:,.1f} GB: make them smaller"
        )
    return [torch.zeros(shape, dtype=row.dtype, device=device) for shape, row in zip(shapes, stored, strict=True)]


def scales_of_caches(sites: int, options: HelixOptions, device: torch.device) -> list[Tensor]:
    """The scale of each cached attention's FP8 values, a float32 scalar; none where the format has no such scale."""
    if options.cache_dtype != FP8_E4M3:
        return []
    given = options.cache_scale
    scales = given if isinstance(given, tuple) else (given,) * sites
    return [torch.tensor(scale, dtype=torch.float32, device=device) for scale in scales]


def _memory_of(device: torch.device) -> int | None:
    """All bytes of a device, free or not; None where it is not known."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


@dataclass
class Ledger:
    """How many tokens each sequence has, mirrored on the host so that no step asks the device.

    Attributes:
        lengths: tokens of each sequence of the current batch; empty before the first step.
        page_table: [max_batch_size, pages of a sequence] int64.
        written: positions of each row up to which something may lie in the caches, max_batch_size of them.
        gaps, tails: columns of padding that were fed between each row's tokens, and behind its last one.
        rings: pages of rings of the last tokens -> tokens that a query sees there at most.
        ring_tables: of each of these a page table [max_batch_size, pages of max_seq_len tokens] int64.
        deepest: the most tokens that each row has had since it was empty: what rings have forgotten follows.
    """

    options: HelixOptions
    kvp: int
    device: torch.device
    rings: Mapping[int, int] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)
    page_table: Tensor = field(init=False)
    written: list[int] = field(init=False)
    gaps: list[int] = field(init=False)
    tails: list[int] = field(init=False)
    ring_tables: dict[int, Tensor] = field(init=False)
    deepest: list[int] = field(init=False)

    def __post_init__(self) -> None:
        rows, pages = self.options.max_batch_size, pages_per_sequence(self.options, self.kvp)
        self._host_table = torch.arange(rows * pages, device="cpu").view(rows, pages)
        self._host_pages: dict[int, Tensor] = {}
        self.page_table = self._host_table.to(self.device)
        self.written, self.gaps, self.tails, self.deepest = ([0] * rows for _ in range(4))
        self.ring_tables = {n: ring_table(rows, n, self.options.max_seq_len).to(self.device) for n in self.rings}

    @property
    def batch_size(self) -> int:
        """Sequences of the current batch, 0 before the first step."""
        return len(self.lengths)

    def empty(self, rows: Sequence[int] | None = None) -> None:
        """Forget these sequences, or with None the batch."""
        if rows is None:
            self.lengths = []
            self.gaps, self.tails = ([0] * self.options.max_batch_size for _ in range(2))
        for row in rows or ():
            self.lengths[row] = self.gaps[row] = self.tails[row] = 0

    def check_room(self, new_tokens: list[int]) -> None:
        """Raise RuntimeFault unless every sequence has room for its new tokens; nothing is changed."""
        lengths = self.lengths or [0] * len(new_tokens)
        for row, (length, new) in enumerate(zip(lengths, new_tokens, strict=True)):
            if length + new > self.options.max_seq_len:
                raise RuntimeFault(
                    f"sequence {row} is full: {length} tokens + {new} new = {length + new} > "
                    f"max_seq_len={self.options.max_seq_len}; compile with a larger max_seq_len or reset()"
                )

    def check_held(self, lengths: list[int], what: str) -> None:
        """Raise RuntimeFault unless rings still hold what the next token sees of a sequence of these lengths."""
        for row, (length, deepest) in enumerate(zip(lengths, self.deepest, strict=False)):
            for pages, reach in self.rings.items():
                held, oldest = first_held(deepest, pages), max(0, length + 1 - reach)
                if oldest < min(length, held):
                    raise RuntimeFault(
                        f"{what}: sequence {row} of {length} tokens: its next one sees those from {oldest} on, and of the "
                        f"{deepest} that it had a window of {reach} that every rank holds by itself keeps those from {held} on. "
                        f'nearest that works: {held + reach - 1} tokens, none (reset()), or window="shard", which keeps all'
                    )

    def check_columns(self, mask: Tensor, reach: int) -> None:
        """Raise RuntimeFault if padding stands between tokens that a window or chunks of `reach` tokens would tell apart.

        The model's own mask counts columns: behind such padding it forgets a token earlier than the row alone would.
        """
        for row, (before, new, _) in enumerate(self._padding(mask)):
            tokens, gap = (self.lengths[row] if self.lengths else 0) + new, self.gaps[row] + before
            if new and gap and tokens + gap > reach:
                raise RuntimeFault(
                    f"row {row}: {gap} columns of padding stand between its {tokens} tokens, and attention of this model "
                    f"forgets what is {reach} columns back (a sliding window or chunks). transformers counts the padding, and "
                    "would show the row other tokens than by itself; here tokens are counted, and the step would not be the "
                    "model's. nearest that works: padding before a row's first token alone (no row idle, then); "
                    "truncate() takes back what stands behind its last"
                )

    def count_padding(self, mask: Tensor, whole: bool = False) -> None:
        """Count a step's columns of padding behind rows' first tokens; before advance(). `whole`: the mask is of all columns so far."""
        for row, (before, new, behind) in enumerate(self._padding(mask, whole)):
            if new:
                self.gaps[row] = before + (0 if whole else self.gaps[row])
            self.tails[row] = behind

    def _padding(self, mask: Tensor, whole: bool = False) -> Iterator[tuple[int, int, int]]:
        """For each row of a step's mask [B, T]: padding between its last token and these, these, padding behind its last one then."""
        for row, kept in enumerate(mask.bool().tolist()):
            begun, tail = bool(self.lengths and self.lengths[row]) and not whole, 0 if whole else self.tails[row]
            if not any(kept):
                yield 0, 0, tail + len(kept) if begun else 0
                continue
            first, last = kept.index(True), len(kept) - kept[::-1].index(True)
            inside = kept[first:last].count(False)
            yield inside + (tail + first if begun else 0), kept.count(True), len(kept) - last

    def forget_tails(self) -> None:
        """Padding behind the last tokens was taken back; of an empty row all."""
        self.tails = [0] * len(self.tails)
        for row, length in enumerate(self.lengths):
            self.gaps[row] = self.gaps[row] if length else 0

    def promise(self, new_tokens: list[int]) -> None:
        """Say before they are written that these tokens will be: an interrupt leaves what clear_tails() must find."""
        lengths = self.lengths or [0] * len(new_tokens)
        for row, (length, new) in enumerate(zip(lengths, new_tokens, strict=True)):
            self.written[row] = max(self.written[row], length + new)
            self.deepest[row] = max(self.deepest[row] if length else 0, length + new)

    def clear_tails(
        self, caches: Mapping[int, list[Tensor]], layout: HelixLayout, sites: Sequence[AttentionPlan]
    ) -> None:
        """Zero what was written behind the lengths and given up since (reset, truncate, a step that failed).

        Kernels read whole pages and mask what lies behind a length; a NaN there would reach an output as 0 * NaN.
        """
        lengths = self.lengths + [0] * (len(self.written) - len(self.lengths))
        for row, (written, length) in enumerate(zip(self.written, lengths, strict=True)):
            if written <= length:
                continue
            for rank, held in caches.items():
                for cache, site in zip(held, sites, strict=True):
                    mine = self.held_positions(row, written, layout.index("kvp", rank), site)
                    cache[self._places(cache, row, mine[mine >= length], site)] = 0
            self.written[row] = length

    def held_positions(self, row: int, length: int, kvp_rank: int, site: AttentionPlan) -> Tensor:
        """Absolute positions that a rank holds of a sequence of `length` tokens, ascending, int64."""
        if site.ring:
            return torch.arange(first_held(max(self.deepest[row], length), site.ring), length)
        return positions_on_rank(length, kvp_rank, self.kvp, self.options.tokens_per_block)

    def advance(self, new_tokens: list[int]) -> None:
        """Count tokens that were written."""
        lengths = self.lengths or [0] * len(new_tokens)
        self.lengths = [a + b for a, b in zip(lengths, new_tokens, strict=True)]

    def positions(self, mask: Tensor) -> Tensor:
        """Absolute positions [B, T] int64 on the host of a step's tokens, -1 where mask [B, T] is 0; padding never counts."""
        lengths = torch.tensor(self.lengths or [0] * mask.shape[0], dtype=torch.int64)
        counted = mask.to(torch.int64).cumsum(dim=1) - 1 + lengths[:, None]
        return torch.where(mask > 0, counted, -1)

    def pages_of(self, batch_size: int) -> Tensor:
        """Page table [B, pages] of the current batch."""
        return self.page_table[:batch_size]

    def pages_on_host(self, batch_size: int) -> Tensor:
        """The same on the host, and the same object in every step: who compares it need not read it again."""
        return self._host_pages.setdefault(batch_size, self._host_table[:batch_size])

    def write_sequence(
        self, cache: Tensor, row: int, entries: Tensor, kvp_rank: int, site: AttentionPlan, start: int = 0
    ) -> None:
        """Lay out entries [length, *] of a sequence's tokens, as `cache` holds them, from position `start` in this rank's shard."""
        mine = self.held_positions(row, start + len(entries), kvp_rank, site)
        mine = mine[mine >= start]
        cache[self._places(cache, row, mine, site)] = entries[(mine - start).to(entries.device)].to(cache)

    def read_sequence(self, cache: Tensor, row: int, mine: Tensor, site: AttentionPlan) -> Tensor:
        """Rows [n, *] at a sequence's absolute positions `mine` [n], which this shard of `cache` must own."""
        return cache[self._places(cache, row, mine, site)]

    def _places(self, cache: Tensor, row: int, positions: Tensor, site: AttentionPlan) -> tuple[Tensor, Tensor]:
        """(pages, slots inside a page) of positions that one shard owns."""
        if site.ring:
            slots = positions.to(cache.device)
            return self.ring_tables[site.ring][row].to(cache.device)[slots // PAGE_SIZE], slots % PAGE_SIZE
        slots = local_slot(positions, self.kvp, self.options.tokens_per_block).to(cache.device)
        return self.page_table[row].to(cache.device)[slots // PAGE_SIZE], slots % PAGE_SIZE
