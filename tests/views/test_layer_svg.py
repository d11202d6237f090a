"""NAME.svg: well-formed, every box once and none on another, no line through a box."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import combinations
from xml.etree import ElementTree

import pytest

from helix_compile.views.bodies import BodyViews, body_views
from helix_compile.views.graph_view import EdgeView, GraphView
from helix_compile.views.lanes import place
from helix_compile.views.layer_svg import format_layer_svg
from tests.support.graphs import compiled_tiny

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def views() -> list[BodyViews]:
    compiled = compiled_tiny()
    return body_views(compiled.plan, compiled.stages)


def all_views(views: list[BodyViews]) -> list[GraphView]:
    return [v for b in views for v in (b.before, b.after)]


def test_every_box_once_and_coloured_by_kind(views: list[BodyViews]) -> None:
    for body in views:
        root = ElementTree.fromstring(format_layer_svg("a title", body.before, body.after))
        groups = [g for g in root.iter(f"{SVG}g") if "data-node" in g.attrib]
        drawn = [(g.get("data-node"), g.get("class"), g.get("data-stage")) for g in groups]
        expected = [(n.name, f"node {n.kind}", n.stage) for v in (body.before, body.after) for n in v.nodes]
        assert drawn == expected
        assert sum(k == "node collective" for _, k, _ in drawn) == 3


def test_readable_at_a_glance(views: list[BodyViews]) -> None:
    for body in views:
        root = ElementTree.fromstring(format_layer_svg("a title", body.before, body.after))
        width, height = float(root.get("width", 0)), float(root.get("height", 0))
        assert 900 < width < 2000
        assert 900 < height < 2000


def test_boxes_do_not_overlap(views: list[BodyViews]) -> None:
    for body in views:
        root = ElementTree.fromstring(format_layer_svg("a title", body.before, body.after))
        panels = [g for g in root if g.tag == f"{SVG}g"]
        assert len(panels) == 2
        for panel in panels:
            boxes = [r for r in panel.iter(f"{SVG}rect") if r.get("class") == "box"]
            corners = [tuple(float(r.get(k, 0)) for k in ("x", "y", "width", "height")) for r in boxes]
            for (x, y, w, h), (u, v, _, _) in combinations(corners, 2):
                assert abs(x - u) >= w or abs(y - v) >= h


def lines_on_tracks(view: GraphView) -> list[tuple[int, int]]:
    """Check that no line shares a place with a box; (track, row) of every line that runs beside the lanes."""
    lanes = place(view)
    filled = {(lanes.row[n.name], lanes.lane[n.name]) for n in view.nodes}
    assert len(filled) == len(view.nodes)
    found = []
    for edge in view.edges:
        key = (edge.source, edge.target)
        between = range(lanes.row[edge.source] + 1, lanes.row[edge.target])
        assert lanes.row[edge.source] < lanes.row[edge.target]
        if key in lanes.track:
            found += [(lanes.track[key], row) for row in between]
        elif between:
            assert not {(row, lanes.run[key]) for row in between} & filled
    return found


def test_no_line_passes_through_a_box(views: list[BodyViews]) -> None:
    for view in all_views(views):
        tracks = lines_on_tracks(view)
        assert len(tracks) == len(set(tracks))  # nor lies on another line


@pytest.mark.parametrize("seed", range(40))
def test_no_line_passes_through_a_box_of_any_graph(seed: int, views: list[BodyViews]) -> None:
    chance = random.Random(seed)
    names = [f"n{i}" for i in range(16)]
    pairs = [p for p in combinations(names, 2) if chance.random() < 0.15]
    nodes = tuple(replace(views[0].after.nodes[1], name=n) for n in names)
    lines_on_tracks(GraphView("random", nodes, tuple(EdgeView(*p, (), ()) for p in pairs)))


def test_the_main_flow_is_one_straight_column(views: list[BodyViews]) -> None:
    for view in all_views(views):
        lanes = place(view)
        main = [n.title for n in view.nodes if lanes.lane[n.name] == 0]
        assert {"hidden", "o_proj", "post_attention_layernorm", "output"} <= set(main)
        assert len(main) > len(view.nodes) / 2
        assert lanes.lanes <= 3


def test_names_are_escaped(views: list[BodyViews]) -> None:
    after = views[0].after
    hostile = replace(after.nodes[1], title="a<b>&\"'", subtitle="</text>", source="<x>&.py:1")
    changed = replace(after, nodes=(after.nodes[0], hostile, *after.nodes[2:]))
    root = ElementTree.fromstring(format_layer_svg("<title> & more", changed, changed))
    texts = [t.text for t in root.iter(f"{SVG}text")]
    assert texts[0] == "<title> & more"
    assert texts.count("a<b>&\"'") == 2
    assert texts.count("</text>") == 2
