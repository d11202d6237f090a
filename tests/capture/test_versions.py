"""A newer transformers than any that was tested: a note of every plan, and no refusal."""

from __future__ import annotations

import importlib

import pytest


@pytest.mark.parametrize(("version", "newer"), [("5.24.9", False), ("5.25.0", True), ("6.0.0.dev0", True)])
def test_a_newer_version_is_noted(monkeypatch: pytest.MonkeyPatch, version: str, newer: bool) -> None:
    model = importlib.import_module("helix_compile.capture.model")
    monkeypatch.setattr(model.transformers, "__version__", version)
    expected = f"transformers {version} is newer than what was tested (up to 5.24)"
    assert model.version_notes() == ((expected,) if newer else ())
