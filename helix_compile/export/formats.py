"""What a module can be exported to, and which kind of folder one is."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from helix_compile.errors import ExportError, HelixError
from helix_compile.export.manifest import MANIFEST, Fault, check_manifest, read_manifest
from helix_compile.files import check_folder
from helix_compile.runtime.compiled import CompiledModule

FORMATS = ("onnx", "pt2", "aoti")


def check_format(format: str) -> None:
    """Raise ExportError unless it can be written."""
    if format not in FORMATS:
        raise ExportError(f"format={format!r} is unknown; one of {', '.join(FORMATS)}")


def check_asked(format: str, collectives: str, batch: int | None = None, tokens: int | None = None) -> None:
    """Raise ExportError unless the format can be written, with collectives of this name and these sizes."""
    check_format(format)
    if format != "onnx" and (batch, tokens) != (None, None):
        raise ExportError(
            f"format={format!r}: batch= and tokens= fix sizes of ONNX models; programs take any B and T; leave them"
        )
    if collectives != "helix":
        from helix_compile.export.onnx_nccl import check_collectives  # onnx is slow to import

        check_collectives(collectives, format)


def export_module(
    compiled: CompiledModule,
    folder: Path,
    format: str,
    layers: Collection[int] | None = None,
    logical: CompiledModule | None = None,
    collectives: str = "helix",
    batch: int | None = None,
    tokens: int | None = None,
) -> dict[str, Any]:
    """Write `compiled` to `folder`; see HelixModule.export()."""
    check_asked(format, collectives, batch, tokens)
    check_folder(folder, "export:")
    # what one format needs is slow to import for another
    if format == "onnx":
        from helix_compile.export.onnx_folder import export_onnx

        return export_onnx(compiled, folder, layers, logical, collectives, batch, tokens)
    if logical is not None:
        raise ExportError(f"format={format!r}: logical= is for plan.onnx, which format='onnx' writes alone; leave it")
    from helix_compile.export.program_folder import export_programs

    return export_programs(compiled, folder, format, layers)


def is_export(folder: Path) -> bool:
    """True for a folder that export() wrote, whatever has become of it since."""
    return (folder / MANIFEST).is_file()


def check_export(folder: Path) -> list[Fault]:
    """What is wrong with an exported folder; nothing, where it is what export() wrote.

    Raises:
        ExportError: its manifest can't be read, or is of a format or version that is not known here.
    """
    manifest = read_manifest(folder)
    check_format(manifest["format"])
    said = check_manifest(manifest)
    if manifest["format"] == "onnx":
        from helix_compile.export.onnx_check import check_onnx as check
    else:
        from helix_compile.export.program_check import check_programs as check
    try:
        return said + check(folder, manifest)
    except (HelixError, LookupError, TypeError, ValueError, AttributeError) as error:
        if not said:  # what was exported has all that is read of it
            raise
        return [
            *said,
            Fault("unreadable", MANIFEST, f"the files can't be held against it: {type(error).__name__}: {error}"),
        ]
