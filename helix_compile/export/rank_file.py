"""rankN.safetensors of an export: what a rank holds and where it is on each axis of the mesh."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from helix_compile.errors import ExportError
from helix_compile.export.manifest import EXPORT_ID, digest_of_tensor

COORDINATES = ("kvp", "ep", "world")  # axes; a rank's place on one is an input of the walk, AXIS_rank


def file_of_rank(rank: int) -> str:
    """Where a rank's weights are."""
    return f"rank{rank}.safetensors"


def digest_of(tensor: Tensor) -> str:
    """See digest_of_tensor()."""
    flat: Any = tensor.contiguous().flatten().view(torch.uint8).numpy()
    return digest_of_tensor(str(tensor.dtype)[6:], tensor.shape, flat.data)


class RankFile:
    """A file, open.

    Attributes:
        identity: of the export that it is a part of.
        names: of its tensors.

    Raises:
        ExportError: it can't be read.
    """

    def __init__(self, path: Path):
        try:
            self._file = safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise ExportError(f"{path}: can't be read: {error}") from error
        self.identity = (self._file.metadata() or {}).get(EXPORT_ID, "")
        self.names = set(self._file.keys())

    def tensor(self, name: str) -> Tensor:
        """One of its tensors, in memory of its own: in the file it is not aligned."""
        return self._file.get_tensor(name).clone()

    def coordinates(self) -> dict[str, int]:
        """Axis -> this rank's place on it, of those that the file says."""
        return {axis: int(self.tensor(f"{axis}_rank")) for axis in COORDINATES if f"{axis}_rank" in self.names}
