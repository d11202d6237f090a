"""A layer against its graph, as torch.export wrote it, at sizes of one's choice: every value by its digest, none computed.

torch.export answers `if T == 1`, `k = 1 if T == 1 else 2` or a Python number made from a size once, for the sizes that it
saw. Both are therefore run at other sizes on fake tensors: the same operators on the same values with the same constants,
ints included, or something differs (value_digest.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from helix_compile.capture.value_digest import DigestMode

EXPORTED = "exported"  # of a captured body's meta, until it was compared: Exported


class Exported(NamedTuple):
    """A graph before it was made functional.

    Attributes:
        inputs: of each placeholder, the name of a tensor of the module, or "" and the number of the input.
        examples: the inputs, with sizes as symbols.
        constants: tensors of the graph by name.
    """

    module: fx.GraphModule
    inputs: list[tuple[str, int]]
    examples: list[Any]
    constants: Mapping[str, Any]


def as_exported(program: ExportedProgram, prefix: str) -> Exported:
    """The graph of `program` with what its placeholders are; names of tensors begin with `prefix`."""
    inputs: list[tuple[str, int]] = []
    examples: list[Any] = []
    values = {n.name: n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder"}
    for spec in program.graph_signature.input_specs:
        if spec.kind is InputKind.USER_INPUT:
            inputs.append(("", len(examples)))
            examples.append(values[spec.arg.name])
        else:
            inputs.append((str(spec.target).removeprefix(prefix), -1))
    constants = {name.removeprefix(prefix): value for name, value in program.constants.items()}
    return Exported(fx.GraphModule(program.graph_module, program.graph), inputs, examples, constants)


def same_values(
    exported: Exported,
    tensors: Mapping[str, Tensor],
    given: list[Tensor],
    device: torch.device,
    run: Callable[[dict[str, Tensor], list[Tensor]], list[Tensor]],
    compiling: AbstractContextManager[Any],
) -> bool:
    """Does `run`, on stand-ins for the tensors by name and for the inputs, compute what the graph does?

    Args:
        tensors: of the module; one tensor of several names is one value.
        given: examples of the inputs, of the sizes to compare at; they may be on meta.
        device: where the inputs are to be.
        run: the module itself.
        compiling: open while it runs.
    """

    def stand_ins(mode: DigestMode) -> tuple[dict[str, Tensor], list[Tensor]]:
        own: dict[int, Tensor] = {}
        for name, tensor in tensors.items():
            if id(tensor) not in own:
                own[id(tensor)] = mode.stand_in(tensor, f"tensor {name}")
        inputs: list[Tensor] = [mode.stand_in(x, f"input {i}", device) for i, x in enumerate(given)]
        return {name: own[id(t)] for name, t in tensors.items()}, inputs

    def digests(compute: Callable[[dict[str, Tensor], list[Tensor]], list[Tensor]], mode: DigestMode) -> list[str]:
        with torch.no_grad():
            places = stand_ins(mode)
            with mode.fake, mode:
                return [mode.digest(x) for x in compute(*places)]

    def by_graph(own: dict[str, Tensor], inputs: list[Tensor]) -> list[Tensor]:
        values = [
            (own[name] if name in own else exported.constants[name]) if name else inputs[number]
            for name, number in exported.inputs
        ]
        return list(fx.Interpreter(exported.module).run(*values))

    def same(on_meta: bool) -> bool:
        with compiling:
            of_module = digests(run, DigestMode(on_meta))
        return of_module == digests(by_graph, DigestMode(on_meta))

    if device.type == "meta" and all(t.is_meta for t in tensors.values()):
        # where it makes tensors elsewhere, or asks whether they are fake, fake ones may do
        with suppress(Exception):
            if same(on_meta=True):
                return True
    return same(on_meta=False)
