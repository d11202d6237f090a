"""What lies between the walk's calls as programs of torch.export: torch's own ops alone, for any B and T from 1 on.

The cut is the one at collectives (passes/lower/segments.py), and at what touches a cache, the ledger or chosen experts as well:
those stay calls of helix:: ops that the walk names, so a program is a function of tensors that any torch loads and runs by itself.
Weights are among its inputs: one program serves all ranks and all layers that compute the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from helix_compile.capture.model import CAPTURING
from helix_compile.errors import ExportError, LoweringError
from helix_compile.export.manifest import EXPORT_ID
from helix_compile.export.program_file import read_program
from helix_compile.ir.fakes import FreshSizes
from helix_compile.ir.graph import helix_op, input_ref, placeholders
from helix_compile.ir.sizes import size_text
from helix_compile.ir.stage import graphs_of
from helix_compile.passes.lower.segments import is_boundary, segments_of
from helix_compile.runtime.inductor import WRITTEN_OUT, check_inductor, check_sizes, references, segment_key

_TORCHS = ("aten", "prims")
_LEDGER = {"cp", "tokens_per_block"}  # arguments of an op that knows the round robin of tokens
# as Inductor's own code for segments: rounded where the ops alone would round, on as many threads as torch has when it runs. Symbols
# begin at 2 while it is made, and what is made computes 1 too: AOTI_RUNTIME_CHECK_INPUTS is not to ask for 2
_NATIVE = {
    "emulate_precision_casts": True,
    "compile_threads": 1,
    "cpp.dynamic_threads": True,
    "aot_inductor.check_lowerbound": False,
}


def cut_for_export(lowered: fx.GraphModule) -> fx.GraphModule:
    """A lowered stage whose programs are calls of submodules; `lowered` is left as it is."""
    return segments_of(lowered, stays_in_walk)


def stays_in_walk(node: fx.Node) -> bool:
    """True for what is in no program: collectives, helix:: ops with a cache, ledger or experts, a view of a cache."""
    if is_boundary(node):
        return True
    op = helix_op(node)
    if op:
        return op not in WRITTEN_OUT or bool(_LEDGER & {argument.name for argument in node.target._schema.arguments})
    source = node
    while getattr(source.target, "is_view", False):
        source = source.args[0]
    return input_ref(source).kind == "cache"


def distinct_programs(stage: fx.GraphModule) -> tuple[dict[str, fx.GraphModule], dict[str, str]]:
    """Name -> graph of each program that differs, named after its first place; and every segment's name -> its program's."""
    named, of_segment, known = dict[str, fx.GraphModule](), dict[str, str](), dict[str, str]()
    for _, graph in graphs_of(stage):
        for node in graph.graph.nodes:
            if "segment" not in node.meta or (name := str(node.target)) in of_segment:
                continue
            segment = graph.get_submodule(name)
            assert isinstance(segment, fx.GraphModule)
            of_segment[name] = known.setdefault(segment_key(segment, {}), name)
            if of_segment[name] == name:
                named[name] = segment
    return named, of_segment


def program_of(segment: fx.GraphModule, name: str) -> ExportedProgram:
    """The program of a segment.

    Raises:
        ExportError: what can't be traced, or would hold for some sizes alone; names the program.
    """
    inputs = placeholders(segment.graph)
    with CAPTURING:  # a trace patches what all threads share
        sizes = FreshSizes()
        fakes = _fakes(inputs, sizes)
        try:
            with torch.no_grad():
                traced = make_fx(segment, decomposition_table=references(), tracing_mode="symbolic")(*fakes)
            check_sizes(sizes.environment, name)
            return _exported(_named(traced, [node.name for node in inputs], name))
        except ExportError:
            raise
        except LoweringError as error:
            raise ExportError(f"export: program {name} would not hold for all sizes: {error}") from error
        except Exception as error:  # torch's own classes are many
            first = str(error).strip().split("\n")[0]
            raise ExportError(f"export: program {name}: it can't be traced: {type(error).__name__}: {first}") from error


def _fakes(inputs: Sequence[fx.Node], sizes: FreshSizes) -> list[Tensor]:
    """Inputs in symbols that are the program's own. A size that no input shows by itself (B * T without B) is a symbol of its own."""
    alone = {s for node in inputs for size in node.meta["val"].shape for s in _symbols(size) if str(size) == str(s)}
    others: dict[str, Any] = {}
    made = []
    for node in inputs:
        value = node.meta["val"]
        hidden = [dim for dim, size in enumerate(value.shape) if _symbols(size) - alone]
        if not hidden:
            # what a rank holds lies in a row, whatever it was cut from
            is_held = input_ref(node).kind in ("param", "cache")
            made.append(sizes.tensor(value, _row_strides(value.shape) if is_held else None))
            continue
        shape = [sizes.size(size) for size in value.shape]
        for dim in hidden:
            if (text := str(value.shape[dim])) not in others:
                others[text] = sizes.other()
            shape[dim] = others[text]
        with sizes.mode:
            made.append(torch.empty(shape, dtype=value.dtype, device=value.device))
    return made


def _symbols(size: Any) -> set[Any]:
    return set(size.node.expr.free_symbols) if isinstance(size, torch.SymInt) else set()


def _row_strides(shape: Sequence[Any]) -> list[Any]:
    strides: list[Any] = []
    step = 1
    for size in reversed(shape):
        strides.insert(0, step)
        step = step * max(int(size), 1)
    return strides


def _named(traced: fx.GraphModule, names: Sequence[str], program: str) -> fx.Graph:
    """The graph with inputs of these names and one tuple of outputs."""
    graph, new = fx.Graph(), dict[fx.Node, fx.Node]()
    inputs = iter(names)
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            new[node] = graph.placeholder(next(inputs))
        elif node.op == "output":
            outputs = node.args[0] if isinstance(node.args[0], (tuple, list)) else (node.args[0],)
            graph.output(tuple(new[n] for n in outputs))
        elif node.op == "get_attr":
            raise ExportError(f"export: program {program}: `{node.name}` is a tensor that the graph itself holds")
        elif (library := getattr(node.target, "namespace", "aten")) not in _TORCHS:
            raise ExportError(
                f"export: program {program}: {node.target} is an op of {library}, which who runs the program would need too; write it out "
                "in torch's own ops"
            )
        else:
            new[node] = graph.node_copy(node, new.__getitem__)
        if node in new:
            new[node].meta = {"val": node.meta["val"]} if "val" in node.meta else {}
    return graph


def _exported(graph: fx.Graph) -> ExportedProgram:
    inputs, (outputs,) = placeholders(graph), graph.output_node().args
    ranges = dict[Any, ValueRanges[Any]]()
    for node in inputs:
        for size in node.meta["val"].shape:
            ranges |= {s: ValueRanges(1, int_oo) for s in _symbols(size)}
    signature = ExportGraphSignature(
        [InputSpec(InputKind.USER_INPUT, TensorArgument(node.name), None) for node in inputs],
        [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None) for node in outputs],
    )
    call = ModuleCallSignature(
        [],
        [],
        pytree.tree_structure((tuple(range(len(inputs))), {})),
        pytree.tree_structure(tuple(range(len(outputs)))),
        [node.name for node in inputs],
    )
    # symbols begin at 2 where they were traced: no size is broadcast there, so what is computed for them holds for 1 too
    return ExportedProgram(torch.nn.Module(), graph, signature, {}, ranges, [ModuleCallEntry("", call)])


def save_program(program: ExportedProgram, path: Path, identity: str) -> None:
    """A file that torch.export.load() reads: it is asked, for it does not read all that torch.export.save() writes."""
    torch.export.save(program, path, extra_files={EXPORT_ID: identity})
    read_program(path)


def check_native(device: torch.device) -> None:
    """Raise LoweringUnavailable where AOTInductor can't compile, ExportError where it has nothing to compile for."""
    if device.type == "meta":
        raise ExportError(
            "format='aoti': a module on the meta device has no device to compile for; compile the model with weights, or "
            "format='pt2'"
        )
    check_inductor(device)


def save_native(program: ExportedProgram, path: Path, identity: str) -> None:
    """A file that torch._inductor.aoti_load_package() reads: machine code of this kind of machine and this version of torch.

    Raises:
        ExportError: AOTInductor can't compile it.
    """
    program.example_inputs = (tuple(node.meta["val"] for node in placeholders(program.graph)), {})
    options: dict[str, Any] = {**_NATIVE, "aot_inductor.metadata": {EXPORT_ID: identity}}
    try:
        with torch.no_grad(), CAPTURING:
            torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=options)
    except Exception as error:  # Inductor's own classes are many
        first = str(error).strip().split("\n")[0]
        raise ExportError(
            f"format='aoti': {path.name}: AOTInductor does not compile it: {type(error).__name__}: {first}; format='pt2' has "
            "the same programs as graphs"
        ) from error


def described_program(segment: fx.GraphModule) -> dict[str, Any]:
    """What a manifest says of a program; letters are free sizes."""
    (outputs,) = segment.graph.output_node().args
    described = {
        "inputs": [_described(node) for node in placeholders(segment.graph)],
        "outputs": [_described(node) for node in outputs],
    }
    return described


def _described(node: fx.Node) -> dict[str, Any]:
    value = node.meta["val"]
    shape = [size if isinstance(size, int) else size_text(size) for size in value.shape]
    return {"name": node.name, "dtype": str(value.dtype).removeprefix("torch."), "shape": shape}
