"""Where a plan can go, and what stops it: what runs it here, and what it can be exported to.

Each target is asked as it asks itself when it is chosen, as far as that costs nothing: no kernel is compiled, no engine built, no file
written. So "yes" says that nothing known stands in the way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from helix_compile.errors import HelixError, LoweringUnavailable
from helix_compile.export.exportable import check_exportable, without_kernels
from helix_compile.export.formats import FORMATS
from helix_compile.ir.graph import helix_op
from helix_compile.ir.stage import nodes_of
from helix_compile.kernels.registry import has_cpp
from helix_compile.kernels.target import device_target, target_for
from helix_compile.plan.cache_row import pages_per_sequence
from helix_compile.runtime.compiled import CompiledModule
from helix_compile.runtime.inductor import check_inductor
from helix_compile.runtime.tensorrt import DTYPES, check_tensorrt


@dataclass(frozen=True)
class Target:
    """One place.

    Attributes:
        name: as `lower` or `format` calls it.
        kind: "lower" or "format".
        stops: why it can't go there; "": nothing is known to.
    """

    name: str
    kind: str
    stops: str


def targets_of(compiled: CompiledModule) -> list[Target]:
    """Every lowering, then every format of exports."""
    lowerings: dict[str, Callable[[CompiledModule], None]] = {
        "reference": lambda _: None,
        "inductor": lambda module: check_inductor(module.device),
        "triton": lambda module: _check_triton(module.device),
        "cpp": _check_cpp,
        "tensorrt": _check_engines,
    }
    formats = {name: _check_onnx if name == "onnx" else partial(_check_programs, format=name) for name in FORMATS}
    found = [Target(name, "lower", _stops(check, compiled)) for name, check in lowerings.items()]
    return found + [Target(name, "format", _stops(check, compiled)) for name, check in formats.items()]


def _stops(check: Callable[[CompiledModule], None], compiled: CompiledModule) -> str:
    try:
        check(compiled)
    except HelixError as error:
        return str(error)
    return ""


def _check_triton(device: torch.device) -> None:
    device_target(device)


def _check_cpp(compiled: CompiledModule) -> None:
    target_for("cpp", compiled.device)
    ops = sorted({helix_op(node) for node in nodes_of(compiled.graph)} - {""})
    if not any(map(has_cpp, ops)):
        raise LoweringUnavailable(f"lower='cpp' has no C++ for any op of this plan: {', '.join(ops)}")


def _check_engines(compiled: CompiledModule) -> None:
    if getattr(torch, compiled.plan.dtype) not in DTYPES:
        raise LoweringUnavailable(f"lower='tensorrt': engines know no {compiled.plan.dtype}")
    # a plan without weights is asked as if it were on a card
    check_tensorrt(torch.device("cuda") if compiled.device.type == "meta" else compiled.device, None)


def _check_onnx(compiled: CompiledModule) -> None:
    """By writing the graph, which is quick, and throwing it away."""
    from helix_compile.export.onnx_graph import rank_model  # slow to import

    check_exportable(compiled)
    plan = compiled.plan
    pages = pages_per_sequence(plan.options, plan.layout.kvp)
    caches = compiled.ranks[0].cache
    rank_model(without_kernels(compiled), plan, caches, pages, compiled.facts.vocab_size, None)


def _check_programs(compiled: CompiledModule, format: str) -> None:
    from helix_compile.export.program_folder import check_programs_of  # slow to import

    check_programs_of(compiled, format)
