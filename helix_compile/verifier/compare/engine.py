"""Attention outputs of another engine: a folder of .safetensors with tensors named layer_{i}.attn_out (a layer's second
attention: layer_{i}.attn_out_1).

A tensor is [B, T, D], [B * T, D], or [tokens, D] without padding. A file whose name has step_S in it is of that step, all
others of step 0.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from helix_compile.errors import HelixError
from helix_compile.runtime.values import ValueEntry, layer_name
from helix_compile.verifier.compare.dumps import Key, Step, Value

_NAME = re.compile(r"layer_(\d+)\.(attn_out(?:_\d+)?)")
_STEP = re.compile(r"step_(\d+)")


@dataclass
class EngineFolder:
    """The files of each step."""

    folder: Path
    files: dict[int, list[Path]]
    notes: list[str] = field(default_factory=list)

    @property
    def numbers(self) -> list[int]:
        """Its steps."""
        return sorted(self.files)

    def __str__(self) -> str:
        return f"{self.folder}: attention outputs of another engine; steps {', '.join(map(str, self.numbers))}"

    def steps(self) -> Iterator[Step]:
        """One after the other.

        Raises:
            HelixError: a file that can't be read, a name twice, or no tensor layer_{i}.attn_out in a step.
        """
        for number in self.numbers:
            found: dict[tuple[int, str], Tensor] = {}
            for path in self.files[number]:
                for name, tensor in _load(path).items():
                    match = _NAME.fullmatch(name)
                    if match is None:
                        self.notes.append(f"{path.name}: {name} is not compared: only layer_{{i}}.attn_out is")
                    elif (at := (int(match[1]), match[2])) in found:
                        raise HelixError(f"{path}: {name} is in step {number} twice; name files step_0..., step_1...")
                    else:
                        found[at] = tensor
            if not found:
                raise HelixError(f"{self.folder}: step {number} has no tensor named layer_{{i}}.attn_out")
            values = {
                Key(layer_name(i), role): as_value(layer_name(i), role, found[i, role]) for i, role in sorted(found)
            }
            yield Step(number, None, [values])


def open_engine_folder(folder: Path) -> EngineFolder:
    """Which file is of which step."""
    files: dict[int, list[Path]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        match = _STEP.search(path.stem)
        files.setdefault(int(match[1]) if match else 0, []).append(path)
    return EngineFolder(folder, files)


def as_value(place: str, role: str, tensor: Tensor) -> Value:
    """A whole tensor as a dump would have it."""
    shape = tuple(tensor.shape)
    wide = tensor.double()
    finite = wide[wide.isfinite()]
    entry = ValueEntry(
        place=place,
        name=role,
        role=role,
        op="",
        shape=list(shape),
        dtype=str(tensor.dtype).removeprefix("torch."),
        layout="R",
        norm=float(finite.norm()),
        largest=float(finite.abs().max()) if finite.numel() else 0.0,
        nonfinite=tensor.numel() - finite.numel(),
        origin=[],
        source="",
        captured=False,
        reads=[],
    )
    return Value(entry, tensor.flatten(), torch.arange(tensor.numel()), tensor)


def as_shaped(value: Value, shape: tuple[int, ...], mask: Tensor | None) -> Value | None:
    """Another engine's tensor in the shape that a dump has, padding filled with zeros; None where it does not fit."""
    tensor = value.tensor
    assert tensor is not None
    size = torch.Size(shape).numel()
    if tensor.numel() == size:
        kept = tensor.reshape(shape)
        if mask is not None and shape[:2] == tuple(mask.shape):
            kept = torch.where(mask.bool()[..., None], kept, 0)  # a dump's norm is that of tokens
        return as_value(value.entry.place, value.entry.role, kept)
    if mask is None or len(shape) != 3 or tensor.numel() != int(mask.sum()) * shape[-1]:
        return None
    whole = tensor.new_zeros(shape)
    whole[mask.bool()] = tensor.reshape(-1, shape[-1])
    return as_value(value.entry.place, value.entry.role, whole)


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise HelixError(f"{path}: can't be read: {error}") from error
