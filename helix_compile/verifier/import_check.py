"""Does import_cache deal a prefilled cache out as the contract says? Run on caches that stand in for the module's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from helix_compile.module import HelixModule
from helix_compile.options import PAGE_SIZE
from helix_compile.verifier.check import fault
from helix_compile.verifier.report import Finding
from helix_compile.verifier.scratch import deal
from helix_compile.verifier.site_terms import on_rank


@contextmanager
def _stand_in_caches(compiled: HelixModule) -> Iterator[None]:
    """Empty caches and an empty batch; the module's own come back afterwards, untouched."""
    caches, lengths = [rank.cache for rank in compiled.ranks], compiled._ledger.lengths
    for rank in compiled.ranks:
        # not filled: memory that nobody writes is never really taken
        rank.cache = [torch.empty_like(cache) for cache in rank.cache]
    compiled._ledger.lengths = []
    try:
        yield
    finally:
        for rank, cache in zip(compiled.ranks, caches, strict=True):
            rank.cache = cache
        compiled._ledger.lengths = lengths


def check_import(compiled: HelixModule) -> list[Finding]:
    """Two left-padded sequences, one longer than a page on every rank where capacity allows."""
    options, layout = compiled.plan.options, compiled.plan.layout
    cp, tpb = layout.kvp, options.tokens_per_block
    longest = min(options.max_seq_len, cp * (PAGE_SIZE + 2 * tpb) + 1)
    lengths = [longest, max(1, longest // 3)][: options.max_batch_size]
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, compiled.plan.dtype)
    widths = compiled.facts.cache_widths
    entries = [
        torch.randn(len(lengths), longest, w, generator=generator).to(compiled.device, dtype)
        for w in widths
    ]
    mask = torch.tensor([[0] * (longest - n) + [1] * n for n in lengths])
    with _stand_in_caches(compiled):
        table = compiled.page_table
        pages = compiled.ranks[0].cache[0].shape[0]
        if len(table.unique()) != table.numel() or int(table.max()) >= pages:
            got = f"{table.numel() - len(table.unique())} pages that two places name, largest {int(table.max())}"
            return [
                Finding(
                    "HX404", "page table", got, f"{table.numel()} pages below {pages}, each once", 4
                )
            ]
        try:
            halves = [
                (e[..., :R], e[..., R:])
                for e, R in zip(entries, compiled.facts.latent_widths, strict=True)
            ]
            compiled.import_cache([a for a, _ in halves], [b for _, b in halves], lengths, mask)
        except Exception as error:  # the module under test may do anything
            return [fault(error, "import_cache")]
        if compiled.lengths.tolist() != lengths:
            return [
                Finding(
                    "HX404",
                    "import_cache: lengths",
                    str(compiled.lengths.tolist()),
                    str(lengths),
                    11,
                )
            ]
        table = compiled.page_table
        for rank in compiled.ranks:
            for row, length in enumerate(lengths):
                mine = deal(length, cp, tpb)[rank.rank % cp]
                slots = torch.arange(len(mine))
                for site, cache in enumerate(rank.cache):
                    held = cache[table[row].cpu()[slots // PAGE_SIZE], slots % PAGE_SIZE]
                    wanted = on_rank(
                        entries[site][row, longest - length :][mine], compiled.facts.caches[site],
                        rank.rank // cp, layout.tpa,
                    )  # fmt: skip
                    wrong = (held != wanted).flatten(1).any(dim=-1).nonzero()
                    if len(wrong):
                        position = mine[int(wrong[0])]
                        where = f"import_cache: site {site}, rank {rank.rank}, sequence {row}, position {position}"
                        got = f"{len(wrong)} of {len(mine)} entries of this shard are others"
                        return [Finding("HX404", where, got, "the entries of its positions", 11)]
    return []
