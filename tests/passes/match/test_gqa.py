"""Grouped-query sites by dataflow: styles that match, near-misses that are refused with the reason that applies."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from helix_compile.kernels.reference import apply_sinks_reference, gqa_decode_reference
from helix_compile.passes.match.attention import find_attention
from helix_compile.plan.matches import AttentionMatch, Grouped, MatchFailure
from tests.support.graphs import BodyValues
from tests.support.toy_gqa import DK, DV, H, K, toy_graph


def only_match(style: str) -> AttentionMatch:
    (match,) = find_attention(toy_graph(style))
    assert isinstance(match, AttentionMatch) and isinstance(match.kind, Grouped), match
    return match


@pytest.mark.parametrize("style", ["repeat", "enable_gqa", "eager", "interleave"])
def test_the_match_says_what_the_graph_computes(style: str) -> None:
    """Attention over a cache made of the match's own parts is the anchor's value."""
    match, values = only_match(style), BodyValues(toy_graph(style))
    k, v = match.kind.linears
    assert (match.num_heads, k.heads, match.q_head_dim, match.v_head_dim) == (H, K, DK, DV)
    assert (k.weight, v.weight, match.q_proj.weight) == ("k.weight", "v.weight", "q.weight")
    assert (k.bias, match.o_weight, match.o_bias) == ("k.bias", "o.weight", None)
    seen = torch.arange(8) < torch.tensor([[6, 7, 8]] * 2)[..., None]
    mask = torch.where(seen, 0.0, -torch.inf).double()[:, None]
    values.set(match.mask, mask)
    wanted = values[match.anchor].transpose(1, 2)

    def cached(past: str, new: str) -> Tensor:
        pages = values[past].new_zeros(2, 8, K, values[new].shape[3])
        pages[:, :5], pages[:, 5:] = values[past].transpose(1, 2), values[new].transpose(1, 2)
        return pages

    o, _ = gqa_decode_reference(
        values[match.q].transpose(1, 2),
        *(cached(past, new) for past, new in zip(match.past, match.new, strict=True)),
        torch.tensor([[0], [1]]),
        torch.tensor([[6, 7, 8]] * 2, dtype=torch.int32),
        match.scale,
    )
    torch.testing.assert_close(o, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("style", "miss"), [("sinks", ""), ("sinks", "no maximum"), ("sinks behind", "")])
def test_sinks_in_both_spellings(style: str, miss: str) -> None:
    """What o_proj reads is attention without them, scaled by what is left of the weights."""
    (match,) = find_attention(toy_graph(style, miss))
    assert isinstance(match, AttentionMatch) and match.sinks is not None, match
    assert (match.sinks.name, match.sinks.heads, match.sinks.width, match.gate) == ("sink", H, 1, None)
    values = BodyValues(toy_graph(style, miss))
    seen = torch.arange(8) < torch.tensor([[6, 7, 8]] * 2)[..., None]
    values.set(match.mask, torch.where(seen, 0.0, -torch.inf).double()[:, None])
    q = values[match.q].double().transpose(1, 2)
    cached = []
    for past, new in zip(match.past, match.new, strict=True):
        cached.append(torch.cat([values[past], values[new]], dim=2).transpose(1, 2).contiguous())
    visible = torch.tensor([[6, 7, 8]] * 2, dtype=torch.int32)
    o, lse = gqa_decode_reference(q, *cached, torch.tensor([[0], [1]]), visible, match.scale)
    read = next(n for n in toy_graph(style, miss).nodes if n.name == match.o_proj).args[0]
    got = apply_sinks_reference(o, lse, values.param("sink"))
    limit = 1e-6 if style == "sinks behind" else 1e-12  # that one is scaled in float32
    torch.testing.assert_close(got.flatten(2), values[read.name], rtol=limit, atol=limit)


MISSES: list[tuple[str, str, str]] = [
    ("repeat", "tiled", "K: query head 1 reads KV head 1, expected 0 (the heads are tiled as a whole; repeat each one"),
    ("repeat", "other heads", "K: query head 0 reads KV head 1, expected 0"),
    ("enable_gqa", "other heads", "K: query head 0 reads KV head 1, expected 0"),
    ("repeat", "v from another position", "V: an element comes from another position"),
    ("repeat", "k of other channels", "K: channels are cut or permuted between cache and attention"),
    ("repeat", "k scaled", "V is what the layer caches, K is not: it comes from `mul"),
    ("repeat", "window by slice", "K: attention sees 7 positions of 8 that are cached (a window?)"),
    ("eager", "score scaled per key", "the score chain holds `aten.mul.Tensor` (sinks, a cap or a bias?)"),
    ("sinks", "two sinks", "the score chain holds `aten.cat.default` (sinks, a cap or a bias?)"),
    ("sinks", "sinks of other heads", "sinks: `sink` is not one number a head in their order"),
    ("sinks", "sinks from the scores", "sinks must be a parameter of one number a head, they are"),
    ("sinks", "sinks scaled", "sinks must be a parameter of one number a head, they are"),
    ("sinks", "both scaled", "the scores are scaled after sinks are put beside them"),
    ("sinks", "first key cut off", "part of the softmax is cut off before it meets V"),
    ("sinks behind", "sinks of other heads", "sinks: `sink` is not one number a head in their order"),
    ("sinks behind", "lse of other scores", "the gate must come from one linear, it comes from 2"),
    ("repeat", "one linear", "q, K and V come from fewer than three linears"),
    ("repeat", "q and more", f"the linear of q has {H * (DK + 1)} rows, expected {H} heads x {DK} channels = {H * DK}"),
    (
        "repeat",
        "gate's heads change places",
        "the gate can't be cut by heads: aten.slice.Tensor works across dim 2, which is cut by heads (a gate is cut over all cp * tpa ranks; nearest that works: a gate whose linear",
    ),
]


@pytest.mark.parametrize(("style", "miss", "reason"), MISSES, ids=[f"{s}-{m}" for s, m, _ in MISSES])
def test_near_misses_say_the_reason(style: str, miss: str, reason: str) -> None:
    (failure,) = find_attention(toy_graph(style, miss))
    assert isinstance(failure, MatchFailure)
    assert re.search(re.escape(reason), failure.reason), failure.reason
    assert failure.node


UNCUT: list[tuple[str, str, str]] = [
    ("norm over heads", "K", "rows 0.. of the linear of K do not make head 0 alone"),
    (
        "q's heads change places",
        "q",
        "q can't be cut by heads: aten.slice.Tensor works across dim 1, which is cut by heads",
    ),
    ("next to nothing across heads", "q", "q can't be cut by heads: mean works across dim 1, which is cut by heads"),
    ("a weight per head", "q", "rows 0.. of the linear of q do not make head 0 alone"),
    (
        "heads taken by number",
        "q",
        f"(aten.select.int) works on all {H} heads as a fixed number, it does not run on one of them",
    ),
]


@pytest.mark.parametrize(("miss", "what", "reason"), UNCUT, ids=[m for m, *_ in UNCUT])
def test_what_can_not_be_cut_by_heads_is_said_and_is_no_refusal(miss: str, what: str, reason: str) -> None:
    """It works where nothing is cut: at tpa=1."""
    (match,) = find_attention(toy_graph("repeat", miss))
    assert isinstance(match, AttentionMatch) and isinstance(match.kind, Grouped), match
    (uncut,) = match.uncut
    assert uncut.what == what and reason in uncut.reason, uncut
    assert uncut.node and uncut.where.startswith("toy_gqa.py:")
    assert not only_match("repeat").uncut
