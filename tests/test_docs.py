"""docs/inspect.md is true: every excerpt is in what the commands print and write, its Python runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from helix_compile import HelixModule, helix_compile
from helix_compile.models.presets import build_model, preset_config

TEXT = (Path(__file__).parents[1] / "docs/inspect.md").read_text()


@pytest.fixture(scope="module")
def compiled() -> HelixModule:
    return helix_compile(build_model(preset_config("tiny"), meta=True), cp=4)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


def test_every_excerpt_is_real(compiled: HelixModule, tmp_path: Path) -> None:
    printed = [str(compiled.inspect(tmp_path)), str(compiled.explain_node("body_1.all_to_all_single"))]
    real = "\n".join([*printed, *(f.read_text() for f in sorted(tmp_path.iterdir()))])
    excerpts = blocks("text")
    assert len(excerpts) >= 6
    for line in "".join(excerpts).splitlines():
        assert line in real, line


def test_every_file_is_described(compiled: HelixModule, tmp_path: Path) -> None:
    compiled.inspect(tmp_path)
    for file in tmp_path.iterdir():
        kind = re.sub(r"^(body_\d+|outer)", "NAME", re.sub(r"^\d\d_\w+", "NN_STAGE", file.name))
        assert kind in TEXT, file.name


def test_its_python_runs(compiled: HelixModule, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = blocks("python")
    exec(compile(code, "docs/inspect.md", "exec"), {"compiled": compiled})
    assert "edges are worth drawing" in capsys.readouterr().out
