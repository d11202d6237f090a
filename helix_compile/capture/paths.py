"""Does a layer, or the graph around the layers, compute what was captured at T = 1, S = 0, B = 1 and at large sizes too?

torch.export takes 0 and 1 for sizes that never come (T = 1 is every decode step), so `if T == 1` is answered once, for
good, and leaves no guard. Both are therefore run at those sizes without computing anything (same_values.py). Where some
value is not the same the two paths may still compute the same numbers: then numbers decide.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any
from unittest.mock import patch

import torch
import transformers
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils import _pytree as pytree

from helix_compile.capture.body import CONSTANTS, OpTrace, without_values
from helix_compile.capture.checks import explained
from helix_compile.capture.layers import ConcatenatingCache
from helix_compile.capture.leaves import PART_OP
from helix_compile.capture.same_values import EXPORTED, Exported, same_values
from helix_compile.capture.structure import tensors_forgotten, tensors_of
from helix_compile.capture.trial import Replay, Tensors, Trial, relative_gap, widened
from helix_compile.errors import CaptureError, HelixError
from helix_compile.ir.graph import input_ref, inputs_of, past_dim, placeholders
from helix_compile.ir.leaves import LayerCall
from helix_compile.ir.sizes import HINT_B, HINT_S, HINT_T, hint_of, size_at

Lines = list[tuple[str, str]]
_IS_COMPILING = torch.compiler.is_compiling
_TRANSFORMERS = str(Path(transformers.__file__).parent)
_MASKS = tuple(str(Path(_TRANSFORMERS) / name) for name in ("masking_utils.py", "modeling_attn_mask_utils.py"))
_ASKING = str(Path(_TRANSFORMERS) / "utils")  # is_torchdynamo_compiling() and the like


def _is_compiling() -> bool:
    """torch.compiler.is_compiling() as the one who asks is to see it.

    transformers' masks: true, as in the export (eager drops masks that hide nothing). Everyone else: as it is in eager, which
    is what the graph must compute.
    """
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith((_ASKING, __file__)):
        frame = frame.f_back
    return _IS_COMPILING() or (frame is not None and frame.f_code.co_filename in _MASKS)


COMPILING = patch.object(torch.compiler, "is_compiling", _is_compiling)
NOT_COMPARED = "not compared: "  # what a note begins with that verify() must find


@dataclass(frozen=True)
class Sizes:
    """Of one call: B sequences, T new tokens, S cached ones."""

    B: int = HINT_B
    T: int = HINT_T
    S: int = HINT_S

    def __str__(self) -> str:
        return f"B={self.B}, T={self.T}, S={self.S}"


def past_shape(example: Tensor, sizes: Sizes) -> tuple[int, ...]:
    """Of what is cached, an example of which has other sizes."""
    shape = [*example.shape]
    shape[0], shape[past_dim(example)] = sizes.B, sizes.S
    return tuple(shape)


# beyond any threshold that a layer may have: a prompt, a batch of decode steps, a long context
LARGE = (Sizes(1, 521, 0), Sizes(67, 1, 4099), Sizes(19, 37, 1013))
# with the large ones every mixture of B and T that are 1 or not, and S that is 0 or not; the plainest first, to be named
SPECIAL = (Sizes(T=1), Sizes(B=1), Sizes(S=0), Sizes(B=1, T=1), Sizes(T=1, S=0), Sizes(B=1, T=1, S=0))
# with the usual sizes every pair of a B that is 1 or large and a T that is 1 or large
APART = (Sizes(1, 1, 1013), Sizes(67, 1, 0), Sizes(1, 521, 1013))
# where numbers must decide, these stand for the large ones: their steps may take gigabytes
_WITH_NUMBERS = dict(zip(LARGE, (Sizes(1, 67, 0), Sizes(9, 1, 131), Sizes(5, 19, 67)), strict=True))


class _Calls(TorchFunctionMode):
    """Every call into torch that a module makes itself, with its constants but ints, which may be sizes."""

    def __init__(self, names: dict[int, str]):
        super().__init__()
        self.names = names
        self.lines: Lines = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = resolve_name(func) or str(func)
        if "__get__" not in name:
            leaves = pytree.tree_leaves((args, kwargs))
            constants = [text for leaf in leaves if (text := self._text(leaf))]
            self.lines.append((f"{name}({', '.join(constants)})", caller()))
        return func(*args, **kwargs)

    def _text(self, leaf: Any) -> str:
        if isinstance(leaf, Tensor):
            return self.names.get(id(leaf), "")
        return repr(leaf) if isinstance(leaf, (bool, float, str, torch.dtype)) else ""


def caller() -> str:
    """File and line of the nearest frame that is neither torch's nor of a capture."""
    frame: Any = sys._getframe(2)
    inside = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    while frame is not None and frame.f_code.co_filename.startswith(inside):
        frame = frame.f_back
    return "" if frame is None else f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def traced(what: str, module: nn.Module, run: Callable[[_Calls], None]) -> Lines:
    """The calls that `run` makes on fake tensors, while it has the trace open."""
    trace = _Calls({id(t): n for n, t in tensors_of(module).items()})
    with explained(what), torch.no_grad(), COMPILING, FakeTensorMode(allow_non_fake_inputs=True):
        run(trace)
    return trace.lines


def compare_paths(
    what: str,
    calls: Callable[[Sizes], Lines],
    gap: Callable[[Sizes], float],
    same: Callable[[Sizes], bool],
    at: Iterable[Sizes] = (*SPECIAL, *LARGE),
) -> list[str]:
    """Compare the module with its graph at every special size, and at large ones.

    Args:
        what: a name for messages.
        calls: what is called at some sizes, for messages.
        gap: how far what is computed there is from the graph, 0.0: not at all.
        same: is every value there the graph's?
        at: the sizes.

    Returns:
        A note for each size at which values differ and numbers could not be had.

    Raises:
        CaptureError: the module computes something else at one of the sizes.
    """
    notes = []
    for sizes in at:
        if _surely(same, sizes):
            continue
        tried = _WITH_NUMBERS.get(sizes, sizes)
        try:
            error = gap(tried)
        except HelixError:
            raise
        except Exception as reason:  # the module may fail on random numbers for any reason
            said = " ".join(f"{type(reason).__name__}: {reason}".split())[:200]
            where = _place_of_difference(calls, sizes)
            notes.append(f"{NOT_COMPARED}{what} takes another path at {tried}, at {where}; tried with numbers: {said}")
            continue
        if error:
            where = _place_of_difference(calls, sizes)
            raise CaptureError(
                f"capture: {what} takes another path at {tried} than at {Sizes()}, at {where}, and computes something else "
                f"there (relative RMS error {error:.2g}); a graph holds one path: write it without a branch on a size of 0 or 1, or "
                "on torch.compiler.is_compiling() or is_exporting()"
            )
    return notes


def _surely(same: Callable[[Sizes], bool], sizes: Sizes) -> bool:
    try:
        return same(sizes)
    except Exception:  # it can't be run without values: numbers decide
        return False


def _place_of_difference(calls: Callable[[Sizes], Lines], sizes: Sizes) -> str:
    """For a message; numbers decide also where the module can't be run without values (grouped products on fake float32)."""
    try:
        return _first_difference(calls(Sizes()), calls(sizes))
    except CaptureError:
        return "a place that can't be told without values"


def _first_difference(usual: Lines, found: Lines) -> str:
    for one, other in zip(usual, found, strict=False):
        if one[0] != other[0]:
            return f"{other[1]} (`{other[0]}`, there `{one[0]}`)"
    if len(usual) == len(found):
        return "a number that is made from a size, an order of operands, or what is asked of torch.compiler"
    more = max(usual, found, key=len)[min(len(usual), len(found))]
    return f"{more[1]} (`{more[0]}`)"


def check_paths_by_numbers(
    layer: nn.Module,
    call: LayerCall,
    config: Any,
    body: fx.GraphModule,
    part: str,
    calls: list[LayerCall],
    at: Iterable[Sizes] = (*SPECIAL, *LARGE),
) -> list[str]:
    """The same of a layer whose child `part`, called as in `calls`, can't be run on fake tensors: numbers alone decide."""
    trial = functools.cache(lambda: Trial.of(layer, body.meta[CONSTANTS]))
    child = layer.get_submodule(part)

    def gap(sizes: Sizes) -> float:
        weights, left = trial().weights(), iter(calls)
        own = {n.removeprefix(f"{part}."): t for n, t in weights.items() if n.startswith(f"{part}.")}

        def run_child(tensors: list[Tensor], like: int) -> Any:
            args, kwargs = next(left).rebuild(tensors[0], tensors[1:], None)
            return functional_call(child, registered(child, own), args, kwargs)

        return _layer_gap(layer, call, config, body, sizes, trial(), {PART_OP: run_child})

    everywhere = lambda sizes: [(str(sizes), f"{type(child).__name__}, which branches on data")]  # noqa: E731
    return compare_paths(type(layer).__name__, everywhere, gap, lambda sizes: False, at)


def check_paths(layer: nn.Module, call: LayerCall, config: Any, body: fx.GraphModule) -> list[str]:
    """Of a layer and its captured body; see compare_paths()."""
    trial = functools.cache(lambda: Trial.of(layer, body.meta[CONSTANTS]))
    exported: Exported = body.meta[EXPORTED]
    tensors = tensors_of(layer)

    def same(sizes: Sizes) -> bool:
        # shapes alone matter: an example of a large mask holds nothing
        hidden, others = inputs_at(call, sizes, torch.empty, torch.device("meta"))
        pasts = [
            torch.empty(past_shape(x, sizes), dtype=call.hidden.dtype, device="meta")
            for x in exported.examples[1 + len(others) :]
        ]

        def run(own: dict[str, Tensor], inputs: list[Tensor]) -> list[Tensor]:
            given, pasts = inputs[1 : 1 + len(others)], inputs[1 + len(others) :]
            return _run(layer, call, config, own, inputs[0], given, pasts)

        device = next(layer.parameters()).device
        return same_values(exported, tensors, [hidden, *others, *pasts], device, run, nullcontext())

    return compare_paths(
        type(layer).__name__,
        lambda sizes: _calls(layer, call, config, sizes),
        lambda sizes: _layer_gap(layer, call, config, body, sizes, trial()),
        same,
    )


def check_eager_experts(layer: nn.Module, call: LayerCall, config: Any, body: fx.GraphModule) -> None:
    """A layer whose experts' class is not transformers' own, as the model runs it, against its graph of another form.

    Raises:
        CaptureError: its eager form computes something else.
    """
    error = _layer_gap(layer, call, config, body, Sizes(), Trial.of(layer, body.meta[CONSTANTS]))
    if error:
        raise CaptureError(
            f"capture: the experts of {type(layer).__name__} compute in their own eager form something else than "
            f"'batched_mm' does (relative RMS error {error:.2g}), and that form, a loop, is not captured; move what they compute "
            "besides out of the class, or leave use_experts_implementation off"
        )


def dataflow_elsewhere(layer: nn.Module, call: LayerCall, config: Any) -> str:
    """What a layer computes at B = 1 and T = 1, at S = 0, and at large sizes: layers may differ there alone."""
    lines: list[str] = []
    for sizes in APART:

        def run(trace: OpTrace, device: torch.device, sizes: Sizes = sizes) -> None:
            hidden, others = inputs_at(call, sizes, torch.zeros, device)
            trace.name_inputs([hidden, *others])
            with trace:
                cache = ConcatenatingCache(config, None, hidden.new_zeros(sizes.B, 1, sizes.S, 1))
                args, kwargs = call.rebuild(hidden, others, cache)
                out = layer(*args, **kwargs)
                ends = [*call.results(out, args, kwargs), *(t for new in cache.new for t in new)]
            trace.lines += map(trace.text, ends)

        lines += without_values(f"{type(layer).__name__} can't be run at {sizes}", layer, run).lines
    return "\n".join(lines)


def _calls(layer: nn.Module, call: LayerCall, config: Any, sizes: Sizes) -> Lines:
    what = f"{type(layer).__name__} can't be run at {sizes}"
    device = next(layer.parameters()).device
    return traced(what, layer, lambda trace: _run_traced(layer, call, config, sizes, trace, device))


def _run_traced(
    layer: nn.Module, call: LayerCall, config: Any, sizes: Sizes, trace: _Calls, device: torch.device
) -> None:
    hidden, others = inputs_at(call, sizes, torch.zeros, device)
    cache = ConcatenatingCache(config, None, hidden.new_zeros(sizes.B, 1, sizes.S, 1))
    args, kwargs = call.rebuild(hidden, others, cache)
    with tensors_forgotten(layer), trace:
        layer(*args, **kwargs)


def _masked(shape: list[int], device: torch.device) -> Tensor:
    """A mask that hides some columns, never the last one."""
    columns = torch.arange(shape[-1], device=device)
    return ((columns % 3 != 1) | (columns == shape[-1] - 1)).expand(shape).contiguous()


def inputs_at(
    call: LayerCall, sizes: Sizes, make: Any, device: torch.device, masked: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """Hidden states and the other tensors at these sizes; `masked`: boolean ones hide something."""
    numbers = _numbers(call, sizes)

    def one(fake: Tensor) -> Tensor:
        shape = [size_at(n, numbers) for n in fake.shape]
        if fake.dtype.is_floating_point:
            return make(shape, dtype=fake.dtype, device=device)
        if fake.dtype is torch.bool and masked and shape:
            return _masked(shape, device)
        return torch.ones(shape, dtype=fake.dtype, device=device)

    return one(call.hidden), [one(t) for t in call.others]


def _numbers(call: LayerCall, sizes: Sizes) -> dict[Any, int]:
    """Numbers for the symbols of the export around the layers: B and T are hidden's, the others S or S + T."""
    batch, tokens = (str(n) for n in call.hidden.shape[:2])
    numbers: dict[Any, int] = {}
    hints: dict[Any, int] = {}
    shapes: list[Any] = [n for t in (call.hidden, *call.others) for n in t.shape]
    for size in (n for n in shapes if isinstance(n, torch.SymInt)):
        for symbol in size.node.expr.free_symbols - set(numbers):
            if str(symbol) in (batch, tokens):
                own, hint = (sizes.B, HINT_B) if str(symbol) == batch else (sizes.T, HINT_T)
            else:
                past = size_at(size, {**hints, symbol: HINT_S}) == hint_of(size)
                own = sizes.S if past else sizes.S + sizes.T
                hint = HINT_S if past else HINT_S + HINT_T
            numbers[symbol], hints[symbol] = own, hint
    return numbers


def _layer_gap(
    layer: nn.Module,
    call: LayerCall,
    config: Any,
    body: fx.GraphModule,
    sizes: Sizes,
    trial: Trial,
    opaque: Mapping[Any, Callable[..., Any]] = MappingProxyType({}),
) -> float:
    generator = torch.Generator().manual_seed(0)

    def drawn(shape: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    hidden, others = inputs_at(call, sizes, drawn, trial.device, masked=True)
    past = {}
    for n in inputs_of(body.graph, "past"):
        past[input_ref(n).name] = drawn(past_shape(n.meta["val"], sizes), hidden.dtype, trial.device)
    known = {"hidden": hidden, **dict(zip(call.names, others, strict=True)), **past}
    weights = trial.of_graph()
    given = [(weights if input_ref(n).kind == "param" else known)[input_ref(n).name] for n in placeholders(body.graph)]
    with torch.no_grad():
        got = Replay(body, trial.device, opaque).run(*given)
        own = wide = _run(layer, call, config, trial.weights(), hidden, others, list(past.values()))
        if widened(hidden).dtype != hidden.dtype:
            wide_others, wide_past = ([widened(t) for t in x] for x in (others, past.values()))
            wide = _run(layer, call, config, trial.weights(wide=True), widened(hidden), wide_others, wide_past)
    return max(relative_gap(*each) for each in zip(got, own, wide, strict=True))


def _run(
    layer: nn.Module,
    call: LayerCall,
    config: Any,
    weights: Tensors,
    hidden: Tensor,
    others: list[Tensor],
    pasts: list[Tensor],
) -> list[Tensor]:
    """What the layer itself gives for these weights, inputs and past, what it caches, and what else it returns."""
    cache = ConcatenatingCache(config, pasts, pasts[0] if pasts else hidden)
    args, kwargs = call.rebuild(hidden, others, cache)
    # on the modules themselves, not on a copy: someone may have patched a forward of theirs
    with tensors_forgotten(layer):
        returned = functional_call(layer, registered(layer, weights), args, kwargs)
        out, *results = call.results(returned, args, kwargs)
    return [out, *(t for new in cache.new for t in new), *results]


def registered(module: nn.Module, weights: Mapping[str, Tensor]) -> Tensors:
    """Those of them that are parameters or buffers: a plain attribute stays what it is."""

    def names() -> Iterator[str]:
        for named in (module.named_parameters, module.named_buffers):
            yield from (name for name, _ in named())

    return {name: weights[name] for name in names()}
