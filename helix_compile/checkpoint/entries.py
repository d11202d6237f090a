"""Stored names -> tensors as a model has them: a plain one as it is, a quantised one with what belongs to it.

What is stored decides: a weight is quantised if its dtype and its companions say so, whatever a list of modules says that
were left out. What does not fit the one format that the configuration states is a problem of that tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from helix_compile.checkpoint.files import FLOATS, CheckpointFiles, Stored
from helix_compile.checkpoint.formats import Format, Quantised, scale_shapes
from helix_compile.checkpoint.stated import Stated

# last words of names of scales of activations and of the cache: a step computes in the model's dtype and needs none
IDLE = (
    "input_scale",
    "input_global_scale",
    "activation_scale",
    "output_scale",
    "q_scale",
    "k_scale",
    "v_scale",
    "kv_scale",
    "prob_scale",
)
_PACKED = "weight_packed"
_NOT_STATED = "config.json states no quantization_config"
Range = tuple[int, int]
_SIZES = {"F8_E4M3": 1, "F8_E5M2": 1, "U8": 1, "I32": 4}


@dataclass(frozen=True)
class Entry:
    """A tensor of a checkpoint as a model has it.

    Attributes:
        name: stored name of its values.
        stored: where these are, and how.
        shape: once it is read.
        bits: stored for each of its elements.
        quantised: how it is read; None: plain floats.
        problems: why it can't be read.
    """

    name: str
    stored: Stored
    shape: tuple[int, ...]
    bits: int
    quantised: Quantised | None = None
    problems: tuple[str, ...] = ()

    def __str__(self) -> str:
        return str(self.stored)

    def copy_part(self, files: CheckpointFiles, ranges: tuple[Range, ...], target: Tensor) -> None:
        """Read [start, stop) of each dim into `target`, in its dtype."""
        if self.quantised is None:
            target.copy_(files.slice(self.name, ranges))
        else:
            rows, columns = ranges
            self.quantised.copy_part(files.slice, rows, columns, target)

    def part(self, files: CheckpointFiles, ranges: tuple[Range, ...]) -> Tensor:
        """[start, stop) of each dim: as it is stored, or dequantised to float32."""
        if self.quantised is None:
            return files.slice(self.name, ranges)
        target = torch.empty([stop - start for start, stop in ranges])
        self.copy_part(files, ranges, target)
        return target


@dataclass(frozen=True)
class Entries(Mapping[str, Entry]):
    """Name in the checkpoint, as it would be of a plain weight -> entry; and the names of scales without effect."""

    found: dict[str, Entry]
    idle: tuple[str, ...]

    def __getitem__(self, name: str) -> Entry:
        return self.found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.found)

    def __len__(self) -> int:
        return len(self.found)


def read_entries(files: CheckpointFiles, stated: Stated | None) -> Entries:
    """Sort what is stored into weights, what belongs to them, and scales that nothing here needs.

    A companion of nothing stays an entry of its own: no model has a tensor of its name.
    """
    form = stated.format if stated else None
    found: dict[str, Entry] = {}
    used: set[str] = set()
    for key, tensor in files.tensors.items():
        if form is not None and _holds_values(key, tensor, form, files):
            name = key.removesuffix(form.tail)
            found[name], companions = _quantised(files, name, form)
            used |= {key, *companions}
    idle = tuple(k for k in files.tensors if stated and k not in used and k.rpartition(".")[2] in IDLE)
    used |= set(idle)
    for key, tensor in files.tensors.items():
        if key in used:
            continue
        name = key.removesuffix("_packed") if key.endswith(_PACKED) else key  # as it would be of this format
        if name in found:
            twice = f"does not fit: {name}: stored as {key} and in another format too"
            found[name] = replace(found[name], problems=(*found[name].problems, twice))
        else:
            found[name] = _plain(key, tensor, stated)
    return Entries(found, idle)


def _holds_values(key: str, tensor: Stored, form: Format, files: CheckpointFiles) -> bool:
    if form.tail:
        return key.endswith("weight" + form.tail)
    of_another = any(key.endswith(tail) and key.removesuffix(tail) in files.tensors for tail in form.scales)
    return tensor.dtype in form.values and not of_another


def _plain(key: str, tensor: Stored, stated: Stated | None) -> Entry:
    problems: tuple[str, ...] = ()
    if tensor.dtype not in FLOATS:
        other = f"is not {stated.name}, which {stated.file.name} states" if stated else _NOT_STATED
        told = f"dtype {tensor.dtype} is not one of {', '.join(FLOATS)}, and {other}"
        problems = (f"does not fit: {key}: {told}",)
    bits = 8 * FLOATS[tensor.dtype].itemsize if tensor.dtype in FLOATS else 0
    return Entry(key, tensor, tensor.shape, bits, problems=problems)


def _quantised(files: CheckpointFiles, name: str, form: Format) -> tuple[Entry, list[str]]:
    """The entry of a weight, and the names of what belongs to it."""
    there, key = files.tensors, name + form.tail
    values = there[key]
    scale = next((name + tail for tail in form.scales if name + tail in there), "")
    whole, said = (name + tail if tail else "" for tail in (form.whole_scale, form.shape))
    companions = [one for one in (scale, whole, said) if one in there]
    if len(values.shape) != 2 or values.dtype not in form.values:
        told = f"{form.name} is read for matrices of {' or '.join(form.values)} only"
        entry = Entry(key, values, values.shape, 0, problems=(f"does not fit: {key}: {values}: {told}",))
        return entry, companions
    shape, problems = _logical_shape(files, key, said, form.packed)
    share = _share(there.get(scale), form, shape)
    if not scale:
        told = " or ".join(name + tail for tail in form.scales)
        problems.append(f"missing: {told}, the scales of {key} {values}: {form.name}")
    elif share is None:
        shapes = " or ".join(str(list(scale_shapes(grid, shape)[0])) for grid in form.grids)
        kinds, of = ", ".join(form.scale_dtypes), f"the scales of {key} {values}: {form.name}"
        problems.append(f"does not fit: {scale}: {there[scale]}, expected {shapes} in one of {kinds}: {of}")
    if whole and whole not in there:
        problems.append(f"missing: {whole}, the scale of all of {key} {values}: {form.name}")
    elif whole and (math.prod(there[whole].shape) != 1 or there[whole].dtype != "F32"):
        problems.append(f"does not fit: {whole}: {there[whole]}, expected one F32: the scale of all of {key} {values}")
    quantised = None if share is None else Quantised(form, key, scale, len(there[scale].shape), share, whole)
    bits = 8 * _SIZES[values.dtype] // form.packed
    return Entry(key, values, shape, bits, quantised, tuple(problems)), companions


def _logical_shape(files: CheckpointFiles, key: str, said: str, packed: int) -> tuple[tuple[int, int], list[str]]:
    """Rows and columns of the weight whose values are `key`: by the tensor `said` where its format has one."""
    values = files.tensors[key]
    rows, columns = values.shape[0], values.shape[1] * packed
    if not said:
        return (rows, columns), []
    if said not in files.tensors:
        return (rows, columns), [f"missing: {said}, the shape of {key} {values}"]
    told = files.slice(said, ()).reshape(-1).tolist()
    if (
        len(told) == 2 and told[0] == rows and columns - packed < told[1] <= columns
    ):  # the last element may be part full
        return (rows, told[1]), []
    return (rows, columns), [f"does not fit: {said}: says {told}, {key} is {values}"]


def _share(scale: Stored | None, form: Format, shape: tuple[int, int]) -> tuple[int, int] | None:
    """Rows and columns that share a scale, by the shape of what is stored; None: it is none of the format's."""
    if scale is None or scale.dtype not in form.scale_dtypes:
        return None
    for rows, columns in form.grids:
        if scale.shape in scale_shapes((rows, columns), shape):
            return rows or shape[0], columns or shape[1]
    return None
