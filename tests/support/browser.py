"""A real headless Chromium for tests of pages. Never downloaded: the system's own, or none."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def chromium_path() -> str:
    """Path of the browser. Where there is none the test is skipped, or fails where one is required (CI)."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        reason = f"no browser: none of {', '.join(NAMES)} on PATH (Debian: apt-get install chromium)"
        if os.environ.get("CI") or os.environ.get("HELIX_REQUIRE_BROWSER"):
            pytest.fail(reason)
        pytest.skip(reason)
    return found


@contextmanager
def open_browser() -> Iterator[Any]:
    """A running browser of playwright."""
    path = chromium_path()
    from playwright.sync_api import sync_playwright  # the dev extra; not needed where the test is skipped

    with sync_playwright() as playwright:
        # containers have no user namespaces for the sandbox, and a small /dev/shm
        arguments = ["--no-sandbox", "--disable-dev-shm-usage"]
        browser = playwright.chromium.launch(executable_path=path, args=arguments)
        yield browser
        browser.close()


class Page:
    """A page that was opened, and everything that it complained about or asked the network for."""

    def __init__(self, browser: Any, file: Path, width: int = 1280, scheme: str = "light"):
        self.page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda m: self.errors.append(m.text) if m.type == "error" else None)
        self.page.on("pageerror", lambda e: self.errors.append(str(e)))
        self.page.on("request", lambda r: self.requests.append(r.url))
        self.page.goto(file.as_uri())
