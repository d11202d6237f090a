"""The planner's page in a real headless Chromium: it adds up what Python does, at what was asked for and wherever its controls stand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helix_compile.predict.formats import cache_format
from helix_compile.predict.planner import Planned
from helix_compile.predict.search import Search, pareto, recommended
from helix_compile.views.plan_page import format_plan_page
from tests.support.browser import Page, open_browser
from tests.support.planned import goal, tiny_costed

pytestmark = pytest.mark.browser
ASKED = goal(batches=(8, 64), tokens_per_s_per_user=2000.0)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("page") / "plan.html"
    file.write_text(format_plan_page(Planned(tiny_costed(), ASKED)), encoding="utf-8")
    return file


def of_page(page: Any, state: dict[str, Any]) -> list[list[float]]:
    return list(
        page.evaluate(
            "(state) => helixPlan.evaluate(state).map((p) => [p.us, p.kv, p.bytes, p.tokens, +p.fits])", state
        )
    )


def test_opens_without_an_error_or_a_request(browser: Any, page_file: Path) -> None:
    for scheme, width in (("light", 1280), ("dark", 390)):
        opened = Page(browser, page_file, width=width, scheme=scheme)
        assert opened.errors == [] and opened.requests == [page_file.as_uri()]
        assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
        assert opened.page.locator("h2", has_text="predicted").count() == 4


def test_it_adds_up_what_python_does(browser: Any, page_file: Path) -> None:
    page = Page(browser, page_file).page
    states = (
        (ASKED, {}),
        (
            replace(ASKED, context=5000, accelerator=replace(ASKED.accelerator, link_gb_s=11.0)),
            {"context": 5000, "link": 11.0},
        ),
        (replace(ASKED, context=3_000_001, cache=cache_format("fp8")), {"context": 3_000_001, "cache": "fp8"}),
        (replace(ASKED, cache=cache_format("fp8_ds_mla"), batches=(8,)), {"cache": "fp8_ds_mla", "batch": 8}),
    )
    for asked, moved in states:
        state = {"context": ASKED.context, "batch": 64, "link": 900.0, "cache": "auto"} | moved
        points = Search(tiny_costed(), asked).points()
        expected = [[p.step_us, p.kv_bytes_per_rank, p.bytes_per_rank, p.tokens_that_fit, int(p.fits)] for p in points]
        got = of_page(page, state)
        assert len(got) == len(expected) >= 300
        assert any(p.candidate.overlap == "hopb" for p in points)
        for one, other in zip(got, expected, strict=True):
            assert one == pytest.approx(other, rel=1e-9, abs=1)
        front, best = pareto(points), recommended(points, asked)
        said = page.evaluate(
            "(state) => { const p = helixPlan.evaluate(state), b = helixPlan.recommended(p); return "
            "[helixPlan.pareto(p).map((q) => q.user), b && [b.plan.cp, b.plan.tpa, b.plan.ep, b.batch, b.plan.overlap]]; }",
            state,
        )
        assert said[0] == pytest.approx([p.tokens_per_s_per_user for p in front], rel=1e-9)
        chosen = best and best.candidate
        assert said[1] == (chosen and best and [chosen.cp, chosen.tpa, chosen.ep, best.batch, chosen.overlap])


def test_controls_move_the_winner_the_front_and_the_bytes(browser: Any, page_file: Path) -> None:
    opened = Page(browser, page_file)
    page = opened.page

    def shown() -> tuple[str, int, str]:
        return page.inner_text("#winner"), page.locator("#pareto tbody tr").count(), page.inner_text("#batches")

    first = shown()
    assert "predicted" in first[0] and "cp=1," not in first[0] and page.inner_text("#context-is") == "1,048,576"
    page.focus("#context")
    page.keyboard.press("Home")
    assert page.inner_text("#context-is") == "1,024"
    short = shown()
    assert short != first and "cp=1," in short[0] and "do not use Helix here" in page.inner_text("#verdict")
    page.click("#reset")
    assert shown() == first
    page.focus("#link")
    page.keyboard.press("Home")
    assert page.inner_text("#link-is") == "8" and shown()[2] != first[2]
    page.click("#reset")
    page.select_option("#cache", "fp8")
    assert shown()[0] != first[0] and "GB of KV cache on a rank" in shown()[0]
    page.click("#reset")
    page.focus("#batch")
    page.keyboard.press("Home")
    assert page.inner_text("#batch-is") == "8" and page.locator("#batches tbody tr").count() == 1
    assert page.locator("#front circle").count() > 0 and opened.errors == []
