"""Sizes of values: B, T and S as hints, as numbers and as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from helix_compile.layout.placement import format_layout

# sizes a graph is captured with: all different, none 1 (export specialises 0 and 1)
HINT_B, HINT_T, HINT_S = 2, 3, 5
LETTERS = {HINT_B: "B", HINT_T: "T", HINT_S: "S", HINT_S + HINT_T: "S+T", HINT_B * HINT_T: "B*T"}


def shape_text(value: Any) -> str:
    """Shape of a value, such as "[B,T,72]"; symbols by their letter, tuples joined."""
    if isinstance(value, (list, tuple)):
        return ", ".join(shape_text(v) for v in value)
    if isinstance(value, (int, torch.SymInt)):
        return size_text(value)
    if not isinstance(value, Tensor):
        return "-"
    return "[" + ",".join(size_text(s) for s in value.shape) + "]"


def layout_text(node: fx.Node) -> str:
    """How a value lies over the mesh, such as "world:S(2)"; "-" where no layout was inferred."""
    layout = node.meta.get("layout")
    if layout is None:
        return "-"
    parts = layout if isinstance(layout, tuple) else (layout,)
    return "; ".join(format_layout(part) for part in parts)


def hint_of(size: int | torch.SymInt) -> int:
    """A size at the capture hints, without adding a guard."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


def symbol_hints(size: torch.SymInt) -> dict[Any, int]:
    """The symbols of a size, each with the number it was captured with."""
    env = size.node.shape_env
    hints = getattr(env, "backed_var_to_val", None) or env.var_to_val  # torch 2.13 renamed it
    return {symbol: int(hints[symbol]) for symbol in size.node.expr.free_symbols}


def symbols_of(size: int | torch.SymInt) -> set[Any]:
    """The symbols of a size; of a number none."""
    return set(size.node.expr.free_symbols) if isinstance(size, torch.SymInt) else set()


def size_at(size: int | torch.SymInt, numbers: Mapping[Any, int]) -> int:
    """A size with `numbers` for its symbols."""
    return int(size.node.expr.subs(numbers)) if isinstance(size, torch.SymInt) else int(size)


def size_at_step(size: int | torch.SymInt, B: int, T: int, S: int) -> int:
    """A size in a step of B sequences, T new tokens and S cached ones."""
    if isinstance(size, int):
        return size
    step = {HINT_B: B, HINT_T: T, HINT_S: S, HINT_S + HINT_T: S + T}
    return size_at(size, {symbol: step[hint] for symbol, hint in symbol_hints(size).items()})


def has_rows_of(value: Any, batch: Tensor) -> bool:
    """Is the first size of `value` that of `batch`? By the expression, which adds no guard."""
    if not isinstance(value, Tensor) or not value.dim():
        return False
    first, rows = value.shape[0], batch.shape[0]
    return isinstance(first, torch.SymInt) and isinstance(rows, torch.SymInt) and first.node.expr == rows.node.expr


def size_text(size: int | torch.SymInt) -> str:
    """The letter of a symbol, by the hint it was captured with."""
    if isinstance(size, int):
        return str(size)
    if hint_of(size) in LETTERS:
        return LETTERS[hint_of(size)]
    # by letters, not by torch's names: those are sorted otherwise in each capture
    letters = {symbol: LETTERS.get(hint, str(symbol)) for symbol, hint in symbol_hints(size).items()}
    return str(size.node.expr.xreplace({s: sympy.Symbol(letter, **s.assumptions0) for s, letter in letters.items()}))


def concrete(value: Any) -> Any:
    """Sizes of a node or SymInt at the capture hints."""
    if isinstance(value, fx.Node):
        value = value.meta["val"]
    return hint_of(value) if isinstance(value, torch.SymInt) else value


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """A node's shape at the capture hints."""
    return tuple(map(hint_of, node.meta["val"].shape))
