"""The layout type of gqa_decode: heads cut over tpa, slots over kvp; what does not fit is named."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import fx

from helix_compile.ir.ops import helix
from helix_compile.layout.degrees import HelixLayout
from helix_compile.layout.placement import format_layout, parse_layout
from helix_compile.passes.typing.check_layouts import Untyped, infer_layouts

NAMES = ("q", "k_cache", "v_cache", "page_table", "visible")


def inferred(degrees: HelixLayout, layouts: dict[str, str]) -> Any:
    """Layouts of (partial_o, lse) of one call, given those of its inputs."""
    graph = fx.Graph()
    inputs = [graph.placeholder(name) for name in NAMES]
    node = graph.call_function(helix.gqa_decode.default, (*inputs, 0.1))
    of = {name: parse_layout(layouts.get(name, "R")) for name in NAMES}
    return infer_layouts(graph, lambda n: of[n.name], degrees)[node]


def degrees(kvp: int, tpa: int) -> HelixLayout:
    return HelixLayout(kvp=kvp, tpa=tpa, ep=1, tpf=kvp * tpa)


ALONE = {"q": "world:S(2)", "k_cache": "world:L", "v_cache": "world:L"}
SHARDED = {"q": "tpa:S(2)", "k_cache": "kvp:L, tpa:S(2)", "v_cache": "kvp:L, tpa:S(2)", "visible": "kvp:L"}


@pytest.mark.parametrize(
    ("kvp", "tpa", "layouts", "result"),
    [
        (1, 1, {}, "R"),
        (1, 2, dict.fromkeys(NAMES[:3], "world:S(2)"), "world:S(2)"),
        (4, 1, {n: "kvp:L" for n in ("k_cache", "v_cache", "visible")}, "kvp:PS"),
        (2, 2, SHARDED, "kvp:PS, tpa:S(2)"),
        (2, 2, ALONE, "world:S(2)"),  # a window that every rank holds by itself
        (4, 1, ALONE, "world:S(2)"),
    ],
    ids=str,
)
def test_partials_of_own_heads(kvp: int, tpa: int, layouts: dict[str, str], result: str) -> None:
    o, lse = inferred(degrees(kvp, tpa), layouts)
    assert format_layout(o) == format_layout(lse) == result


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"q": "R"}, "q is R"),
        ({"q": "tpa:S(3)"}, "q is tpa:S(3)"),
        ({"v_cache": "kvp:L"}, "caches are"),
        ({"k_cache": "tpa:S(2)"}, "caches are"),
        ({"visible": "R"}, "visible R"),
        ({"page_table": "kvp:L"}, "page table"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named(change: dict[str, str], word: str) -> None:
    with pytest.raises(Untyped, match=re.escape(word)):
        inferred(degrees(2, 2), {**SHARDED, **change})


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"q": "tpa:S(2)"}, "q is tpa:S(2), expected world:S(2)"),
        ({"v_cache": "tpa:S(2)"}, "caches are"),
        ({"k_cache": "kvp:L, tpa:S(2)"}, "expected tpa:S(2)"),
        ({"visible": "kvp:L"}, "expected tpa:S(2)"),
        ({"page_table": "kvp:L"}, "page table"),
    ],
    ids=str,
)
def test_what_does_not_fit_a_window_on_every_rank_is_named(change: dict[str, str], word: str) -> None:
    with pytest.raises(Untyped, match=re.escape(word)):
        inferred(degrees(2, 2), {**ALONE, **change})


@pytest.mark.parametrize(("kvp", "heads", "result"), [(2, 4, "world:S(2)"), (4, 2, "world:L"), (4, 8, "world:S(2)")])
def test_heads_of_a_rank(kvp: int, heads: int, result: str) -> None:
    graph = fx.Graph()
    x, rank = graph.placeholder("x"), graph.placeholder("rank")
    x.meta["val"], rank.meta["val"] = torch.empty(2, 3, heads, 5, device="meta"), torch.empty((), device="meta")
    node = graph.call_function(helix.heads_of_rank.default, (x, rank, kvp))
    given = {x: parse_layout("R"), rank: parse_layout("kvp:L")}
    assert format_layout(infer_layouts(graph, given.__getitem__, degrees(kvp, 1))[node]) == result
    with pytest.raises(Untyped, match="the rank is R"):
        infer_layouts(graph, lambda n: {}, degrees(kvp, 1))
    values = torch.arange(heads).view(1, 1, heads, 1).expand(2, 3, heads, 5)
    owned = [helix.heads_of_rank(values, torch.tensor(r), kvp)[0, 0, :, 0].tolist() for r in range(kvp)]
    assert owned == [sorted({q * heads // (2 * max(kvp, heads)) for q in queries}) for queries in _queries(kvp, heads)]


def _queries(kvp: int, heads: int) -> list[range]:
    """Query heads of each rank, of twice as many as there are KV heads or ranks."""
    share = 2 * max(kvp, heads) // kvp
    return [range(r * share, (r + 1) * share) for r in range(kvp)]


APPEND = ("cache", "page_table", "slots", "visible", "k", "v")
APPENDED = {"cache": "kvp:L, tpa:S(2)", "slots": "kvp:L", "visible": "kvp:L", "k": "tpa:S(2)", "v": "tpa:S(2)"}


def appended(layouts: dict[str, str], dims: int = 4) -> Any:
    """Layout of what cache_append returns, for a cache of so many dims."""
    graph = fx.Graph()
    inputs = [graph.placeholder(name) for name in APPEND]
    inputs[0].meta["val"] = torch.empty((8, 4, 3, 16)[4 - dims :])
    node = graph.call_function(helix.cache_append.default, tuple(inputs))
    of = {name: parse_layout(layouts.get(name, "R")) for name in APPEND}
    return format_layout(infer_layouts(graph, lambda n: of[n.name], degrees(2, 2))[node])


def test_append_takes_a_ranks_heads_or_a_whole_latent() -> None:
    assert appended(APPENDED) == "kvp:L"
    latent = {"cache": "kvp:L", "slots": "kvp:L", "visible": "kvp:L"}
    assert appended(latent, dims=3) == "kvp:L"
    for layouts, dims in (
        ({**APPENDED, "k": "R"}, 4),
        ({**APPENDED, "cache": "kvp:L"}, 4),
        ({**APPENDED, "slots": "R"}, 4),
        (APPENDED, 3),
        ({**latent, "k": "tpa:S(2)"}, 3),
        (latent, 4),
    ):
        with pytest.raises(Untyped):
            appended(layouts, dims)


@pytest.mark.parametrize(
    ("keep", "before", "after"),
    [
        (True, "tpa:S(2)", "tpa:S(2)"),
        (False, "tpa:S(2)", "tpa:S(1)"),
        (False, "tpa:S(1)", None),
        (True, "kvp:PS", None),
    ],
)
def test_a_mean_keeps_heads_cut(keep: bool, before: str, after: str | None) -> None:
    """Of dim 1 of [B, T, K, D]: it must be whole."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(2, 3, 4, 5)
    node = graph.call_function(torch.ops.aten.mean.dim, (x, [1], keep))

    def result() -> str:
        return format_layout(infer_layouts(graph, lambda n: parse_layout(before), degrees(2, 2))[node])

    if after is None:
        with pytest.raises(Untyped):
            result()
    else:
        assert result() == after


X = "tpa:S(1)"  # heads of [B, K, T, D] are cut
Op = Any
aten = torch.ops.aten
RULES: list[tuple[Op, Any, dict[str, str], str | None]] = [
    (aten.stack.default, lambda a, b, w: ([a, b], -1), {"a": X, "b": X}, X),
    (aten.stack.default, lambda a, b, w: ([a, b], 1), {"a": X, "b": X}, "tpa:S(2)"),
    (aten.stack.default, lambda a, b, w: ([a, b],), {"a": X, "b": X}, "tpa:S(2)"),
    (aten.stack.default, lambda a, b, w: ([a, b], 2), {"a": X, "b": X}, X),
    (aten.stack.default, lambda a, b, w: ([a, b], -1), {"a": X}, None),
    (aten.stack.default, lambda a, b, w: ([a, b], -1), {"a": X, "b": "tpa:S(2)"}, None),
    (aten.layer_norm.default, lambda a, b, w: (a, [5], w), {"a": X}, X),
    (aten.layer_norm.default, lambda a, b, w: (a, [5], w, w), {"a": X}, X),
    (aten.layer_norm.default, lambda a, b, w: (a, [5]), {"a": X}, X),
    (aten.layer_norm.default, lambda a, b, w: (a, [5], w), {"a": "tpa:S(3)"}, None),
    (aten.layer_norm.default, lambda a, b, w: (a, [3, 4, 5]), {"a": X}, None),
    (aten.layer_norm.default, lambda a, b, w: (a, [5], w), {"a": X, "w": "tpa:S(0)"}, None),
    (aten.layer_norm.default, lambda a, b, w: (a, [5], w), {"a": "tpa:P(sum)"}, None),
    (aten.layer_norm.default, lambda a, b, w: (a, [5], w), {"a": "kvp:PS"}, None),
    (aten.rms_norm.default, lambda a, b, w: (a, [5], w), {"a": X}, X),
    (aten.rms_norm.default, lambda a, b, w: (a, [4, 5]), {"a": X}, X),
    (aten.rms_norm.default, lambda a, b, w: (a, [5], w), {"a": "tpa:S(3)"}, None),
]


@pytest.mark.parametrize(("op", "args", "layouts", "result"), RULES)
def test_heads_stay_cut_through_norms_and_interleaved_rope(
    op: Any, args: Any, layouts: dict[str, str], result: str | None
) -> None:
    """Of a, b [2, 3, 4, 5] and w [5]."""
    graph = fx.Graph()
    inputs = {name: graph.placeholder(name) for name in "abw"}
    values = {"a": torch.rand(2, 3, 4, 5), "b": torch.rand(2, 3, 4, 5), "w": torch.rand(5)}
    for name, node in inputs.items():
        node.meta["val"] = values[name]
    node = graph.call_function(op, args(**inputs))
    node.meta["val"] = op(*args(**values))
    of = {name: parse_layout(layouts.get(name, "R")) for name in "abw"}

    def inferred() -> str:
        return format_layout(infer_layouts(graph, lambda n: of[n.name], degrees(2, 2))[node])

    if result is None:
        with pytest.raises(Untyped):
            inferred()
    else:
        assert inferred() == result
