"""Imports inside the package."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]


def modules() -> dict[str, Path]:
    """Name inside the package -> file."""
    package = ROOT / "helix_compile"
    files = package.rglob("*.py")
    return {".".join(f.relative_to(package).with_suffix("").parts): f for f in files}


def imports_of(path: Path) -> set[str]:
    """Modules of ours that a file imports when it is imported itself."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("helix_compile"):
            found.add(node.module or "")
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.startswith("helix_compile")}
    return found


def test_nothing_inside_imports_the_package_root() -> None:
    assert not [m for m, path in modules().items() if "helix_compile" in imports_of(path)]


def test_no_cycles() -> None:
    graph = {f"helix_compile.{m}": imports_of(path) for m, path in modules().items()}
    TopologicalSorter(graph).prepare()  # raises CycleError, naming the cycle


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
