"""Can what a linear makes be cut by heads? Shown on the piece of graph between the two, in two ways.

By numbers: rows [h * w, (h + 1) * w) of the linear alone must make head h, so the piece is run on one head at a time; views
in it that write the head count as a number get -1 there. By the typing rules: every op in it must take heads that are
cut, or a rank would mix its own heads only (a mean over heads that is nearly nothing, two heads that change places).
"""

from __future__ import annotations

from collections.abc import Callable
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
from helix_compile.plan.matches import Uncut


def cut_or_whole(
    value: fx.Node, linear: fx.Node, by_head: Callable[[Tensor], Tensor], heads_dim: int, width: int, what: str
) -> tuple[tuple[str, ...], tuple[Uncut, ...]]:
    """(views that write the head count, why heads can't be cut) of q, K or V, which may also stay whole where tpa is 1.

    Raises:
        Reject: the linear has other rows than heads * width, so that no plan can hold it.
    """
    H, rows = shape_of(value)[heads_dim], shape_of(linear)[-1]
    if rows != H * width:
        raise Reject(
            f"the linear of {what} has {rows} rows, expected {H} heads x {width} channels = {H * width}: some rows are for "
            "something else, or channels are repeated (nearest that works: a linear with one row for each channel)",
            linear,
            6,
        )
    try:
        return check_head_rows(value, linear, by_head, heads_dim, what), ()
    except Reject as rejection:
        found = rejection.failure
        return (), (Uncut(what, found.reason, found.node, found.where),)


def check_head_rows(
    value: fx.Node, linear: fx.Node, by_head: Callable[[Tensor], Tensor], heads_dim: int, what: str
) -> tuple[str, ...]:
    """Rows [h * w, (h + 1) * w) of `linear` must give head h of `value`.

    Args:
        value: what is cut by heads.
        linear: where its heads come from.
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

    full = random(linear)
    inputs: dict[fx.Node, Any] = {linear: full}
    whole = by_head(evaluate(value, inputs, random))
    fixed = {n: v for n, v in inputs.items() if n.op == "placeholder"}
    H = whole.shape[2]
    between = [n for n in inputs if n not in fixed and n is not linear]
    opened = {n: sizes for n in between if (sizes := open_view(n, H)) is not None}
    if full.shape[-1] % H:
        raise Reject(f"{full.shape[-1]} rows of the linear of {what} are not {H} heads", value, 6)
    rows = full.shape[-1] // H
    for head in sorted({0, H // 2, H - 1}):
        part = full[..., head * rows : (head + 1) * rows].contiguous()
        try:
            one = by_head(evaluate(value, {**fixed, linear: part}, sizes=opened))
        except NotRun as stopped:
            raise Reject(
                f"{what} can't be cut by heads: `{stopped.node.name}` ({stopped.node.target}) works on all {H} heads as a fixed "
                "number, it does not run on one of them",
                stopped.node,
                6,
            ) from stopped
        if one.shape != whole[:, :, :1].shape or not _same(one[:, :, 0], whole[:, :, head]):
            raise Reject(
                f"rows {head * rows}.. of the linear of {what} do not make head {head} alone (a weight of its own for each "
                "head, or something across heads?)",
                value,
                6,
            )
    _check_layouts(value, linear, heads_dim, what)
    return tuple(n.name for n in opened)


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal to rounding: vector and scalar code of one function differ in the last bit."""
    return torch.allclose(a.double(), b.double(), rtol=1e-3, atol=1e-4)


def _check_layouts(value: fx.Node, linear: fx.Node, heads_dim: int, what: str) -> None:
    """Every op between takes heads that are cut over tpa, and leaves them so."""
    piece, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    needed, behind = ancestors([value], until=[linear]), {linear}
    for node in value.graph.nodes:
        if node not in needed or behind.isdisjoint(node.all_input_nodes):
            continue
        for source in node.all_input_nodes:
            if source not in copies:
                copies[source] = piece.placeholder(source.name)
                copies[source].meta = source.meta
        copies[node] = piece.node_copy(node, copies.__getitem__)
        behind.add(node)
    heads: Layout = {"tpa": Shard(len(shape_of(linear)) - 1)}
    degrees = HelixLayout(kvp=2, tpa=2, ep=1, tpf=4)
    try:
        layouts = infer_layouts(piece, lambda n: heads if n is copies.get(linear) else {}, degrees)
    except Untyped as error:
        node = next(n for n, copy in copies.items() if copy is error.node)
        why = str(error).replace("over tpa", "by heads")
        raise Reject(f"{what} can't be cut by heads: {why}", node, 6) from error
    got = layouts[copies[value]] if value in copies else heads
    if got != {"tpa": Shard(heads_dim)}:
        raise Reject(
            f"{what} can't be cut by heads: its layout is {format_layout(got)}, expected dim {heads_dim} cut", value, 6
        )
