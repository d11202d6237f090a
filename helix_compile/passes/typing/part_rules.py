"""Rows of a part of the batch: which they are is part of a value's type, and what reads two values reads the same rows of both.

rows_of_part(x, i, n)          all rows -> those of part i
place_rows(x, like, i, n)      those of part i -> at their places among all; the other rows are nobody's
cat([o_0, ..., o_n-1])         every part once, in order -> all rows
any other op                   rows of one part, and what has no rows (weights, a cache): rows of that part
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx

from helix_compile.ir.graph import aten, is_call, placeholders
from helix_compile.ir.ops import helix
from helix_compile.ir.sizes import symbols_of
from helix_compile.layout.placement import ROWS, Rows
from helix_compile.passes.typing.aten_rules import require

_TAKE, _PLACE = helix.rows_of_part.default, helix.place_rows.default


def rows_of(layout: Any) -> Rows | None:
    """The part whose rows a value has; None: all rows, or none at all. Of a tuple, that of its items."""
    if isinstance(layout, tuple):
        return next(filter(None, map(rows_of, layout)), None)
    found = layout.get(ROWS)
    return found if isinstance(found, Rows) else None


def without_rows(layout: Any) -> Any:
    """The layout over the mesh alone."""
    if isinstance(layout, tuple):
        return tuple(map(without_rows, layout))
    return {axis: placement for axis, placement in layout.items() if axis != ROWS}


def with_rows(layout: Any, rows: Rows | None) -> Any:
    """A layout over the mesh, of these rows."""
    if rows is None:
        return layout
    return tuple(with_rows(x, rows) for x in layout) if isinstance(layout, tuple) else {**layout, ROWS: rows}


def rows_made(node: fx.Node, of: Callable[[Any], Any]) -> Rows | None:
    """Whose rows the value of a node has.

    Raises:
        Violation: it reads rows of several parts, or those of one beside all, or joins parts that are not all or not in order.
    """
    batch = node.kwargs.get("batch")  # how many sequences there are, of which it has a part
    require(batch is None or rows_of(of(batch)) is None, f"`{batch}` as all sequences, it has the rows of a part")
    read = {source: rows_of(of(source)) for source in node.all_input_nodes if source is not batch}
    if node.target is _TAKE:
        return _taken(node, read)
    if node.target is _PLACE:
        return _placed(node, read)
    marks = {rows for rows in read.values() if rows is not None}
    if not marks:
        return None
    if is_call(node, aten.cat.default):
        return _joined(node, read)
    texts = ", ".join(f"`{n.name}` {'all' if rows is None else rows}" for n, rows in read.items() if _of_batch(n))
    require(len(marks) == 1, f"`{node.name}` reads rows of several parts: {texts}")
    require(
        all(rows or not _of_batch(n) for n, rows in read.items()),
        f"`{node.name}` reads all rows and those of a part: {texts}",
    )
    return marks.pop()


def _taken(node: fx.Node, read: dict[fx.Node, Rows | None]) -> Rows:
    source, part, parts = node.args
    rows = read[source]
    require(0 <= part < parts, f"part {part} of {parts}")
    require(
        rows is None or rows == Rows(part, parts, placed=True),
        f"rows {part}/{parts} of `{source.name}`, which has rows {rows}",
    )
    return Rows(part, parts)


def _placed(node: fx.Node, read: dict[fx.Node, Rows | None]) -> Rows:
    source, like, part, parts = node.args
    require(
        read[source] == Rows(part, parts),
        f"`{source.name}` has rows {read[source] or 'of all'}, placed as {part}/{parts}",
    )
    require(read[like] is None, f"`{like.name}` has rows {read[like]}, expected all")
    return Rows(part, parts, placed=True)


def _joined(node: fx.Node, read: dict[fx.Node, Rows | None]) -> Rows | None:
    joined = [read[part] for part in node.args[0]]
    if len({*joined}) == 1 and len(joined) > 1:  # along another dim: of one part
        require(
            len(node.args) > 1 and node.args[1] % node.meta["val"].dim() != 0,
            f"rows of part {joined[0]} are joined with themselves",
        )
        return joined[0]
    wanted = [Rows(part, len(joined)) for part in range(len(joined))]
    dim = node.args[1] if len(node.args) > 1 else 0
    require(
        joined == wanted and dim == 0,
        f"rows {', '.join(map(str, joined))} are joined, expected {', '.join(map(str, wanted))}",
    )
    return None


def _of_batch(node: fx.Node) -> bool:
    """Does a value have the sequences of the batch in one of its sizes?"""
    value, rows = node.meta.get("val"), placeholders(node.graph)[0].meta["val"].shape[0]
    batch = symbols_of(rows)
    values = value if isinstance(value, (tuple, list)) else (value,)
    return any(symbols_of(size) & batch for v in values if isinstance(v, Tensor) for size in v.shape)
