"""Find dense FFNs and shared experts by dataflow: linear(act(linear(x)) * linear(x))."""

from __future__ import annotations

from typing import Any

from torch import fx

from helix_compile.matches import DenseFFNMatch
from helix_compile.passes.fx_edit import aten, calls, is_call, is_param
from helix_compile.passes.index_provenance import shape_of

# f(0) * 0 = 0 for each, so rows of padding in a shard add nothing
ACTIVATIONS = (
    aten.silu.default,
    aten.gelu.default,
    aten.relu.default,
    aten.tanh.default,
)


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
        gate=gate.name, up=up.name, product=product.name, down=down.name,
        gate_weight=_name(gate, 1), gate_bias=_bias(gate), up_weight=_name(up, 1), up_bias=_bias(up),
        down_weight=_name(down, 1), down_bias=_bias(down),
        width=shape_of(gate)[-1], input_size=shape_of(gate.args[0])[-1],
        hidden_size=shape_of(down)[-1],
    )  # fmt: skip


def _name(linear: Any, place: int) -> str:
    return linear.args[place].meta["input"][1]


def _bias(linear: Any) -> str | None:
    has_bias = len(linear.args) > 2 and linear.args[2] is not None
    return _name(linear, 2) if has_bias else None
