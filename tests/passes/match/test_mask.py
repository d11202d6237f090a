"""A mask is accepted by what it does: causal + padding, a window or chunks, at the first positions and up to the end of the capacity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from transformers import Qwen2Config, Qwen2ForCausalLM

from helix_compile import helix_compile
from helix_compile.capture.captured import CapturedGraph
from helix_compile.errors import MatchError, PlanError
from helix_compile.ir.graph import aten, calls, placeholders
from helix_compile.ir.stage import copy_module
from helix_compile.passes.match.layers import match_layers
from tests.support.driver import worst_deviation
from tests.support.graphs import captured_tiny

Edit = Callable[[fx.Graph, fx.Node], fx.Node]


def with_mask(edit: Edit, layers: slice = slice(None)) -> CapturedGraph:
    """The tiny model's capture with another mask [B, 1, T, S + T] for some layers in the outer graph."""
    captured = captured_tiny()
    module = copy_module(captured.graph)
    graph = module.graph
    call = next(n for n in graph.nodes if n.op == "call_module")
    names = [p.name for p in placeholders(captured.bodies[call.target].graph)]
    mask = call.args[names.index("attention_mask")]
    with graph.inserting_before(call):
        edited = edit(graph, mask)
    for node in [n for n in graph.nodes if n.op == "call_module"][layers]:
        node.replace_input_with(mask, edited)
    graph.lint()
    return replace(captured, graph=module)


def key_numbers(graph: fx.Graph, mask: fx.Node) -> fx.Node:
    """1, 2, ... along the keys, in the mask's shape."""
    ones = graph.call_function(aten.ones_like.default, (mask,))
    return graph.call_function(aten.cumsum.default, (ones, -1))


def window(width: int) -> Edit:
    def edit(graph: fx.Graph, mask: fx.Node) -> fx.Node:
        keys = key_numbers(graph, mask)
        last = graph.call_function(aten.amax.default, (keys, [-1], True))
        oldest = graph.call_function(aten.sub.Tensor, (last, width))
        return graph.call_function(aten.bitwise_and.Tensor, (mask, graph.call_function(aten.gt.Tensor, (keys, oldest))))

    return edit


def bidirectional(graph: fx.Graph, mask: fx.Node) -> fx.Node:
    return graph.call_function(aten.ones_like.default, (mask,))


def sparse(graph: fx.Graph, mask: fx.Node) -> fx.Node:
    hidden = calls(graph, aten.embedding.default)[0]
    score = graph.call_function(aten.amax.default, (hidden, [0, 1, 2]))
    return graph.call_function(aten.bitwise_and.Tensor, (mask, graph.call_function(aten.gt.Scalar, (score, 0.0))))


def by_positions(seen: Callable[..., Tensor]) -> Edit:
    """The mask where `seen(b, q, k)` says so: sequence, positions of query and key."""

    def masked(mask: Tensor) -> Tensor:
        B, _, T, total = mask.shape
        b, q, k = (torch.arange(B)[:, None, None, None], torch.arange(total - T, total)[:, None], torch.arange(total))
        return seen(b, q, k, k <= q) & mask.any(dim=2, keepdim=True)  # padding stays hidden

    return lambda graph, mask: graph.call_function(masked, (mask,))


def placed(seen: Callable[..., Tensor]) -> Edit:
    """The mask, causal and padding, where `seen(q, k)` says so too: places among a row's own tokens."""

    def masked(mask: Tensor) -> Tensor:
        T = mask.shape[2]
        kept = mask.any(dim=2, keepdim=True)  # [B, 1, 1, S + T]
        places = kept.to(torch.int64).cumsum(-1) - 1
        return mask & seen(places.mT[:, :, -T:], places)

    return lambda graph, mask: graph.call_function(masked, (mask,))


REACHES: dict[str, tuple[Callable[..., Tensor], int, tuple[int, int]]] = {
    "window of 1": (lambda q, k: k > q - 1, 64, (1, 0)),
    "window of 3": (lambda q, k: k > q - 3, 64, (3, 0)),
    "window of 511": (lambda q, k: k > q - 511, 4096, (511, 0)),
    "window of 512": (lambda q, k: k > q - 512, 4096, (512, 0)),
    "window of 1500": (lambda q, k: k > q - 1500, 4096, (1500, 0)),
    "window that the capacity just reaches": (lambda q, k: k > q - 1500, 1501, (1500, 0)),
    "window beyond the capacity": (lambda q, k: k > q - 1500, 1500, (0, 0)),
    "chunks of 2": (lambda q, k: q // 2 == k // 2, 64, (0, 2)),
    "chunks of 7": (lambda q, k: q // 7 == k // 7, 64, (0, 7)),
    "chunks of 700": (lambda q, k: q // 700 == k // 700, 4096, (0, 700)),
    "chunks that the capacity just reaches": (lambda q, k: q // 700 == k // 700, 701, (0, 700)),
}


@pytest.mark.parametrize("name", REACHES)
def test_windows_and_chunks_are_learned(name: str) -> None:
    """They count tokens of a row: two rows of the square are padded on the left."""
    seen, capacity, reach = REACHES[name]
    matches = match_layers(with_mask(placed(seen)), capacity)
    assert {(a.window, a.chunk) for m in matches.values() for a in m.attentions} == {reach}


# none of these shows at the first 8 positions and for the last query at once
SUBTLE: dict[str, Callable[..., Tensor]] = {
    "window and 4 first tokens": lambda b, q, k, causal: causal & ((q - k < 20) | (k < 4)),
    "window with a hole": lambda b, q, k, causal: causal & (q - k < 30) & (q - k != 12),
    "window of half the row": lambda b, q, k, causal: causal & (q - k < 30 + q // 2),
    "window and chunks": lambda b, q, k, causal: causal & (q - k < 30) & (q // 64 == k // 64),
    "chunks that grow": lambda b, q, k, causal: causal & ((q < 90) == (k < 90)) & ((q < 30) == (k < 30)),
    "a window in long rows, a larger one in short ones": lambda b, q, k, causal: (
        causal & (q - k < (700 if len(k) > 2000 else 800))
    ),
    "prefix of 4": lambda b, q, k, causal: causal | ((k < 4) & (q < 4)),
    "window until 40": lambda b, q, k, causal: causal & ((q - k < 9) | (q >= 40)),
    "chunks until 48": lambda b, q, k, causal: causal & ((q // 16 == k // 16) | (q >= 48)),
    "not itself": lambda b, q, k, causal: causal & ((q != k) | (q < 10) | (q > 30)),
    "third sequence": lambda b, q, k, causal: causal & ((b < 2) | (q - k < 3)),
    "a lost key": lambda b, q, k, causal: causal & ((k != 9) | (q == 9)),
    "window around 1500": lambda b, q, k, causal: causal & ((q - k < 99) | (q < 1000) | (q > 2050)),
}


@pytest.mark.parametrize("name", SUBTLE)
def test_masks_that_differ_at_few_places_are_refused(name: str) -> None:
    with pytest.raises(MatchError, match=r"differs from (causal|a window|chunks)[ofa-z\d ]* \+ padding at [\d,]+ of"):
        match_layers(with_mask(by_positions(SUBTLE[name])), 4096)


def test_the_same_edit_that_changes_nothing_is_accepted() -> None:
    same = with_mask(by_positions(lambda b, q, k, causal: causal))
    assert set(match_layers(same, 4096)) == {"body_0", "body_1"}


def test_each_layer_of_a_body_is_looked_at() -> None:
    """Layers 2 and 3 share a body; only the last one has a window."""
    captured = with_mask(placed(lambda q, k: k > q - 3), layers=slice(3, None))
    assert [x.body for x in captured.layers][2:] == ["body_1", "body_1"]
    with pytest.raises(
        MatchError, match=r"layer 3: attention .* it is a window of 3, that of another layer .* is causal"
    ):
        match_layers(captured, 4096)


def test_a_mask_that_ignores_padding_is_told_as_one() -> None:
    def unpadded(mask: Tensor) -> Tensor:
        T, total = mask.shape[2:]
        return torch.ones(T, total, dtype=torch.bool).tril(total - T).expand_as(mask)

    with pytest.raises(MatchError, match="keys of padding are seen: attention_mask is not part"):
        match_layers(with_mask(lambda g, mask: g.call_function(unpadded, (mask,))), 64)


@pytest.mark.parametrize("windows", [False, True])
def test_a_mask_for_each_head(windows: bool) -> None:
    """[B, H, T, S + T]: the same for each head is accepted, a window in one head is not."""

    def by_head(mask: Tensor) -> Tensor:
        heads = mask.expand(-1, 24, -1, -1).clone()
        if windows:
            T, total = mask.shape[2:]
            heads[:, 7] &= torch.ones(T, total, dtype=torch.bool).triu(total - T - 5)
        return heads

    captured = with_mask(lambda g, mask: g.call_function(by_head, (mask,)))
    if windows:
        with pytest.raises(MatchError, match=r"differs from causal \+ padding"):
            match_layers(captured, 64)
    else:
        assert match_layers(captured, 64)


def mixed_windows(first: str, second: str) -> Any:
    config = Qwen2Config(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=58,
        num_hidden_layers=3,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=512,
        use_sliding_window=True,
        sliding_window=8,
        layer_types=[first, second, first],
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    return Qwen2ForCausalLM(config).double().eval()


def test_equal_layers_with_other_masks_are_apart() -> None:
    """Qwen2's own: the layers compute the same, some with a window."""
    model = mixed_windows("sliding_attention", "full_attention")
    compiled = helix_compile(model, cp=2, max_seq_len=64, max_batch_size=3, tokens_per_block=2)
    windows = {layer: a.window for body in compiled.plan.bodies for layer in body.layers for a in body.attentions}
    assert windows == {0: 8, 1: 0, 2: 8}
    assert worst_deviation(model, compiled, [20, 3, 12]) <= 1e-10


def test_the_models_own_mask_is_accepted() -> None:
    assert set(match_layers(captured_tiny(), 4096)) == {"body_0", "body_1"}


def test_a_mask_that_is_computed_but_changes_nothing_is_accepted() -> None:
    assert set(match_layers(with_mask(window(10**6)), 4096)) == {"body_0", "body_1"}


def test_a_window_that_counts_other_than_a_rows_tokens_is_refused() -> None:
    """Of the last query of a step alone: all queries of a step are cut where the last one's window begins."""
    captured = with_mask(window(100))
    with pytest.raises(MatchError, match="of 1,048,576 places, first for the query at 2"):
        match_layers(captured, 4096)
    assert match_layers(captured, 64)  # no query of this capacity reaches the window's edge


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (window(3), "and the key at"),
        (bidirectional, "first for the query at 2 and the key at 0"),
        (sparse, r"computed from 'model.embed_tokens.weight' \(sparse attention"),
    ],
    ids=["narrow window", "bidirectional", "sparse"],
)
def test_other_masks_are_refused(edit: Edit, reason: str) -> None:
    with pytest.raises(MatchError, match=reason) as caught:
        match_layers(with_mask(edit), 4096)
    assert "layer 0" in str(caught.value)
    assert "`scaled_dot_product_attention`" in str(caught.value)


def test_a_capacity_beyond_any_mask_is_refused_before_it_is_evaluated() -> None:
    assert match_layers(captured_tiny(), 2**20)
    with pytest.raises(PlanError, match=r"max_seq_len=1000000000: .* expected at most 16777216"):
        match_layers(captured_tiny(), 10**9)


def test_a_mask_that_does_not_run_at_other_sizes_is_told_as_one() -> None:
    def fixed(mask: Tensor) -> Tensor:
        return mask & torch.ones(3, 8, dtype=torch.bool)  # of the capture's sizes

    with pytest.raises(MatchError, match=r"layer 0: .* does not run for B=4, T=64, S=0"):
        match_layers(with_mask(lambda g, mask: g.call_function(fixed, (mask,))), 64)
