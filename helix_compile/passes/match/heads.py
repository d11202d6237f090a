"""What must be cut by heads around an attention site: q's linear, a gate's linear, and the columns of o_proj.

    anchor [B, H, T, V] -> layout ops -> (x gate) -> layout ops -> linear(o_proj)

That rows of a linear make one head alone is shown in head_cuts.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from helix_compile.ir.dataflow import ancestors, follow
from helix_compile.ir.elements import is_layout_op, trace_elements
from helix_compile.ir.graph import aten, input_ref, is_call, is_param, node_named
from helix_compile.ir.sizes import shape_of
from helix_compile.passes.match.head_cuts import HeadsOf, check_head_rows, heads_of
from helix_compile.passes.match.joint import heads_of_two
from helix_compile.passes.match.reject import Reject, computed_weight
from helix_compile.plan.matches import GateMatch, HeadLinear, permuted


def linears_before(values: Iterable[fx.Node]) -> list[fx.Node]:
    """The linears that `values` come from through no other linear; themselves where they are one."""
    before = follow(values, lambda n: () if is_call(n, aten.linear.default) else n.all_input_nodes)
    return [n for n in before if is_call(n, aten.linear.default)]


def one_linear(value: fx.Node, what: str) -> fx.Node:
    """The one linear whose output becomes `value`."""
    found = linears_before([value])
    if len(found) != 1:
        raise Reject(f"{what} must come from one linear, it comes from {len(found)}", value, 6)
    return found[0]


def param_of(linear: fx.Node, argument: int) -> str:
    """Name of the parameter that is `argument` of a linear; Reject where it is computed."""
    weight = linear.args[argument]
    if not is_param(weight):
        raise Reject(computed_weight(linear, weight), linear, 6)
    return input_ref(weight).name


def bias_of(linear: fx.Node) -> str | None:
    """Name of a linear's bias, or None."""
    return param_of(linear, 2) if len(linear.args) > 2 and linear.args[2] is not None else None


def head_linear(made: HeadsOf, heads: int, views: tuple[str, ...]) -> HeadLinear:
    """A linear that makes `heads` heads."""
    linear = made.linear
    total, inputs = shape_of(linear)[-1], shape_of(linear.args[0])[-1]
    params = param_of(linear, 1), bias_of(linear)
    of_two = (made.role, made.rows, total, made.parts) if made.role else ()
    return HeadLinear(linear.name, *params, heads, made.count // heads, inputs, views, *of_two)


def heads_of_q(linear: fx.Node, queries: Sequence[fx.Node], heads: int, gate: GateMatch | None) -> HeadsOf:
    """What a linear makes of q; of one that makes the gate too, what is q's."""
    if gate is None or gate.linear is None or gate.linear.node != linear.name:
        return heads_of(linear)
    return heads_of_two(linear, queries, node_named(linear.graph, gate.value), heads)[0]


def output_projection(anchor: fx.Node, form: str, queries: Sequence[fx.Node]) -> tuple[fx.Node, GateMatch | None]:
    """The first linear behind attention [form], reached by single users through layout ops and at most one gate.

    Its input column h * V + v is channel v of head h. The gate may come from the linear that makes q, which is `queries`.
    """
    node, product, last = anchor, None, anchor
    while not is_call(node, aten.linear.default):
        if len(node.users) != 1:
            raise Reject(f"{len(node.users)} users between attention and its output projection", node, 6)
        before, node = node, next(iter(node.users))
        if is_call(node, aten.mul.Tensor) and product is None and len(node.all_input_nodes) == 2:
            product, last = (node, before), node
        elif product and before is product[0] and _casts_back(node, anchor):
            last = node
        elif not (is_layout_op(node) or is_call(node, aten.linear.default)):
            raise Reject(f"`{node.target}` stands between attention and its output projection", node, 6)
    source = trace_elements(node.args[0], stop=lambda n: n is last)
    at = source.coordinates(last) if last in source.sources else None
    if at is None or source.ids.dim() != 3:
        raise Reject("the output projection does not read all heads of attention", node, 6)
    gate = None
    if product is not None:
        attended = trace_elements(product[1], stop=lambda n: n is anchor)
        inside = attended.coordinates(anchor)
        if inside is None or attended.ids.shape != shape_of(product[0]):
            raise Reject("a gate widens what attention returns", product[0], 6)
        at = tuple(c[at] for c in inside)
        gate = replace(_gate(*product, attended.ids, anchor, form, queries), cast=last is not product[0])
    _check_columns(at, anchor, node, form)
    return node, gate


def _casts_back(node: fx.Node, anchor: fx.Node) -> bool:
    """A gate in float32 makes the product wider; this is the cast to what attention returned."""
    return is_call(node, aten._to_copy.default) and node.meta["val"].dtype == anchor.meta["val"].dtype


def _check_columns(at: tuple[Tensor, ...], anchor: fx.Node, o_proj: fx.Node, form: str) -> None:
    batch, head, token, channel = (at[form.index(c)] for c in "BHTV")
    B, T, width = batch.shape
    H, V = (shape_of(anchor)[form.index(c)] for c in "HV")
    straight = bool((batch == torch.arange(B).view(B, 1, 1)).all()) and bool(
        (token == torch.arange(T).view(1, T, 1)).all()
    )
    if not straight or width != H * V:
        raise Reject("the output projection mixes sequences or positions", o_proj, 6)
    if not torch.equal(head[0, 0] * V + channel[0, 0], torch.arange(width)):
        raise Reject("the output projection reads heads that are not whole blocks of columns", o_proj, 6)


def gate_by_head(gate: Any, form: str, v_head_dim: int) -> list[tuple[Any, ...]]:
    """(op, args...) that bring a gate in `form` to [B, T, H, V or 1], as for o [B, T, H, V]."""
    if form == "BHTV":
        return [(aten.transpose.int, 1, 2)]
    if form == "BT(HV)":
        return [(aten.unflatten.int, 2, [-1, v_head_dim])]
    return []


def _gate(
    product: fx.Node, attended: fx.Node, ids: Tensor, anchor: fx.Node, order: str, queries: Sequence[fx.Node]
) -> GateMatch:
    """The gate of product = attended * gate, cut by heads where it has heads."""
    lying = (ids.flatten().min() + torch.arange(ids.numel())).view(shape_of(anchor))
    straight = permuted(lying, order, "BHTV")
    H, V = straight.shape[1], straight.shape[3]
    forms = {"BTHV": straight.transpose(1, 2), "BHTV": straight, "BT(HV)": straight.transpose(1, 2).flatten(2)}
    form = next((f for f, x in forms.items() if x.shape == ids.shape and torch.equal(x, ids)), None)
    gate = next(n for n in product.args if n is not attended)
    assert isinstance(gate, fx.Node)
    size = shape_of(gate)
    if form is None or len(size) != ids.dim() or (form == "BT(HV)" and size[2] != H * V):
        raise Reject(f"a gate of shape {size} on attention of shape {tuple(ids.shape)}", product, 6)
    names = (product.name, gate.name, form)
    heads = {"BTHV": size[2], "BHTV": size[1]}.get(form, H) if len(size) == 4 else H
    if heads == 1:  # the same for all heads: nothing to cut
        return GateMatch(*names)

    def by_head(value: Tensor) -> Tensor:
        for op, *args in gate_by_head(gate, form, V):
            value = op(value, *args)
        return value

    linear = one_linear(gate, "the gate")
    made = heads_of_two(linear, queries, gate, H)[1] if linear in linears_before(queries) else heads_of(linear)
    _refuse_other_readers(made, gate, product, anchor)
    heads_dim = form.index("H") if len(size) == 4 else 2
    try:
        views = check_head_rows(gate, made, by_head, heads_dim, "the gate")
    except Reject as rejection:
        raise _with_advice(rejection) from rejection
    weights = [a for a in linear.args[1:] if a is not None]
    if not all(map(is_param, weights)):
        raise Reject("the weight of the gate's linear is computed, not a parameter", linear, 6)
    return GateMatch(*names, linear=head_linear(made, H, views))


def _with_advice(rejection: Reject) -> Reject:
    """A gate is cut over all ranks, so no smaller tpa would help."""
    rejection.failure = replace(
        rejection.failure,
        reason=f"{rejection.failure.reason} (a gate is cut over all cp * tpa ranks; nearest that works: a gate whose "
        "linear makes the heads one after the other, with nothing across them)",
    )
    return rejection


def _refuse_other_readers(made: HeadsOf, gate: fx.Node, product: fx.Node, anchor: fx.Node) -> None:
    """What is between the gate's linear and the product is for the gate alone: it will be cut by heads."""
    attended = ancestors([anchor])
    for start in made.starts:
        if start in attended:
            raise Reject(
                f"the gate and what attention reads besides q come from one linear `{made.linear.name}` of "
                f"{shape_of(made.linear)[-1]} rows, which are cut by two rules (nearest that works: the gate as a linear of "
                "its own, or of one linear with q)",
                made.linear,
                6,
            )
    for node in follow(made.starts, lambda n: [u for u in n.users if u is not product]):
        for user in node.users:
            if user is product and node is gate:
                continue
            if user.op == "output" or user is product or is_call(user, aten.linear.default):
                raise Reject(f"`{node.name}` of the gate is read by `{user.name}` too", node, 6)
