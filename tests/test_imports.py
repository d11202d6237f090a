"""The import contract holds, and bites; what it can't say stands here."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def modules() -> dict[str, Path]:
    """Name inside the package -> file."""
    package = ROOT / "helix_compile"
    files = package.rglob("*.py")
    return {".".join(f.relative_to(package).with_suffix("").parts): f for f in files}


def imports_of(path: Path) -> set[str]:
    """Modules of ours that a file imports, in functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("helix_compile"):
            found.add(node.module or "")
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.startswith("helix_compile")}
    return found


def test_nothing_inside_imports_the_package_root() -> None:
    assert not [m for m, path in modules().items() if "helix_compile" in imports_of(path)]


@pytest.mark.parametrize(
    ("module", "line", "broken"),
    [
        (
            "ir/graph",
            "import helix_compile.passes.pipeline",
            "helix_compile.ir is not allowed to import helix_compile.passes",
        ),
        (
            "passes/match/mla",
            "def f():\n    import helix_compile.passes.rewrite.ffn",
            "passes.match is not allowed to import",
        ),
        (
            "kernels/target",
            "if TYPE_CHECKING:\n    from helix_compile.plan import matches",
            "kernels is not allowed to import",
        ),
        ("kernels/registry", "def f():\n    import helix_compile.kernels.catalog", "no circle BROKEN"),
        ("verifier/contract", "import helix_compile.layout.placement", "rank arithmetic is written apart BROKEN"),
    ],
)
def test_an_import_that_is_turned_round_breaks_the_contract(
    tmp_path: Path, module: str, line: str, broken: str
) -> None:
    shutil.copytree(ROOT / "helix_compile", tmp_path / "helix_compile", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    file = tmp_path / "helix_compile" / f"{module}.py"
    file.write_text(f"{file.read_text()}\n{line}\n")
    command = [sys.executable, str(ROOT / "tools/lint_imports.py"), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert broken in " ".join(result.stdout.split())


def test_models_know_nothing_of_ours_but_each_other() -> None:
    found = {i for m, p in modules().items() if m.startswith("models.") for i in imports_of(p)}
    assert all(i.startswith("helix_compile.models.") for i in found)


def test_only_the_worlds_know_processes() -> None:
    """One file asks torch.distributed who this process is; no pass and no model does."""
    asking = [
        m
        for m, path in modules().items()
        if "dist.get_rank" in path.read_text() or "get_world_size" in path.read_text()
    ]
    assert asking == ["worlds.groups"]
