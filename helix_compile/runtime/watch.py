"""Is the model still the one that was compiled? Asked before every step: shards that are views follow an edit, others can't.

An edit in place is followed: what a rank holds as a copy (padded, gathered, moved together) is cut again from the original.
A parameter or module that was replaced (`model.half()`, `layer.weight = ...`, `load_state_dict(assign=True)`) is not, nor one that was
given other memory or another view through `x.data = ...`: the ranks hold the old one, and a step says so. `x.data` hides edits from torch's version counter, so of every original that has
copies values are compared as well, on the CPU: all of a small one, SAMPLES evenly spaced ones of a large one.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import repeat
from operator import attrgetter, call, getitem, is_, itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from helix_compile.capture.checks import global_hooks
from helix_compile.capture.structure import OWN_NAMES, attributes_of, code_of
from helix_compile.errors import RuntimeFault
from helix_compile.models.rotary_tables import edited_table, written_by_calls

SAMPLES = 4096
Layout = tuple[int, tuple[int, ...], int, torch.dtype]  # where a tensor lies, its strides, numbers and their dtype
_AGAIN = "call helix_compile(model, ...) again"


@dataclass
class ModelWatch:
    """What a module was compiled from, by identity, storage, version and value."""

    _held: list[tuple[str, Mapping[str, Any], str, Any]] = field(default_factory=list)
    _tensors: dict[str, tuple[Tensor, tuple[Layout, int]]] = field(default_factory=dict)
    _samples: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _code: dict[str, tuple] = field(default_factory=dict)
    _calls: list[tuple[str, dict[str, Any], tuple]] = field(default_factory=list)
    _containers: list[tuple[str, Any, list[Any]]] = field(default_factory=list)
    _children: list[tuple[str, Mapping[str, Any], int]] = field(default_factory=list)
    _model: Callable[[], nn.Module | None] = lambda: None
    _marks: _Marks | None = None
    _tables: list[tuple[str, nn.Module]] = field(default_factory=list)

    @classmethod
    def of(cls, model: nn.Module, constants: Mapping[str, Tensor]) -> ModelWatch:
        """Of every module, parameter, buffer and tensor attribute of a model, and of what else its code holds, as they are now."""
        watch = cls(_model=weakref.ref(model))
        watch._code = {name: code_of(module) for name, module in model.named_modules()}
        watch._calls = [(name, vars(module), _calls_of(vars(module))) for name, module in model.named_modules()]
        passing: set[str] = set()
        for prefix, module in model.named_modules(remove_duplicate=False):
            if own := written_by_calls(module):
                watch._tables.append((prefix, module))
                passing |= {f"{prefix}.{key}" if prefix else key for key in own}
            for kept in (module._modules, module._parameters, module._buffers):
                watch._children.append((prefix, kept, len(kept)))
                for key, value in kept.items():
                    if key in own:
                        continue
                    name = f"{prefix}.{key}" if prefix else key
                    watch._held.append((name, kept, key, value))
                    if isinstance(value, Tensor):
                        watch._tensors[name] = (value, state_of(value))
        for name, (value, kept, key) in attributes_of(model).items():
            if name in passing:
                continue
            watch._held.append((name, kept, key, value))
            watch._tensors[name] = (value, state_of(value))
        for prefix, module in model.named_modules():
            for key, container in vars(module).items():
                if key not in OWN_NAMES and isinstance(container, (list, tuple, dict)):
                    watch._hold_container(f"{prefix}.{key}" if prefix else key, container)
        for name, value in constants.items():
            watch._tensors[name] = (value, state_of(value))
        watch._marks = _Marks(watch)
        return watch

    def _hold_container(self, name: str, container: Any) -> None:
        """Tensors that an attribute holds in a list, tuple or dict."""
        items = _items(container)
        if any(isinstance(value, Tensor) for _, value in items):
            self._containers.append((name, container, [value for _, value in items]))
        for key, value in items:
            if isinstance(value, Tensor):
                self._tensors[f"{name}[{key!r}]"] = (value, state_of(value))

    def check_code(self, model: nn.Module) -> None:
        """Raise RuntimeFault if this is the model that was compiled, and it runs other code now: hooks, patched functions."""
        if self._model() is not model:
            return
        now = {name: code_of(module) for name, module in model.named_modules()}
        changed = [name or "the model" for name in self._code | now if self._code.get(name) != now.get(name)]
        if changed:
            raise _other_code(changed)

    def sample_all(self) -> None:
        """Compare values of every tensor: what the ranks hold are copies, whatever they seem to share."""
        self.sample(list(self._tensors))

    def sample(self, names: Iterable[str]) -> None:
        """Compare values of these from now on, and take what has been edited so far for seen."""
        for name in names:
            # on a card a step would have to wait for the device
            if name in self._tensors and (tensor := self._tensors[name][0]).device.type == "cpu":
                self._samples[name] = (tensor, _values(tensor).clone())

    def edited(self) -> list[str]:
        """Names of tensors that were edited in place since they were last seen.

        Raises:
            RuntimeFault: names what was replaced, or given another hook or forward.
        """
        for name, module in self._tables:
            if table := edited_table(module):
                raise not_followed([f"{name}.{table}"])
        found = [] if self._is_untouched() else self._touched()
        seen = set(found)
        return found + [
            n for n, (t, old) in self._samples.items() if n not in seen and not torch.equal(_values(t), old)
        ]

    def _is_untouched(self) -> bool:
        """Everything is the object and has the version that it was: asked in C, a deep model has thousands."""
        return self._marks is not None and self._marks.hold() and not global_hooks()

    def _touched(self) -> list[str]:
        """As edited(), of what shows without looking at values; one by one, to say what it was."""
        if changed := [name or "the model" for name, own, calls in self._calls if _calls_of(own) != calls]:
            raise _other_code(changed)
        if more := [name or "the model" for name, kept, count in self._children if len(kept) != count]:
            raise RuntimeFault(
                f"the model changed since compile: {_listed(more)} given or lost a module, parameter or buffer, which the "
                f"compiled graphs do not hold: {_AGAIN}"
            )
        if hooks := global_hooks():
            raise RuntimeFault(
                f"{hooks} hook(s) for every module were registered since compile (register_module_forward_hook), which the "
                f"compiled graphs do not hold; remove them, or {_AGAIN}"
            )
        gone = [name for name, kept, key, value in self._held if kept.get(key) is not value]
        for name, container, held in self._containers:
            now_held = [value for _, value in _items(container)]
            if len(now_held) != len(held) or any(a is not b for a, b in zip(now_held, held, strict=True)):
                gone.append(name)
        found = []
        for name, (tensor, state) in self._tensors.items():
            now = state_of(tensor)
            if now[0] != state[0]:
                gone.append(name)
            elif now[1] != state[1]:
                found.append(name)
        if gone:
            raise RuntimeFault(
                f"the model changed since compile: {_listed(gone)} replaced (another dtype, device or layout, another parameter "
                f"or module); the ranks hold what was there before: {_AGAIN}"
            )
        return found

    def is_live(self, name: str, original: Tensor) -> bool:
        """True if what the ranks were cut from is the model's own tensor, and no copy of it."""
        tensor = self._tensors[name][0] if name in self._tensors else original
        return tensor.device == original.device and tensor.data_ptr() == original.data_ptr()

    def seen(self, names: Iterable[str]) -> None:
        """These edits have been followed."""
        names = list(names)
        for name in names:
            tensor = self._tensors[name][0]
            self._tensors[name] = (tensor, state_of(tensor))
        self.sample(n for n in names if n in self._samples)
        self._marks = _Marks(self)


class _Marks:
    """What a watch holds, laid out so that one pass in C says that nothing of it changed. What changed it can't say."""

    def __init__(self, watch: ModelWatch):
        self._watch = watch
        self._getters: list[Callable[[str], Any]] = [kept.get for _, kept, _, _ in watch._held]
        self._keys = [key for _, _, key, _ in watch._held]
        self._values = [value for _, _, _, value in watch._held]
        self._children = [kept for _, kept, _ in watch._children]
        self._counts = [count for _, _, count in watch._children]
        own = [attributes for _, attributes, _ in watch._calls]
        self._own = own
        self._forwards = [attributes.get("forward") for attributes in own]
        # modules that had hooks when they were captured are few
        self._hooked = [(a, calls) for a, (_, _, calls) in zip(own, watch._calls, strict=True) if _has_hooks(a)]
        self._hookless = [a for a in own if not _has_hooks(a)]
        self._tensors = [tensor for tensor, _ in watch._tensors.values()]
        self._layouts = layouts_of(self._tensors)
        counted = [(t, state) for t, state in watch._tensors.values() if not t.is_inference()]
        self._counted, self._versions = [t for t, _ in counted], [version for _, (_, version) in counted]

    def hold(self) -> bool:
        """True if nothing changed, as far as identities, counts, storages and versions say."""
        hooks = (map(getitem, self._hookless, repeat(name)) for name in ("_forward_hooks", "_forward_pre_hooks"))
        return (
            all(map(is_, map(call, self._getters, self._keys), self._values))
            and [*map(len, self._children)] == self._counts
            and all(map(is_, map(dict.get, self._own, repeat("forward")), self._forwards))
            and not any(map(any, hooks))
            and all(_calls_of(attributes) == calls for attributes, calls in self._hooked)
            and layouts_of(self._tensors) == self._layouts
            and [*map(attrgetter("_version"), self._counted)] == self._versions
            and all(
                [*map(id, map(itemgetter(1), _items(container)))] == [*map(id, held)]
                for _, container, held in self._watch._containers
            )
        )


def _has_hooks(own: dict[str, Any]) -> bool:
    return bool(own["_forward_hooks"] or own["_forward_pre_hooks"])


def _items(container: Any) -> list[tuple[Any, Any]]:
    return list(container.items() if isinstance(container, dict) else enumerate(container))


def layouts_of(tensors: list[Tensor]) -> list[list[Any]]:
    """Where and how tensors lie, asked in C: `x.data = y` puts other memory, or another view of the same, behind the same object."""
    return [[*map(ask, tensors)] for ask in _LAYOUT]


_LAYOUT: tuple[Callable[[Tensor], Any], ...] = (Tensor.data_ptr, Tensor.stride, Tensor.numel, attrgetter("dtype"))


def state_of(tensor: Tensor) -> tuple[Layout, int]:
    """Where and how a tensor lies, and how often torch saw it written."""
    layout = tensor.data_ptr(), tensor.stride(), tensor.numel(), tensor.dtype
    return layout, 0 if tensor.is_inference() else tensor._version


def _calls_of(own: dict[str, Any]) -> tuple:
    """What decides how a module is called, of its attributes: handles of hooks (never used twice), a forward of its own."""
    forward = own.get("forward")
    return (*own["_forward_hooks"], None, *own["_forward_pre_hooks"], getattr(forward, "__func__", forward))


def _other_code(names: list[str]) -> RuntimeFault:
    return RuntimeFault(
        f"the model changed since compile: {_listed(names)} given other hooks, functions or classes, which the "
        f"compiled graphs do not hold: {_AGAIN}"
    )


def _values(tensor: Tensor) -> Tensor:
    """All values of a small tensor, evenly spaced ones of a large one, as bits (a NaN equals itself)."""
    flat = tensor.detach().reshape(-1)
    flat = flat[:: max(1, flat.numel() // SAMPLES)].contiguous()
    return flat.view(torch.uint8) if flat.numel() else flat


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return (
        f"{shown} and {len(names) - 3} more were"
        if len(names) > 3
        else f"{shown} {'was' if len(names) == 1 else 'were'}"
    )


def not_followed(names: list[str]) -> RuntimeFault:
    """What to say of edits that the ranks can't follow."""
    return RuntimeFault(
        f"the model changed since compile: {_listed(names)} edited in place, and the ranks hold copies (another dtype or "
        f"device, or a copy that was edited itself): {_AGAIN}"
    )
