"""Guards of the layout: real code in the package, links at the root, one spelling for each module."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINKED = ("passes", "kernels", "models")


def test_no_init_files_where_they_would_shadow() -> None:
    found = [f for name in LINKED for f in (ROOT / "helix_compile" / name).glob("__init__.py")]
    assert not found and not list((ROOT / "tests").rglob("__init__.py"))


def test_root_names_are_links_into_the_package() -> None:
    for name in LINKED:
        assert (ROOT / name).is_symlink()
        assert (ROOT / name).resolve() == ROOT / "helix_compile" / name


def test_each_module_has_one_spelling() -> None:
    code = (
        "import sys, helix_compile, helix_compile.passes.pipeline as p\n"
        "bad = [n for n in sys.modules if n.split('.')[0] in ('passes', 'kernels', 'models')]\n"
        "assert p.__name__ == 'helix_compile.passes.pipeline' and not bad, bad\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=ROOT)


def test_transformers_does_not_take_our_kernels_folder(tmp_path: Path) -> None:
    code = "from transformers.utils import is_kernels_available; print(is_kernels_available())"
    seen = {
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code], check=True, cwd=cwd, capture_output=True
        ).stdout
        for cwd in (ROOT, tmp_path)
    }
    assert len(seen) == 1


def test_the_wheel_holds_the_package_only(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(ROOT)]  # fmt: skip
    subprocess.run(command, check=True)
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    top = {n.split("/")[0] for n in names if ".dist-info" not in n}
    assert top == {"helix_compile"}
    for needed in ("py.typed", "passes/pipeline.py", "kernels/reference.py", "models/presets.py"):
        assert f"helix_compile/{needed}" in names


# lower never imports upper; a module is in the first layer that lists it
LAYERS: list[tuple[str, ...]] = [
    ("errors", "ledger", "layout", "numerics"),
    ("models.presets", "kernels.reference", "placement", "options", "mesh"),
    ("ops", "matches", "plan", "graph_pass", "kv_cache"),
    ("passes.fx_edit",),
    ("passes.canonicalize", "passes.index_provenance", "passes.evaluate", "passes.propagate"),
    ("capture_layers", "capture_body", "capture", "virtual_world"),
    ("passes.match_mla", "passes.match_mask", "passes.match_ffn", "passes.match_moe", "passes.match_layers",
     "param_plan", "planning", "params", "graph_text", "graph_json", "world", "step_inputs", "prefix_import"),
    ("passes.shard_attention", "passes.rewire_outer", "passes.reshard", "passes.shard_ffn", "passes.lower",
     "passes.typing_rules", "passes.lowered_rules", "passes.check_layouts", "passes.pipeline"),
    ("inspection", "module", "generation", "saving"),
    ("model_source", "compile", "backend", "__main__", "__init__"),
]  # fmt: skip


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT / "helix_compile").with_suffix("").parts)


def test_imports_go_downwards_and_nothing_imports_the_root() -> None:
    rank = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    files = sorted((ROOT / "helix_compile").rglob("*.py"))
    assert {module_name(f) for f in files} == set(rank)
    upward = []
    for file in files:
        name = module_name(file)
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("helix_compile"):
                target = (node.module or "").removeprefix("helix_compile").lstrip(".")
                assert target, f"{name} imports from the package root"
                if rank[target] > rank[name]:
                    upward.append(f"{name} -> {target}")
    assert upward == []


@pytest.mark.parametrize("file", sorted((ROOT / "helix_compile").rglob("*.py")), ids=module_name)
def test_files_are_small(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= 350
