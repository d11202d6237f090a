"""Sizes of values: B, T and S as hints, as numbers and as text."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, fx

from helix_compile.layout.placement import format_layout


def shape_text(value: Any) -> str:
    """Shape of a value, such as "[B,T,72]"; symbols by their letter, tuples joined."""
    if isinstance(value, (list, tuple)):
        return ", ".join(shape_text(v) for v in value)
    if isinstance(value, (int, torch.SymInt)):
        return _size(value)
    if not isinstance(value, Tensor):
        return "-"
    return "[" + ",".join(_size(s) for s in value.shape) + "]"


def layout_text(node: fx.Node) -> str:
    """How a value lies over the mesh, such as "world:S(2)"; "-" where no layout was inferred."""
    layout = node.meta.get("layout")
    if layout is None:
        return "-"
    parts = layout if isinstance(layout, tuple) else (layout,)
    return "; ".join(format_layout(part) for part in parts)


def _size(size: int | torch.SymInt) -> str:
    """The letter of a symbol, by the hint it was captured with."""
    if isinstance(size, int):
        return str(size)
    names = {HINT_B: "B", HINT_T: "T", HINT_S: "S", HINT_S + HINT_T: "S+T", HINT_B * HINT_T: "B*T"}
    hint = int(size.node.hint)
    if hint in names:
        return names[hint]
    env = size.node.shape_env
    hints = getattr(env, "backed_var_to_val", None) or env.var_to_val  # torch 2.13 renamed it
    text = str(size.node.expr)
    for symbol in size.node.expr.free_symbols:
        text = re.sub(rf"\b{symbol}\b", names.get(int(hints[symbol]), str(symbol)), text)
    return text


# sizes a graph is captured with: all different, none 1 (export specialises 0 and 1)
HINT_B, HINT_T, HINT_S = 2, 3, 5


def concrete(value: Any) -> Any:
    """Sizes of a node or SymInt at the capture hints."""
    if isinstance(value, fx.Node):
        value = value.meta["val"]
    return int(value.node.hint) if isinstance(value, torch.SymInt) else value


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """A node's shape at the capture hints."""
    return tuple(concrete(s) for s in node.meta["val"].shape)
