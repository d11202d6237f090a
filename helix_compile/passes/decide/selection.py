"""How ranks agree on the keys that an indexer chooses: all candidates to all ranks, or to one owner of each query."""

from __future__ import annotations

import torch

from helix_compile.config.options import PAGE_SIZE, HelixOptions
from helix_compile.kernels.reference import accumulation_dtype
from helix_compile.layout.degrees import HelixLayout
from helix_compile.plan.cache_row import pages_per_sequence
from helix_compile.plan.helix_plan import Decision
from helix_compile.plan.matches import AttentionMatch, Selection


def candidates_bytes(selection: Selection, options: HelixOptions, layout: HelixLayout, dtype: torch.dtype) -> int:
    """Bytes of a rank's candidates for one query: score and position of each, as wide as the scores."""
    held = min(selection.top_k, pages_per_sequence(options, layout.kvp) * PAGE_SIZE)
    return held * 2 * accumulation_dtype(dtype).itemsize


def topk_exchange(
    sites: list[AttentionMatch], dtype: torch.dtype, layout: HelixLayout, options: HelixOptions
) -> Decision | None:
    """The decision, where some site chooses its keys."""
    chosen = next((a.selection for a in sites if isinstance(a.selection, Selection)), None)
    if chosen is None:
        return None
    sent = candidates_bytes(chosen, options, layout, dtype)
    inputs = (("top_k", chosen.top_k), ("candidate_bytes", sent), ("cp", layout.kvp))
    return Decision("topk_exchange", "every rank gets the best keys of every other one", inputs, "gather")
