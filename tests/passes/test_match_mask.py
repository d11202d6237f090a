"""A mask is accepted by what it does: causal + padding, near position 0 and at the far end of the capacity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from torch import fx

from helix_compile.capture import CapturedGraph
from helix_compile.errors import MatchError
from helix_compile.graph_pass import copy_module
from helix_compile.passes.fx_edit import aten, calls, placeholders
from helix_compile.passes.match_layers import match_layers
from tests.support.graphs import captured_tiny

Edit = Callable[[fx.Graph, fx.Node], fx.Node]


def with_mask(edit: Edit) -> CapturedGraph:
    """The tiny model's capture with another mask [B, 1, T, S + T] in the outer graph."""
    captured = captured_tiny()
    module = copy_module(captured.graph)
    graph = module.graph
    call = next(n for n in graph.nodes if n.op == "call_module")
    names = [p.name for p in placeholders(captured.bodies[call.target].graph)]
    mask = call.args[names.index("attention_mask")]
    with graph.inserting_before(call):
        edited = edit(graph, mask)
    for node in [n for n in graph.nodes if n.op == "call_module"]:
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
        return graph.call_function(
            aten.bitwise_and.Tensor,
            (mask, graph.call_function(aten.gt.Tensor, (keys, oldest))),
        )

    return edit


def bidirectional(graph: fx.Graph, mask: fx.Node) -> fx.Node:
    return graph.call_function(aten.ones_like.default, (mask,))


def sparse(graph: fx.Graph, mask: fx.Node) -> fx.Node:
    hidden = calls(graph, aten.embedding.default)[0]
    score = graph.call_function(aten.amax.default, (hidden, [0, 1, 2]))
    return graph.call_function(
        aten.bitwise_and.Tensor, (mask, graph.call_function(aten.gt.Scalar, (score, 0.0)))
    )


def test_the_models_own_mask_is_accepted() -> None:
    assert set(match_layers(captured_tiny(), 4096)) == {"body_0", "body_1"}


def test_a_mask_that_is_computed_but_changes_nothing_is_accepted() -> None:
    assert set(match_layers(with_mask(window(10**6)), 4096)) == {"body_0", "body_1"}


def test_a_window_is_found_only_beyond_its_width() -> None:
    captured = with_mask(window(100))
    with pytest.raises(MatchError, match="at 3996 of 4096 places for the query at 4095"):
        match_layers(captured, 4096)
    assert match_layers(captured, 64)  # no query of this capacity reaches the window's edge


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (window(3), "near position 0"),
        (bidirectional, "near position 0"),
        (sparse, r"computed from 'model.embed_tokens.weight' \(sparse attention"),
    ],
    ids=["narrow window", "bidirectional", "sparse"],
)
def test_other_masks_are_refused(edit: Edit, reason: str) -> None:
    with pytest.raises(MatchError, match=reason) as caught:
        match_layers(with_mask(edit), 4096)
    assert "layer 0" in str(caught.value)
    assert "`scaled_dot_product_attention`" in str(caught.value)
