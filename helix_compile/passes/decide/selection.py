"""How ranks agree on the keys that an indexer chooses: all candidates to all ranks, or to one owner of each query."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction

import torch

from helix_compile.config.options import PAGE_SIZE, HelixOptions
from helix_compile.errors import PlanError
from helix_compile.ir.collectives import ALL_GATHER, ALL_TO_ALL, CollectiveOp
from helix_compile.kernels.reference import accumulation_dtype
from helix_compile.layout.degrees import HelixLayout
from helix_compile.plan.cache_row import pages_per_sequence
from helix_compile.plan.helix_plan import OF_CANDIDATES, Decision
from helix_compile.plan.matches import AttentionMatch, Selection

# of the machine that v_up is decided for (plan_helix.py); the latency is that of predict/costs.py
LINK_BYTES_PER_S, COLLECTIVE_LATENCY_S = 900e9, 10.7e-6


def candidates_exchange(
    selection: Selection, agreed: str, options: HelixOptions, layout: HelixLayout, dtype: torch.dtype
) -> Iterable[tuple[CollectiveOp, str, int | Fraction]]:
    """(collective, what, bytes that a rank passes to it for each token) of one choosing site.

    With owners a query's candidates leave for one rank, and each rank's share of the answers goes to all.
    """
    candidate = 2 * accumulation_dtype(dtype).itemsize  # score and position, as wide as the scores
    nbytes = min(selection.top_k, pages_per_sequence(options, layout.kvp) * PAGE_SIZE) * candidate
    if agreed == "gather":
        return [(ALL_GATHER, OF_CANDIDATES[0], nbytes)]
    # the buffer has a row a query, rounded up to a multiple of cp: a token's share, without the rounding
    answers = Fraction(candidate, layout.kvp)
    return [(ALL_TO_ALL, OF_CANDIDATES[0], nbytes), (ALL_GATHER, OF_CANDIDATES[1], answers)]


def topk_exchange(
    sites: list[AttentionMatch], dtype: torch.dtype, layout: HelixLayout, options: HelixOptions
) -> Decision | None:
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
    sent = {
        how: sum(
            op.egress(layout.kvp, 1) * nbytes
            for op, _, nbytes in candidates_exchange(chosen, how, options, layout, dtype)
        )
        for how in ("gather", "owner")
    }
    inputs = (
        ("top_k", chosen.top_k),
        ("gather_bytes", float(sent["gather"])),
        ("owner_bytes", float(sent["owner"])),
        ("tokens", options.max_batch_size),
        ("link_GB_s", LINK_BYTES_PER_S / 1e9),
        ("latency_us", COLLECTIVE_LATENCY_S * 1e6),
        ("option", options.topk_exchange),
    )
    if options.topk_exchange != "auto":
        return Decision("topk_exchange", "as asked", inputs, options.topk_exchange)
    saved = float(sent["gather"] - sent["owner"]) * options.max_batch_size / LINK_BYTES_PER_S
    rule = '"owner" if the bytes that it saves over max_batch_size tokens take longer than one more collective, else "gather"'
    return Decision("topk_exchange", rule, inputs, "owner" if saved > COLLECTIVE_LATENCY_S else "gather")
