"""Guards of the layout: real code in the package, links at the root, one spelling for each module."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import helix_compile

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
        "names = [n for n in sys.modules if n.split('.')[0] in ('passes', 'kernels', 'models')]\n"
        "bad = [n for n in names if getattr(sys.modules[n], '__file__', None)]\n"
        "assert p.__name__ == 'helix_compile.passes.pipeline' and not bad, bad\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=ROOT)


def test_the_front_door_imports_what_is_asked_for() -> None:
    code = (
        "import sys, torch, helix_compile\n"
        "assert torch.ops.helix.mla_decode and 'transformers' not in sys.modules\n"
        "import helix_compile.capture.model\n"
        "from helix_compile import capture, helix_compile as front\n"
        "assert capture is sys.modules['helix_compile.capture.model'].capture\n"  # the function hides the room of its name
        "assert front.__module__ == 'helix_compile.compile' and helix_compile.passes.__name__ == 'helix_compile.passes'\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=ROOT)


def test_types_and_imports_of_the_front_door_agree() -> None:
    tree = ast.parse((ROOT / "helix_compile" / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {a.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for a in node.names}
    assert {name: f"helix_compile.{place}" for name, place in helix_compile._PLACES.items()} == typed
    assert sorted(typed) == sorted(helix_compile.__all__)
    assert all(getattr(helix_compile, name).__name__ == name for name in typed)


def test_transformers_does_not_take_our_kernels_folder(tmp_path: Path) -> None:
    code = "from transformers.utils import is_kernels_available; print(is_kernels_available())"
    seen = {
        subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=cwd, capture_output=True).stdout
        for cwd in (ROOT, tmp_path)
    }
    assert len(seen) == 1


def test_the_wheel_holds_the_package_only(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(command, check=True)
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    top = {n.split("/")[0] for n in names if ".dist-info" not in n}
    assert top == {"helix_compile"}
    for needed in (
        "py.typed",
        "passes/pipeline.py",
        "kernels/reference.py",
        "kernels/cpp/mla_decode.cpp",
        "models/presets.py",
        "views/report.css",
        "views/report.js",
        "options.schema.json",
        "export/helix_ops.onnx.txt",
    ):
        assert f"helix_compile/{needed}" in names
