"""Does a layer take the path that was captured at T = 1, S = 0 and B = 1 too?

torch.export takes 0 and 1 for sizes that never come (T = 1 is every decode step), so `if T == 1` is answered once, for
good, and leaves no guard. The layer's calls into torch are therefore written down at those sizes, on fake tensors, and
compared. Where they differ the two paths may still compute the same: then numbers decide, if the layer has any.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils import _pytree as pytree

from helix_compile.capture.checks import explained
from helix_compile.capture.layers import ConcatenatingCache
from helix_compile.errors import CaptureError
from helix_compile.ir.graph import input_ref, inputs_of, placeholders
from helix_compile.ir.leaves import LayerCall
from helix_compile.ir.sizes import HINT_B, HINT_S, HINT_T, hint_of, size_at

COMPARED_BYTES = 2**29  # of a layer's weights, up to which numbers are compared


@dataclass(frozen=True)
class Sizes:
    """Of one call: B sequences, T new tokens, S cached ones."""

    B: int = HINT_B
    T: int = HINT_T
    S: int = HINT_S

    def __str__(self) -> str:
        return f"B={self.B}, T={self.T}, S={self.S}"


SPECIAL = (Sizes(T=1), Sizes(S=0), Sizes(B=1))
Tensors = dict[str, Tensor]


class _Calls(TorchFunctionMode):
    """Every call into torch that a layer makes itself, with its constants but ints, which may be sizes."""

    def __init__(self, names: dict[int, str]):
        super().__init__()
        self.names = names
        self.lines: list[tuple[str, str]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = resolve_name(func) or str(func)
        if "__get__" not in name:
            leaves = pytree.tree_leaves((args, kwargs))
            constants = [text for leaf in leaves if (text := self._text(leaf))]
            self.lines.append((f"{name}({', '.join(constants)})", _caller()))
        return func(*args, **kwargs)

    def _text(self, leaf: Any) -> str:
        if isinstance(leaf, Tensor):
            return self.names.get(id(leaf), "")
        return repr(leaf) if isinstance(leaf, (bool, float, str, torch.dtype)) else ""


def _caller() -> str:
    """File and line of the nearest frame that is neither torch's nor this file's."""
    frame: Any = sys._getframe(2)
    inside = (str(Path(torch.__file__).parent), __file__)
    while frame is not None and frame.f_code.co_filename.startswith(inside):
        frame = frame.f_back
    return "" if frame is None else f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def check_paths(layer: nn.Module, call: LayerCall, config: Any, body: fx.GraphModule) -> None:
    """Raise CaptureError if the layer computes something else at T = 1, S = 0 or B = 1 than its captured body.

    Weights on meta, or of more than half a GiB, are not computed with: there the calls alone decide, and a layer whose calls
    differ is taken at its word, as torch.export takes it.
    """
    usual = _calls(layer, call, config, Sizes())
    for sizes in SPECIAL:
        found = _calls(layer, call, config, sizes)
        if [text for text, _ in found] == [text for text, _ in usual] or not _can_compute(layer):
            continue
        if error := _differs(layer, call, config, body, sizes):
            raise CaptureError(
                f"capture: {type(layer).__name__} takes another path at {sizes} than at {Sizes()}, at "
                f"{_first_difference(usual, found)}, and computes something else there (relative RMS error {error:.2g}); "
                "a graph holds one path: write the layer without a branch on a size of 0 or 1"
            )


def _first_difference(usual: list[tuple[str, str]], found: list[tuple[str, str]]) -> str:
    for one, other in zip(usual, found, strict=False):
        if one[0] != other[0]:
            return f"{other[1]} (`{other[0]}`, there `{one[0]}`)"
    more = max(usual, found, key=len)[min(len(usual), len(found))]
    return f"{more[1]} (`{more[0]}`)"


def _calls(layer: nn.Module, call: LayerCall, config: Any, sizes: Sizes) -> list[tuple[str, str]]:
    trace = _Calls({id(t): n for n, t in (*layer.named_parameters(), *layer.named_buffers())})
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    what = f"{type(layer).__name__} can't be run at {sizes}"
    # what a model skips while it is compiled is skipped here too
    compiling = patch.object(torch.compiler, "is_compiling", lambda: True)
    with explained(what), torch.no_grad(), compiling, fake:
        hidden, others = _inputs(layer, call, sizes, torch.zeros)
        cache = ConcatenatingCache(config, None, hidden.new_zeros(sizes.B, 1, sizes.S, 1))
        args, kwargs = call.rebuild(hidden, others, cache)
        with trace:
            layer(*args, **kwargs)
    return trace.lines


def _inputs(layer: nn.Module, call: LayerCall, sizes: Sizes, make: Any) -> tuple[Tensor, list[Tensor]]:
    """Hidden states and the other tensors at these sizes."""
    device = next(layer.parameters()).device
    numbers = _numbers(call, sizes)

    def one(fake: Tensor) -> Tensor:
        shape = [size_at(n, numbers) for n in fake.shape]
        if fake.dtype.is_floating_point:
            return make(shape, dtype=fake.dtype, device=device)
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


def _can_compute(layer: nn.Module) -> bool:
    tensors = [*layer.parameters(), *layer.buffers()]
    size = sum(t.numel() * t.itemsize for t in tensors)
    return size <= COMPARED_BYTES and all(t.device.type != "meta" for t in tensors)


def _differs(layer: nn.Module, call: LayerCall, config: Any, body: fx.GraphModule, sizes: Sizes) -> float:
    """RMS error of the body over the RMS of the layer's output; 0.0 if it is within what rounding explains."""
    generator = torch.Generator().manual_seed(0)

    def drawn(shape: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    hidden, others = _inputs(layer, call, sizes, drawn)
    dtype = hidden.dtype
    past = {}
    for n in inputs_of(body.graph, "past"):
        _, heads, _, width = n.meta["val"].shape
        past[input_ref(n).name] = drawn((sizes.B, heads, sizes.S, width), dtype, hidden.device)
    known = {"hidden": hidden, **dict(zip(call.names, others, strict=True)), **past}
    weights = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    given = [(weights if input_ref(n).kind == "param" else known)[input_ref(n).name] for n in placeholders(body.graph)]
    with torch.no_grad():
        got = fx.Interpreter(body).run(*given)[0].double()
        own = _run(layer, call, config, weights, known, past)
        wide = own
        if dtype in (torch.bfloat16, torch.float16):
            wide = _run(layer, call, config, *map(_widened, (weights, known, past)))
    rms = wide.square().mean().sqrt()
    error, rounding = ((x - wide).square().mean().sqrt() / rms for x in (got, own))
    limit = 4 * float(rounding) + (1e-9 if dtype is torch.float64 else 1e-4)
    return float(error) if not float(error) <= limit else 0.0


def _widened(tensors: Tensors) -> Tensors:
    return {n: t.float() if t.is_floating_point() else t for n, t in tensors.items()}


def _run(layer: nn.Module, call: LayerCall, config: Any, weights: Tensors, known: Tensors, past: Tensors) -> Tensor:
    """What the layer itself gives for these weights, inputs and past."""
    pasts = list(past.values())
    cache = ConcatenatingCache(config, pasts, pasts[0])
    args, kwargs = call.rebuild(known["hidden"], [known[n] for n in call.names], cache)
    # on the modules themselves, not on a copy: someone may have patched a forward of theirs
    out = functional_call(layer, weights, args, kwargs)
    return (out[0] if isinstance(out, tuple) else out).double()
