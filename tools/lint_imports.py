"""The import contract of pyproject.toml, by import-linter.

import-linter sees folders with an `__init__.py` only, and ours have none: `kernels` at the root would then shadow the
library of that name. So it reads a copy of the package, with empty ones added.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main(root: Path = ROOT) -> int:
    """Exit status of lint-imports on the package below `root`."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "helix_compile"
        shutil.copytree(root / "helix_compile", copy, ignore=shutil.ignore_patterns("__pycache__"))
        for inner in (p for p in copy.rglob("*") if p.is_dir()):
            (inner / "__init__.py").touch()
        command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
        command += [str(root / "pyproject.toml"), "--no-cache"]
        return subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": folder}).returncode


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
