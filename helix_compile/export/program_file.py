"""NAME.pt2 of an export in format pt2: a program, read."""

from __future__ import annotations

import json
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from helix_compile.errors import ExportError


def read_program(path: Path) -> ExportedProgram:
    """What torch.export.save() wrote.

    Raises:
        ExportError: this torch can't read it; names the version of its schema, of which torch itself says nothing in its error.
    """
    try:
        with warnings.catch_warnings():  # torch warns of what it then raises
            warnings.simplefilter("ignore")
            return torch.export.load(path)
    except Exception as error:  # torch's own classes are many
        first = str(error).strip().split("\n")[0]
        schema = f", schema {version}" if (version := _schema_of(path)) else ""
        raise ExportError(
            f"{path}: torch {torch.__version__} reads no program{schema}: {type(error).__name__}: {first}"
        ) from error


def member_of(archive: zipfile.ZipFile, end: str) -> bytes:
    """The file in an archive whose name, behind the archive's own, is this; LookupError where it has none."""
    for name in archive.namelist():
        if name.endswith(end):
            return archive.read(name)
    raise LookupError(f"it holds no {end}")


def _schema_of(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            stated: Any = json.loads(member_of(archive, "models/model.json"))["schema_version"]
            return f"{stated['major']}.{stated['minor']}"
    except (OSError, LookupError, TypeError, ValueError, zipfile.BadZipFile):
        return ""
