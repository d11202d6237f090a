"""A graph as Python that runs: one function a graph, with shape, layout and pass behind each line.

    def body_1(
        hidden,  # f32[B,T,128]  R
        ...
    ):
        # modeling_deepseek_v3.py:481
        linear_4 = torch.ops.aten.linear.default(o_flat, self_attn_o_proj_weight)  # f32[B,T,128]  world:P(sum)
        # modeling_deepseek_v3.py:481, from linear_4 by pass lowered
        all_reduce = torch.ops._c10d_functional.all_reduce.default(linear_4, 'sum', 'world')  # ...

The text of a stage is this for its bodies and the outer graph; a diff of two such texts is a diff of two stages.
"""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._logging import trace_structured

from helix_compile.errors import HelixError
from helix_compile.ir.origin import CAPTURED, ORIGIN, SOURCE, STAGE
from helix_compile.ir.sizes import layout_text, shape_text
from helix_compile.ir.stage import graphs_of

_WIDTH = 100


_HEADER = '''"""{title}

Shapes: B sequences, T new tokens, S cached ones. Layouts: R the same on every rank, S(d) cut along dim d, P(sum) a part
of a sum, PS attention over a part of the keys, L another value on each rank; over the mesh axis before the colon.
Group arguments of collectives are axis names.
"""

import operator

import torch

import helix_compile.ir.ops  # registers torch.ops.helix
{kernels}
inf, nan = float("inf"), float("nan")
'''


_KERNELS = {
    "helix_triton": "import helix_compile.kernels.catalog  # registers torch.ops.helix_triton\n",
    "helix_cpp": "import helix_compile.kernels.cpp.mla_decode  # registers torch.ops.helix_cpp\n",
}


def format_python(gm: fx.GraphModule, name: str, title: str = "") -> str:
    """A graph, and the bodies that it calls, as a module with one function each."""
    called = [(n, g) for n, g in reversed(graphs_of(gm)) if g is not gm]  # a segment before the body that calls it
    functions = [format_function(g.graph, n) for n, g in (*sorted(called, key=_is_body), (name, gm))]
    kernels = "".join(line for name, line in _KERNELS.items() if any(f"torch.ops.{name}." in f for f in functions))
    return "\n\n".join([_HEADER.format(title=title or name, kernels=kernels), *functions])


def _is_body(named: tuple[str, fx.GraphModule]) -> bool:
    return "_segment_" not in named[0]


def format_function(graph: fx.Graph, name: str, layouts: bool = True) -> str:
    """A graph as one function; `layouts` False leaves them out of the comments."""
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    lines = [f"def {name}("]
    lines += [f"    {n.name},{_comment(n, layouts)}" for n in inputs]
    lines.append("):")
    said = ""
    for node in graph.nodes:
        if node.op == "placeholder":
            continue
        if (origin := _origin_text(node)) != said:
            lines.append(f"    # {origin or 'no source line'}")
            said = origin
        lines += _statement(node, _comment(node, layouts))
    return "\n".join(lines) + "\n"


def _origin_text(node: fx.Node) -> str:
    source, stage = node.meta.get(SOURCE, ""), node.meta.get(STAGE, CAPTURED)
    if stage == CAPTURED:
        return source
    return f"{source}, from {', '.join(node.meta[ORIGIN])} by pass {stage}"


def _statement(node: fx.Node, comment: str) -> list[str]:
    if node.op == "output":
        return [f"    return {_literal(node.args[0])}"]
    if node.target is operator.getitem:
        return [f"    {node.name} = {node.args[0].name}[{node.args[1]!r}]{comment}"]
    if node.op == "get_attr":  # only a user's edit makes one
        return [f"    {node.name} = graph_module.{node.target}{comment}"]
    items = [_literal(a) for a in node.args[node.op == "call_method" :]]
    items += [f"{key}={_literal(value)}" for key, value in node.kwargs.items()]
    start = f"    {node.name} = {_callee(node)}("
    whole = f"{start}{', '.join(items)})"
    if len(whole) <= _WIDTH:
        return [whole + comment]
    return [start, *_wrapped(items), f"    ){comment}"]


def _wrapped(items: Iterable[str]) -> list[str]:
    """Arguments, as many a line as fit."""
    lines: list[str] = []
    for item in items:
        if lines and len(lines[-1]) + len(item) + 2 <= _WIDTH:
            lines[-1] += f" {item},"
        else:
            lines.append(f"        {item},")
    return lines


def _callee(node: fx.Node) -> str:
    if node.op == "call_module":
        return str(node.target)
    if node.op == "call_method":
        return f"{_literal(node.args[0])}.{node.target}"
    if isinstance(node.target, torch._ops.OpOverload):
        return f"torch.ops.{node.target}"
    module = getattr(node.target, "__module__", None) or "torch"
    return f"{module.removeprefix('_')}.{node.target.__name__}"


def _literal(value: Any) -> str:
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    if isinstance(value, tuple):
        return "(" + ", ".join(map(_literal, value)) + ("," if len(value) == 1 else "") + ")"
    if isinstance(value, torch.device):
        return f"torch.device({str(value)!r})"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # inf and nan are names of the module
    return repr(value)


def _comment(node: fx.Node, layouts: bool) -> str:
    layout = f"  {layout_text(node)}" if layouts and "layout" in node.meta else ""
    value = node.meta.get("val")
    first = value[0] if isinstance(value, (tuple, list)) and value else value
    if isinstance(first, Tensor):
        dtype = str(first.dtype).removeprefix("torch.").replace("float", "f").replace("int", "i")
        return f"  # {dtype}{shape_text(value)}{layout}"
    return f"  # {shape_text(value)}" if isinstance(value, (int, torch.SymInt)) else ""


def stage_diff(stages: dict[str, fx.GraphModule], before: str, after: str, context: int = 2) -> str:
    """Unified diff of two stages, graph by graph; graphs that are equal are left out.

    Layouts are compared where both stages have them: nobody infers those of a captured graph.
    """
    parts: list[str] = []
    held = [{n: g.graph for n, g in graphs_of(stages[stage])} for stage in (before, after)]
    names = list(dict.fromkeys(name for graphs in held for name in graphs))
    for shown in (*names[1:], names[0]):  # what is around the bodies last
        pair = [graphs[shown] for graphs in held if shown in graphs]
        typed = all(any("layout" in n.meta for n in graph.nodes) for graph in pair)
        old, new = (
            format_function(graphs[shown], shown, typed).splitlines() if shown in graphs else [] for graphs in held
        )
        parts += difflib.unified_diff(old, new, f"{before}/{shown}", f"{after}/{shown}", n=context, lineterm="")
    return "\n".join(parts) + ("\n" if parts else "")


def dump_to(folder: Path | None) -> Callable[[int, str, fx.GraphModule], None]:
    """What writes a stage to HELIX_DUMP's folder, and to torch's structured trace where one is written (TORCH_TRACE; tlparse shows it)."""

    def dump(number: int, stage: str, module: fx.GraphModule) -> None:
        name = f"{number:02d}_{stage}"

        def text() -> str:
            return format_python(module, "outer", f"Stage {stage}.")

        trace_structured("graph_dump", lambda: {"name": f"helix_{name}"}, payload_fn=text, expect_trace_id=False)
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise HelixError(f"HELIX_DUMP={folder}: can't be made a folder of graphs: {error}") from error
            (folder / f"{name}.txt").write_text(text())

    return dump
