"""One linear that makes both q and a gate: which of its rows make which, and where the two come apart.

    linear(x) -> view, split, ... -> q's parts -> ... -> q
                                  -> the gate's parts -> ... -> the gate

q is cut over the ranks that compute heads, a gate over those that own them: each becomes a linear of its own rows. Which
these are is read off the elements of the parts; that they make whole heads is shown in head_cuts.py, as of any linear.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import permutations

import torch
from torch import Tensor, fx

from helix_compile.ir.dataflow import ancestors, follow
from helix_compile.ir.elements import trace_elements
from helix_compile.ir.sizes import shape_of
from helix_compile.passes.match.head_cuts import HeadsOf
from helix_compile.passes.match.reject import Reject
from helix_compile.plan.matches import LinearPart, permuted

_ADVICE = (
    " (nearest that works: for each head some rows for q and some for the gate, each for one thing; or two linears)"
)


def heads_of_two(linear: fx.Node, queries: Sequence[fx.Node], gate: fx.Node, heads: int) -> tuple[HeadsOf, HeadsOf]:
    """What `linear` makes of q, and of the gate.

    Raises:
        Reject: they do not come apart, or not by rows; says at which node.
    """
    starts = _parted(linear, queries, gate)
    of_q, of_gate = (_heads(linear, nodes, role, heads) for role, nodes in starts.items())
    total = shape_of(linear)[-1]
    times = Counter(row for made in (of_q, of_gate) for head in made.rows for row in head)
    twice = sorted(row for row, n in times.items() if n > 1)
    if twice:
        raise Reject(
            f"{len(twice)} of {total} rows of `{linear.name}`, {twice[0]} the first, are read twice by q and the gate, "
            f"expected once{_ADVICE}",
            linear,
            6,
        )
    if len(times) != total:
        raise Reject(
            f"{total - len(times)} of {total} rows of `{linear.name}` reach neither q nor the gate{_ADVICE}", linear, 6
        )
    return of_q, of_gate


def _parted(linear: fx.Node, queries: Sequence[fx.Node], gate: fx.Node) -> dict[str, list[fx.Node]]:
    """The first values behind `linear` that are for q alone, and those for the gate alone."""
    of_q, of_gate = ancestors(queries, until=[linear]), ancestors([gate], until=[linear])
    behind = set(follow([linear], lambda n: n.users))
    both = (of_q & of_gate & behind) | {linear}
    starts: dict[str, list[fx.Node]] = {"q": [], "gate": []}
    for node in linear.graph.nodes:
        if node in both or not both.intersection(node.all_input_nodes):
            continue
        if node not in of_q and node not in of_gate and node.users:
            raise Reject(
                f"`{node.name}` ({node.target}) reads what `{linear.name}` makes of both q and the gate{_ADVICE}",
                node,
                6,
            )
        if node in of_q or node in of_gate:
            starts["q" if node in of_q else "gate"].append(node)
    return starts


def _heads(linear: fx.Node, nodes: list[fx.Node], role: str, heads: int) -> HeadsOf:
    """The rows that `nodes` hold, their channels one node after the other."""
    starts, parts, tables, first = {}, [], [], 0
    for node in nodes:
        form, rows = _rows(linear, node, role, heads)
        starts[node] = 2 if form == "BT(HC)" else form.index("H")
        parts.append(LinearPart(node.name, form, first, first + rows.shape[1]))
        tables.append(rows)
        first += rows.shape[1]
    if not nodes:
        raise Reject(f"`{linear.name}` makes q and the gate of the same values{_ADVICE}", linear, 6)
    return HeadsOf(linear, starts, role, tuple(map(tuple, torch.cat(tables, dim=1).tolist())), tuple(parts))


def _rows(linear: fx.Node, node: fx.Node, role: str, heads: int) -> tuple[str, Tensor]:
    """(order of dims, row of the linear [H, C]) of a value that is channels of every head."""
    source = trace_elements(node, stop=lambda n: n is linear)
    used = source.used()
    if used != [linear] or source.undefined() or len(shape_of(linear)) != 3:
        names = ", ".join(f"`{n.name}` ({n.target})" for n in used)
        whose = "the gate" if role == "gate" else role
        raise Reject(
            f"the first value behind `{linear.name}` that is for {whose} alone, `{node.name}`, is computed by {names} from rows "
            f"of q and the gate, expected moved out of them{_ADVICE}",
            node,
            6,
        )
    coordinates = source.coordinates(linear)
    assert coordinates is not None
    (B, T, _), dims = shape_of(linear), node.meta["val"].dim()
    forms = ["BT(HC)"] if dims == 3 else ["".join(p) for p in permutations("BTHC")] if dims == 4 else []
    for form in forms:
        if form == "BT(HC)" and coordinates[0].shape[2] % heads:
            continue
        batch, token, row = (
            x.unflatten(2, (heads, -1)) if form == "BT(HC)" else permuted(x, form, "BTHC") for x in coordinates
        )
        straight = batch.shape[:3] == (B, T, heads) and bool((row == row[:1, :1]).all())
        straight = straight and bool((batch == torch.arange(B).view(B, 1, 1, 1)).all())
        if straight and bool((token == torch.arange(T).view(1, T, 1, 1)).all()):
            return form, row[0, 0]
    raise Reject(
        f"`{node.name}` of shape {shape_of(node)} is not the same channels of each of {heads} heads, of its own sequence and "
        f"position, out of `{linear.name}` [{B}, {T}, {shape_of(linear)[-1]}]{_ADVICE}",
        node,
        6,
    )
