"""Gather a batch's entries from the shards of the ranks in this process: the inverse of import_cache."""

from __future__ import annotations

import torch
from torch import Tensor

from helix_compile.errors import RuntimeFault
from helix_compile.handover import CacheEntries, CacheShard, join_shards
from helix_compile.kv_cache import Ledger, parts_of_rows
from helix_compile.layout import HelixLayout
from helix_compile.ledger import positions_on_rank
from helix_compile.matches import CacheRow
from helix_compile.ranks import ModelFacts, Rank


def shards_to_export(
    ledger: Ledger, ranks: list[Rank], layout: HelixLayout, facts: ModelFacts
) -> list[CacheShard]:
    """One shard for each CP rank that lives here (ranks that differ in tpa only hold the same); copies.

    Raises:
        RuntimeFault: no batch, or a module without values.
    """
    if facts.device.type == "meta":
        raise RuntimeFault("export: the model is on the meta device: its cache has no values")
    if not ledger.batch_size:
        raise RuntimeFault(
            "export: there is no batch; expected a step or import_cache() before (reset() empties the cache)"
        )
    tokens_per_block = ledger.options.tokens_per_block
    shards: dict[int, CacheShard] = {}
    for cp_rank in sorted({layout.index("kvp", rank.rank) for rank in ranks}):
        held = [
            positions_on_rank(length, cp_rank, layout.kvp, tokens_per_block)
            for length in ledger.lengths
        ]
        positions = torch.full((len(held), max(map(len, held))), -1, dtype=torch.int64)
        for row, mine in enumerate(held):
            positions[row, : len(mine)] = mine
        latents, k_ropes = [], []
        for site, kind in enumerate(facts.caches):
            parts = []
            for cache in _caches_with_all_heads(site, kind, cp_rank, ranks, layout):
                entries = cache.new_zeros(*positions.shape, *cache.shape[2:])
                for row, mine in enumerate(held):
                    entries[row, : len(mine)] = ledger.read_sequence(cache, row, mine)
                parts.append(entries)
            first, second = parts_of_rows(torch.cat(parts, dim=2), kind)
            latents.append(first)
            k_ropes.append(second)
        shards[cp_rank] = CacheShard(cp_rank, latents, k_ropes, positions, torch.tensor(ledger.lengths))  # fmt: skip
    return list(shards.values())


def _caches_with_all_heads(
    site: int, kind: CacheRow, cp_rank: int, ranks: list[Rank], layout: HelixLayout
) -> list[Tensor]:
    """A CP rank's caches of one site: K and V are cut by heads over tpa; one rank of tpa has the whole of a latent."""
    mine = [rank for rank in ranks if layout.index("kvp", rank.rank) == cp_rank]
    mine.sort(key=lambda rank: layout.index("tpa", rank.rank))
    if not kind.heads:
        return [mine[0].cache[site]]
    if len(mine) < layout.tpa:
        raise RuntimeFault(
            f"export: this process holds the KV heads of {len(mine)} of tpa={layout.tpa} ranks alone; a shard holds all "
            "heads: export where the ranks of tpa live in one process, or compile with tpa=1"
        )
    return [rank.cache[site] for rank in mine]


def entries_to_export(
    ledger: Ledger, ranks: list[Rank], layout: HelixLayout, facts: ModelFacts
) -> CacheEntries:
    """The whole cache, if every CP rank lives in this process; RuntimeFault otherwise."""
    here = {layout.index("kvp", rank.rank) for rank in ranks}
    if len(here) < layout.kvp:
        raise RuntimeFault(
            f"export_cache: this process holds cp rank {', '.join(map(str, sorted(here)))} of {layout.kvp} alone; "
            "export_shards() gives its part with absolute positions, handover.join_shards() joins the parts of all ranks"
        )
    return join_shards(shards_to_export(ledger, ranks, layout, facts))
