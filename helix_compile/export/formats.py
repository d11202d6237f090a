"""What a module can be exported to, and which kind of folder one is."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from helix_compile.errors import ExportError
from helix_compile.export.onnx_check import Fault, check_onnx
from helix_compile.export.onnx_folder import MANIFEST, export_onnx
from helix_compile.runtime.compiled import CompiledModule

FORMATS = ("onnx",)
PLANNED = ("pt2", "aoti")


def check_format(format: str) -> None:
    """Raise ExportError unless it can be written."""
    if format in PLANNED:
        raise ExportError(f"format={format!r} is not built yet; nearest that works: {', '.join(FORMATS)}")
    if format not in FORMATS:
        raise ExportError(f"format={format!r} is unknown; one of {', '.join(FORMATS)}")


def export_module(
    compiled: CompiledModule,
    folder: Path,
    format: str,
    layers: Collection[int] | None = None,
    logical: CompiledModule | None = None,
) -> dict[str, Any]:
    """Write `compiled` to `folder`; see HelixModule.export()."""
    check_format(format)
    return export_onnx(compiled, folder, layers, logical)


def is_export(folder: Path) -> bool:
    """True for a folder that export() wrote, whatever has become of it since."""
    return (folder / MANIFEST).is_file()


def check_export(folder: Path) -> list[Fault]:
    """What is wrong with an exported folder; nothing, where it is what export() wrote.

    Raises:
        ExportError: its manifest can't be read, or is of a format or version that is not known here.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        format, version = manifest["format"], manifest["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExportError(
            f"{folder / MANIFEST}: not the manifest of an export: {type(error).__name__}: {error}"
        ) from error
    check_format(format)
    if version != 1:
        raise ExportError(f"{folder / MANIFEST}: version {version!r}, expected 1")
    return check_onnx(folder, manifest)
