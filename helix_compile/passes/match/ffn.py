"""Find FFNs by dataflow: dense ones and shared experts, and routed experts in both forms that transformers exports.

    dense        linear(act(linear(x)) * linear(x))
    batched_mm   index(gate_up, [ids]) bmm repeat_interleave(x, k) -> act * up -> index(down, [ids]) bmm -> * w -> sum(k)
    grouped_mm   sort(ids) -> x[order // k] grouped gate_up -> act * up -> grouped down -> * w[order] -> unsort -> sum(k)

Routed experts start from the product act(gate) * up whose halves come from one product with a 3-D parameter.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from helix_compile.ir.graph import aten, calls, input_ref, is_call, is_param, source_line
from helix_compile.ir.sizes import shape_of
from helix_compile.plan.matches import DenseFFNMatch, MatchFailure, MoEMatch

# f(0) * 0 = 0 for each, so rows of padding in a shard add nothing
ACTIVATIONS = (aten.silu.default, aten.gelu.default, aten.relu.default, aten.tanh.default)


def find_dense_ffns(graph: fx.Graph) -> list[DenseFFNMatch]:
    """Every gated FFN whose three weights are parameters, in graph order."""
    found = [_match(product) for product in calls(graph, aten.mul.Tensor)]
    return [match for match in found if match is not None]


def _match(product: fx.Node) -> DenseFFNMatch | None:
    sides = [a for a in product.args if isinstance(a, fx.Node)]
    act = next((a for a in sides if is_call(a, *ACTIVATIONS)), None)
    if act is None or len(sides) != 2 or len(product.users) != 1:
        return None
    gate, up = act.args[0], sides[1 - sides.index(act)]
    down = next(iter(product.users))
    linears = (gate, up, down)
    if not all(is_call(n, aten.linear.default) and is_param(n.args[1]) for n in linears):
        return None
    if gate.args[0] is not up.args[0] or down.args[0] is not product:
        return None
    return DenseFFNMatch(
        gate=gate.name,
        up=up.name,
        product=product.name,
        down=down.name,
        gate_weight=_name(gate, 1),
        gate_bias=_bias(gate),
        up_weight=_name(up, 1),
        up_bias=_bias(up),
        down_weight=_name(down, 1),
        down_bias=_bias(down),
        width=shape_of(gate)[-1],
        input_size=shape_of(gate.args[0])[-1],
        hidden_size=shape_of(down)[-1],
    )


def _name(linear: Any, argument: int) -> str:
    return input_ref(linear.args[argument]).name


def _bias(linear: Any) -> str | None:
    has_bias = len(linear.args) > 2 and linear.args[2] is not None
    return _name(linear, 2) if has_bias else None


_RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


def _is_grouped(node: Any) -> bool:
    """A grouped matmul: torch's, or the op that transformers registers for dtypes that torch's does not take."""
    return is_call(node, aten._grouped_mm.default) or (
        isinstance(node, fx.Node) and str(node.target) == "transformers.grouped_mm_fallback.default"
    )


class _Reject(Exception):
    """Unwinds one candidate."""


def find_moes(graph: fx.Graph) -> list[MoEMatch | MatchFailure]:
    """Every place where an FFN's weights are chosen per token, in graph order."""
    results: list[MoEMatch | MatchFailure] = []
    for product in calls(graph, aten.mul.Tensor):
        halves = _halves(product)
        if halves is None:
            continue
        try:
            results.append(_match_moe(product, *halves))
        except _Reject as rejection:
            results.append(MatchFailure(str(rejection), product.name, source_line(product)))
    return results


def _halves(product: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(activation, split) if `product` is act(split[0]) * split[1] of the gate_up product."""
    for act, up in (product.args, product.args[::-1]):
        if isinstance(act, fx.Node) and is_call(up, operator.getitem) and len(act.all_input_nodes) == 1:
            gate = act.args[0]
            if is_call(gate, operator.getitem) and gate.args[0] is up.args[0]:
                split = gate.args[0]
                made = _strip(split.args[0], aten.squeeze.dim)
                if (is_call(made, aten.bmm.default) or _is_grouped(made)) and (gate.args[1], up.args[1]) == (0, 1):
                    return act, split
    return None


def _strip(node: Any, *targets: Any) -> Any:
    while is_call(node, *targets):
        node = node.args[0]
    return node


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise _Reject(reason)


def _match_moe(product: fx.Node, act: fx.Node, split: fx.Node) -> MoEMatch:
    _require(is_call(act, aten.silu.default), f"experts with activation `{act.target}`; expected silu")
    first = _strip(split.args[0], aten.squeeze.dim)
    match = _batched if is_call(first, aten.bmm.default) else _grouped
    gate_up, down, x, ids, weighted, weights, form = match(first, product)
    output, top_k = _sum_over_choices(weighted)
    x, ids, weights = (_strip(n, *_RESHAPES) if n is not x else n for n in (x, ids, weights))
    E, twice_F, D = shape_of(gate_up)
    _require(shape_of(down) == (E, D, twice_F // 2), f"down is {shape_of(down)}, gate_up {shape_of(gate_up)}")
    _require(shape_of(ids)[-1:] == (top_k,), f"expert ids {shape_of(ids)} do not hold {top_k} choices")
    _require(shape_of(x)[-1] == D, f"tokens {shape_of(x)} are not {D} wide")
    seam, shared = _seam(output)
    return MoEMatch(
        x=x.name,
        expert_ids=ids.name,
        weights=weights.name,
        output=output.name,
        gate_up=input_ref(gate_up).name,
        down=input_ref(down).name,
        form=form,
        num_experts=E,
        top_k=top_k,
        width=twice_F // 2,
        hidden_size=D,
        seam=seam.name,
        shared=shared.name if shared else None,
    )


def _batched(first: fx.Node, product: fx.Node) -> tuple:
    gate_up, ids = _chosen(first.args[0])
    tokens = _strip(first.args[1], aten.unsqueeze.default)
    _require(is_call(tokens, aten.repeat_interleave.self_int), "tokens are not repeated k times")
    second = _only_user(_only_user(product, aten.unsqueeze.default), aten.bmm.default)
    down, down_ids = _chosen(second.args[0])
    _require(down_ids is ids, "gate_up and down are chosen by different ids")
    weighted = _only_user(_only_user(second, aten.squeeze.dim), aten.mul.Tensor)
    weights = _strip(weighted.args[1], aten.unsqueeze.default)
    return gate_up, down, tokens.args[0], ids, weighted, weights, "batched_mm"


def _chosen(node: Any) -> tuple[fx.Node, fx.Node]:
    """(parameter, ids) of index(parameter, [ids])."""
    _require(is_call(node, aten.index.Tensor) and is_param(node.args[0]), "weights are not parameter[ids]")
    return node.args[0], node.args[1][0]


def _grouped(first: fx.Node, product: fx.Node) -> tuple:
    tokens, offsets = first.args[0], first.args[2]
    _require(is_call(tokens, aten.index.Tensor), "tokens are not gathered by sorted expert")
    gathered = tokens.args[1][0]
    _require(is_call(gathered, aten.floor_divide.default), "rows are not order // k")
    order = gathered.args[0]
    _require(is_call(order, operator.getitem) and is_call(order.args[0], aten.sort.default), "no sort of ids")
    sort = order.args[0]
    counts = _strip(offsets, aten.cumsum.default)
    _require(is_call(counts, aten.histc.default), "offsets are not a running count of ids")
    counted = _strip(counts.args[0], aten._to_copy.default)
    _require(counted.args == (sort, 0), "the counted ids are not the sorted ones")
    second = next(iter(product.users))
    _require(len(product.users) == 1 and _is_grouped(second), f"`{product.name}` feeds no grouped matmul")
    _require(second.args[2] is offsets, "gate_up and down use different offsets")
    weighted = _only_user(second, aten.mul.Tensor)
    chosen = _strip(weighted.args[1], aten.unsqueeze.default)
    _require(is_call(chosen, aten.index.Tensor) and chosen.args[1][0] is order, "weights are not w[order]")
    unsorted = _only_user(weighted, aten.index.Tensor)
    inverse = unsorted.args[1][0]
    _require(
        is_call(inverse, aten.index_put.default)
        and inverse.args[1][0] is order
        and is_call(inverse.args[2], aten.arange.default),
        "rows are not put back by the inverse of order",
    )
    gate_up, down = (_transposed(n.args[1]) for n in (first, second))
    return gate_up, down, tokens.args[0], sort.args[0], unsorted, chosen.args[0], "grouped_mm"


def _transposed(node: Any) -> fx.Node:
    ok = is_call(node, aten.transpose.int) and is_param(node.args[0])
    _require(ok and sorted(d % 3 for d in node.args[1:]) == [1, 2], "expert weights are not transposed parameters")
    return node.args[0]


def _only_user(node: fx.Node, *targets: Any) -> fx.Node:
    users = list(node.users)
    names = ", ".join(str(u.target) for u in users)
    _require(len(users) == 1 and is_call(users[0], *targets), f"`{node.name}` is used by {names}")
    return users[0]


def _sum_over_choices(weighted: fx.Node) -> tuple[fx.Node, int]:
    """The sum over a token's k choices, with the cast that follows it where there is one."""
    grid = _only_user(weighted, *_RESHAPES)
    total = _only_user(grid, aten.sum.dim_IntList)
    _require(list(total.args[1]) == [1], f"choices are summed over dims {total.args[1]}, expected [1]")
    users = list(total.users)
    casted = len(users) == 1 and is_call(users[0], aten._to_copy.default)
    return (users[0] if casted else total), shape_of(grid)[1]


def _seam(output: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """(addition of a shared expert, its down linear), or (routed output, None)."""
    node = output
    while len(node.users) == 1 and is_call(next(iter(node.users)), *_RESHAPES):
        node = next(iter(node.users))
    user = next(iter(node.users), None)
    if user is not None and len(node.users) == 1 and is_call(user, aten.add.Tensor):
        other = user.args[1] if user.args[0] is node else user.args[0]
        gated = is_call(other, aten.linear.default) and is_call(other.args[0], aten.mul.Tensor)
        if gated and len(other.users) == 1 and is_param(other.args[1]):
            return user, other
    return output, None
