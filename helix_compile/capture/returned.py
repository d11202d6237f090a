"""What each layer of a model gives besides hidden states: tensors that a later layer may read (chosen keys, say).

They are returned, or left in a mapping that all layers are handed (K and V that they share). Found by running the whole model
without values at four sizes; each dim is then B, T, S, S + T, a number, or min(S + T, a number). Only asked where the model does
not take hidden states alone from its layers, or hands them such a mapping.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from helix_compile.capture.structure import on_meta
from helix_compile.errors import CaptureError
from helix_compile.ir.leaves import Returned, Size, Stored, TensorLike, arguments_of, is_mapping

_Entries = dict[tuple[int, Any, int], Tensor]
_Left = tuple[Any, _Entries]  # what a layer returned, and what it left in mappings

# B, T and S: all of them apart, a context that no fixed number of keys reaches, and two that nearly every number exceeds
_SIZES = ((3, 5, 11), (7, 13, 2**20), (2, 1, 1), (2, 1, 0))


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
    outputs: list[list[_Left]] = []
    for sizes in _SIZES:
        kept: dict[int, _Left] = {}
        before: dict[int, _Entries] = {}
        handles = [
            handle
            for i, layer in enumerate(layers)
            for handle in (
                layer.register_forward_pre_hook(partial(_look, before, i), with_kwargs=True),
                layer.register_forward_hook(partial(_keep, kept, before, i), with_kwargs=True),
            )
        ]
        try:
            run_without_values(model, run, sizes)
        finally:
            for handle in handles:
                handle.remove()
        outputs.append([kept[i] for i in range(len(layers))])
    return tuple(_returned(i, runs) for i, runs in enumerate(zip(*outputs, strict=True)))


def _entries(args: Any, kwargs: Any) -> _Entries:
    """The tensors of all mappings among a layer's arguments, by argument, key and place."""
    found: _Entries = {}
    for number, (_, leaf) in enumerate(arguments_of(args, kwargs)[0]):
        for key, value in leaf.items() if is_mapping(leaf) else ():
            alone = isinstance(value, Tensor)
            found |= {(number, key, -1 if alone else i): t for i, t in enumerate((value,) if alone else value)}
    return found


def _look(before: dict[int, _Entries], index: int, module: nn.Module, args: Any, kwargs: Any) -> None:
    before[index] = _entries(args, kwargs)


def _keep(
    kept: dict[int, _Left], before: dict[int, _Entries], index: int, module: nn.Module, args: Any, kwargs: Any, out: Any
) -> None:
    own = {at: t for at, t in _entries(args, kwargs).items() if t is not before[index].get(at)}
    kept[index] = out, own


def run_without_values(model: nn.Module, run: Callable[..., None], sizes: tuple[int, int, int]) -> None:
    """run(device, B, T, S) of a model whose tensors have no values meanwhile."""
    try:
        with torch.no_grad(), on_meta(model):
            run(torch.device("meta"), *sizes)
    except Exception:  # it makes tensors on its own device: then on fake ones
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
            run(next(model.parameters()).device, *sizes)


def _returned(index: int, runs: tuple[_Left, ...]) -> Returned:
    """What a layer left at each of _SIZES as one form."""
    outs, stored = [out for out, _ in runs], [left for _, left in runs]
    left = tuple(Stored(*at, _like(index, [own[at] for own in stored])) for at in stored[0])
    if not isinstance(outs[0], tuple):
        return Returned(stored=left)
    others = zip(*(out[1:] for out in outs), strict=True)
    return Returned(True, tuple(_like(index, each) if isinstance(each[0], Tensor) else None for each in others), left)


def _like(index: int, tensors: Sequence[Tensor]) -> TensorLike:
    sizes = tuple(_size(index, dims) for dims in zip(*(t.shape for t in tensors), strict=True))
    return TensorLike(sizes, tensors[0].dtype)


def _size(index: int, dims: tuple[int, ...]) -> Size:
    letters = ("B", "T", "S", "ST")
    most = max(dims)
    for size in (*map(Size, letters), Size("", most), *(Size(x, most) for x in letters)):
        if [size.at(*s) for s in _SIZES] == list(dims):
            return size
    raise CaptureError(
        f"capture: layer {index} gives a tensor besides hidden states with a dim of {', '.join(map(str, dims))} at B, T, S = "
        f"{', '.join(map(str, _SIZES))}; expected B, T, S, S + T, a number, or the lesser of S + T and a number"
    )
