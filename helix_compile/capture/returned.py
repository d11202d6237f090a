"""What each layer of a model returns besides hidden states: tensors that a later layer may read (chosen keys, say).

Found by running the whole model without values at two sizes; each dim is then B, T, S, S + T, a number, or min(S + T, a
number). Only asked where the model does not take hidden states alone from its layers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from helix_compile.capture.structure import on_meta
from helix_compile.errors import CaptureError
from helix_compile.ir.leaves import Returned, Size, TensorLike

# B, T and S: all of them apart, and a context that no fixed number of keys reaches
_SIZES = ((3, 5, 11), (7, 13, 2**20))


def returned_by(
    model: nn.Module, layers: nn.ModuleList, run: Callable[[torch.device, int, int, int], None]
) -> tuple[Returned, ...]:
    """What each layer returns.

    Args:
        model: whose layers these are.
        layers: in order.
        run: runs the model without values on a device, at B, T, S.

    Raises:
        CaptureError: a size of a returned tensor that is none of the above.
    """
    outputs: list[list[Any]] = []
    for sizes in _SIZES:
        kept: dict[int, Any] = {}
        handles = [layer.register_forward_hook(partial(_keep, kept, i)) for i, layer in enumerate(layers)]
        try:
            _run_without_values(model, run, sizes)
        finally:
            for handle in handles:
                handle.remove()
        outputs.append([kept[i] for i in range(len(layers))])
    return tuple(_returned(i, *pair) for i, pair in enumerate(zip(*outputs, strict=True)))


def _keep(kept: dict[int, Any], index: int, module: nn.Module, args: Any, out: Any) -> None:
    kept[index] = out


def _run_without_values(model: nn.Module, run: Callable[..., None], sizes: tuple[int, int, int]) -> None:
    try:
        with torch.no_grad(), on_meta(model):
            run(torch.device("meta"), *sizes)
    except Exception:  # it makes tensors on its own device: then on fake ones
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
            run(next(model.parameters()).device, *sizes)


def _returned(index: int, first: Any, second: Any) -> Returned:
    if not isinstance(first, tuple):
        return Returned()
    others = [_tensor_like(index, a, b) for a, b in zip(first[1:], second[1:], strict=True)]
    return Returned(True, tuple(others))


def _tensor_like(index: int, first: Any, second: Any) -> TensorLike | None:
    if not isinstance(first, Tensor):
        return None
    sizes = tuple(_size(index, *pair) for pair in zip(first.shape, second.shape, strict=True))
    return TensorLike(sizes, first.dtype)


def _size(index: int, first: int, second: int) -> Size:
    for letters in ("B", "T", "S", "ST", ""):
        for size in (Size(letters), Size(letters, second)):
            if (letters or size.most is not None) and [size.at(*s) for s in _SIZES] == [first, second]:
                return size
    raise CaptureError(
        f"capture: layer {index} returns a tensor besides hidden states with a dim of {first} at B, T, S = {_SIZES[0]} and "
        f"{second} at {_SIZES[1]}; expected B, T, S, S + T, a number, or the lesser of S + T and a number"
    )
