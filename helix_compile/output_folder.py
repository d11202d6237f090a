"""Is a folder that a command shall write to usable? Asked before anything slow begins."""

from __future__ import annotations

import os
from pathlib import Path

from helix_compile.errors import HelixError


def check_folder(out: Path) -> None:
    """The nearest part of the path that exists is a folder that can be written.

    Raises:
        HelixError: it is not; names the part.
    """
    nearest = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        what = "can't be written" if nearest.is_dir() else "is not a folder"
        raise HelixError(f"--out {out}: {nearest} {what}; choose another folder")
