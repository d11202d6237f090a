"""Matches read off the graph are the model's own weights: tables checked by arithmetic, not by names."""

from __future__ import annotations

import pytest

from helix_compile.capture.model import capture
from helix_compile.ir.elements import trace_elements
from helix_compile.ir.graph import placeholders
from helix_compile.passes.match.attention import find_attention
from helix_compile.passes.match.layers import match_layers
from helix_compile.passes.typing.aten_rules import reshape_map
from helix_compile.plan.matches import AttentionMatch
from tests.support.models import VARIANTS, tiny_model

# tests/whole/test_exact.py runs the others in CI
IN_CI = ("plain", "no_q_lora", "v_wider_than_latent", "half_rope")


@pytest.mark.parametrize("variant", [pytest.param(v, marks=() if v in IN_CI else pytest.mark.slow) for v in VARIANTS])
def test_roles_of_every_variant(variant: str) -> None:
    captured = capture(tiny_model(variant))
    dense, moe = match_layers(captured, 128).values()
    assert dense.roles() == {"attention": 1, "dense_ffn": 1}
    assert moe.roles() == {"attention": 1, "shared_expert": 1, "routed_experts": 1}


def test_bodies_are_shared_by_equal_layers_only() -> None:
    captured = capture(tiny_model())
    assert [layer.body for layer in captured.layers] == ["body_0", "body_0", "body_1", "body_1"]
    assert [layer.caches for layer in captured.layers] == [(0,), (1,), (2,), (3,)]
    assert capture(tiny_model()).graph is captured.graph  # remembered
    body = captured.bodies["body_0"]
    kinds = [p.meta["input"][0] for p in placeholders(body.graph)]
    assert kinds[0] == "hidden" and sorted(kinds, key=kinds.index) == kinds  # grouped by kind


def test_a_layer_with_another_constant_gets_its_own_body() -> None:
    from tests.support.models import fresh_model

    model = fresh_model()
    model.model.layers[1].self_attn.scaling = 0.5
    model.model.layers[3].input_layernorm.variance_epsilon = 1e-3
    assert [x.body for x in capture(model).layers] == ["body_0", "body_1", "body_2", "body_3"]


def test_provenance_follows_elements_not_shapes() -> None:
    """Transposing twice, cutting and joining gives every element its own source coordinate back."""
    graph = capture(tiny_model()).bodies["body_0"].graph
    (match,) = find_attention(graph)
    assert isinstance(match, AttentionMatch)
    anchor = next(n for n in graph.nodes if n.name == match.anchor)
    k = trace_elements(anchor.args[1])
    assert not k.undefined() and len(k.used()) == 2
    assert len(k.ids.unique()) == 2 * 8 * (24 * 10 + 6)  # the rope part is one for all heads


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ((2, 3, 84), (2, 3, 6, 14), {0: 0, 1: 1, 2: 2}),
        ((2, 3, 6, 14), (2, 3, 84), {0: 0, 1: 1, 2: 2}),
        ((2, 3, 72), (6, 72), {0: 0, 2: 1}),
        ((8, 2, 72), (4, 2, 2, 72), {0: 0, 1: 2, 2: 3}),
    ],
    ids=str,
)
def test_reshape_map(before: tuple[int, ...], after: tuple[int, ...], expected: dict[int, int]) -> None:
    assert reshape_map(before, after) == expected
