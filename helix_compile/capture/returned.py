"""What each layer of a model returns besides hidden states: tensors that a later layer may read (chosen keys, say).

Found by running the whole model without values at a few sizes; each dim is then B, T, S, S + T, a number, or min(S + T, a
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

# B, T and S: all of them apart; a context that no fixed number of keys reaches; and so few that even one of 2 tells them apart
_SIZES = ((3, 5, 11), (7, 13, 2**20), (5, 1, 2), (5, 1, 0))


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
    return tuple(_returned(i, *each) for i, each in enumerate(zip(*outputs, strict=True)))


def _keep(kept: dict[int, Any], index: int, module: nn.Module, args: Any, out: Any) -> None:
    kept[index] = out


def _run_without_values(model: nn.Module, run: Callable[..., None], sizes: tuple[int, int, int]) -> None:
    try:
        with torch.no_grad(), on_meta(model):
            run(torch.device("meta"), *sizes)
    except Exception:  # it makes tensors on its own device: then on fake ones
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
            run(next(model.parameters()).device, *sizes)


def _returned(index: int, *found: Any) -> Returned:
    """By what one layer returned at each of the sizes."""
    if not isinstance(found[0], tuple):
        return Returned()
    others = [_tensor_like(index, *each) for each in zip(*(out[1:] for out in found), strict=True)]
    return Returned(True, tuple(others))


def _tensor_like(index: int, *found: Any) -> TensorLike | None:
    if not isinstance(found[0], Tensor):
        return None
    sizes = tuple(_size(index, *each) for each in zip(*(tensor.shape for tensor in found), strict=True))
    return TensorLike(sizes, found[0].dtype)


def _size(index: int, *found: int) -> Size:
    for letters in ("B", "T", "S", "ST", ""):
        for size in (Size(letters), Size(letters, found[1])):
            if (letters or size.most is not None) and [size.at(*s) for s in _SIZES] == [*found]:
                return size
    raise CaptureError(
        f"capture: layer {index} returns a tensor besides hidden states with a dim of {', '.join(map(str, found))} at B, T, S = "
        f"{', '.join(map(str, _SIZES))}; expected B, T, S, S + T, a number, or the lesser of S + T and a number"
    )
