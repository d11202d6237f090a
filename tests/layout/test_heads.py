"""Where zero heads lie: the arithmetic of the layout against the verifier's own, which counts one by one."""

from __future__ import annotations

from itertools import product

import pytest

from helix_compile.layout.degrees import HelixLayout
from helix_compile.layout.heads import head_padding
from helix_compile.verifier.contract import head_places

KINDS = [(20, 0), (12, 0), (5, 0), (1, 0), (20, 4), (20, 5), (12, 3), (12, 12), (5, 1), (5, 5), (6, 2)]


def layout_of(cp: int, tpa: int) -> HelixLayout:
    return HelixLayout(kvp=cp, tpa=tpa, ep=1, tpf=cp * tpa)


@pytest.mark.parametrize(("cp", "tpa"), list(product((1, 2, 3, 4, 8), (1, 2, 3))))
def test_places_and_runs(cp: int, tpa: int) -> None:
    layout = layout_of(cp, tpa)
    N = layout.world_size
    for heads, kv_heads in KINDS:
        padding, places = head_padding(heads, kv_heads, layout), head_places(heads, kv_heads, layout)
        assert (padding.heads, padding.places) == (heads, len(places)) and len(places) % N == 0
        assert [h for h in places if h is not None] == list(range(heads))
        for start in range(len(places)):
            assert padding.before(start) == sum(h is not None for h in places[:start])
            for stop in range(start + 1, len(places) + 1):
                held: list[int | None] = [None] * (stop - start)
                for first, end, at in padding.runs(start, stop):
                    held[at : at + end - first] = range(first, end)
                assert held == places[start:stop]
        if kv_heads and heads % N == kv_heads % tpa == 0:
            assert len(places) == heads
        if kv_heads:  # a query head keeps its KV head, and each rank of tpa its whole groups
            size = len(places) // padding.padded_groups
            assert all(place // size == h // (heads // kv_heads) for place, h in enumerate(places) if h is not None)
            assert padding.padded_groups % tpa == 0 and padding.padded_groups - kv_heads < tpa
        else:
            assert len(places) - heads < N


def test_by_hand() -> None:
    assert head_places(5, 0, layout_of(4, 2)) == [0, 1, 2, 3, 4, None, None, None]
    assert head_places(6, 2, layout_of(4, 1)) == [0, 1, 2, None, 3, 4, 5, None]
    assert head_places(6, 3, layout_of(2, 2)) == [0, 1, 2, 3, 4, 5, None, None]
    assert head_places(3, 3, layout_of(2, 1)) == [0, None, 1, None, 2, None]  # cached heads are dearer than q's
