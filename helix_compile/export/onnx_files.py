"""The weights of ONNX models beside them: external data, written tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from onnx import ModelProto, TensorProto, numpy_helper
from torch import Tensor

from helix_compile.errors import ExportError
from helix_compile.export.manifest import digest_of_tensor
from helix_compile.export.onnx_graph import RankModel
from helix_compile.export.onnx_scope import ONNX_DTYPES

_ALIGNED = 4096  # a runtime may map the file: pages of memory


class ExternalData:
    """One file of tensors.

    Attributes:
        digests: tensor -> digest_of_tensor().
    """

    def __init__(self, path: Path, location: str):
        """`location` is the name by which the model, in the same folder, finds the file."""
        self._path, self._location = path, location
        self._places: dict[tuple[int, tuple[int, ...], tuple[int, ...], torch.dtype], tuple[int, int, str]] = {}
        self.digests: dict[str, str] = {}

    def write(self, tensors: Mapping[str, Tensor]) -> list[TensorProto]:
        """The file, and what stands for the tensors in the model. Tensors that are one are written once."""
        protos = []
        with open(self._path, "wb") as file:
            for name, tensor in tensors.items():
                key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
                if key not in self._places:
                    file.write(bytes(-file.tell() % _ALIGNED))
                    start, data = file.tell(), bytes_of(tensor)
                    file.write(data)
                    self._places[key] = start, len(data), digest_of_tensor(str(tensor.dtype)[6:], tensor.shape, data)
                start, length, self.digests[name] = self._places[key]
                protos.append(self._proto(name, tensor, start, length))
        return protos

    def _proto(self, name: str, tensor: Tensor, start: int, length: int) -> TensorProto:
        proto = TensorProto(name=name, data_type=ONNX_DTYPES[tensor.dtype], data_location=TensorProto.EXTERNAL)
        proto.dims.extend(tensor.shape)
        for key, value in (("location", self._location), ("offset", start), ("length", length)):
            proto.external_data.add(key=key, value=str(value))
        return proto


def bytes_of(tensor: Tensor) -> bytes:
    """Little endian, as ONNX has them."""
    if tensor.dtype not in ONNX_DTYPES:
        raise ExportError(f"format=onnx: a weight is {tensor.dtype}, which is not exported")
    flat = tensor.detach().cpu().contiguous().flatten()
    return bytes(flat.view(torch.uint8).numpy().data)


def with_weights(common: RankModel, coordinates: Mapping[str, int], weights: list[TensorProto]) -> ModelProto:
    """The model of one rank."""
    model = ModelProto()
    model.CopyFrom(common.model)
    for name in common.coordinates:
        model.graph.initializer.append(numpy_helper.from_array(np.array(coordinates[name], np.int64), name))
    model.graph.initializer.extend(weights)
    return model
