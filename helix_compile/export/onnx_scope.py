"""ONNX nodes of one graph or function in the making, and what stands for a value of an fx graph there."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from onnx import NodeProto, TensorProto, helper

OPSET, IR_VERSION = 23, 11
HELIX, BODIES, COLLECTIVES = "helix", "helix.body", "helix.collective"  # domains, each at version 1

ONNX_DTYPES: dict[torch.dtype, int] = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.float64: TensorProto.DOUBLE,
    torch.int64: TensorProto.INT64,
    torch.int32: TensorProto.INT32,
    torch.uint8: TensorProto.UINT8,
    torch.bool: TensorProto.BOOL,
}


@dataclass(frozen=True)
class Two:
    """One value of an fx graph that is two in ONNX, which has no such dtype: real and imaginary part, or score and position.

    What moves dims of the one moves those of both.
    """

    first: str
    second: str


@dataclass(frozen=True)
class Size:
    """A size of a value: the name of an int64 tensor [1]."""

    name: str


Value = str | Two | Size | tuple[Any, ...]


class Scope:
    """Nodes in order; every name is unique.

    Attributes:
        nodes: what has been written.
    """

    def __init__(self, taken: Iterable[str] = ()):
        self.nodes: list[NodeProto] = []
        self._taken = set(taken)
        self._constants: dict[tuple[Any, ...], str] = {}

    def name(self, wanted: str) -> str:
        """`wanted`, or with a number behind it where that is taken."""
        name, number = wanted, 1
        while name in self._taken:
            name, number = f"{wanted}.{number}", number + 1
        self._taken.add(name)
        return name

    def op(self, op: str, *inputs: str, outputs: int = 1, domain: str = "", wanted: str = "", **attributes: Any) -> Any:
        """A node; the name of its output, or a tuple of names where it has several."""
        names = [self.name(wanted or op.lower()) for _ in range(outputs)]
        node = helper.make_node(op, list(inputs), names, domain=domain, name=names[0], **attributes)
        self.nodes.append(node)
        return names[0] if outputs == 1 else tuple(names)

    def constant(self, value: Any, dtype: torch.dtype) -> str:
        """A number, or a list of them (a tensor [n]); the same one is written once."""
        key = (repr(value), dtype)
        if key not in self._constants:
            values = list(value) if isinstance(value, (list, tuple)) else [value]
            dims = [len(values)] if isinstance(value, (list, tuple)) else []
            tensor = _tensor(values, dims, dtype)
            self._constants[key] = self.op("Constant", wanted=_name_of(value), value=tensor)
        return self._constants[key]

    def ints(self, values: Sequence[int]) -> str:
        """A constant int64 [n]."""
        return self.constant([int(v) for v in values], torch.int64)

    def shape(self, sizes: Sequence[int | Size]) -> str:
        """A shape, int64 [n], out of numbers and sizes."""
        parts: list[str | list[int]] = []
        for size in sizes:
            if isinstance(size, Size):
                parts.append(size.name)
            elif parts and isinstance(parts[-1], list):
                parts[-1].append(int(size))
            else:
                parts.append([int(size)])
        names = [self.ints(part) if isinstance(part, list) else part for part in parts]
        return names[0] if len(names) == 1 else self.op("Concat", *names, wanted="shape", axis=0)

    def size_of(self, x: str, dim: int) -> Size:
        """One size of a tensor."""
        return Size(self.op("Shape", x, wanted="size", start=dim, end=dim + 1))


def _tensor(values: list[Any], dims: list[int], dtype: torch.dtype) -> TensorProto:
    """Numbers rounded as torch rounds them, once."""
    rounded = torch.tensor(values, dtype=torch.float64 if dtype.is_floating_point else dtype).to(dtype)
    raw = rounded.view(torch.uint8).numpy().tobytes() if dtype is not torch.bool else bytes(map(int, values))
    proto = TensorProto(data_type=ONNX_DTYPES[dtype], raw_data=raw)
    proto.dims.extend(dims)
    return proto


def _name_of(value: Any) -> str:
    """A name that a reader of the file understands."""
    if isinstance(value, (list, tuple)):
        return "c_" + "_".join(_name_of(v)[2:] for v in value) if len(value) <= 4 else "c_list"
    if isinstance(value, float) and not math.isfinite(value):
        return f"c_{value}".replace("-", "minus_")
    return f"c_{value}".replace("-", "minus_").replace("+", "")
