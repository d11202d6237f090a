"""Caches after a step: only the new tokens' slots changed, each on its owner, and they hold the original's entries.

That import_cache deals a prefilled cache out as the contract says is shown on caches that stand in for the module's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from helix_compile.config.options import PAGE_SIZE
from helix_compile.module import HelixModule
from helix_compile.plan.matches import AttentionMatch
from helix_compile.verifier.contract import deal, kept_in_ring, kv_share
from helix_compile.verifier.numeric.cache_format import CacheFormat
from helix_compile.verifier.numeric.scratch import Scratch
from helix_compile.verifier.numeric.site_terms import new_entries, on_rank, terms_of
from helix_compile.verifier.report import Finding, fault, numeric_finding

# a new entry is rounded once; its inputs passed two norms and a linear in the module's dtype
ENTRY = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}


def check_cache(
    attention: AttentionMatch,
    scratch: Scratch,
    site: int,
    expected: dict[str, Any],
    before: list[list[Tensor]],
    pasts: tuple[int, ...],
    T: int,
    where: str,
) -> list[Finding]:
    """Only the new tokens' slots changed, each on its owner, and they hold the original's latent and roped key; of another
    layer's cache none.
    """
    dtype = getattr(torch, scratch.compiled.plan.dtype)
    row_of = attention.cache
    new = torch.cat(new_entries(attention, expected), dim=-1)
    scale, limit = float(new.abs().max()), ENTRY[dtype]
    largest = _largest(attention, new)
    stale = scratch.stale_entry(site)
    for rank, caches in enumerate(scratch.caches):
        cache, old = caches[site].cpu(), before[rank][site].cpu()
        if scratch.format.rounds:
            cache, old = cache.view(torch.uint8), old.view(torch.uint8)
        untouched = torch.ones(cache.shape[:2], dtype=torch.bool)
        for row, past in enumerate(pasts):
            for position, slot in scratch.hand(site, past + T, rank).items():
                if position < past or attention.shared:
                    continue
                page = int(scratch.table(site)[row, slot // PAGE_SIZE])
                untouched[page, slot % PAGE_SIZE] = False
                held = caches[site][page, slot % PAGE_SIZE].cpu()
                got = scratch.format.decode(site, held[None])[0].double()
                share = scratch.share(site, rank)
                wanted = on_rank(new[row, position - past], row_of, *share)
                # a zero head may cache the bias of its norm: it is in no result, and only has to be finite
                allowed = on_rank(_allowed(position, attention, dtype) * largest, row_of, *share, 1e300)
                if scratch.format.rounds:  # where the original's lies at a tie, either is right
                    wrong = scratch.format.followed(site, wanted[None], got[None], allowed[None])[1]
                    wanted = scratch.format.rounded(site, wanted[None])[0]
                else:
                    wrong = (got - wanted).abs().nan_to_num(torch.inf) > allowed
                if bool(wrong.any()):
                    at = f"{where}, rank {rank}, sequence {row}, position {position}"
                    text, family = _entry_fault(got, wanted, attention, limit * scale, stale)
                    what = "latent, k_rope and index key" if row_of.index else "latent and k_rope"
                    what = "K and V" if row_of.heads else what
                    return [numeric_finding("HX404", at, text, f"the original's {what} to {limit:.0e}", family)]
        changed = (cache != old) & ~(cache.isnan() & old.isnan())
        wrong = (changed.flatten(2).any(dim=-1) & untouched).nonzero()
        if len(wrong):
            page, slot = wrong[0].tolist()
            at = f"{where}, rank {rank}, page {page}, slot {slot}"
            alone = "left alone: not a slot of a new token of this rank"
            return [numeric_finding("HX404", at, f"written ({len(wrong)} slots)", alone, 4)]
    return []


def _allowed(position: int, attention: AttentionMatch, dtype: torch.dtype) -> Tensor:
    """Limit of each channel of an entry. An angle is position * frequency, rounded in float32 or wider: its error, and with
    it that of the roped key, grows with the position.
    """
    first, second = attention.cache.widths
    allowed = torch.full((first + second,), ENTRY[dtype], dtype=torch.float64)
    angle = position * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    allowed[terms_of(attention).roped()] += angle
    return allowed


def _largest(attention: AttentionMatch, new: Tensor) -> Tensor:
    """What the limit of each channel of an entry is a part of: the largest number; of an index key, which is normed by
    itself, its own.
    """
    own, index = new.split([new.shape[-1] - attention.cache.index, attention.cache.index], dim=-1)
    return torch.cat([part.abs().max().expand(part.shape[-1]) for part in (own, index) if part.shape[-1]])


def _entry_fault(
    got: Tensor, wanted: Tensor, attention: AttentionMatch, limit: float, stale: Tensor
) -> tuple[str, int]:
    if bool((got == stale).all()):
        return "never written", 7
    error = (got - wanted).abs().nan_to_num(torch.inf)
    first = attention.cache.first
    stop = first + attention.cache.second
    latent, rope, index = error[..., :first], error[..., first:stop], error[..., stop:]
    if attention.cache.heads:
        return f"K off by {float(latent.max()):.2e}, V by {float(rope.max()):.2e}", 4
    if attention.cache.index and max(float(x.max()) for x in (latent, rope) if x.numel()) <= limit:
        return f"the index key is off by {float(index.max()):.2e}, latent and k_rope are right", 8
    if float(latent.max()) <= limit:
        return f"k_rope off by {float(rope.max()):.2e}, the latent is right", 8
    return f"another entry: the latent is off by {float(latent.max()):.2e}", 4


@contextmanager
def _stand_in_caches(compiled: HelixModule) -> Iterator[None]:
    """Empty caches and an empty batch; the module's own come back afterwards, untouched."""
    caches, ledger = [rank.cache for rank in compiled.ranks], compiled._ledger
    lengths, written, gaps, tails = ledger.lengths, ledger.written, ledger.gaps, ledger.tails
    deepest = ledger.deepest
    for rank in compiled.ranks:
        # not filled: memory that nobody writes is never really taken
        rank.cache = [torch.empty_like(cache) for cache in rank.cache]
    ledger.lengths, ledger.written, ledger.deepest = [], [0] * len(written), [0] * len(written)
    try:
        yield
    finally:
        for rank, cache in zip(compiled.ranks, caches, strict=True):
            rank.cache = cache
        ledger.lengths, ledger.written, ledger.gaps, ledger.tails = lengths, written, gaps, tails
        ledger.deepest = deepest


def _ring_fault(table: Tensor, ring: int, pages: int) -> tuple[str, str] | None:
    """(got, expected) where pages that are in use at the same time are one page, or are none of the cache's."""
    rows, there = table.shape
    for first in range(max(1, there - ring + 1)):
        held = table[:, first : first + ring]
        if len(held.unique()) != held.numel() or int(held.max()) >= pages:
            text = f"pages {held.tolist()} hold pages {first} to {first + held.shape[1] - 1} of {rows} sequences"
            return text, f"{held.numel()} different ones below {pages}"
    return None


def check_import(compiled: HelixModule) -> list[Finding]:
    """Two left-padded sequences, one longer than a page on every rank where capacity allows."""
    options, layout = compiled.plan.options, compiled.plan.layout
    cp, tpb = layout.kvp, options.tokens_per_block
    rings, sites = compiled.plan.rings, compiled.plan.cached
    longest = max(cp * (PAGE_SIZE + 2 * tpb), PAGE_SIZE * (max(rings, default=0) + 1)) + 1
    longest = min(options.max_seq_len, longest)
    lengths = [longest, max(1, longest // 3)][: options.max_batch_size]
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, compiled.plan.dtype)
    widths = compiled.facts.cache_widths
    entries = [torch.randn(len(lengths), longest, w, generator=generator).to(compiled.device, dtype) for w in widths]
    mask = torch.tensor([[0] * (longest - n) + [1] * n for n in lengths])
    with _stand_in_caches(compiled):
        table = compiled.page_table
        pages = min(
            (c.shape[0] for c, s in zip(compiled.ranks[0].cache, sites, strict=True) if not s.ring), default=None
        )
        if pages is not None and (len(table.unique()) != table.numel() or int(table.max()) >= pages):
            got = f"{table.numel() - len(table.unique())} pages that two places name, largest {int(table.max())}"
            return [Finding("HX404", "page table", got, f"{table.numel()} pages below {pages}, each once", 4)]
        for ring in rings:
            pages = min(c.shape[0] for c, s in zip(compiled.ranks[0].cache, sites, strict=True) if s.ring == ring)
            if bad := _ring_fault(compiled._ledger.ring_tables[ring].cpu(), ring, pages):
                return [Finding("HX404", f"page table of rings of {ring} pages", *bad, 4)]
        try:
            halves = [(e[..., :R], e[..., R:]) for e, R in zip(entries, compiled.facts.latent_widths, strict=True)]
            compiled.import_cache([a for a, _ in halves], [b for _, b in halves], lengths, mask)
        except Exception as error:  # the module under test may do anything
            return [fault(error, "import_cache")]
        if compiled.lengths.tolist() != lengths:
            return [Finding("HX404", "import_cache: lengths", str(compiled.lengths.tolist()), str(lengths), 11)]
        table, form = compiled.page_table, CacheFormat.of(compiled)
        for rank in compiled.ranks:
            for row, length in enumerate(lengths):
                for site, cache in enumerate(rank.cache):
                    plan, own = sites[site], table
                    mine = deal(length, cp, tpb)[rank.rank % cp]
                    slots = torch.arange(len(mine))
                    if plan.ring:
                        mine, own = kept_in_ring(length, plan.ring), compiled._ledger.ring_tables[plan.ring]
                        slots = torch.tensor(mine, dtype=torch.int64)
                    held = cache[own[row].cpu()[slots // PAGE_SIZE], slots % PAGE_SIZE]
                    share = kv_share(plan.heads, plan.kv_heads, rank.rank, layout, bool(plan.ring))
                    wanted = on_rank(entries[site][row, longest - length :][mine], compiled.facts.caches[site], *share)
                    if form.rounds:
                        held, wanted = (x.cpu().view(torch.uint8) for x in (held, form.encode(site, wanted.cpu())))
                    wrong = (held != wanted).flatten(1).any(dim=-1).nonzero()
                    if len(wrong):
                        position = mine[int(wrong[0])]
                        where = f"import_cache: site {site}, rank {rank.rank}, sequence {row}, position {position}"
                        got = f"{len(wrong)} of {len(mine)} entries of this shard are others"
                        return [Finding("HX404", where, got, "the entries of its positions", 11)]
    return []
