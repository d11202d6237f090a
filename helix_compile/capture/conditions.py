"""Does an exported program hold for every step within the ranges of its Dims? Export may bind it to more: `B * T <= 16`.

Its conditions are guards (texts that torch wrote: `L['pasts'][0].size()[2] + L['input_ids'].size()[1] <= 16`) and assertions in
its graph. Most relate sizes that are one by what a step is (the mask is as wide as the cache with the step). What is left binds
sizes of a step: a program that is the model for some of them alone.
"""

from __future__ import annotations

import ast
import itertools
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.export import ExportedProgram

from helix_compile.errors import CaptureError
from helix_compile.ir.graph import aten, is_call


class _Step(NamedTuple):
    """Sizes of a step: sequences, new tokens, cached tokens."""

    B: int
    T: int
    S: int


# export holds for no size below 2; small ones for remainders, large ones for bounds
_TRIED = ((2, 3, 4, 5, 64, 1001), (2, 3, 4, 5, 6, 7, 8, 64, 513, 5003), (2, 3, 4, 5, 7, 64, 1000, 100_003))
_ALLOWED = (
    ast.Expression, ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.USub, ast.BinOp, ast.Add, ast.Sub, ast.Mult,
    ast.FloorDiv, ast.Mod, ast.Compare, ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Constant, ast.Name, ast.Load,
    ast.Subscript,
)  # fmt: skip
_SIZE_OPS = {
    operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod, operator.neg, operator.eq, operator.ne,
    operator.lt, operator.le, operator.gt, operator.ge, operator.and_, operator.or_, operator.not_, operator.truediv,
    torch.sym_not, torch.sym_max, torch.sym_min, torch.sym_int, torch.sym_float, torch.sym_ite,
}  # fmt: skip
Holds = Callable[[_Step], bool]


def check_conditions(
    program: ExportedProgram, roles: Mapping[str, tuple[str, torch.Size]], limits: Mapping[str, tuple[int, int]]
) -> None:
    """Refuse a program that is bound to more than the ranges of its sizes.

    Args:
        roles: of each input its role ("input_ids", "attention_mask", "position_ids", "past", else "") and example shape.
        limits: of "B", "T" and "S" the smallest and largest.

    Raises:
        CaptureError: the condition, and a step that it excludes.
    """
    for text, holds in [*_guards(program, roles), *_assertions(program, roles)]:
        for sizes in _tried(limits):
            if not holds(sizes):
                raise CaptureError(
                    f"capture: the program was exported under a condition that binds its sizes together, `{text}`: it does not "
                    f"hold for {sizes.B} sequences, {sizes.T} new tokens and {sizes.S} cached ones, and what the model does there is "
                    "not in it; export it without that branch, or give the model itself"
                )


def _tried(limits: Mapping[str, tuple[int, int]]) -> Iterator[_Step]:
    within = []
    for letter, sizes in zip("BTS", _TRIED, strict=True):
        low, high = limits.get(letter, (0, max(sizes)))
        within.append(sorted({min(max(size, low, 2), max(high, 2)) for size in sizes}))
    yield from (_Step(*sizes) for sizes in itertools.product(*within))


def _size(roles: Mapping[str, tuple[str, torch.Size]], name: str, dim: int, step: _Step) -> int:
    role, shape = roles[name]
    of_role = {
        "input_ids": {0: step.B, 1: step.T},
        "attention_mask": {0: step.B, 1: step.S + step.T},
        "position_ids": {0: step.B, 1: step.T},
        "past": {0: step.B, 2: step.S},
    }.get(role, {})
    size: Any = shape[dim]
    return size if isinstance(size, int) else of_role[dim]


def _guards(program: ExportedProgram, roles: Mapping[str, tuple[str, torch.Size]]) -> Iterator[tuple[str, Holds]]:
    """The texts that torch keeps; nothing of them runs but sums and comparisons of sizes."""
    for text in getattr(program, "_guards_code", None) or []:
        reader = _Sizes()
        tree = ast.fix_missing_locations(reader.visit(ast.parse(text, mode="eval")))
        known = all(map(_is_allowed, ast.walk(tree))) and all(n in roles for n, _ in reader.read)
        if not known:
            raise CaptureError(f"capture: the program was exported under a condition that can't be read here: `{text}`")
        code = compile(tree, "<condition>", "eval")

        def holds(step: _Step, code: Any = code, read: list[tuple[str, int]] = reader.read) -> bool:
            return bool(
                eval(
                    code,
                    {"__builtins__": {}, "min": min, "max": max},
                    {"sizes": [_size(roles, n, d, step) for n, d in read]},
                )
            )

        yield text, holds


def _is_allowed(node: ast.AST) -> bool:
    """Sums and comparisons, and the lesser or larger of some."""
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in ("min", "max") and not node.keywords
    return isinstance(node, _ALLOWED)


class _Sizes(ast.NodeTransformer):
    """L['pasts'][0].size()[2] as sizes[i], where read[i] is ("pasts_0", 2)."""

    def __init__(self) -> None:
        self.read: list[tuple[str, int]] = []

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        value, dim = node.value, node.slice
        is_size = isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr == "size"
        if not is_size or not isinstance(dim, ast.Constant) or not isinstance(dim.value, int):
            return self.generic_visit(node)
        assert isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute)
        keys, inner = [], value.func.value
        while isinstance(inner, ast.Subscript) and isinstance(inner.slice, ast.Constant):
            keys.append(str(inner.slice.value))
            inner = inner.value
        self.read.append(("_".join(reversed(keys)), dim.value))
        return ast.parse(f"sizes[{len(self.read) - 1}]", mode="eval").body


def _assertions(program: ExportedProgram, roles: Mapping[str, tuple[str, torch.Size]]) -> Iterator[tuple[str, Holds]]:
    """Of torch._check() and of guards that were put off, where they are of sizes alone."""
    for node in program.graph.nodes:
        if (
            is_call(node, aten._assert_scalar.default)
            and isinstance(node.args[0], fx.Node)
            and _is_of_sizes(node.args[0])
        ):

            def holds(step: _Step, condition: fx.Node = node.args[0]) -> bool:
                return bool(_value(condition, roles, step))

            yield str(node.args[1]).removeprefix("Runtime assertion failed for expression ").split(" on node")[0], holds


def _is_of_sizes(node: fx.Node) -> bool:
    if is_call(node, aten.sym_size.int):
        return isinstance(node.args[0], fx.Node) and node.args[0].op == "placeholder"
    return node.target in _SIZE_OPS and all(map(_is_of_sizes, node.all_input_nodes))


def _value(node: Any, roles: Mapping[str, tuple[str, torch.Size]], step: _Step) -> Any:
    if not isinstance(node, fx.Node):
        return node
    if is_call(node, aten.sym_size.int):
        return _size(roles, node.args[0].name, node.args[1], step)
    target: Any = node.target
    return target(*(_value(a, roles, step) for a in node.args))
