"""Accept a mask by what it does: evaluate it at small positions and at one far query; only causal + padding passes.

A window of 4096 looks causal near 0, a top-k mask needs the hidden states: neither can pass here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from helix_compile.capture import CapturedGraph
from helix_compile.errors import MatchError
from helix_compile.matches import Site, permuted
from helix_compile.passes.evaluate import evaluate
from helix_compile.passes.fx_edit import (
    HINT_B,
    HINT_S,
    HINT_T,
    node_named,
    placeholders,
    source_line,
)

PADDED = 2  # columns of left padding in row 0 of the small case


def check_mask(captured: CapturedGraph, body: str, match: Site, max_seq_len: int) -> None:
    """Raise MatchError unless the site's mask is the causal one plus padding, up to `max_seq_len`."""
    mask = torch.ones(HINT_B, HINT_S + HINT_T, dtype=torch.int64)
    mask[0, :PADDED] = 0
    small = _allowed(captured, body, match, mask, HINT_T)
    keys = torch.arange(HINT_S + HINT_T)
    causal = keys <= torch.arange(HINT_T)[:, None] + HINT_S
    _compare(captured, body, match, small, causal & (mask[:, None, None] > 0), "near position 0")
    far = _allowed(captured, body, match, torch.ones(1, max_seq_len, dtype=torch.int64), 1)
    everything = torch.ones(1, 1, 1, max_seq_len, dtype=torch.bool)
    _compare(captured, body, match, far, everything, f"for the query at {max_seq_len - 1}")


def _compare(
    captured: CapturedGraph,
    body: str,
    match: Site,
    got: Tensor,
    expected: Tensor,
    where: str,
) -> None:
    expected = expected.expand(got.shape[0], 1, *expected.shape[2:])
    different = int((got.expand_as(expected) != expected).sum())
    if different:
        raise _mask_error(
            captured, body, match,
            f"it differs from causal + padding at {different} of {expected.numel()} places {where} "
            "(sliding window, chunked or bidirectional attention?)",
        )  # fmt: skip


def _mask_error(captured: CapturedGraph, body: str, match: Site, why: str) -> MatchError:
    node = node_named(captured.bodies[body].graph, match.anchor)
    layer = captured.layers_of(body)[0].index
    return MatchError(
        f"layer {layer}: attention at node `{node.name}` ({source_line(node)}) has a mask that Helix can't keep: "
        f"{why}. Expected: every key at a position <= the query's, except padding. "
        'nearest that works: full causal attention; unmatched="keep" leaves such layers as they are, if others match'
    )


def _allowed(captured: CapturedGraph, body: str, match: Site, mask: Tensor, T: int) -> Tensor:
    """Mask of the site [B, 1, T, S + T], True = visible, for a 2-D padding mask [B, S + T]."""
    B, total = mask.shape
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -T:]
    inputs = {
        "input_ids": torch.zeros(B, T, dtype=torch.int64),
        "attention_mask": mask,
        "position_ids": positions,
    }
    graph = captured.bodies[body].graph
    call = next(n for n in captured.graph.graph.nodes if n.op == "call_module" and n.target == body)
    outer_args = dict(zip(placeholders(graph), call.args, strict=True))

    def outer_input(node: fx.Node) -> Any:
        kind, name = node.meta["input"]
        if kind == "input":
            return inputs[name]
        if kind == "past":
            _, heads, _, width = node.meta["val"].shape
            return torch.zeros(1).expand(B, heads, total - T, width)
        raise KeyError(name)

    known: dict[fx.Node, Any] = {}
    try:
        value = evaluate(
            node_named(graph, match.mask),
            {},
            lambda n: evaluate(outer_args[n], known, outer_input),
        )
    except KeyError as missing:
        raise _mask_error(
            captured, body, match,
            f"it is computed from {missing} (sparse attention over a top-k of keys?)",
        ) from missing  # fmt: skip
    value = value[(None,) * (4 - value.dim())]
    if match.mask_form != "BHTS":
        value = permuted(value, match.mask_form, "BHTS")
    if value.dtype is torch.bool:
        return value
    seen = value > torch.finfo(value.dtype).min / 2
    if bool((value[seen] != 0).any()):
        raise _mask_error(
            captured, body, match, "it adds other numbers than 0 to scores of visible keys (a bias by distance?)"
        )  # fmt: skip
    return seen
