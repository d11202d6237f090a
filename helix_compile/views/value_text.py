"""Shapes and bytes of values with symbolic sizes, by the letters that a reader knows: B, T, S."""

from __future__ import annotations

import re

import torch
from torch import Tensor, fx

from helix_compile.graph_text import shape_text
from helix_compile.passes.fx_edit import placeholders


class Letters:
    """The letter of each symbol of a graph, learnt from inputs whose sizes are one symbol."""

    def __init__(self, graph: fx.Graph):
        self._letters: dict[str, str] = {}
        for node in placeholders(graph):
            value = node.meta.get("val")
            if isinstance(value, Tensor) and value.dim():
                texts = shape_text(value)[1:-1].split(",")
                for size, letter in zip(value.shape, texts, strict=True):
                    if isinstance(size, torch.SymInt) and letter in ("B", "T", "S"):
                        self._letters.setdefault(str(size), letter)

    def sizes(self, value: Tensor) -> list[str]:
        """Sizes as text, such as "512", "S+T" or "32896*B*T"."""
        text = shape_text(value)[1:-1].replace(" ", "")
        named = re.sub(r"\bs\d+\b", lambda m: self._letters.get(m[0], m[0]), text)
        return named.split(",") if value.dim() else []

    def shape(self, value: Tensor) -> str:
        """A shape, such as "[B,T,72]"."""
        return "[" + ",".join(self.sizes(value)) + "]"


def bytes_text(value: Tensor, letters: Letters) -> str:
    """Bytes of a value, such as "14,336 x B*T"; a product over the sizes that are known only at run time."""
    known, symbols = value.dtype.itemsize, []
    for text in letters.sizes(value):
        factors = text.split("*") if re.fullmatch(r"[\w*]+", text) else [f"({text})"]
        for factor in factors:
            if factor.isdigit():
                known *= int(factor)
            else:
                symbols.append(factor)
    return f"{known:,}" + (f" x {'*'.join(sorted(symbols))}" if symbols else "")
