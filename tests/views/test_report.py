"""report.html without a browser: complete, self-contained, and nothing in a name can break out of its place."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from helix_compile import HelixModule
from helix_compile.views.report import format_html_report
from tests.support.graphs import compiled_tiny


class Reader(HTMLParser):
    """Tags, texts of scripts, and whether every element is closed in its order."""

    VOID = ("meta", "link", "input", "br")

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID and not (self.get_starttag_text() or "").endswith("/>"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID and not (self.get_starttag_text() or "").endswith("/>"):
            assert self.open.pop() == tag
        elif self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)


@pytest.fixture(scope="module")
def compiled() -> HelixModule:
    return compiled_tiny()


def page(compiled: HelixModule, **changes: str) -> str:
    plan = replace(compiled.plan, **changes)  # type: ignore[arg-type] # text fields only
    return format_html_report(plan, compiled.stages, compiled.inspect().facts)


def test_every_part_is_there_and_well_formed(compiled: HelixModule) -> None:
    reader = Reader(page(compiled))
    assert reader.open == []
    ids = {attrs["id"] for _, attrs in reader.tags if attrs.get("id")}
    assert {"layers", "kv", "collectives", "memory", "schedule", "decisions", "facts"} <= ids
    figures = [(a["data-body"], a["data-moment"]) for t, a in reader.tags if t == "figure"]
    assert figures == [(b, m) for b in ("body_0", "body_1") for m in ("before", "after")]


def test_every_box_has_its_details(compiled: HelixModule) -> None:
    reader = Reader(page(compiled))
    facts = json.loads(reader.scripts[0])
    figure = {}
    boxes = 0
    for tag, attrs in reader.tags:
        if tag == "figure":
            figure = facts["bodies"][attrs["data-body"]][attrs["data-moment"]]
        elif "data-node" in attrs:
            boxes += 1
            assert {"outputs", "stage", "op"} <= set(figure[attrs["data-node"]])
    assert boxes > 100


def test_nothing_is_loaded(compiled: HelixModule) -> None:
    text = page(compiled)
    assert not re.findall(
        r"https?://|//[a-z0-9.-]+\.[a-z]{2,}/|@import|url\((?!#)", text
    )  # of its own parts it may speak
    loads = [a for t, attrs in Reader(text).tags for k, a in attrs.items() if k in ("src", "href")]
    assert loads == ["data:,"]


def test_hostile_names_stay_text(compiled: HelixModule) -> None:
    hostile = "</script><img src=x onerror=alert(1)><!-- & \"'"
    reader = Reader(page(compiled, model=hostile))
    assert not [t for t, _ in reader.tags if t == "img"]
    assert len(reader.scripts) == 2
    body = compiled.plan.bodies[0]
    shard = replace(body.param_shards[0], layout=hostile)
    plan = replace(compiled.plan, bodies=(replace(body, param_shards=(shard,)),))
    text = format_html_report(plan, compiled.stages, compiled.inspect().facts)
    assert not [t for t, _ in Reader(text).tags if t == "img"]


def test_tables_say_what_the_plan_says(compiled: HelixModule) -> None:
    text = page(compiled)
    for body in compiled.plan.bodies:
        for c in body.collectives:
            assert f"<td>{c.op}</td><td>{c.axis}</td><td>{c.what}</td>" in text
    assert "<td class=n>504 B</td><td class=n>1,008 B</td>" in text  # one layer of body_0, both
    assert "<td>self_attn.o_proj.weight</td><td>[128,160]</td><td>[128,40]</td>" in text


def test_inspect_writes_the_views(compiled: HelixModule, tmp_path: Path) -> None:
    written = {p.name for p in compiled.inspect().write(tmp_path)}
    assert {"report.html", "model_explorer.json", "body_0.svg", "body_1.svg"} <= written
    assert (tmp_path / "body_0.svg").read_text().startswith("<svg xmlns=")
    assert (tmp_path / "report.html").read_text().rstrip() == page(compiled).rstrip()


def test_the_schedule_shows_the_predicted_times_of_the_facts() -> None:
    inspection = compiled_tiny().inspect()
    predicted = inspection.facts["predicted"]
    section = format_html_report(inspection.plan, inspection.stages, inspection.facts)
    section = section.split("<section id='schedule'>")[1].split("</section>")[0]
    assert "Predicted" in section and predicted["machine"] in section
    for body in predicted["bodies"]:
        assert f"<b>{body['microseconds_of_a_layer']:.1f} us</b>" in section
        assert len(body["collectives"]) == 3
        for c in body["collectives"]:
            assert f"{c['microseconds']:.1f} us, of which compute waits {c['held_microseconds']:.1f} us" in section
