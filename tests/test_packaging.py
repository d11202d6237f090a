"""Guards of the layout: code nested in the package, root links for readers, nothing that shadows another package."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINKS = ("passes", "kernels", "models")


def python(code: str, folder: Path, path: Path | None = None) -> str:
    """Standard output of a new interpreter that runs in `folder`, with `path` first on its import path."""
    lead = f"import sys; sys.path.insert(0, {str(path)!r})\n" if path else ""
    ran = subprocess.run(
        [sys.executable, "-c", lead + code], cwd=folder, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


def test_no_init_where_folders_are_shared() -> None:
    assert not [name for name in LINKS if (ROOT / "helix_compile" / name / "__init__.py").exists()]
    assert not list((ROOT / "tests").rglob("__init__.py"))


@pytest.mark.parametrize("name", LINKS)
def test_root_links_point_into_the_package(name: str) -> None:
    link = ROOT / name
    if not link.is_symlink():
        pytest.skip("links are not supported here")
    assert link.resolve() == ROOT / "helix_compile" / name


def test_one_spelling_per_module(tmp_path: Path) -> None:
    """With the root on the import path, no module of ours is loaded under a root link's name."""
    code = """
import json, helix_compile.compile, helix_compile.saving, helix_compile.generation
found = {n: str(getattr(sys.modules.get(n), "__file__", None)) for n in ("passes", "kernels", "models")}
print(json.dumps(found))
"""
    found = json.loads(python(code, tmp_path, ROOT))
    assert not [name for name, file in found.items() if file.startswith(str(ROOT))]


def test_transformers_sees_the_same_kernels_package(tmp_path: Path) -> None:
    """Transformers looks for a package named `kernels`; our link of that name must not be it."""
    code = "from transformers.utils.import_utils import is_kernels_available; print(is_kernels_available())"
    assert python(code, tmp_path, ROOT) == python(code, tmp_path)


def test_the_wheel_holds_the_package_alone(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    tracked = subprocess.run(
        ["git", "ls-files", "helix_compile", "pyproject.toml", "README.md", "LICENSE", *LINKS],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if tracked.returncode:
        pytest.skip("not a git checkout")
    for name in tracked.stdout.split():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            (source / name).symlink_to((ROOT / name).readlink())
        else:
            (source / name).write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "-w", str(out), str(source)], check=True, capture_output=True)
    names = zipfile.ZipFile(next(out.glob("*.whl"))).namelist()
    assert {n.split("/")[0] for n in names if ".dist-info/" not in n} == {"helix_compile"}
    for expected in ("passes/pipeline.py", "kernels/reference.py", "models/presets.py", "py.typed"):
        assert f"helix_compile/{expected}" in names


def test_entry_points() -> None:
    scripts = entry_points(group="console_scripts", name="helix-compile")
    assert {s.value for s in scripts} == {"helix_compile.__main__:main"}
    backends = entry_points(group="torch_dynamo_backends", name="helix")
    assert {b.value for b in backends} == {"helix_compile.backend:helix_backend"}
