"""Where the cache of a window or of chunks lies: sharded as all caches are, or its last tokens on every rank; and what that costs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from fractions import Fraction

from helix_compile.capture.captured import CapturedGraph
from helix_compile.config.options import OPTIONS, PAGE_SIZE, HelixOptions
from helix_compile.errors import PlanError
from helix_compile.layout.degrees import HelixLayout
from helix_compile.passes.decide.param_shards import needed_padding
from helix_compile.plan.cache_row import pages_per_sequence
from helix_compile.plan.helix_plan import OF_PARTIALS, AttentionPlan, BodyPlan, Collective, Decision, number
from helix_compile.plan.matches import AttentionMatch, LayerMatch
from helix_compile.plan.ring import longest_step, ring_pages

Site = tuple[str, int]  # body, number of the attention in it


def plan_rings(
    captured: CapturedGraph, matches: dict[str, LayerMatch], layout: HelixLayout, options: HelixOptions
) -> dict[Site, int]:
    """Pages of a sequence's ring, of each site whose last tokens every rank holds.

    All that read one cache hold it alike, and so do all layers of a body.

    Raises:
        PlanError: window="replicate" where a site with a window or chunks can't be held so, or there is none.
    """
    if options.window == "shard":
        return {}
    sites = {(name, i): a for name, match in matches.items() for i, a in enumerate(match.attentions)}
    if options.window == "replicate" and not any(a.window or a.chunk for a in sites.values()):
        raise PlanError(
            'option window="replicate" has no effect: no attention of this model has a sliding window or chunks; drop it'
        )
    why_not = {site: _why_not(a, layout) for site, a in sites.items()}
    pages = {s: ring_pages(a.window or a.chunk, options.max_seq_len) for s, a in sites.items() if not why_not[s]}
    if options.window == "auto":
        why_not |= {
            s: "is smaller or no faster in shards" for s in pages if not _worth_it(sites[s], pages[s], layout, options)
        }
    readers = _readers(captured, matches)
    changed = True
    while changed:  # what reads one cache is of one kind, and of one size
        changed = False
        for sharing in readers.values():
            if refusing := next((s for s in sharing if why_not[s]), None):
                for site in (s for s in sharing if not why_not[s]):
                    layer = captured.layers_of(refusing[0])[0].index
                    why_not[site] = f"shares its cache with the attention of layer {layer}, which {why_not[refusing]}"
                    changed = True
            elif len({pages[s] for s in sharing}) > 1:
                pages |= dict.fromkeys(sharing, max(pages[s] for s in sharing))
                changed = True
    if options.window == "replicate":
        for site, a in sites.items():
            if (a.window or a.chunk) and why_not[site]:
                raise PlanError(
                    f'layer {captured.layers_of(site[0])[0].index}: window="replicate": its attention {why_not[site]}. nearest that '
                    'works: window="auto", which shards it, or window="shard"'
                )
    rings = {site: n for site, n in pages.items() if not why_not[site]}
    if rings.keys() == sites.keys():
        _refuse_without_exchange(options)
    return rings


_OF_EXCHANGE = ("merge", "q_proj", "v_up", "overlap")


def _refuse_without_exchange(options: HelixOptions) -> None:
    """Options that say how ranks exchange, where no attention of the model does."""
    for name in _OF_EXCHANGE:
        if (value := getattr(options, name)) != OPTIONS[name].choices[0]:
            raise PlanError(
                f"option {name}={value!r} has no effect at window={options.window!r}: every attention of this model has a window, "
                "and nothing is exchanged; drop one of them"
            )


def _why_not(match: AttentionMatch, layout: HelixLayout) -> str:
    """Why the last tokens of a site can't be held whole; "" where they can."""
    N, K = layout.world_size, match.cache.heads
    if not (match.window or match.chunk):
        return "sees all tokens"
    if match.selection is not None:
        return "sees what an indexer chooses"
    if K and N % K and K % N:
        return f"has {K} KV heads, and of cp*tpa = {N} ranks neither number divides the other"
    if needed_padding(match, layout) is not None:
        return "has zero heads (pad_heads)"
    return ""


def _worth_it(match: AttentionMatch, pages: int, layout: HelixLayout, options: HelixOptions) -> bool:
    """Some rank would only exchange, and the ring takes no more bytes than the shard."""
    kv_parts = min(layout.world_size, match.cache.heads) or 1
    ring = pages * math.prod(match.cache.tail(kv_parts))
    shard = pages_per_sequence(options, layout.kvp) * math.prod(match.cache.tail(layout.tpa))
    return blocks_seen(match.window or match.chunk, options) < layout.kvp and ring <= shard


def _readers(captured: CapturedGraph, matches: Mapping[str, LayerMatch]) -> dict[int, list[Site]]:
    """Cache -> the sites that read it."""
    found: dict[int, list[Site]] = {}
    for layer in captured.layers:
        for i in range(len(matches[layer.body].attentions)):
            found.setdefault(layer.caches[i], []).append((layer.body, i))
    return {cache: list(dict.fromkeys(sites)) for cache, sites in found.items()}


def blocks_seen(reach: int, options: HelixOptions) -> int:
    """Blocks that a query's visible tokens lie in at most."""
    block = options.tokens_per_block
    return min(-(-(reach - 1) // block) + 1, max(1, -(-options.max_seq_len // block)))


def window_decisions(
    captured: CapturedGraph,
    matches: dict[str, LayerMatch],
    bodies: tuple[BodyPlan, ...],
    layout: HelixLayout,
    options: HelixOptions,
) -> Iterable[Decision]:
    """What sharding costs a window or chunks: of tokens in a row, blocks and with them ranks, hold few, and all exchange.

    Beside it stands what it saves: the bytes of the W tokens that a query sees, were they on every rank. Of a ring what it holds.
    """
    found: dict[tuple[int, int, int], list[tuple[AttentionMatch, AttentionPlan, BodyPlan]]] = {}
    for body in bodies:
        for a, plan in zip(matches[body.name].attentions, body.attentions, strict=True):
            if plan.reach:
                found.setdefault((plan.window, plan.chunk, plan.ring), []).append((a, plan, body))
    for (window, chunk, ring), sites in found.items():
        name = f"window {window}" if window else f"chunk {chunk}"
        yield (_replicated if ring else _sharded)(name, window or chunk, sites, captured, layout, options)


Sites = list[tuple[AttentionMatch, AttentionPlan, BodyPlan]]


def _sharded(
    name: str, reach: int, sites: Sites, captured: CapturedGraph, layout: HelixLayout, options: HelixOptions
) -> Decision:
    cp, block, blocks = layout.kvp, options.tokens_per_block, blocks_seen(reach, options)
    # of a body with several attentions each that is sharded has its part of what is exchanged
    shares = [(_of_partials(body), Fraction(len(body.layers), _exchanging(body))) for _, _, body in sites]
    rounds = sum(sum(c.parts for c in own) * share for own, share in shares)
    nbytes = sum(
        (sum((c.egress_bytes_per_rank_per_token for c in own), Fraction(0)) * n for own, n in shares), Fraction(0)
    )
    row = sum(math.prod(a.cache.tail(layout.tpa)) * len(b.layers) for a, _, b in sites if not a.shared)
    return Decision(
        name,
        "sharded as all tokens are; a query's visible tokens lie in at most ceil((W - 1) / tokens_per_block) + 1 blocks, "
        "each on one rank, and the other ranks only exchange",
        (
            ("W", reach),
            ("tokens_per_block", block),
            ("cp", cp),
            ("ranks_that_only_exchange", cp - min(cp, blocks)),
            ("layers", sum(len(b.layers) for *_, b in sites)),
            ("exchanges_per_step", int(rounds)),
            ("exchange_bytes_per_rank_per_token", number(nbytes)),
            ("bytes_of_W_tokens_if_on_every_rank", min(reach, options.max_seq_len) * row * captured.dtype.itemsize),
        ),
        f"at most {min(cp, blocks)} of {cp} ranks hold what a query sees",
    )


def _of_partials(body: BodyPlan) -> list[Collective]:
    return [c for c in body.collectives if c.what in OF_PARTIALS]


def _exchanging(body: BodyPlan) -> int:
    return sum(not a.ring for a in body.attentions)


def _replicated(
    name: str, reach: int, sites: Sites, captured: CapturedGraph, layout: HelixLayout, options: HelixOptions
) -> Decision:
    pages = sites[0][1].ring
    asked = {"auto": "auto: fewer blocks than CP ranks hold a window, and a ring takes no more bytes than a shard"}
    own = [(a, p, b) for a, p, b in sites if not a.shared]
    stored = [(a.cache.stored(options.cache_dtype, captured.dtype, p.kv_parts(layout)), b) for a, p, b in own]
    in_shards = sum(
        a.cache.stored(options.cache_dtype, captured.dtype, layout.tpa).nbytes * len(b.layers) for a, _, b in own
    )
    return Decision(
        name,
        f"{asked.get(options.window, 'as asked')}; every rank holds the last tokens, of the KV heads that its own query heads "
        "read, and exchanges nothing. A ring of pages: a step of as many tokens as stated, and as many taken back, fit beside a window",
        (
            ("W", reach),
            ("cp", layout.kvp),
            ("layers", sum(len(b.layers) for *_, b in sites)),
            ("pages_of_a_sequence", pages),
            ("tokens_of_a_sequence", pages * PAGE_SIZE),
            ("kv_heads_per_rank", sites[0][1].cached_heads(layout)),
            ("tokens_of_a_step", longest_step(pages, reach, options.max_seq_len)),
            ("bytes_of_a_sequence_per_rank", sum(s.nbytes * len(b.layers) for s, b in stored) * pages * PAGE_SIZE),
            ("bytes_of_a_sequence_per_rank_in_shards", in_shards * pages_per_sequence(options, layout.kvp) * PAGE_SIZE),
            ("exchanges_per_step", 0),
        ),
        f"the last {pages * PAGE_SIZE} tokens on each of {layout.world_size} ranks",
    )
