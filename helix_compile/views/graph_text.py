"""A short view of a graph that keeps what a reader looks for, and shapes and layouts as text.

It prints matmuls, attention, cache updates, helix:: ops and collectives, and folds norms, rope and views
between them into one comment.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor, fx

from helix_compile.ir.elements import is_cache_update, is_layout_op
from helix_compile.ir.graph import aten, input_named, input_ref, is_call, is_param
from helix_compile.ir.sizes import shape_text

_KEY_OPS = frozenset(
    {
        aten.linear.default,
        aten.matmul.default,
        aten.bmm.default,
        aten.einsum.default,
        aten.topk.default,
        aten.scaled_dot_product_attention.default,
        aten._grouped_mm.default,
    }
)
_NAMESPACES = ("helix.", "_c10d_functional.", "transformers.")


def attention_block(body: fx.GraphModule, output_weight: str) -> list[str]:
    """Short view of a body from its start to the node behind the output projection."""
    graph = body.graph
    weight = input_named(graph, "param", output_weight)
    o_proj = next(n for n in weight.users if is_call(n, aten.linear.default))
    last = o_proj
    while len(last.users) == 1 and str(next(iter(last.users)).target).startswith(_NAMESPACES):
        last = next(iter(last.users))
    nodes = list(graph.nodes)
    return short_view(nodes[: nodes.index(last) + 1])


def short_view(nodes: list[fx.Node]) -> list[str]:
    """One line for each key op, one comment for each run of others between them."""
    lines: list[str] = []
    folded = 0
    for node in nodes:
        if node.op == "placeholder" or node.target in (operator.getitem, aten.sym_size.int):
            continue
        if not _is_key(node):
            folded += not is_layout_op(node) and isinstance(node.meta.get("val"), Tensor)
            continue
        if folded:
            lines.append(f"# {folded} elementwise ops (norms, rope)")
            folded = 0
        lines.append(_line(node))
    return lines


def _is_key(node: fx.Node) -> bool:
    if node.op == "call_module":
        return True
    return node.target in _KEY_OPS or str(node.target).startswith(_NAMESPACES) or is_cache_update(node)


def _line(node: fx.Node) -> str:
    items = [u.name for u in node.users if u.target is operator.getitem]
    left = ", ".join(items) if items else _name(node)
    args = ", ".join(_argument(a) for a in node.args if not isinstance(a, float))  # no scale, eps
    op = str(node.target).removesuffix(".default")
    return f"{left} = {op}({args})  # {shape_text(node.meta.get('val'))}"


def _argument(value: Any) -> str:
    if isinstance(value, fx.Node):
        root = _root(value)
        return parameter_text(input_ref(root).name) if is_param(root) else _name(root)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_argument(v) for v in value) + "]"
    return repr(value)


def _name(node: fx.Node) -> str:
    return node.name.replace("scaled_dot_product_attention", "sdpa")


def parameter_text(name: str) -> str:
    """What a reader needs of a parameter's name: self_attn.kv_b_proj.weight.w_uk as kv_b_proj.w_uk."""
    parts = [p for p in name.split(".") if p != "weight"]
    return ".".join(parts[-2:] if parts[-1].startswith(("w_", "bias")) else parts[-1:])


def _root(node: fx.Node) -> fx.Node:
    """The printed node that a folded one comes from first."""
    while node.op == "call_function" and not _is_key(node) and node.target is not operator.getitem:
        sources = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), (Tensor, tuple, list))]
        if not sources:
            return node
        node = next((s for s in sources if s.op != "placeholder"), sources[0])
    if node.target is operator.getitem and not _is_key(node.args[0]):
        return _root(node.args[0])
    return node
