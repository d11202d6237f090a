"""The README is true: its Python runs, its before and after are what the demo prints; examples run."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name.replace(".py", ""), ROOT / "examples" / name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)
    assert found is not None
    return found[1]


def test_the_demo_prints_what_the_readme_shows(capsys: pytest.CaptureFixture[str]) -> None:
    assert example("demo.py").main() == 0
    printed = capsys.readouterr().out
    for line in block("text").splitlines():
        if "deviation" not in line:  # the last digits depend on the machine's BLAS
            assert line in printed
    assert printed.rstrip().endswith("tokens equal")


def test_the_demo_fails_when_tokens_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    demo = example("demo.py")
    monkeypatch.setattr(demo, "FP64_LIMIT", 0.0)
    assert demo.main() == 1


def test_the_python_of_the_readme_runs() -> None:
    exec(compile(block("python"), "README.md", "exec"), {})


def test_examples(capsys: pytest.CaptureFixture[str]) -> None:
    example("01_inspect_plan.py").main(num_layers=4)
    assert "egress_bytes_per_rank_per_token: 115136 -> 29120" in capsys.readouterr().out
    example("02_verify.py").main()
    printed = capsys.readouterr().out
    assert "float64): equivalent" in printed and "rank 0 holds the part of rank 1" in printed
    example("03_own_op.py").main()
    assert "with a rule: equivalent" in capsys.readouterr().out
    example("04_step_by_step.py").main()
    assert "after reset(rows=[0]): [0, 33]" in capsys.readouterr().out


def test_the_example_in_onnxruntime(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert example("05_onnx_ranks.py").main(tmp_path / "exported") <= 1e-5
    assert "that each rank caches: [8, 8, 8, 0]" in capsys.readouterr().out


def test_every_relative_link_exists() -> None:
    for document in (ROOT / "README.md", ROOT / "ARCHITECTURE.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / link).exists(), f"{document.name}: {link}"
