"""Two programs compute the same value if their operators, constants and inputs hash the same.

A dispatch mode runs a program on fake tensors and gives every value a digest: hash(operator, constants, digests of its
tensors). Memory is hashed, not names: a digest belongs to a storage and a view adds size, stride and offset, so an
in-place update is followed through every alias. Values made of constants and integers alone (positions, masks) are
computed for real and hashed by content. Nothing of the size of a weight is allocated.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from helix_compile.capture.results import result_of
from helix_compile.errors import CaptureError

_PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
# one product of rows by the matrices of their experts: transformers takes either, by dtype and by whether it is compiled
_ALIKE = {"transformers.grouped_mm_fallback.default": "aten._grouped_mm.default"}


def _hash(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def content_digest(tensor: Tensor) -> str:
    """Hash of a real tensor's values, shape and dtype; one on meta has no values and is only itself."""
    if tensor.is_meta:
        return _hash("meta", id(tensor))
    with unset_fake_temporarily():
        flat = tensor.detach().cpu().contiguous().view(-1)
        raw = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    return _hash(str(tensor.dtype), tuple(tensor.shape), hashlib.sha256(raw).hexdigest())


class DigestMode(TorchDispatchMode):
    """Digest of every value while this is open; run the program inside `with mode.fake, mode:`.

    Args:
        on_meta: of a program that is on meta: its own tensors are stand-ins enough, and take a third of the time of fake ones.

    Attributes:
        fake: what is open beside this mode: the fake mode that it works with, or nothing.
        seen: digests of all values so far.
    """

    def __init__(self, on_meta: bool = False) -> None:
        super().__init__()
        self._mode = None if on_meta else FakeTensorMode(allow_non_fake_inputs=True)
        self.fake: AbstractContextManager[Any] = self._mode or nullcontext()
        self.seen: set[str] = set()
        self._storages: dict[int, str] = {}
        self._known: set[int] = set()
        self._kept: list[Any] = []  # storages and tensors stay alive: their addresses are keys
        self._foreign: dict[int, Tensor] = {}

    def stand_in(self, tensor: Tensor, name: str, device: torch.device | None = None) -> Tensor:
        """A fake of `tensor` (own storage) whose digest is that of `name`; on its device, or another one."""
        with torch.no_grad(), unset_fake_temporarily():
            fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
            if self._mode is not None:
                fake = FakeTensor(self._mode, fake, device or tensor.device)
        self._name(fake, _hash("input", name))
        return fake

    def known(self, tensor: Tensor) -> Tensor:
        """A private copy of a small real tensor that is computed with for real."""
        copy = tensor.detach().clone()
        self._known.add(id(copy))
        self._kept.append(copy)
        return copy

    def digest(self, value: Any) -> str:
        """Digest of a value of the program."""
        if not isinstance(value, Tensor):
            return _hash(value)
        if id(value) in self._known:
            return content_digest(value)
        value = self._faked(value)
        place = (tuple(value.shape), value.stride(), value.storage_offset(), str(value.dtype))
        return _hash(self._storages[value.untyped_storage()._cdata], place)

    def _name(self, fake: Tensor, digest: str) -> None:
        storage = fake.untyped_storage()
        self._storages[storage._cdata] = digest
        self._kept.append(storage)

    def _is_stand_in(self, value: Tensor) -> bool:
        if self._mode is not None:
            return isinstance(value, FakeTensor)
        return value.is_meta and value.untyped_storage()._cdata in self._storages

    def _faked(self, value: Tensor) -> Tensor:
        """The fake of a value; a real tensor that nobody announced is a constant of the program."""
        if self._is_stand_in(value):
            return value
        if id(value) not in self._foreign:
            self._kept.append(value)
            self._foreign[id(value)] = self.stand_in(value, f"constant {content_digest(value)}")
        return self._foreign[id(value)]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # torch asks a fake for its device before each operator
            return func(*args)
        kwargs = kwargs or {}
        flat = _leaves((args, kwargs))
        tensors = [x for x in flat if isinstance(x, Tensor)]
        if all(id(t) in self._known for t in tensors) and self._is_small(func, flat, tensors):
            with unset_fake_temporarily():
                out = func(*args, **kwargs)
            for leaf in pytree.tree_leaves(out):
                if isinstance(leaf, Tensor):
                    self._known.add(id(leaf))
                    self._kept.append(leaf)
            return out
        made = _hash(_ALIKE.get(str(func), str(func)), self._text(args), self._text(kwargs))
        args, kwargs = self._entered(args), self._entered(kwargs)
        changed = list(_written(func, args, kwargs))
        out = _run(func, args, kwargs, self._mode)
        for number, tensor in enumerate(changed):
            self._name(tensor, _hash(made, "written", number))
        for number, leaf in enumerate(pytree.tree_leaves(out)):
            if not isinstance(leaf, Tensor):
                continue
            if self._mode is None and not leaf.is_meta:
                raise CaptureError(f"capture: {func} makes a tensor on {leaf.device} in a program on meta")
            if isinstance(leaf, FakeTensor) or self._mode is None:
                if leaf.untyped_storage()._cdata not in self._storages:
                    self._name(leaf, _hash(made, number))
                self.seen.add(self.digest(leaf))
        return out

    def _text(self, value: Any) -> Any:
        """What a call holds, with digests in the place of tensors."""
        if isinstance(value, Tensor):
            return self.digest(value)
        if isinstance(value, (list, tuple)):
            return type(value).__name__, [self._text(item) for item in value]
        if isinstance(value, dict):
            return {name: self._text(item) for name, item in value.items()}
        if type(value) not in _PLAIN and any(isinstance(x, Tensor) for x in pytree.tree_leaves(value)):
            raise CaptureError(
                f"capture: a call is given tensors in a {type(value).__name__}, which is not looked into"
            )
        return repr(value)

    def _entered(self, value: Any) -> Any:
        """The same call with a stand-in in the place of each tensor."""
        if isinstance(value, Tensor):
            return self._enter(value)
        if isinstance(value, (list, tuple)):
            items = [self._entered(item) for item in value]
            if isinstance(value, list):
                return items
            return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
        return {name: self._entered(item) for name, item in value.items()} if isinstance(value, dict) else value

    def _enter(self, value: Tensor) -> Tensor:
        """A known value that meets an unknown one goes on as a fake that is named by its content."""
        if id(value) not in self._known:
            return self._faked(value)
        return self.stand_in(value, f"constant {content_digest(value)}")

    def _is_small(self, func: Any, flat: list[Any], tensors: list[Tensor]) -> bool:
        """With tensors: what is known stays known. Without: only integers are made for real, never a buffer; nothing on meta."""
        if any(isinstance(x, torch.device) and x.type == "meta" for x in flat):
            return False
        if tensors:
            return True
        dtypes = [x for x in flat if isinstance(x, torch.dtype)]
        if dtypes:
            return not any(d.is_floating_point or d.is_complex for d in dtypes)
        return func in (torch.ops.aten.arange.default, torch.ops.aten.arange.start)


def _leaves(value: Any) -> list[Any]:
    """What a call holds, out of lists, tuples and dicts."""
    if isinstance(value, dict):
        value = list(value.values())
    elif not isinstance(value, (list, tuple)):
        return [value]
    return [leaf for item in value for leaf in _leaves(item)]


def _run(func: Any, args: tuple, kwargs: dict, mode: FakeTensorMode | None) -> Any:
    if func is not torch.ops.aten._grouped_mm.default:
        return result_of(func, args, kwargs, mode)
    rows, weights = args[:2]  # its fake takes fewer dtypes and widths than the op
    return rows.new_empty(rows.shape[0], weights.shape[-1])


def _written(func: Any, args: tuple, kwargs: dict) -> Iterable[Tensor]:
    """The tensors that an operator writes into, by its schema."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[place] if place < len(args) else kwargs.get(argument.name)
        if isinstance(value, FakeTensor) or (isinstance(value, Tensor) and value.is_meta):
            yield value
        elif isinstance(value, Tensor):
            raise CaptureError(f"capture: {func} writes a computed value into a constant")
