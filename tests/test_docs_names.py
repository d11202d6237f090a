"""Every path and every dotted name of ours that the documents mention exists; examples and docs use root-level names only."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
FOLDERS = ("", "helix_compile", "tests", "docs", "benchmarks", "examples")
# files of other projects, and what our own commands write
FOREIGN = re.compile(
    r"modeling_\w+\.py|test_request_utils\.py|configuration_\w+\.py|NAME\.\w+\.py|body_\d+\.\w+\.py|outer\.\w+\.py"
)
# documented where they are: the root holds what most users need
DEEP_BUT_PUBLIC = (
    "helix_compile.models.presets",
    "helix_compile.kernels.catalog",
    "helix_compile.backend",
    "helix_compile.eval.harness",
    "helix_compile.eval.words",
    "helix_compile.predict.schedule",
    "helix_compile.predict.roofline",
    "helix_compile.verifier.numeric.reference",
)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_paths_exist(document: Path) -> None:
    text = document.read_text()
    named = set(re.findall(r"(?<![\w/.{*-])((?:[\w-]+/)*[\w-]+\.(?:py|md))\b", text))
    missing = [n for n in named if not FOREIGN.fullmatch(Path(n).name) and not _exists(n)]
    assert not missing, sorted(missing)


def _exists(name: str) -> bool:
    if any((ROOT / folder / name).exists() for folder in FOLDERS):
        return True
    # a bare file name: of a neighbour that the text has named just before
    return "/" not in name and any(ROOT.glob(f"*/**/{name}"))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_dotted_names_exist(document: Path) -> None:
    for name in set(re.findall(r"\bhelix_compile(?:\.[A-Za-z_]\w*)+", document.read_text())):
        if not name.endswith((".cache", ".svg", ".json", ".md", ".py", ".toml", ".git")):
            assert _resolves(name), f"{document.name}: {name}"


def _resolves(name: str) -> bool:
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] != "helix_compile":
                return cut == len(parts)  # the module is there: what it imports comes with an extra
            continue
        for attribute in parts[cut:]:
            if not hasattr(found, attribute):
                return False
            found = getattr(found, attribute)
        return True
    return False


@pytest.mark.parametrize("file", [*DOCUMENTS, *sorted(ROOT.glob("examples/**/*.py"))], ids=lambda d: d.name)
def test_names_are_imported_from_the_root(file: Path) -> None:
    deep = set(re.findall(r"^\s*(?:from|import) (helix_compile\.[\w.]+)", file.read_text(), re.M))
    assert not {d for d in deep if not d.startswith(DEEP_BUT_PUBLIC)}
