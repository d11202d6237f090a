"""What an operator gives where nothing is computed, remembered by what it is given.

On meta torch answers in Python, a tenth of a millisecond an operator, and a capture asks 60,000 times for a few hundred
different answers. Only what is a pure function of shapes is remembered: operators of aten that return new memory.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily


class _Kind(NamedTuple):
    """A tensor but for its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


_LARGEST = 50_000
_KNOWN: dict[Any, _Kind | tuple[_Kind, ...] | None] = {}  # None: to be run each time


def result_of(func: Any, args: tuple, kwargs: dict[str, Any], mode: FakeTensorMode | None = None) -> Any:
    """What `func` returns for tensors on meta, or, where a mode is given, for its fake ones."""
    key = _key_of(func, args, kwargs, mode)
    if key is None:
        return func(*args, **kwargs)
    try:
        known = _KNOWN[key]
    except KeyError:
        out = func(*args, **kwargs)
        if len(_KNOWN) >= _LARGEST:
            _KNOWN.clear()
        _KNOWN[key] = _kinds_of(out, args, kwargs, mode)
        return out
    except TypeError:  # sizes that are symbols, and what else has no hash
        return func(*args, **kwargs)
    if known is None:
        return func(*args, **kwargs)
    return _made(known, mode) if isinstance(known, _Kind) else tuple(_made(kind, mode) for kind in known)


def _made(kind: _Kind, mode: FakeTensorMode | None) -> Tensor:
    if mode is None:
        return torch.empty_strided(kind.shape, kind.stride, dtype=kind.dtype, device="meta")
    with unset_fake_temporarily():
        memory = torch.empty_strided(kind.shape, kind.stride, dtype=kind.dtype, device="meta")
        return FakeTensor(mode, memory, kind.device)


class _Unknown(Exception):
    """An argument of which it is not known all that a result may depend on."""


def _key_of(func: Any, args: tuple, kwargs: dict[str, Any], mode: FakeTensorMode | None) -> Any:
    """All that the result depends on; None: it may be more, or the result may share memory with an argument."""
    if getattr(func, "namespace", "") != "aten" or not _makes_new(func):
        return None
    try:
        own = tuple([_text(value, mode) for value in args])
        named = tuple([(name, _text(value, mode)) for name, value in kwargs.items()]) if kwargs else ()
    except _Unknown:
        return None
    return func, own, named, mode is None, torch.get_default_dtype()


def _text(value: Any, mode: FakeTensorMode | None) -> Any:
    if isinstance(value, Tensor):
        plain = type(value) in (Tensor, nn.Parameter) and value.is_meta if mode is None else _is_fake_of(mode, value)
        if not plain or value.layout is not torch.strided or value.is_complex():
            raise _Unknown
        return value.shape, value.stride(), value.storage_offset(), value.dtype, value.device
    if isinstance(value, (list, tuple)):
        return type(value), tuple([_text(item, mode) for item in value])
    return type(value), value  # 2 == 2.0 == True, and they promote differently


def _is_fake_of(mode: FakeTensorMode, value: Tensor) -> bool:
    # one that knows its value gives it on to what is computed from it
    return type(value) is FakeTensor and value.fake_mode is mode and value.constant is None


_MAKES_NEW: dict[Any, bool] = {}
_DEPENDS_ON_MORE = (
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
    torch.Tag.nondeterministic_seeded,
    torch.Tag.inplace_view,
)


def _makes_new(func: Any) -> bool:
    """By its schema: it writes nothing, returns no view, and what it returns hangs on no value."""
    if func not in _MAKES_NEW:
        schema = func._schema
        shared = any(x.alias_info is not None for x in (*schema.arguments, *schema.returns))
        _MAKES_NEW[func] = not shared and not any(tag in func.tags for tag in _DEPENDS_ON_MORE)
    return _MAKES_NEW[func]


def _kinds_of(
    out: Any, args: tuple, kwargs: dict[str, Any], mode: FakeTensorMode | None
) -> _Kind | tuple[_Kind, ...] | None:
    """None where it can't be made anew: no tensors, or memory that it shares all the same (_unsafe_view)."""
    made = (out,) if isinstance(out, Tensor) else out
    if not isinstance(made, tuple) or not all(isinstance(x, Tensor) for x in made):
        return None
    given = torch.utils._pytree.tree_leaves((args, kwargs))
    memory = [x.untyped_storage()._cdata for x in (*given, *made) if isinstance(x, Tensor)]
    if len(set(memory[-len(made) :])) < len(made) or set(memory[: -len(made)]) & set(memory[-len(made) :]):
        return None
    kinds = []
    for x in made:
        plain = type(x) is Tensor and x.is_meta if mode is None else _is_fake_of(mode, x)
        if not plain or x.layout is not torch.strided or x.is_complex() or x.is_quantized or x.storage_offset():
            return None
        kinds.append(_Kind(tuple(x.shape), x.stride(), x.dtype, x.device))
    return kinds[0] if isinstance(out, Tensor) else tuple(kinds)
