"""The safetensors files of a checkpoint folder: which tensors there are, and slices of them without reading the rest."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from helix_compile.errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# safetensors' names of the dtypes that plain weights may be stored in
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class Stored:
    """A tensor on disk: file name, shape, and dtype by safetensors' name ("BF16")."""

    file: str
    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{list(self.shape)} {self.dtype}"


class CheckpointFiles:
    """Headers of all files of a folder, read at once; tensor data is mapped, and read only where a slice is asked.

    Attributes:
        folder: where the files are.
        tensors: name -> Stored, of every tensor in every file.
    """

    def __init__(self, folder: Path):
        """Open the files.

        Raises:
            CheckpointError: no safetensors, pickles only, or files that are missing, damaged or contradict the index.
        """
        self.folder = folder
        self.tensors: dict[str, Stored] = {}
        self._open: dict[str, Any] = {}
        problems: list[str] = []
        promised = self._promised()
        for file in sorted(set(promised.values())) if promised else [SINGLE]:
            problems += self._read_header(file)
        problems += [
            f"{INDEX}: {name} is said to be in {file}, which does not hold it"
            for name, file in promised.items()
            if file in self._open and self.tensors.get(name, Stored("", (), "")).file != file
        ]
        if problems:
            raise CheckpointError(
                f"{folder}: {len(problems)} problem(s) with its files; nothing was read:\n  " + "\n  ".join(problems)
            )

    def slice(self, name: str, ranges: tuple[tuple[int, int], ...]) -> Tensor:
        """[start, stop) of each dim of a tensor, as stored. It is a view of the mapped file: copy what is kept."""
        view = self._open[self.tensors[name].file].get_slice(name)
        return view[tuple(slice(start, stop) for start, stop in ranges)] if ranges else view[...]

    def sample(self, name: str) -> str:
        """Name, shape, dtype, and up to 16 elements each of the first and of the middle row, as bytes in hex."""
        tensor, parts = self.tensors[name], []
        for place in (0, 1):
            row = [(place * (size // 2), place * (size // 2) + 1) for size in tensor.shape[:-1]]
            ends = [(0, min(16, size)) for size in tensor.shape[-1:]]
            few = self.slice(name, (*row, *ends)).contiguous().reshape(-1)
            parts.append(few.view(torch.uint8).numpy().tobytes().hex())
        return f"{name} {tensor} {' '.join(parts)}"

    def _promised(self) -> dict[str, str]:
        """Tensor name -> file of the index; empty where one file holds all."""
        if (self.folder / SINGLE).is_file():
            return {}
        path = self.folder / INDEX
        if not path.is_file():
            raise CheckpointError(self._nothing_to_read())
        try:
            weight_map = json.loads(path.read_text())["weight_map"]
            files = {str(name): str(file) for name, file in weight_map.items()}
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path}: not an index of a sharded checkpoint: {type(error).__name__}: {error}"
            ) from error
        outside = sorted({f for f in files.values() if Path(f).name != f})
        if outside or not files:
            what = f"names {', '.join(outside)}, not a file of the folder" if outside else "is empty"
            raise CheckpointError(f"{path}: weight_map {what}; download the checkpoint again")
        return files

    def _nothing_to_read(self) -> str:
        pickles = sorted(p.name for pattern in _PICKLES for p in self.folder.glob(pattern))
        if pickles:
            return (
                f"{self.folder} holds pickled weights only ({', '.join(pickles[:3])}{', ...' if pickles[3:] else ''}). "
                "Reading a pickle runs code of whoever wrote it, so it is refused; convert it: "
                "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder) writes safetensors"
            )
        return f"{self.folder} has no weights: expected {SINGLE}, or {INDEX} and the files it names"

    def _read_header(self, file: str) -> list[str]:
        """Note what `file` holds; returns what is wrong with it."""
        path = self.folder / file
        if not path.is_file():
            return [f"{file} is missing" + (f" ({INDEX} names it)" if file != SINGLE else "")]
        try:
            handle = safe_open(path, framework="pt", device="cpu")
            self._open[file] = handle
            found = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 no mapping
            stored = {n: Stored(file, tuple(v.get_shape()), v.get_dtype()) for n, v in found.items()}
        except (SafetensorError, OSError) as error:
            size = path.stat().st_size
            return [f"{file} ({size} bytes) is damaged, truncated or not safetensors: {error}"]
        twice = [f"{name} is in {self.tensors[name].file} and in {file}" for name in stored if name in self.tensors]
        self.tensors |= stored
        return twice
