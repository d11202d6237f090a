"""Layers that compute what an earlier one computes, by construction: they need not be run to see it.

Two layers are so if their modules have the same types, attributes and code, tensors of the same shapes, and are called
alike. Whole numbers may differ (a layer's index), if a run of the earlier layer with other numbers in their places asks
nothing of them: neither Python (a number that watches itself) nor torch (the calls stay the same). Anything else that
differs, or that can't be compared, means that the layer is run.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from helix_compile.errors import HelixError
from helix_compile.ir.leaves import LayerCall

OWN_NAMES = frozenset(vars(nn.Module()))  # of every module; what of these matters is compared below


_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


_FAR = 1_000_003  # added to a number that nobody should ask for


_ASKING = [
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "hash",
    "bool",
    "index",
    "int",
    "float",
    "str",
    "repr",
    "format",
    "abs",
    "neg",
    "pos",
    "invert",
    "round",
    "trunc",
    "ceil",
    "floor",
    "divmod",
    "rdivmod",
    "add",
    "radd",
    "sub",
    "rsub",
    "mul",
    "rmul",
    "truediv",
    "rtruediv",
    "floordiv",
    "rfloordiv",
    "mod",
    "rmod",
    "pow",
    "rpow",
    "and",
    "rand",
    "or",
    "ror",
    "xor",
    "rxor",
    "lshift",
    "rlshift",
    "rshift",
    "rrshift",
]


Place = tuple[str, str]  # dotted name of a module in its layer, attribute


class Watched(int):
    """A whole number that remembers whether anybody asked for it."""

    asked: bool = False


def _watching(name: str) -> Callable[..., Any]:
    plain = getattr(int, name)

    def ask(self: Watched, *args: Any) -> Any:
        self.asked = True
        return plain(self, *args)

    return ask


for _name in _ASKING:
    setattr(Watched, f"__{_name}__", _watching(f"__{_name}__"))


@dataclass
class EqualLayers:
    """The layers that were run so far, one of each kind.

    Attributes:
        signature_of: runs a layer on fake tensors and says what it computes.
    """

    signature_of: Callable[[nn.Module, LayerCall], str]
    _known: list[tuple[nn.Module, LayerCall, Any]] = field(default_factory=list)
    _idle: dict[tuple[int, frozenset[Place]], bool] = field(default_factory=dict)

    def add(self, layer: nn.Module, call: LayerCall, found: Any) -> None:
        """A layer that was run, and what was found."""
        self._known.append((layer, call, found))

    def find(self, layer: nn.Module, call: LayerCall) -> Any | None:
        """What was found of an earlier layer that is equal; None: this one has to be run."""
        for known, known_call, found in self._known:
            if _call_text(known_call) != _call_text(call):
                continue
            places = differing_numbers(known, layer)
            if places is not None and self._are_idle(known, known_call, found.signature, places):
                return found
        return None

    def _are_idle(self, layer: nn.Module, call: LayerCall, signature: str, places: frozenset[Place]) -> bool:
        key = (id(layer), places)
        if places and key not in self._idle:
            self._idle[key] = self._run_watched(layer, call, signature, places)
        return not places or self._idle[key]

    def _run_watched(self, layer: nn.Module, call: LayerCall, signature: str, places: frozenset[Place]) -> bool:
        owners = [(layer.get_submodule(name).__dict__, attribute) for name, attribute in places]
        before = [owner[attribute] for owner, attribute in owners]
        watched = [Watched(number + _FAR) for number in before]
        try:
            for (owner, attribute), number in zip(owners, watched, strict=True):
                owner[attribute] = number
            return self.signature_of(layer, call) == signature and not any(w.asked for w in watched)
        except HelixError:
            return False
        finally:
            for (owner, attribute), number in zip(owners, before, strict=True):
                owner[attribute] = number


def _call_text(call: LayerCall) -> str:
    tensors = [(str(t.shape), t.dtype) for t in (call.hidden, *call.others)]
    return f"{call.constants()} {tensors} {call.names}"


def differing_numbers(one: nn.Module, other: nn.Module) -> frozenset[Place] | None:
    """Where two layers differ, if that is in whole numbers only; None: in more, or it can't be told."""
    places: set[Place] = set()
    modules, others = list(one.named_modules()), list(other.named_modules())
    if [n for n, _ in modules] != [n for n, _ in others]:
        return None
    for (name, a), (_, b) in zip(modules, others, strict=True):
        if type(a) is not type(b) or a.training is not b.training:
            return None
        if any(getattr(m, hooks) for m in (a, b) for hooks in _HOOKS):
            return None
        for kept in ("_parameters", "_buffers"):
            if _tensors(vars(a)[kept]) != _tensors(vars(b)[kept]):
                return None
        mine, theirs = ({k: v for k, v in vars(m).items() if k not in OWN_NAMES} for m in (a, b))
        if mine.keys() != theirs.keys():
            return None
        for key, value in mine.items():
            if _same(value, theirs[key]):
                continue
            if type(value) is int and type(theirs[key]) is int:
                places.add((name, key))
            else:
                return None
    return frozenset(places)


def _tensors(named: dict[str, Tensor | None]) -> list[tuple]:
    return [(n, None if t is None else (tuple(t.shape), t.stride(), t.dtype, t.device)) for n, t in named.items()]


def _same(a: Any, b: Any) -> bool:
    """The same to any code that doesn't ask for identity."""
    if a is b:
        return True
    if inspect.isroutine(a):
        return bool(a == b)
    if type(a) is not type(b):
        return False
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return isinstance(a, (bool, int, float, str, torch.dtype)) and bool(a == b)


def structure_key(model: PreTrainedModel) -> tuple:
    """What a capture depends on: shapes, dtypes, configuration, constants and code of every module, not weights."""
    shapes = tuple((n, tuple(p.shape), p.dtype, p.device) for n, p in model.named_parameters())
    config = model.config
    implementations = (config._attn_implementation, getattr(config, "_experts_implementation", None))
    modules = tuple((name, _constants_and_code(m)) for name, m in model.named_modules())
    return shapes, implementations, repr(config.to_dict()), modules


def _constants_and_code(module: nn.Module) -> tuple:
    """Plain attributes, hooks, and the functions of the class and of the instance (someone may have patched one)."""
    plain = {k: v for k, v in vars(module).items() if k not in OWN_NAMES and _is_plain(v)}
    tensors = [
        (k, v.data_ptr(), v._version, tuple(v.shape)) for k, v in vars(module).items() if isinstance(v, torch.Tensor)
    ]
    # handles count up and are never used twice, so they name a set of hooks without holding what hooks close over
    hooks = (tuple(module._forward_hooks), tuple(module._forward_pre_hooks))
    # a bound method's function alone: the method would keep the model alive through its own memo
    patched = [(k, getattr(v, "__func__", v)) for k, v in vars(module).items() if inspect.isroutine(v)]
    code = [(k, v) for k, v in vars(type(module)).items() if inspect.isroutine(v)]
    return type(module), repr(plain), tuple(tensors), hooks, tuple(patched), tuple(code)


def _is_plain(value: Any) -> bool:
    """A value whose repr says all there is to say."""
    if isinstance(value, dict):
        return all(_is_plain(k) and _is_plain(v) for k, v in value.items())
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype))
