"""Can what a linear makes be cut by heads? Shown on the piece of graph between the two, in two ways.

By numbers: rows [h * w, (h + 1) * w) of the linear alone must make head h (of one that makes a gate too, those that joint.py
found), so the piece is run on one head at a time; views in it that write the head count as a number get -1 there. By the
typing rules: every op in it must take heads that are cut, or a rank would mix its own heads only (a mean over heads that is
nearly nothing, two heads that change places).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.distributed.tensor.placement_types import Shard

from helix_compile.ir.dataflow import NotRun, ancestors, evaluate
from helix_compile.ir.shapes import open_view
from helix_compile.ir.sizes import shape_of
from helix_compile.layout.degrees import HelixLayout
from helix_compile.layout.placement import Layout, format_layout
from helix_compile.passes.match.reject import Reject
from helix_compile.passes.typing.check_layouts import Untyped, infer_layouts
from helix_compile.plan.matches import LinearPart, Table, Uncut


@dataclass(frozen=True)
class HeadsOf:
    """What a linear makes of heads: head after head along dim starts[value] of each of these values.

    Of a linear that makes nothing else this is the linear itself. Else `role`, `rows` and `parts` are those of HeadLinear.
    """

    linear: fx.Node
    starts: Mapping[fx.Node, int]
    role: str = ""
    rows: Table = ()
    parts: tuple[LinearPart, ...] = ()

    @property
    def count(self) -> int:
        """Rows of the linear."""
        return sum(map(len, self.rows)) if self.rows else shape_of(self.linear)[-1]


def heads_of(linear: fx.Node) -> HeadsOf:
    """Heads of a linear all of whose rows make them, one head after the other."""
    return HeadsOf(linear, {linear: len(shape_of(linear)) - 1})


def cut_or_whole(
    value: fx.Node, made: HeadsOf, by_head: Callable[[Tensor], Tensor], heads_dim: int, width: int, what: str
) -> tuple[tuple[str, ...], tuple[Uncut, ...]]:
    """(views that write the head count, why heads can't be cut) of q, K or V, which may also stay whole where tpa is 1.

    Raises:
        Reject: the linear has other rows than heads * width, so that no plan can hold it.
    """
    H, rows = shape_of(value)[heads_dim], made.count
    if rows != H * width:
        raise Reject(
            f"the linear of {what} has {rows} rows, expected {H} heads x {width} channels = {H * width}: some rows are for "
            "something else, or channels are repeated (nearest that works: a linear with one row for each channel)",
            made.linear,
            6,
        )
    try:
        return check_head_rows(value, made, by_head, heads_dim, what), ()
    except Reject as rejection:
        found = rejection.failure
        return (), (Uncut(what, found.reason, found.node, found.where),)


def check_head_rows(
    value: fx.Node, made: HeadsOf, by_head: Callable[[Tensor], Tensor], heads_dim: int, what: str
) -> tuple[str, ...]:
    """What `made` holds of head h must give head h of `value`.

    Args:
        value: what is cut by heads.
        made: where its heads come from.
        by_head: puts a value of `value` in the form [B, T, H, ...].
        heads_dim: the dim of `value` that is cut.
        what: for messages.

    Returns:
        Names of the views that write the head count.

    Raises:
        Reject: they do not; names the node that stands in the way.
    """
    generator = torch.Generator().manual_seed(0)

    def random(node: fx.Node) -> Tensor:
        numbers = torch.randn(shape_of(node), generator=generator)
        return numbers.to(node.meta["val"].dtype)

    full = {n: random(n) for n in made.starts}
    inputs: dict[fx.Node, Any] = dict(full)
    whole = by_head(evaluate(value, inputs, random))
    fixed = {n: v for n, v in inputs.items() if n.op == "placeholder"}
    H = whole.shape[2]
    between = [n for n in inputs if n not in fixed and n not in full]
    opened = {n: sizes for n in between if (sizes := open_view(n, H)) is not None}
    if made.count % H:
        raise Reject(f"{made.count} rows of the linear of {what} are not {H} heads", value, 6)
    rows = made.count // H
    for head in sorted({0, H // 2, H - 1}):
        part = {n: full[n].chunk(H, dim)[head].contiguous() for n, dim in made.starts.items()}
        try:
            one = by_head(evaluate(value, {**fixed, **part}, sizes=opened))
        except NotRun as stopped:
            raise Reject(
                f"{what} can't be cut by heads: `{stopped.node.name}` ({stopped.node.target}) works on all {H} heads as a fixed "
                "number, it does not run on one of them",
                stopped.node,
                6,
            ) from stopped
        if one.shape != whole[:, :, :1].shape or not _same(one[:, :, 0], whole[:, :, head]):
            first = made.rows[head][0] if made.rows else head * rows
            raise Reject(
                f"rows {first}.. of the linear of {what} do not make head {head} alone (a weight of its own for each "
                "head, or something across heads?)",
                value,
                6,
            )
    _check_layouts(value, made.starts, heads_dim, what)
    return tuple(n.name for n in opened)


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal to rounding: vector and scalar code of one function differ in the last bit."""
    return torch.allclose(a.double(), b.double(), rtol=1e-3, atol=1e-4)


def _check_layouts(value: fx.Node, starts: Mapping[fx.Node, int], heads_dim: int, what: str) -> None:
    """Every op between takes heads that are cut over tpa, and leaves them so."""
    piece, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    needed, behind = ancestors([value], until=starts), set(starts)
    for node in value.graph.nodes:
        if node not in needed or behind.isdisjoint(node.all_input_nodes):
            continue
        for source in node.all_input_nodes:
            if source not in copies:
                copies[source] = piece.placeholder(source.name)
                copies[source].meta = source.meta
        copies[node] = piece.node_copy(node, copies.__getitem__)
        behind.add(node)
    given: dict[Any, Layout] = {copies[n]: {"tpa": Shard(dim)} for n, dim in starts.items() if n in copies}
    degrees = HelixLayout(kvp=2, tpa=2, ep=1, tpf=4)
    try:
        layouts = infer_layouts(piece, lambda n: given.get(n, {}), degrees)
    except Untyped as error:
        node = next(n for n, copy in copies.items() if copy is error.node)
        why = str(error).replace("over tpa", "by heads")
        raise Reject(f"{what} can't be cut by heads: {why}", node, 6) from error
    got = layouts[copies[value]] if value in copies else {"tpa": Shard(starts[value])}
    if got != {"tpa": Shard(heads_dim)}:
        raise Reject(
            f"{what} can't be cut by heads: its layout is {format_layout(got)}, expected dim {heads_dim} cut", value, 6
        )
