"""Fake values in an environment of their own: graphs of one capture number their symbols each for itself, and what traces a
graph once more would leave guards in the capture's.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import Tensor
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from helix_compile.ir.sizes import HINT_B, HINT_S, HINT_T, symbol_hints

_OTHER = 10_007  # no size of a model
FRESH_B = 47  # B here: two parts of a batch then have more rows than one, and not as many, and are traced as any number of them


class FreshSizes:
    """Symbols for B, T and S, and values like those of a capture's graphs that speak of them. T and S have the hints of a capture.

    Args:
        batch: hint of B.

    Attributes:
        mode: the fake mode of the new values; its shape_env is new too.
        symbols: hint in a capture -> B, T, S or S + T, or another size that a graph is given (how many keys an earlier layer chose).
    """

    def __init__(self, batch: int = FRESH_B) -> None:
        self.mode = FakeTensorMode(shape_env=ShapeEnv())
        context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * 3)
        sizes = torch.empty(batch, HINT_T, HINT_S, device="meta")
        B, T, S = self.mode.from_tensor(sizes, source=ConstantSource("sizes"), symbolic_context=context).shape
        self._others = 0
        self._sizes: dict[tuple[ShapeEnv, sympy.Expr], Any] = {}  # a graph says the same few sizes again and again
        self.symbols: dict[int, Any] = {HINT_B: B, HINT_T: T, HINT_S: S, HINT_S + HINT_T: S + T}

    @property
    def environment(self) -> ShapeEnv:
        """Where the symbols live."""
        environment = self.mode.shape_env
        assert environment is not None
        return environment

    def size(self, value: Any) -> Any:
        """A size in the new symbols; what is no size as it is."""
        if not isinstance(value, torch.SymInt):
            return value
        key = (value.node.shape_env, value.node.expr)
        if key not in self._sizes:
            self._sizes[key] = self._in_new_symbols(value)
        return self._sizes[key]

    def _in_new_symbols(self, value: torch.SymInt) -> Any:
        expression = value.node.shape_env.replace(value.node.expr)
        hints = symbol_hints(value)
        free = sorted(expression.free_symbols, key=str)
        # Python's own would decide here which of two sizes is the lesser
        ours = {"Min": torch.sym_min, "Max": torch.sym_max, "FloorDiv": operator.floordiv}
        return sympy.lambdify(free, expression, modules=[ours, "math"])(*[self._with_hint(hints[s]) for s in free])

    def _with_hint(self, hint: int) -> Any:
        if hint not in self.symbols:
            self.symbols[hint] = self._new(hint, f"size_{hint}")
        return self.symbols[hint]

    def _new(self, hint: int, name: str) -> Any:
        context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
        like = torch.empty(hint, device="meta")
        return self.mode.from_tensor(like, source=ConstantSource(name), symbolic_context=context).shape[0]

    def other(self) -> Any:
        """A size that is none of these, nor equal to another."""
        self._others += 1
        return self._new(_OTHER + self._others, f"other_{self._others}")

    def tensor(self, like: Tensor, strides: Sequence[Any] | None = None, open_dim: int | None = None) -> Tensor:
        """A fake tensor of this shape, dtype and device; `strides` in place of its own, `open_dim` of any size then (contiguous)."""
        shape = [self.size(n) for n in like.shape]
        own = [self.size(n) for n in like.stride()]
        if open_dim is not None:
            shape[open_dim] = self.other()
        if open_dim is not None:
            with self.mode:
                return torch.empty(shape, dtype=like.dtype, device=like.device)
        wanted = tuple(own if strides is None else strides)
        with unset_fake_temporarily():  # a third of the time that the mode takes for it
            memory = torch.empty_strided(tuple(shape), wanted, dtype=like.dtype, device="meta")
            return FakeTensor(self.mode, memory, like.device)
