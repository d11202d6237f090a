"""What each layer computes in steps of the whole model, one after the other, against what it computes by itself.

A layer is captured alone. A Python number that another layer, the model around them or an earlier step leaves behind (in a
global, a counter, an object they share) would stay in its graph as it was at that moment. So the model's own forward is run
without values, layers in place, for several steps of unlike sizes, and every operator of every layer is written down; so is
what stands around the layers. Alone, afterwards and in the opposite order, each must do the same.
"""

from __future__ import annotations

import hashlib
import re
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from helix_compile.capture.body import CachedSite, OpTrace, check_index_keys, reads_handed, sites_of
from helix_compile.capture.layers import Around, Calls, ConcatenatingCache, model_inputs, result_shapes
from helix_compile.capture.paths import APART, COMPILING, NOT_COMPARED, Sizes, caller, inputs_at
from helix_compile.capture.structure import on_meta, tensors_forgotten, tensors_of
from helix_compile.errors import CaptureError
from helix_compile.ir.leaves import LayerCall, record_call

STEPS = (Sizes(), *APART)
_OWN = ("forward", "_forward_pre_hooks", "_forward_hooks")  # what a layer's call looks up on it
_CONSTANTS = ("constant", "constant")
Lines = list[str]


@dataclass
class _Step:
    """One step: the lines of each layer, by its number, and of what is around them; how layers are called; what they cached."""

    layers: dict[int, Lines] = field(default_factory=dict)
    called: dict[int, LayerCall] = field(default_factory=dict)
    around: Lines = field(default_factory=list)
    sites: dict[int, list[CachedSite]] = field(default_factory=dict)


@dataclass(frozen=True)
class Together:
    """What is known of the layers of a model that ran as a whole.

    Attributes:
        signatures: of each layer that was traced; layers of one signature compute the same function of their parameters.
        sites: what each of them caches.
        notes: what could not be compared.
        reads: does it read what a layer before it made?
    """

    signatures: Mapping[int, str] = field(default_factory=dict)
    sites: Mapping[int, list[CachedSite]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    reads: Mapping[int, bool] = field(default_factory=dict)


class CanNotRun(Exception):
    """The model can't be run as a whole without values; the reason is in the message."""


def run_together(model: Any, layers: nn.ModuleList, calls: Calls, absent: Collection[int] = ()) -> Together:
    """Run `model` as a whole without values, then its layers one by one.

    Args:
        model: the model.
        layers: its layers.
        calls: how it calls them.
        absent: layers that can't be run so: stand-ins take their places.

    Raises:
        CaptureError: a layer, or what is around the layers, computes something else by itself: it names both numbers.
        CanNotRun: the whole model can't be run so.
    """
    reasons = []
    for meta in (True, False):
        with torch.no_grad(), COMPILING, ExitStack() as stack:
            mode = None if meta else FakeTensorMode(allow_non_fake_inputs=True)
            stack.enter_context(on_meta(model) if mode is None else mode)
            run = _Run(model, layers, calls, frozenset(absent), mode)
            try:
                steps = [run.whole(sizes) for sizes in STEPS]
            except Exception as error:  # the model's forward may raise anything
                reasons.append(" ".join(f"{type(error).__name__}: {error}".split())[:200])
                continue
            return run.compared(steps)
    raise CanNotRun(reasons[-1])


def not_compared(error: Exception) -> str:
    """A note."""
    return f"{NOT_COMPARED}numbers that layers may leave for one another: the model can't be run as a whole without values: {error}"


class _Run:
    """Steps of one model, without values."""

    def __init__(
        self, model: Any, layers: nn.ModuleList, calls: Calls, absent: frozenset[int], mode: FakeTensorMode | None
    ):
        self._model, self._layers, self._calls, self._absent, self._mode = model, layers, calls, absent, mode
        self._device = torch.device("meta") if mode is None else next(model.parameters()).device
        self._names = {i: _names(layer) for i, layer in enumerate(layers)}
        self._all_names = _names(model)

    def compared(self, steps: list[_Step]) -> Together:
        """What `steps` of the whole model say of the layers, after each was run by itself."""
        for sizes, step in zip(STEPS, steps, strict=True):
            for i, called in step.called.items():
                self._check_constants(i, sizes, called)
        texts = {i: "\n".join([str(s.sites[i]) + "\n".join(s.layers[i]) for s in steps]) for i in steps[0].layers}
        first: dict[str, int] = {}
        for i, text in texts.items():
            first.setdefault(text, i)
        for number in first.values():
            for sizes, step in reversed([*zip(STEPS, steps, strict=True)]):
                alone = self.alone(number, sizes)
                if step.layers[number] != alone:
                    raise self._differs(number, sizes, step.layers[number], alone)
        for sizes, step in reversed([*zip(STEPS, steps, strict=True)]):
            around = self.whole(sizes, layers_run=False).around
            if step.around != around:
                raise _refused(f"what is around the layers of {type(self._model).__name__}", sizes, step.around, around)
        digests = {i: hashlib.sha256(text.encode()).hexdigest() for i, text in texts.items()}
        reads = {i: reads_handed(self._calls[i], lines) for i, lines in steps[0].layers.items()}
        return Together(digests, steps[0].sites, reads=reads)

    def whole(self, sizes: Sizes, layers_run: bool = True) -> _Step:
        """A step of the model; its layers are stand-ins if they do not run."""
        step = _Step()
        trace = OpTrace(dict(self._all_names), self._mode)
        inputs = model_inputs(self._device, sizes.B, sizes.T, sizes.S)
        past = torch.zeros(sizes.B, 1, sizes.S, 1, dtype=self._model.dtype, device=self._device)
        trace.name_inputs([*inputs, past])

        def forward_of(index: int) -> Any:
            runs = layers_run and index not in self._absent

            def forward(*args: Any, **kwargs: Any) -> Any:
                trace.paused = True
                call = self._calls[index]
                step.called[index] = record_call(args, kwargs, call.returned)
                given = _tensors_in(args, kwargs)
                trace.lines.append(f"layer {index}: {[trace.text(t) for t in given]}")
                cache = next(x for x in (*args, *kwargs.values()) if isinstance(x, ConcatenatingCache))
                if runs:
                    with put_back(index):
                        results, step.layers[index], step.sites[index] = self._layer(index, sizes, cache)
                else:
                    hidden = call.returned.captured(given[0])
                    shapes = result_shapes(replace(call, hidden=hidden), args, kwargs)
                    results = [torch.empty_like(hidden)]
                    results += [hidden.new_empty(shape, dtype=like.dtype) for like, shape in shapes]
                out = call.as_returned(results, args, kwargs)
                trace.name_inputs([out[0] if isinstance(out, tuple) else out, *results[1:]], f"layer {index} result")
                trace.paused = False
                return out

            return forward

        with tensors_forgotten(self._model), _forwards(self._layers, forward_of) as put_back, trace:
            Around(self._model, lambda pasts: ConcatenatingCache(self._model.config, None, pasts[0]))(*inputs, [past])
        step.around = trace.lines
        return step

    def alone(self, index: int, sizes: Sizes, trace: OpTrace | None = None) -> Lines:
        """A layer by itself."""
        past = torch.zeros(sizes.B, 1, sizes.S, 1, dtype=self._model.dtype, device=self._device)
        cache = ConcatenatingCache(self._model.config, None, past)
        with tensors_forgotten(self._layers[index]):
            return self._layer(index, sizes, cache, trace)[1]

    def _layer(
        self, index: int, sizes: Sizes, cache: ConcatenatingCache, trace: OpTrace | None = None
    ) -> tuple[list[Tensor], Lines, list[CachedSite]]:
        """Called as it is captured, on tensors of its own: its results, what it does, and caches."""
        layer, call = self._layers[index], self._calls[index]
        trace = trace or OpTrace(dict(self._names[index]), self._mode)
        hidden, others = inputs_at(call, sizes, torch.empty, self._device)
        trace.name_inputs([hidden, *others])
        before = len(cache.new)
        args, kwargs = call.rebuild(hidden, others, cache)
        with trace:
            results = call.results(layer(*args, **kwargs), args, kwargs)
        check_index_keys(layer, cache)
        new = cache.new[before:]
        ends = [*results, *(t for site in new for t in site)]
        return results, [call.constants(), *trace.lines, *map(trace.text, ends)], sites_of(layer, new)

    def _check_constants(self, index: int, sizes: Sizes, called: LayerCall) -> None:
        """A number that the model hands to a layer is part of the layer's graph."""
        call = self._calls[index]
        if call.spec != called.spec:  # a mask that is left out: compared with the graph around the layers
            return
        pairs = [(a[1], b[1]) for a, b in zip(called.leaves, call.leaves, strict=True) if (a[0], b[0]) == _CONSTANTS]
        for there, captured in pairs:
            if isinstance(there, (bool, int, float, str)) and repr(there) != repr(captured):
                raise CaptureError(
                    f"capture: layer {index} ({type(self._layers[index]).__name__}) is called with {there!r} in a step of the model "
                    f"({sizes}), and with {captured!r} at {Sizes()}; a graph holds one.\n"
                    "  nearest that works: the layer makes it itself of the shapes of its inputs, or a tensor"
                )

    def _differs(self, index: int, sizes: Sizes, whole: Lines, alone: Lines) -> CaptureError:
        what = f"layer {index} ({type(self._layers[index]).__name__})"
        at = next((k for k, (a, b) in enumerate(zip(whole, alone, strict=False)) if a != b), 0)
        trace = _Placed(dict(self._names[index]), self._mode)
        self.alone(index, sizes, trace)
        place = trace.places[min(at, len(trace.places)) - 1] if at and trace.places else ""
        return _refused(what, sizes, whole, alone, place)


class _Placed(OpTrace):
    """Also which line of the model each operator stands in."""

    def __init__(self, names: dict[int, str], mode: FakeTensorMode | None):
        super().__init__(names, mode)
        self.places: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.places.append(caller())
        return super().__torch_dispatch__(func, types, args, kwargs)


def _names(module: nn.Module) -> dict[int, str]:
    return {id(t): n for n, t in tensors_of(module).items()}


def _tensors_in(args: tuple, kwargs: dict[str, Any]) -> list[Tensor]:
    """Tensors of a call in order, also of tuples among its arguments."""
    found: list[Tensor] = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found += _tensors_in(tuple(value), {})
    return found


@contextmanager
def _forwards(layers: nn.ModuleList, forward_of: Any) -> Iterator[Any]:
    """Each layer's call is another function while this is open; yields what puts one back for as long as it is called itself."""

    def own(layer: nn.Module) -> dict[str, Any]:
        return {key: vars(layer)[key] for key in _OWN if key in vars(layer)}

    def put(layer: nn.Module, what: Mapping[str, Any]) -> None:
        vars(layer).pop("forward", None)
        vars(layer).update(what)

    kept = [own(layer) for layer in layers]

    @contextmanager
    def put_back(index: int) -> Iterator[None]:
        replaced = own(layers[index])
        put(layers[index], kept[index])
        try:
            yield
        finally:
            put(layers[index], replaced)

    try:
        for i, layer in enumerate(layers):
            put(layer, {"forward": forward_of(i), **{key: OrderedDict() for key in _OWN[1:]}})
        yield put_back
    finally:
        for layer, before in zip(layers, kept, strict=True):
            put(layer, before)


def _refused(what: str, sizes: Sizes, whole: Lines, alone: Lines, place: str = "") -> CaptureError:
    said = _difference(whole, alone)
    return CaptureError(
        f"capture: {what} computes something else in a step of the whole model ({sizes}) than by itself"
        f"{f', at {place}' if place else ''}: {said}. It reads a number that another layer, the model around the layers or an "
        "earlier step left behind (a global, a counter, an attribute of something that they share), or that is drawn anew; a graph "
        "holds one number.\n  nearest that works: a number that is made where it is used, of the layer's own attributes and "
        "inputs, or one that never changes"
    )


def _difference(whole: Lines, alone: Lines) -> str:
    """The first, with both numbers."""
    for one, other in zip(whole, alone, strict=False):
        if one != other:
            return _pair(one, other)
    more, where = (whole, "there") if len(whole) > len(alone) else (alone, "by itself")
    return f"`{_operator(more[min(len(whole), len(alone))])}` comes besides {where}"


def _pair(one: str, other: str) -> str:
    mine, its = (re.split(r"[\[\]{},]", line) for line in (one, other))
    if mine[0] != its[0] or len(mine) != len(its):
        return f"`{_operator(one)}` there, `{_operator(other)}` by itself"
    pairs = [(a, b) for a, b in zip(mine, its, strict=True) if a != b]
    return f"`{mine[0]}` is given {pairs[0][0]} there, {pairs[0][1]} by itself"


def _operator(line: str) -> str:
    return line.split("[")[0][:80]
