"""Each code has its section in the docs, and no section explains a code that does not exist."""

from __future__ import annotations

import re
from pathlib import Path

from helix_compile.verifier.report import CODES

ROOT = Path(__file__).resolve().parents[2]


def test_every_code_is_explained() -> None:
    text = (ROOT / "docs" / "findings.md").read_text()
    assert re.findall(r"^## (HX\d+)$", text, flags=re.MULTILINE) == list(CODES)


def test_every_code_can_be_found() -> None:
    """A code that no check gives would be a promise that nobody keeps."""
    sources = (ROOT / "helix_compile/verifier").rglob("*.py")
    text = "".join(f.read_text() for f in sources)
    assert not [code for code in CODES if text.count(f'"{code}"') < 2]  # CODES itself is one
