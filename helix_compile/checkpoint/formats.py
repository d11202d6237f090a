"""Formats of quantised weights: which tensors one is stored as, and how a part of it is dequantised.

Every format here is one rule: a value, some of them packed in a stored element along a row, times the scale of its part
of a grid, in float32, rounded once into the dtype that is asked. docs/checkpoints.md has them in a table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from helix_compile.errors import CheckpointError

Reader = Callable[[str, tuple[tuple[int, int], ...]], Tensor]  # stored name, [start, stop) of each dim -> that part
Grid = tuple[int | None, int | None]  # rows and columns that share a scale; None: all there are
PER_TENSOR: Grid = (None, None)
PER_CHANNEL: Grid = (1, None)  # a channel is an output: a row

SCALES = ("F32", "BF16", "F16", "F8_E8M0")
# two to a byte, the even column in the low half: sign, two bits of exponent, one of mantissa
_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
_ROWS = 128  # widened at a time: what is held beside the shard stays small


def fp8(values: Tensor) -> Tensor:
    """One to an element."""
    return values.to(torch.float32)


def e2m1(values: Tensor) -> Tensor:
    """Two to a byte."""
    codes = torch.stack((values & 15, values >> 4), dim=-1).flatten(-2)
    # three times as fast as _E2M1[codes.long()]
    return _E2M1.index_select(0, codes.flatten().to(torch.int32)).view(codes.shape)


def int4(values: Tensor) -> Tensor:
    """Eight to an int32, the first column in the lowest bits, each 8 more than it is."""
    codes = (values.unsqueeze(-1) >> torch.arange(0, 32, 4, dtype=torch.int32)) & 15
    return codes.flatten(-2).to(torch.float32) - 8


@dataclass(frozen=True)
class Format:
    """How a weight `name` is stored.

    Attributes:
        name: what it is called in messages.
        values: dtypes, by safetensors' names, that its values may be stored in.
        decode: stored elements [r, c] -> float32 [r, c * packed].
        grids: how scales may lie; the shape of what is stored says which it is.
        scales: what may stand behind `name` in the name of its scales; one of them is there.
        scale_dtypes: of those scales; "U8" is the exponent of E8M0 in a byte.
        packed: values in a stored element.
        tail: what stands behind `name` in the name of its values.
        whole_scale: what stands behind `name` in the name of one more float32 for the whole weight; "": none.
        divides: that one divides the scales; else it multiplies them.
        shape: what stands behind `name` in the name of a tensor that says its shape; "": none.
    """

    name: str
    values: tuple[str, ...]
    decode: Callable[[Tensor], Tensor]
    grids: tuple[Grid, ...]
    scales: tuple[str, ...]
    scale_dtypes: tuple[str, ...] = SCALES
    packed: int = 1
    tail: str = ""
    whole_scale: str = ""
    divides: bool = False
    shape: str = ""


@dataclass(frozen=True)
class Quantised:
    """One weight of a format: stored names, and what the shape of its scales says.

    Attributes:
        format: the format.
        values: stored name of the values.
        scale: stored name of the scales.
        scale_dims: how many dims those have.
        share: rows and columns that share a scale.
        whole_scale: stored name of the scale of all; "" if the format has none.
    """

    format: Format
    values: str
    scale: str
    scale_dims: int
    share: tuple[int, int]
    whole_scale: str

    def copy_part(self, read: Reader, rows: tuple[int, int], columns: tuple[int, int], target: Tensor) -> None:
        """Dequantise rows and columns into `target`; they may begin and end inside elements, groups and blocks."""
        packed = self.format.packed
        first, last = columns[0] // packed, -(-columns[1] // packed)
        values = read(self.values, (rows, (first, last)))
        inside = slice(columns[0] - first * packed, columns[1] - first * packed)
        high, wide = self.share
        grid = [(rows[0] // high, -(-rows[1] // high)), (columns[0] // wide, -(-columns[1] // wide))]
        scales = self._scales(read, grid)
        row_of = torch.arange(*rows) // high - grid[0][0]
        column_of = torch.arange(*columns) // wide - grid[1][0]
        for band in torch.arange(rows[1] - rows[0]).split(_ROWS):
            at = slice(int(band[0]), int(band[-1]) + 1)
            decoded = self.format.decode(values[at])[:, inside]
            target[at].copy_(decoded.mul_(scales[row_of[at]][:, column_of]))

    def _scales(self, read: Reader, grid: list[tuple[int, int]]) -> Tensor:
        one = (0, 1)
        ranges = {0: (), 1: (grid[0],), 2: (grid[0], grid[1]), 4: (grid[0], one, grid[1], one)}[self.scale_dims]
        stored = read(self.scale, ranges).reshape([stop - start for start, stop in grid])
        if stored.dtype == torch.uint8:
            stored = stored.view(torch.float8_e8m0fnu)
        scales = self._finite(stored.to(torch.float32), self.scale)
        if not self.whole_scale:
            return scales
        whole = self._finite(read(self.whole_scale, ()).reshape(()), self.whole_scale)
        # zero may multiply (all weights are zero then), but not divide; nor may the product leave float32
        scales = scales / whole if self.format.divides else scales * whole
        return self._finite(scales, f"{self.scale} {'over' if self.format.divides else 'times'} {self.whole_scale}")

    def _finite(self, scales: Tensor, what: str) -> Tensor:
        if wrong := int((~scales.isfinite()).sum()):
            raise CheckpointError(
                f"{what}: {wrong} of the {scales.numel()} scales that were read are no finite numbers: the file is damaged, or "
                f"its values are not {self.format.name}"
            )
        return scales


@cache  # a checkpoint has few shapes and many weights
def scale_shapes(grid: Grid, shape: tuple[int, int]) -> tuple[tuple[int, ...], ...]:
    """The shapes that the scales of a weight of `shape` may be stored in."""
    rows, columns = (1 if size is None else -(-full // size) for size, full in zip(grid, shape, strict=True))
    shapes: list[tuple[int, ...]] = [(rows, columns), (rows, 1, columns, 1)]
    if columns == 1:
        shapes.append((rows,))
    if rows == columns == 1:
        shapes.append(())
    return tuple(shapes)


def fp8_blocks(rows: int, columns: int, scales: tuple[str, ...], exponents: bool = False) -> Format:
    """FP8 with a scale for each block. `exponents`: a scale may be an exponent in a byte."""
    name = f"FP8 in blocks of {rows} x {columns}"
    dtypes = (*SCALES, "U8") if exponents else SCALES
    return Format(name, FP8, fp8, ((rows, columns),), scales, dtypes)


def fp8_of(grids: dict[str, Grid], scales: tuple[str, ...]) -> Format:
    """FP8 with one scale, or one for each row."""
    return Format(f"FP8 {' or '.join(grids)}", FP8, fp8, tuple(grids.values()), scales)


FP8 = ("F8_E4M3", "F8_E5M2")
FP8_PER_TENSOR = {"per tensor": PER_TENSOR}
FP8_PER_CHANNEL = {"per channel": PER_CHANNEL}
MXFP8 = Format("MXFP8", ("F8_E4M3",), fp8, ((1, 32),), ("_scale",), ("U8", "F8_E8M0"))
MXFP4 = Format("MXFP4", ("U8",), e2m1, ((1, 32),), ("_scale",), ("U8", "F8_E8M0"), packed=2)
NVFP4 = Format("NVFP4", ("U8",), e2m1, ((1, 16),), ("_scale",), ("F8_E4M3",), packed=2, whole_scale="_scale_2")


def int4_packed(group: int | None) -> Format:
    """compressed-tensors' symmetric int4, eight to an int32, with a scale for each `group` of a row (None: a row)."""
    name = f"int4 in groups of {group}" if group else "int4 per channel"
    grid: Grid = (1, group)
    return Format(name, ("I32",), int4, (grid,), ("_scale",), SCALES[:3], packed=8, tail="_packed", shape="_shape")
