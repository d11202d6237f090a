"""Where does every element of a value come from? Push integer ids through pure layout ops and read them off.

Walk back from a node through ops that only move elements. The first node that computes is a *source*; each of its
elements gets a unique id, then the layout ops run on the ids. Id 0 is memory that nothing wrote (new_empty).
Sizes are the tiny capture hints, so the id tensors stay small at any real width.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from helix_compile.ir.graph import aten, input_ref, is_call
from helix_compile.ir.sizes import concrete, shape_of

_MOVES = frozenset(
    {
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
        aten.transpose.int,
        aten.permute.default,
        aten.split_with_sizes.default,
        aten.split.Tensor,
        aten.chunk.default,
        aten.slice.Tensor,
        aten.select.int,
        aten.cat.default,
        aten.expand.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.unsqueeze.default,
        aten.repeat.default,
        aten.repeat_interleave.self_int,
        aten.clone.default,
        aten.slice_scatter.default,
        aten.alias.default,
        aten.detach.default,
        aten.unbind.int,
        aten.t.default,
        aten.movedim.int,
        aten.stack.default,
        aten.flatten.using_ints,
        aten.unflatten.int,
        aten.select_scatter.default,
        operator.getitem,
    }
)
_VIEWS = (aten.view.default, aten._unsafe_view.default)


def is_layout_op(node: fx.Node) -> bool:
    """True for an op that only moves elements."""
    if node.op != "call_function":
        return False
    if node.target in _MOVES or node.target in (aten.copy.default, aten.new_empty.default):
        return True
    if is_call(node, aten._to_copy.default):
        source = node.args[0]
        return isinstance(source, fx.Node) and source.meta["val"].dtype == node.meta["val"].dtype
    return False


def is_cache_update(node: Any) -> bool:
    """cat([past, new]) on a cached past, which ends the walk: the cache is one source."""
    return is_call(node, aten.cat.default) and any(
        n.op == "placeholder" and input_ref(n).kind == "past" for n in node.args[0]
    )


def is_cached(node: Any) -> bool:
    """What attention reads of a cache: that of its own layer, or what an earlier layer caches and hands on."""
    return is_cache_update(node) or (isinstance(node, fx.Node) and input_ref(node).kind == "shared")


@dataclass(frozen=True)
class Provenance:
    """ids of a value, and for each source the id of its first element (shapes at the hints)."""

    ids: Tensor
    sources: dict[fx.Node, int]

    def undefined(self) -> bool:
        """True if some element was never written."""
        return bool((self.ids == 0).any())

    def used(self) -> list[fx.Node]:
        """Sources that really occur in the value."""
        return [s for s, base in self.sources.items() if self._mask(s, base).any()]

    def coordinates(self, source: fx.Node, ids: Tensor | None = None) -> tuple[Tensor, ...] | None:
        """Coordinates in `source` of every element of `ids`, or None if some element is from elsewhere."""
        ids = self.ids if ids is None else ids
        base = self.sources[source]
        if not self._mask(source, base, ids).all():
            return None
        return torch.unravel_index(ids - base, shape_of(source))

    def _mask(self, source: fx.Node, base: int, ids: Tensor | None = None) -> Tensor:
        ids = self.ids if ids is None else ids
        numel = math.prod(shape_of(source))
        return (ids >= base) & (ids < base + numel)


def trace_elements(node: fx.Node, stop: Callable[[fx.Node], bool] = is_cache_update) -> Provenance:
    """Provenance of `node`'s elements. `stop` names nodes that count as sources though they only move elements."""
    sources: dict[fx.Node, int] = {}
    done: dict[fx.Node, Any] = {}
    next_id = 1

    def value(n: Any) -> Any:
        nonlocal next_id
        if not isinstance(n, fx.Node):
            return [value(x) for x in n] if isinstance(n, (list, tuple)) else n
        if not isinstance(n.meta.get("val"), (Tensor, list, tuple)):
            return concrete(n)
        if n not in done:
            if is_layout_op(n) and not stop(n):
                done[n] = run_move(n, value)
            else:
                shape = shape_of(n)
                numel = math.prod(shape)
                sources[n] = next_id
                done[n] = torch.arange(next_id, next_id + numel).reshape(shape)
                next_id += numel
        return done[n]

    ids = value(node)
    return Provenance(ids, sources)


def run_move(node: fx.Node, value: Callable[[Any], Any]) -> Any:
    """Result of a layout op on other values: `value` gives one for each argument."""
    if is_call(node, aten.new_empty.default):
        return torch.zeros([concrete(s) for s in node.args[1]], dtype=torch.int64)
    args = [value(a) for a in node.args]
    if is_call(node, aten.copy.default):
        return args[1].expand_as(args[0]).clone()
    if is_call(node, aten._to_copy.default):
        return args[0]
    if node.target in _VIEWS:
        return args[0].reshape(args[1])
    kwargs = {k: value(v) for k, v in node.kwargs.items() if k != "memory_format"}
    return node.target(*args, **kwargs)
