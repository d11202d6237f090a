"""A cache on its way in, checked and cut into one run of entries a sequence, and out, gathered from the ranks' shards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

try:  # of sparse attention; transformers 5.17 has none
    from transformers.cache_utils import DynamicIndexedLayer
except ImportError:
    DynamicIndexedLayer = DynamicLayer

from helix_compile.cache.pages import Ledger
from helix_compile.cache.rows import RowCodec, of_scale
from helix_compile.cache.shards import CacheEntries, CacheShard, join_shards
from helix_compile.config.options import HelixOptions
from helix_compile.errors import RuntimeFault
from helix_compile.layout.degrees import HelixLayout
from helix_compile.layout.integers import plain_ints
from helix_compile.layout.ledger import positions_on_rank
from helix_compile.plan.cache_row import CacheRow, parts_of_rows
from helix_compile.plan.helix_plan import AttentionPlan
from helix_compile.plan.ring import first_held


def parts_of_dynamic_cache(cache: DynamicCache, kinds: Sequence[CacheRow] = ()) -> tuple[list[Tensor], list[Tensor]]:
    """([B, S, R] latents, [B, S, r] roped keys), one of each a layer; columns include the sender's padding.

    In transformers' own cache of an unmodified MLA model the keys are the latents, the values the roped keys.

    `kinds` are the rows of each cached attention (none given: latents); where they have heads, K and V of all heads side
    by side, [B, S, K Dk] and [B, S, K Dv]; where they have an index key, it goes behind the roped one, [B, S, r + I].

    Raises:
        RuntimeFault: a layer of another kind (quantised, static, a window that has forgotten tokens), an empty one, or one that
            holds full heads.
    """
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    if not cache.layers:
        raise RuntimeFault("import_cache: the DynamicCache is empty; expected a prefilled one")
    for i, layer in enumerate(_with_entries(cache, kinds)):
        if type(layer) not in (DynamicLayer, DynamicIndexedLayer) and not _has_forgotten_nothing(layer):
            raise RuntimeFault(
                f"import_cache: layer {i} of the cache is a {type(layer).__name__}, expected a DynamicLayer: other kinds "
                "keep other columns than all tokens; prefill with past_key_values=DynamicCache(), which without a config keeps "
                "all tokens of layers with windows too (of a model with an indexer make one with the config, and before the "
                "prefill put a DynamicLayer() in place of each DynamicSlidingWindowLayer in its `layers`), or give latents and "
                "k_ropes as tensors"
            )
        if layer.keys is None or layer.values is None:
            raise RuntimeFault(f"import_cache: layer {i} of the DynamicCache is empty; expected a prefilled one")
        for part, tensor in zip(parts, (layer.keys, layer.values), strict=True):
            K = kinds[i].heads if i < len(kinds) else 0
            if tensor.dim() != 4 or tensor.shape[1] != (K or 1):
                what = f"{K} KV heads" if K else "one latent and one roped key for all heads"
                if not K and tensor.dim() == 4 and tensor.shape[1] > 1:
                    what += (
                        " (a model that caches K and V of every head leaves no latent: give the prompt to this module)"
                    )
                raise RuntimeFault(
                    f"import_cache: layer {i} of the DynamicCache holds {tuple(tensor.shape)}, expected "
                    f"[B, {K or 1}, S, width]: {what}"
                )
            part.append(tensor.transpose(1, 2).flatten(2) if K else tensor.squeeze(1))
        keys, width = getattr(layer, "indexer_keys", None), kinds[i].index if i < len(kinds) else 0
        if (0 if keys is None else keys.shape[-1]) != width:
            raise RuntimeFault(
                f"import_cache: layer {i} of the DynamicCache holds {'no' if keys is None else list(keys.shape)} index keys, "
                f"expected {f'[B, S, {width}]' if width else 'none'}"
            )
        if width:
            parts[1][i] = torch.cat([parts[1][i], layer.indexer_keys], dim=-1)
    return parts


def _has_forgotten_nothing(layer: Any) -> bool:
    """A window's layer that still holds every column it was given."""
    return (
        type(layer) is DynamicSlidingWindowLayer
        and layer.keys is not None
        and layer.keys.shape[-2] == layer.cumulative_length
    )


def _with_entries(cache: DynamicCache, kinds: Sequence[CacheRow]) -> list[Any]:
    """Its layers; without the empty ones where as many are left as there are cached attentions: others read an earlier one's."""
    held = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    return held if len(held) == len(kinds) else list(cache.layers)


def shards_to_export(
    ledger: Ledger,
    caches: Mapping[int, list[Tensor]],
    layout: HelixLayout,
    codecs: Sequence[RowCodec],
    sites: Sequence[AttentionPlan],
    raw: bool = False,
) -> list[CacheShard]:
    """One shard for each CP rank that lives here (ranks that differ in tpa only hold the same); copies.

    Args:
        ledger: whose tokens are exported.
        caches: rank -> its caches, of the ranks in this process.
        layout: the degrees.
        codecs: of each cached attention.
        sites: how each is held.
        raw: FP8 rows as they lie there, not what they stand for.

    Raises:
        RuntimeFault: no batch, `raw` where that is the same, tokens that a window has forgotten.
    """
    if not ledger.batch_size:
        raise RuntimeFault(
            "export: there is no batch; expected a step or import_cache() before (reset() empties the cache)"
        )
    for row, length in enumerate(ledger.lengths):
        for pages, reach in ledger.rings.items():
            if length and (kept_from := first_held(ledger.deepest[row], pages)):
                raise RuntimeFault(
                    f"export: sequence {row} has {length} tokens, of which windows of {reach} that every rank holds by itself keep "
                    f'those from {kept_from} on: what leaves must be whole. nearest that works: window="shard", which keeps all'
                )
    if raw and any(codec.raw is None for codec in codecs):
        raise RuntimeFault("export: raw=True has no effect: the cache is in the model's dtype; leave it out")
    shards: dict[int, CacheShard] = {}
    for cp_rank in sorted({layout.index("kvp", rank) for rank in caches}):
        tokens_per_block = ledger.options.tokens_per_block
        held = [positions_on_rank(length, cp_rank, layout.kvp, tokens_per_block) for length in ledger.lengths]
        positions = pad_sequence(held, batch_first=True, padding_value=-1)
        latents, k_ropes = [], []
        for site, codec in enumerate(codecs):
            parts = [
                pad_sequence(
                    [ledger.read_sequence(cache, row, mine, sites[site]) for row, mine in enumerate(held)],
                    batch_first=True,
                )
                for cache in _caches_with_all_heads(site, sites[site], cp_rank, caches, layout)
            ]
            rows = torch.cat(parts, dim=2)
            if raw and rows.dtype is torch.uint8:
                first, second = rows, rows[..., :0]
            else:
                first, second = parts_of_rows(rows if raw else codec.entries(rows), codec.row)
            scale = float(codec.scale) if raw and codec.scale is not None else None
            latents.append(of_scale(first, scale))
            k_ropes.append(of_scale(second, scale))
        shards[cp_rank] = CacheShard(cp_rank, latents, k_ropes, positions, torch.tensor(ledger.lengths))
    return list(shards.values())


def _caches_with_all_heads(
    site: int, plan: AttentionPlan, cp_rank: int, caches: Mapping[int, list[Tensor]], layout: HelixLayout
) -> list[Tensor]:
    """Caches that together have all heads of what a CP rank holds of one site: K and V are cut by heads over tpa, or, of a ring,
    over all ranks; one rank of tpa has the whole of a latent.
    """
    mine = [rank for rank in caches if plan.ring or layout.index("kvp", rank) == cp_rank]
    parts = {plan.kv_part(layout, rank): caches[rank][site] for rank in sorted(mine, reverse=True)}
    if not plan.kv_heads:
        return [caches[min(mine)][site]]
    if len(parts) < plan.kv_parts(layout):
        wanted = (
            "all ranks live in one process"
            if plan.ring
            else "the ranks of tpa live in one process, or compile with tpa=1"
        )
        raise RuntimeFault(
            f"export: this process holds the KV heads of {len(parts)} of {'' if plan.ring else 'tpa='}{plan.kv_parts(layout)} "
            f"{'parts' if plan.ring else 'ranks'} alone; a shard holds all heads: export where {wanted}"
        )
    return [parts[part] for part in sorted(parts)]


def entries_to_export(
    ledger: Ledger,
    caches: Mapping[int, list[Tensor]],
    layout: HelixLayout,
    codecs: Sequence[RowCodec],
    sites: Sequence[AttentionPlan],
    raw: bool = False,
) -> CacheEntries:
    """The whole cache, if every CP rank lives in this process; RuntimeFault otherwise."""
    here = {layout.index("kvp", rank) for rank in caches}
    if len(here) < layout.kvp:
        raise RuntimeFault(
            f"export_cache: this process holds cp rank {', '.join(map(str, sorted(here)))} of {layout.kvp} alone; "
            "export_shards() gives its part with absolute positions, handover.join_shards() joins the parts of all ranks"
        )
    return join_shards(shards_to_export(ledger, caches, layout, codecs, sites, raw))


def sequences_to_import(
    latents: list[Tensor] | DynamicCache,
    k_ropes: list[Tensor] | None,
    lengths: Tensor | list[int] | None,
    mask: Tensor | None,
    codecs: Sequence[RowCodec],
    options: HelixOptions,
    held: list[int],
    index_keys: Sequence[Tensor | None] | None = None,
) -> list[list[Tensor]]:
    """rows[site][row] = [length, R + r], or [length, K Dk + K Dv], as the caches hold them, in order of position, of the tokens that come
    after the first `held`.

    FP8 caches take entries, which are rounded, or rows as they hold them (RowCodec.raw). A DynamicCache holds its sequences from their first token, so the `held` tokens are dropped from it; tensors hold
    what is new. `index_keys` [B, S, I] go behind the k_ropes, None where an attention has none.

    Raises:
        RuntimeFault: another number of sites, shapes, lengths or mask that do not fit each other.
    """
    skipped: list[int] = []
    kinds = [codec.row for codec in codecs]
    if isinstance(latents, DynamicCache):
        given = "k_ropes" if k_ropes is not None else "index_keys" if index_keys is not None else ""
        if given:
            raise RuntimeFault(f"import_cache: a DynamicCache holds the {given} too; leave {given} out")
        latents, k_ropes = parts_of_dynamic_cache(latents, kinds)
        if lengths is None:  # tokens of each row: what the mask keeps, else every column
            lengths = torch.full((latents[0].shape[0],), latents[0].shape[1])
            if isinstance(mask, Tensor) and mask.dim() == 2:
                lengths = mask.sum(dim=1).to(torch.int64)
        skipped = held
    latents = _tensors("latents", "R", latents)
    if k_ropes is None and all(latent.dtype is torch.uint8 for latent in latents):
        k_ropes = [latent[..., :0] for latent in latents]  # whole rows
    k_ropes = _tensors("k_ropes", "r", k_ropes)
    if not len(latents) == len(k_ropes) == len(kinds):
        raise RuntimeFault(
            f"import_cache: {len(latents)} latents and {len(k_ropes)} k_ropes for {len(kinds)} cached attentions"
        )
    counts = _counts(lengths)
    if index_keys is not None:
        k_ropes = _with_index_keys(k_ropes, index_keys, kinds)
    if latents[0].dim() != 3:
        raise RuntimeFault(f"import_cache: latents must be [B, S, R], got {tuple(latents[0].shape)}")
    B, S = latents[0].shape[:2]
    for site, (latent, k_rope) in enumerate(zip(latents, k_ropes, strict=True)):
        codecs[site].check_given(site, latent, k_rope)
        _check_site(site, latent, k_rope, (B, S, *codecs[site].widths(latent)))
    if len(counts) != B or B > options.max_batch_size:
        raise RuntimeFault(
            f"import_cache: {len(counts)} lengths for {B} sequences (max_batch_size={options.max_batch_size})"
        )
    if held and len(held) != B:
        raise RuntimeFault(
            f"import_cache: {B} sequences to append to a batch of {len(held)}; expected the same (a row may have length 0)"
        )
    if any(n < 0 or n > min(S, options.max_seq_len) for n in counts):
        raise RuntimeFault(
            f"import_cache: lengths {counts}; expected 0 <= length <= columns {S} and max_seq_len {options.max_seq_len}"
        )
    before = [0] * B if skipped else held or [0] * B
    if any(n + h > options.max_seq_len for n, h in zip(counts, before, strict=True)):
        raise RuntimeFault(
            f"import_cache: {counts} tokens after {before} are more than max_seq_len={options.max_seq_len}"
        )
    if any(n < h for n, h in zip(counts, skipped, strict=False)):
        raise RuntimeFault(
            f"import_cache: the DynamicCache holds {counts} tokens, fewer than the {skipped} that are here already; "
            "expected it to hold each sequence from its first token"
        )
    columns = [c[h:] for c, h in zip(_columns(mask, counts, B, S), skipped or [0] * B, strict=True)]
    return [
        [codec.rows(latent[b, c], k_rope[b, c]) for b, c in enumerate(columns)]
        for latent, k_rope, codec in zip(latents, k_ropes, codecs, strict=True)
    ]


def _with_index_keys(
    k_ropes: list[Tensor], index_keys: Sequence[Tensor | None], kinds: Sequence[CacheRow]
) -> list[Tensor]:
    """Each roped key with its index key behind it."""
    if len(index_keys) != len(kinds):
        raise RuntimeFault(f"import_cache: {len(index_keys)} index keys for {len(kinds)} cached attentions")
    joined = []
    for site, (k_rope, key, kind) in enumerate(zip(k_ropes, index_keys, kinds, strict=True)):
        expected = (*k_rope.shape[:2], kind.index) if kind.index else None
        if (None if key is None else tuple(key.shape)) != expected:
            raise RuntimeFault(
                f"import_cache: attention {site}: index keys {'None' if key is None else tuple(key.shape)}, expected {expected}"
            )
        joined.append(k_rope if key is None else torch.cat([k_rope, key], dim=-1))
    return joined


def _tensors(name: str, letter: str, given: list[Tensor] | None) -> list[Tensor]:
    """A list of tensors, one a cached attention."""
    got = type(given).__name__
    if isinstance(given, (list, tuple)):
        wrong = [type(t).__name__ for t in given if not isinstance(t, Tensor)]
        if not wrong:
            return list(given)
        got = f"a {got} holding {wrong[0]}"
    raise RuntimeFault(f"import_cache: {name} must be a list of tensors [B, S, {letter}], got {got}")


def _counts(lengths: Tensor | list[int] | None) -> list[int]:
    """Lengths as a list of ints."""
    got = type(lengths).__name__
    if isinstance(lengths, Tensor):
        got = f"a tensor of shape {tuple(lengths.shape)}"
    if not isinstance(lengths, (Tensor, list, tuple)) or (isinstance(lengths, Tensor) and lengths.dim() != 1):
        raise RuntimeFault(f"import_cache: lengths must be a list or a tensor of ints, one a sequence, got {got}")
    counts = plain_ints(lengths.tolist() if isinstance(lengths, Tensor) else lengths)
    if any(isinstance(n, bool) or not isinstance(n, int) for n in counts):
        raise RuntimeFault(f"import_cache: lengths must be ints, got {counts}")
    return counts


def _check_site(site: int, latent: Tensor, k_rope: Tensor, sizes: tuple[int, int, int, int]) -> None:
    """One attention's tensors: shapes, each width by itself, and that they hold numbers of a cache."""
    B, S, R, r = sizes
    if not (latent.dim() == k_rope.dim() == 3 and latent.shape[:2] == k_rope.shape[:2] == (B, S)):
        raise RuntimeFault(
            f"import_cache: attention {site}: latent {tuple(latent.shape)} and k_rope {tuple(k_rope.shape)}; "
            f"expected [{B}, {S}, R] and [{B}, {S}, r] with R = {R} and r = {r} (of sparse attention with its index key; of a transformers cache "
            "squeeze the head dim, or of K and V put all heads side by side: x.transpose(1, 2).flatten(2))"
        )
    got = (latent.shape[2], k_rope.shape[2])
    if got != (R, r):
        swapped = "; latents and k_ropes are swapped" if got == (r, R) else ""
        raise RuntimeFault(
            f"import_cache: attention {site}: latent and k_rope have widths {got[0]} and {got[1]}; "
            f"expected R = {R} and r = {r}{swapped}"
        )
    for name, tensor in (("latents", latent), ("k_ropes", k_rope)):
        if not tensor.is_floating_point() and tensor.dtype is not torch.uint8:  # bytes: check_given() has looked
            raise RuntimeFault(f"import_cache: attention {site}: {name} must be floating, got {tensor.dtype}")


def _columns(mask: Tensor | None, counts: list[int], B: int, S: int) -> list[Tensor]:
    """Columns of each row that hold its tokens."""
    if mask is None:
        return [torch.arange(n) for n in counts]
    if not isinstance(mask, Tensor):
        raise RuntimeFault(f"import_cache: mask must be a tensor [B, S], got {type(mask).__name__}")
    if tuple(mask.shape) != (B, S):
        raise RuntimeFault(f"import_cache: mask {tuple(mask.shape)}, expected {(B, S)}")
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise RuntimeFault("import_cache: mask must hold 0 and 1 only")
    columns = [torch.nonzero(row).flatten() for row in mask.cpu()]
    found = [len(c) for c in columns]
    if found != counts:
        raise RuntimeFault(f"import_cache: the mask keeps {found} tokens a row, lengths say {counts}")
    return columns
