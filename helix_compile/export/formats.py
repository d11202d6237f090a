"""What a module can be exported to, and which kind of folder one is."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from helix_compile.errors import ExportError
from helix_compile.export.manifest import MANIFEST, Fault, read_manifest
from helix_compile.runtime.compiled import CompiledModule

FORMATS = ("onnx", "pt2", "aoti")


def check_format(format: str) -> None:
    """Raise ExportError unless it can be written."""
    if format not in FORMATS:
        raise ExportError(f"format={format!r} is unknown; one of {', '.join(FORMATS)}")


def check_asked(format: str, collectives: str) -> None:
    """Raise ExportError unless the format can be written, with collectives of this name."""
    check_format(format)
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
) -> dict[str, Any]:
    """Write `compiled` to `folder`; see HelixModule.export()."""
    check_asked(format, collectives)
    # what one format needs is slow to import for another
    if format == "onnx":
        from helix_compile.export.onnx_folder import export_onnx

        return export_onnx(compiled, folder, layers, logical, collectives)
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
    if manifest["format"] == "onnx":
        from helix_compile.export.onnx_check import check_onnx

        return check_onnx(folder, manifest)
    from helix_compile.export.program_check import check_programs

    return check_programs(folder, manifest)
