"""How ranks agree on the keys that an indexer chooses: all candidates to all ranks, or to one owner of each query."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction

from helix_compile.config.options import PAGE_SIZE, HelixOptions
from helix_compile.errors import PlanError
from helix_compile.ir.collectives import ALL_GATHER, ALL_TO_ALL
from helix_compile.layout.degrees import HelixLayout
from helix_compile.plan.cache_row import pages_per_sequence
from helix_compile.plan.helix_plan import OF_CANDIDATES, Collective, Decision
from helix_compile.plan.matches import AttentionMatch, Selection

# of the machine that v_up is decided for (plan_helix.py); the latency is that of its all-to-all in predict/accelerators.py
LINK_BYTES_PER_S, COLLECTIVE_LATENCY_S = 900e9, 10.7e-6


def candidates_exchange(
    selection: Selection, agreed: str, options: HelixOptions, layout: HelixLayout
) -> Iterable[Collective]:
    """The collectives of one choosing site.

    With owners a query's candidates leave for one rank, and each rank's share of the answers goes to all.
    """
    cp, candidate = layout.kvp, 2 * selection.score_dtype.itemsize  # score and position, as wide as the scores
    nbytes = min(selection.top_k, pages_per_sequence(options, layout.kvp) * PAGE_SIZE) * candidate
    if agreed == "gather":
        return [Collective(ALL_GATHER.name, "kvp", OF_CANDIDATES[0], ALL_GATHER.egress(cp, nbytes))]
    # the buffers have a row a query, of as many for each owner
    answers = ALL_GATHER.egress(cp, 1) * Fraction(candidate, cp)
    return [
        Collective(ALL_TO_ALL.name, "kvp", OF_CANDIDATES[0], ALL_TO_ALL.egress(cp, nbytes), tokens_rounded_to=cp),
        Collective(ALL_GATHER.name, "kvp", OF_CANDIDATES[1], answers, tokens_rounded_to=cp),
    ]


def topk_exchange(sites: list[AttentionMatch], layout: HelixLayout, options: HelixOptions) -> Decision | None:
    """The decision, where some site chooses its keys.

    Raises:
        PlanError: it is asked for and no site does.
    """
    chosen = next((a.selection for a in sites if isinstance(a.selection, Selection)), None)
    if chosen is None:
        if options.topk_exchange != "auto":
            raise PlanError(
                f"option topk_exchange={options.topk_exchange!r} has no effect: no layer of this model chooses the keys that "
                'it attends to; drop it or use topk_exchange="auto"'
            )
        return None
    tokens = options.max_batch_size
    sent = {
        how: sum(c.egress_bytes_per_rank(tokens) for c in candidates_exchange(chosen, how, options, layout))
        for how in ("gather", "owner")
    }
    inputs = (
        ("top_k", chosen.top_k),
        ("gather_bytes", float(sent["gather"])),
        ("owner_bytes", float(sent["owner"])),
        ("tokens", tokens),
        ("link_GB_s", LINK_BYTES_PER_S / 1e9),
        ("latency_us", COLLECTIVE_LATENCY_S * 1e6),
        ("option", options.topk_exchange),
    )
    if options.topk_exchange != "auto":
        return Decision("topk_exchange", "as asked", inputs, options.topk_exchange)
    saved = float(sent["gather"] - sent["owner"]) / LINK_BYTES_PER_S
    rule = '"owner" if the bytes that it saves over max_batch_size tokens take longer than one more collective, else "gather"'
    return Decision("topk_exchange", rule, inputs, "owner" if saved > COLLECTIVE_LATENCY_S else "gather")
