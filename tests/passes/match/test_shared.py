"""A site reads one earlier layer's K and V, both as that one caches them; anything else is refused."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from helix_compile.ir.elements import is_cached, trace_elements
from helix_compile.ir.graph import InputRef, aten, set_input
from helix_compile.passes.match.anchor import cached_by, names
from helix_compile.passes.match.reject import Reject


def inputs(*refs: InputRef) -> list[fx.Node]:
    graph = fx.Graph()
    nodes = [graph.placeholder(f"{ref.name}_{i}") for i, ref in enumerate(refs)]
    for node, ref in zip(nodes, refs, strict=True):
        node.meta["val"] = torch.empty(2, 3, 8, 4, device="meta")
        set_input(node, ref)
    return nodes


def test_both_parts_of_one_cache() -> None:
    k, v = inputs(InputRef.shared(0, 0), InputRef.shared(1, 0))
    assert is_cached(k) and not is_cached(inputs(InputRef("tensor", "mask"))[0])
    found = cached_by(((k, "K"), (v, "V")), v)
    assert (found.new, found.past, names(found.shared)) == ((), (), (k.name, v.name))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (InputRef.shared(0, 0), InputRef.shared(1, 1)),  # of two layers
        (InputRef.shared(1, 0), InputRef.shared(0, 0)),  # V for K
        (InputRef.shared(0, 0), InputRef.shared(0, 0)),
        (InputRef.shared(0, 0), InputRef.past("rope", 0)),
    ],
    ids=str,
)
def test_parts_of_two_caches_are_refused(first: InputRef, second: InputRef) -> None:
    k, v = inputs(first, second)
    with pytest.raises(Reject, match="a site reads parts of two caches: K from"):
        cached_by(((k, "K"), (v, "V")), v)


def test_what_is_shared_ends_the_walk_back() -> None:
    k, _ = inputs(InputRef.shared(0, 0), InputRef.shared(1, 0))
    turned = k.graph.call_function(aten.transpose.int, (k, 2, 3))
    turned.meta["val"] = k.meta["val"].transpose(2, 3)
    assert trace_elements(turned).used() == [k]
