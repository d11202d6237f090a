"""Is a folder that a command shall write to usable? Asked before anything slow begins."""

from __future__ import annotations

import tempfile
from pathlib import Path

from helix_compile.errors import HelixError


def check_folder(out: Path) -> None:
    """The nearest part of the path that exists is a folder that can be written.

    Raises:
        HelixError: it is not; names the part.
    """
    nearest = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    if not nearest.is_dir():
        raise HelixError(f"--out {out}: {nearest} is not a folder; choose another folder")
    try:
        tempfile.TemporaryFile(
            dir=nearest
        ).close()  # permissions don't tell: root has all, disks may be read-only
    except OSError as error:
        raise HelixError(f"--out {out}: {nearest} can't be written ({error.strerror}); choose another folder") from error  # fmt: skip
