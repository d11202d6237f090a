"""CUDA graphs without a card: a recorder that keeps every operator call with its storages, and does them again.

As on a card, what is recorded counts as not computed: what it wrote is undone, and what it allocated is filled with NaN, or with a
number that no index is, until it is replayed. Reading a value on the host while it records is an error, and so is memory that lies
neither in the recording nor among what it was told to know.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import BuiltinFunctionType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

WAIT = torch.ops._c10d_functional.wait_tensor.default
READS = {"item", "tolist", "numpy", "cpu", "nonzero", "unique", "masked_select", "equal", "allclose", "is_nonzero"}
READS |= {"__bool__", "__int__", "__float__", "__index__", "__contains__"}
INDEXED = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default)
BY_VALUE = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


class ReadsAValue(AssertionError):
    """The host looked at a value while launches were recorded."""


class _NoReads(TorchFunctionMode):
    """Calls of Python that read without an operator."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in READS and any(isinstance(a, Tensor) for a in pytree.tree_leaves((args, kwargs))):
            raise ReadsAValue(name)
        return func(*args, **(kwargs or {}))


class _Call:
    """One operator call."""

    def __init__(self, call: Any, args: Any, kwargs: Any, results: Any):
        self.call, self.args, self.kwargs, self.results = call, args, kwargs, results
        self.given = tensors_of((args, kwargs))
        own = {storage(t) for t in self.given}
        self.made = [(i, t) for i, t in enumerate(tensors_of(results)) if storage(t) not in own]
        self.is_view = bool(self.results is not None) and not self.made and not _writes(call)

    def again(self) -> None:
        if self.is_view:
            return
        results = self.call(*self.args, **self.kwargs)
        if getattr(self.call, "namespace", "") == "_c10d_functional" and self.call is not WAIT:
            results = WAIT(results)
        for (_, mine), now in zip(self.made, [tensors_of(results)[i] for i, _ in self.made], strict=True):
            mine.copy_(now)


class RecordedCalls:
    """A piece.

    Attributes:
        calls: in order.
        outside: storages that it reads or writes and did not allocate: address -> a tensor of it.
    """

    def __init__(self) -> None:
        self.calls: list[_Call] = []
        self.outside: dict[int, Tensor] = {}
        self.inside: dict[int, Tensor] = {}
        self.saved: list[tuple[Tensor, Tensor]] = []
        self.replays, self.is_freed = 0, False

    def add(self, call: _Call) -> None:
        for tensor in call.given:
            if storage(tensor) not in self.inside:
                self.outside.setdefault(storage(tensor), tensor)
        for _, tensor in call.made:
            self.inside.setdefault(storage(tensor), tensor)
        self.calls.append(call)

    def replay(self) -> None:
        assert not self.is_freed
        self.replays += 1
        with torch.inference_mode():  # a card does not ask in which mode a tensor was made
            for call in self.calls:
                call.again()

    def scribble(self) -> None:
        """Whoever needs what lies in its memory now is wrong."""
        with torch.inference_mode():
            for tensor in self.inside.values():
                whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
                whole.fill_(
                    torch.nan if tensor.dtype.is_floating_point else 99 if tensor.dtype is not torch.bool else True
                )

    def signature(self, names: dict[int, str]) -> list[Any]:
        """Its launches: operators, numbers, and of every tensor shape, strides and storage, by name or in order of appearance."""
        numbers: dict[int, int] = {}

        def said(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return repr(value)
            at = storage(value)
            name: Any = names.get(at) if at in self.outside else numbers.setdefault(at, len(numbers))
            assert name is not None, f"memory that nothing is known of: {value.shape} {value.dtype}"
            return name, tuple(value.shape), value.stride(), value.storage_offset(), str(value.dtype)

        return [
            (
                str(c.call) if not callable_of_code(c.call) else "code",
                *map(said, pytree.tree_leaves((c.args, c.kwargs, c.results))),
            )
            for c in self.calls
        ]


class _Records(TorchDispatchMode):
    def __init__(self, piece: RecordedCalls):
        super().__init__()
        self.piece = piece

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        indexed = [t.dtype for t in tensors_of(args[1])] if func in INDEXED else None
        if (torch.bool in indexed) if indexed is not None else any(tag in func.tags for tag in BY_VALUE):
            raise ReadsAValue(str(func))
        return self.do(func, args, kwargs or {})

    def do(self, call: Any, args: Any, kwargs: Any) -> Any:
        for tensor in _written(call, args, kwargs):
            if storage(tensor) not in self.piece.inside:
                self.piece.saved.append((tensor, tensor.clone()))
        with torch._C.DisableTorchFunction():  # Triton's interpreter reads what a card would
            results = call(*args, **kwargs)
        self.piece.add(_Call(call, args, kwargs, results))
        return results


class FakeGraphs:
    """See worlds/tape.py, Recorder.

    Attributes:
        pieces: all that were ever recorded.
        warm_ups: how many steps were run before they were recorded.
    """

    def __init__(self) -> None:
        self.pieces: list[RecordedCalls] = []
        self.warm_ups = 0
        self._stack = ExitStack()
        self._mode: _Records | None = None

    def warm_up(self, run: Callable[[], Any]) -> Any:
        self.warm_ups += 1
        return run()

    def begin(self) -> None:
        assert self._mode is None
        self._stack.enter_context(_NoReads())
        self._mode = self._stack.enter_context(_Records(RecordedCalls()))

    def launch(self, call: Callable[..., Any], arguments: Sequence[Any]) -> Any:
        assert self._mode is not None
        if not callable_of_code(call):
            return call(*arguments)
        mode = self._mode
        with torch.utils._python_dispatch._disable_current_modes(), torch._C.DisableTorchFunction():
            return mode.do(call, tuple(arguments), {})

    def end(self) -> RecordedCalls:
        assert self._mode is not None
        piece = self._mode.piece
        self.abandon()
        for tensor, before in reversed(piece.saved):
            with torch.inference_mode():
                tensor.copy_(before)
        piece.scribble()
        self.pieces.append(piece)
        return piece

    def abandon(self) -> None:
        self._stack.close()
        self._mode = None

    def wait(self) -> None:
        pass

    def mark(self) -> Callable[[], bool]:
        return lambda: True

    def scribble(self) -> None:
        """Between two steps: nothing in the memory of its pieces may be needed."""
        for piece in self.pieces:
            piece.scribble()


def callable_of_code(call: Any) -> bool:
    """Inductor's code, whose loops are no operators: it is recorded as one call."""
    known = isinstance(call, (torch._ops.OpOverload, BuiltinFunctionType))
    return not known and not str(getattr(call, "__module__", "")).startswith("helix_compile")


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def tensors_of(tree: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(tree) if isinstance(x, Tensor)]


def _writes(call: Any) -> bool:
    return not isinstance(call, torch._ops.OpOverload) or call._schema.is_mutable


def _written(call: Any, args: Any, kwargs: Any) -> list[Tensor]:
    if not isinstance(call, torch._ops.OpOverload):
        return tensors_of((args, kwargs))
    names = [a.name for a in call._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    bound = dict(zip([a.name for a in call._schema.arguments], args, strict=False)) | kwargs
    return tensors_of([bound.get(name) for name in names])
