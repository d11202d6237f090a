"""What of a module is exported, whatever the format."""

from __future__ import annotations

from torch import fx

from helix_compile.errors import ExportError
from helix_compile.ir.stage import nodes_of
from helix_compile.passes.lower.select_kernels import PROVIDER
from helix_compile.passes.pipeline import last_of_moves, lowered_copy
from helix_compile.runtime.compiled import CompiledModule


def check_exportable(compiled: CompiledModule) -> None:
    """Raise ExportError where ranks live in other processes, or a module is a stage of several."""
    layout = compiled.plan.layout
    if len(compiled.ranks) != layout.world_size:
        raise ExportError(
            f"export: this process holds {len(compiled.ranks)} of {layout.world_size} ranks; export from one process that "
            'holds all: world="virtual"'
        )
    if compiled.plan.options.pp > 1:
        raise ExportError("export: stages of a pipeline (pp > 1) are not exported; compile the model with pp=1")


def without_kernels(compiled: CompiledModule) -> fx.GraphModule:
    """What runs; kernels of a card or of Triton are no ops that another runtime has, so the references in their place."""
    has_kernels = any(str(node.target).startswith(f"{PROVIDER}.") for node in nodes_of(compiled.graph))
    return lowered_copy(compiled.stages[last_of_moves(compiled.stages)]) if has_kernels else compiled.graph
