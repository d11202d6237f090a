"""report.html in a real headless Chromium: no error, clicks, the slider, phone width, 61 layers at once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helix_compile import HelixModule, helix_compile
from helix_compile.checkpoint.named import named_model
from helix_compile.layout.ledger import local_length, local_slot, owner_rank
from helix_compile.models.presets import build_model, preset_config
from tests.support.browser import Page, chromium_path, open_browser

pytestmark = pytest.mark.browser
CP, TOKENS_PER_BLOCK, MAX_SEQ_LEN = 4, 16, 2000


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_browser() as opened:
        yield opened


def written(compiled: HelixModule, folder: Path) -> Path:
    compiled.inspect(folder)
    return folder / "report.html"


@pytest.fixture(scope="module")
def report(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = build_model(preset_config("tiny"), meta=True)
    compiled = helix_compile(model, cp=CP, tokens_per_block=TOKENS_PER_BLOCK, max_seq_len=MAX_SEQ_LEN)
    return written(compiled, tmp_path_factory.mktemp("report"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_opens_without_an_error_or_a_request(browser: Any, report: Path, scheme: str) -> None:
    opened = Page(browser, report, scheme=scheme)
    for tab in opened.page.locator(".tabs button").all():
        tab.click()
    paper = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") == (scheme == "light")
    assert opened.errors == []
    assert opened.requests == [report.as_uri()]


def test_a_tab_shows_its_body_only(browser: Any, report: Path) -> None:
    page = Page(browser, report).page
    for body in ("body_1", "body_0"):
        page.click(f".tabs button[data-body={body}]")
        shown = page.locator("figure:visible")
        assert [f.get_attribute("data-body") for f in shown.all()] == [body, body]
        assert [o.get_attribute("data-body") for o in page.locator("#schedule ol:visible").all()] == [body]


def test_a_click_shows_the_details(browser: Any, report: Path) -> None:
    opened = Page(browser, report)
    page = opened.page
    details = page.locator("#details")
    assert not details.is_visible()
    page.click("figure[data-body=body_0][data-moment=after] [data-node=linear_4]")
    text = details.inner_text()
    for expected in (
        "o_proj",
        "float32 [B,T,128]",
        "world: partial sum",
        "512 x B*T",
        "modeling_deepseek_v3.py:",
        "captured",
        "self_attn.o_proj.weight",
    ):
        assert expected in text
    related = page.locator("figure[data-body=body_0][data-moment=before] .related")
    assert [n.get_attribute("data-node") for n in related.all()] == ["linear_4"]
    page.keyboard.press("Escape")
    assert not details.is_visible()
    page.focus("figure[data-body=body_0][data-moment=after] [data-node=all_reduce]")
    page.keyboard.press("Enter")
    assert "768 B" in details.inner_text()
    assert opened.errors == []


def test_ownership_equals_the_ledger(browser: Any, report: Path) -> None:
    page = Page(browser, report).page
    lengths = [0, 1, 15, 16, 17, 63, 64, 65, 127, 128, 1000, MAX_SEQ_LEN]
    got = page.evaluate(
        "([lengths, cp]) => lengths.map((n) => [helixReport.ownerRank(n), helixReport.localSlot(n),"
        " [...Array(cp).keys()].map((r) => helixReport.localLength(n, r))])",
        [lengths, CP],
    )
    for length, (owner, slot, held) in zip(lengths, got, strict=True):
        assert owner == owner_rank(length, CP, TOKENS_PER_BLOCK)
        assert slot == local_slot(length, CP, TOKENS_PER_BLOCK)
        assert held == [local_length(length, r, CP, TOKENS_PER_BLOCK) for r in range(CP)]


def test_the_slider_moves_ownership(browser: Any, report: Path) -> None:
    opened = Page(browser, report)
    page = opened.page
    page.focus("#length")
    page.keyboard.press("Home")
    assert page.locator(".block").count() == 0
    assert page.locator("#ranks").inner_text().count("an empty shard") == CP
    for _ in range(17):
        page.keyboard.press("ArrowRight")
    assert page.input_value("#length-number") == "17"
    assert shown(page) == expected(17)
    for length in (65, 1000):  # all blocks of these are drawn
        page.fill("#length-number", str(length))
        assert page.input_value("#length") == str(length)
        assert shown(page) == expected(length)
    page.focus("#length")
    page.keyboard.press("End")
    assert "full" in page.locator("#next-token").inner_text()
    assert opened.errors == []


def shown(page: Any) -> list[tuple[int, list[int]]]:
    """(tokens, blocks) of each rank as drawn."""
    return [
        (
            int(row.get_attribute("data-tokens")),
            [int(b.get_attribute("data-block")) for b in row.locator(".block").all()],
        )
        for row in page.locator(".rank").all()
    ]


def expected(length: int) -> list[tuple[int, list[int]]]:
    """The same by the ledger, token by token."""
    ranks: list[tuple[int, list[int]]] = []
    for rank in range(CP):
        mine = [p for p in range(length) if owner_rank(p, CP, TOKENS_PER_BLOCK) == rank]
        ranks.append((len(mine), sorted({p // TOKENS_PER_BLOCK for p in mine})))
    return ranks


@pytest.mark.parametrize("width", [390, 1280])
def test_no_sideways_scroll(browser: Any, report: Path, width: int) -> None:
    page = Page(browser, report, width=width).page
    size = "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    page.fill("#length-number", str(MAX_SEQ_LEN))
    needed, there = page.evaluate(size)
    assert needed <= there <= width
    for table in page.locator("#collectives table, #memory > .scroll > table").all():
        box = table.bounding_box()
        assert box["x"] + box["width"] <= width  # the figures are seen without scrolling the table
    page.locator("figure:visible [data-node=mla_decode]").click()
    needed, there = page.evaluate(size)
    assert needed <= there
    chosen, panel = page.locator(".chosen").bounding_box(), page.locator("#details").bounding_box()
    assert chosen["y"] + chosen["height"] <= panel["y"]  # not behind the panel
    side_by_side = page.evaluate(
        "(() => { const [a, b] = [...document.querySelectorAll('figure:not([hidden])')]"
        ".map((f) => f.getBoundingClientRect()); return b.left >= a.right; })()"
    )
    assert side_by_side == (width > 900)


@pytest.mark.slow
def test_61_layers_open_at_once(browser: Any, tmp_path: Path) -> None:
    compiled = helix_compile(named_model("deepseek-v3", meta=True), cp=4, max_seq_len=131072)
    assert sum(len(b.layers) for b in compiled.plan.bodies) == 61
    report = written(compiled, tmp_path)
    assert report.stat().st_size < 1_000_000
    assert (tmp_path / "model_explorer.json").stat().st_size < 1_000_000
    opened = Page(browser, report)
    opened.page.wait_for_selector(".rank[data-rank='3']")
    took_ms = opened.page.evaluate(
        "(() => { const n = performance.getEntriesByType('navigation')[0]; return n.loadEventEnd - n.startTime; })()"
    )
    assert 0 < took_ms < 2000
    opened.page.focus("#length")
    opened.page.keyboard.press("End")  # 4096 blocks: the middle of each row is summed up
    assert opened.page.locator(".block").count() < 400
    assert "more" in opened.page.locator("#ranks").inner_text()
    assert opened.errors == []


@pytest.mark.parametrize("variable", ["CI", "HELIX_REQUIRE_BROWSER"])
def test_without_a_browser_ci_fails_and_others_skip(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    for name in ("CI", "HELIX_REQUIRE_BROWSER"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(pytest.skip.Exception, match="no browser"):
        chromium_path()
    monkeypatch.setenv(variable, "1")
    with pytest.raises(pytest.fail.Exception, match="apt-get install chromium"):
        chromium_path()
