"""Modules made of an edited source: Triton reads a function's source from its file."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

Load = Callable[[str, str], ModuleType]


def source_of(module: ModuleType) -> str:
    """The text of a module's file."""
    assert module.__file__ is not None
    return Path(module.__file__).read_text()


def source_loader(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """A function that imports a text, written to `folder`, as a module of the given name."""

    def load(name: str, text: str) -> ModuleType:
        path = folder / f"{name}.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return load
