"""A program that torch.export saved -> CapturedGraph: the whole model in one body.

What each input is, is read off the graph: token ids index the embedding, a past stands before new entries in a
concatenation along the sequence, the mask is as wide as the cache with the step, positions are as wide as the step.
"""

from __future__ import annotations

import copy
import os
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.integrations.executorch import register_dynamic_cache_export_support

from helix_compile.capture.body import CONSTANTS, normalised_module
from helix_compile.capture.captured import CapturedGraph, CapturedLayer, whole_graph
from helix_compile.capture.checks import explained
from helix_compile.capture.conditions import check_conditions
from helix_compile.capture.structure import tensors_of
from helix_compile.errors import CaptureError
from helix_compile.ir.graph import aten, calls, input_ref, inputs_of, is_call, placeholders

UNBOUNDED = 2**31  # a size that nobody limited

_HOW = (
    "export the step with input_ids first, then attention_mask [B, S + T], position_ids [B, T] and the past tensors, "
    "with dynamic batch, tokens and past (docs/torch_compile.md shows it)"
)


def load_program(path: Path) -> ExportedProgram:
    """What torch.export.save wrote, of a step on tensors or on transformers' cache; no object of the file is made but tensors.

    Raises:
        CaptureError: it can't be read.
    """
    register_dynamic_cache_export_support()  # in the process that wrote it, somebody did
    known = torch.serialization.safe_globals([DynamicCache, DynamicLayer])
    # where tensors are not all, torch.export.load would unpickle: run what a file says
    tensors_alone = patch.dict(os.environ, {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1"})
    with explained(f"{path} can't be loaded by torch.export.load"), known, tensors_alone:
        return torch.export.load(path)


def capture_program(program: ExportedProgram) -> CapturedGraph:
    """The decode step that `program` is, as one body.

    Args:
        program: exported with dynamic batch B, new tokens T and past length S; see docs/torch_compile.md.

    Raises:
        CaptureError: a static size, inputs whose role can't be read off the graph, state that it changes.
    """
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        weights: Any = program.module()
        with explained(f"the program can't be made functional; {_HOW}"):
            functional = _of_flat_inputs(program).run_decompositions({})
    weights.config = None
    changed = [s for s in functional.graph_signature.output_specs if s.kind is not OutputKind.USER_OUTPUT]
    if changed:
        raise CaptureError(f"capture: the program changes {changed[0].target} while it runs (a StaticCache?); {_HOW}")
    _inline_grad_modes(functional.graph_module)
    _drop_empty_parts(functional.graph)
    by_name = {n.name: n for n in functional.graph.nodes if n.op == "placeholder"}
    users = [by_name[s.arg.name] for s in functional.graph_signature.input_specs if s.kind is InputKind.USER_INPUT]
    roles = _roles(users)
    body = normalised_module(functional, roles, prefix="")
    vocab_size = _returns_logits_and_new(body)
    pasts = inputs_of(body.graph, "past")
    limits = _limits(functional, users, pasts)
    shapes = [u.meta["val"].shape if isinstance(u.meta.get("val"), torch.Tensor) else torch.Size() for u in users]
    of_step = [name if kind in ("hidden", "tensor") else kind for kind, name in roles]
    names = [s.arg.name for s in program.graph_signature.input_specs if s.kind is InputKind.USER_INPUT]
    check_conditions(program, {n: (role, shape) for n, role, shape in zip(names, of_step, shapes, strict=True)}, limits)
    layer = CapturedLayer(0, "", "body_0", tuple(range(len(pasts) // 2)))
    return CapturedGraph(
        graph=whole_graph(body),
        layers=(layer,),
        dtype=next(p.dtype for p in weights.parameters() if p.is_floating_point()),
        max_positions=None,
        vocab_size=vocab_size,
        model_name="ExportedProgram",
        model=weights,
        limits=limits,
        constants={n: t for n, t in body.meta[CONSTANTS].items() if n not in tensors_of(weights)},
    )


def _of_flat_inputs(program: ExportedProgram) -> ExportedProgram:
    """The program as a function of its tensors alone.

    Where a DynamicCache is an input, run_decompositions() would make one anew, with constants that it then can't find.
    """
    whole, *others = program.module_call_graph
    signature = copy.copy(whole.signature)
    assert signature is not None  # of the program itself
    kinds = (program.graph_signature.input_specs, program.graph_signature.output_specs)
    given, returned = (sum(s.kind.name.startswith("USER") for s in specs) for specs in kinds)
    signature.in_spec = pytree.tree_structure(((0,) * given, {}))
    signature.out_spec = pytree.tree_structure([0] * returned)
    signature.forward_arg_names = None
    flat = copy.copy(whole)
    flat.signature = signature
    return ExportedProgram(
        root=program.graph_module,
        graph=program.graph,
        graph_signature=program.graph_signature,
        state_dict=program.state_dict,
        range_constraints=program.range_constraints,
        module_call_graph=[flat, *others],
        constants=program.constants,
        verifiers=program.verifiers,
    )


def _inline_grad_modes(module: fx.GraphModule) -> None:
    """An export with gradients on has `with torch.no_grad()` as graphs of their own; a step has no gradients anyway."""
    graph = module.graph
    while found := calls(graph, torch.ops.higher_order.wrap_with_set_grad_enabled):
        for node in found:
            _, inner, *given = node.args
            inside = getattr(module, inner.target).graph
            values: dict[fx.Node, Any] = dict(zip(placeholders(inside), given, strict=True))
            with graph.inserting_before(node):
                results = graph.graph_copy(inside, values)
            for user in list(node.users):  # it returns a tuple
                user.replace_all_uses_with(results[user.args[1]])
                graph.erase_node(user)
            graph.erase_node(node)
            if not inner.users:
                graph.erase_node(inner)
    module.recompile()


def _limits(program: ExportedProgram, users: list[fx.Node], pasts: list[fx.Node]) -> dict[str, tuple[int, int]]:
    """What the ranges of its Dims say: outside of them a program is not the model. Export itself never goes below 2."""
    sizes = {"B": users[0].meta["val"].shape[0], "T": users[0].meta["val"].shape[1]}
    if pasts:
        sizes["S"] = pasts[0].meta["val"].shape[2]
    limits = {}
    for letter, size in sizes.items():
        known = program.range_constraints.get(size.node.expr) if isinstance(size, torch.SymInt) else None
        if known is not None:
            low, high = known.lower, known.upper
            bounded = high.is_Integer and int(high) < UNBOUNDED
            limits[letter] = (int(low) if low > 2 else 0, int(high) if bounded else UNBOUNDED)
    return {letter: limit for letter, limit in limits.items() if limit != (0, UNBOUNDED)}


def _drop_empty_parts(graph: fx.Graph) -> None:
    """A DynamicCache starts as tensor([]): cat([tensor([]), x]) is x."""
    for node in [n for n in graph.nodes if is_call(n, aten.cat.default)]:
        parts = [p for p in node.args[0] if tuple(p.meta["val"].shape) != (0,)]
        if len(parts) == 1:
            node.replace_all_uses_with(parts[0])
            graph.erase_node(node)


def _roles(users: list[fx.Node]) -> list[tuple[str, str]]:
    """(kind, name) of each user input, in order."""
    ids = users[0] if users else None
    if ids is None or not any(is_call(u, aten.embedding.default) and u.args[1] is ids for u in ids.users):
        raise CaptureError(f"capture: the program's first input is not the token ids of an embedding; {_HOW}")
    batch, tokens = ids.meta["val"].shape
    for name, size in (("batch", batch), ("tokens", tokens)):
        if isinstance(size, int):
            raise CaptureError(f"capture: the program's {name} size is fixed at {size}; {_HOW}")
    roles = [("hidden", "input_ids")]
    for node in users[1:]:
        value = node.meta.get("val")
        if not node.users or not isinstance(value, torch.Tensor):
            roles.append(("unused", node.name))
        elif value.dim() == 4 and any(is_call(u, aten.cat.default) and u.args[0][0] is node for u in node.users):
            roles.append(("past", node.name))
        elif value.dim() == 2 and not value.is_floating_point():
            name = "position_ids" if str(value.shape[1]) == str(tokens) else "attention_mask"
            roles.append(("tensor", name))
        else:
            raise CaptureError(
                f"capture: input `{node.name}` {list(value.shape)} of the program is no token ids, mask, positions or "
                f"past; {_HOW}"
            )
    return roles


def anchor_tokens(body: fx.GraphModule) -> str:
    """T as the body writes it: the second size of its ids."""
    return str(inputs_of(body.graph, "hidden")[0].meta["val"].shape[1])


def _returns_logits_and_new(body: fx.GraphModule) -> int:
    """Make the body return (logits, what each past is extended by); the width of the logits."""
    output = next(n for n in body.graph.nodes if n.op == "output")
    updates = {
        n: n.args[0][1]
        for n in body.graph.nodes
        if is_call(n, aten.cat.default) and isinstance(n.args[0][0], fx.Node) and input_ref(n.args[0][0]).kind == "past"
    }
    flat = [n for n in output.args[0] if isinstance(n, fx.Node)]
    logits = [n for n in flat if n not in updates and n not in updates.values()]
    if len(logits) != 1 or logits[0].meta["val"].dim() != 3:
        names = ", ".join(f"`{n.name}` {list(n.meta['val'].shape)}" for n in logits) or "none"
        raise CaptureError(
            f"capture: the program must return logits [B, T, vocab] and its cache, besides the cache it returns {names}"
        )
    output.args = ((logits[0], list(updates.values())),)
    tokens = anchor_tokens(body)
    if str(logits[0].meta["val"].shape[1]) != tokens:
        raise CaptureError(
            f"capture: the program returns logits {list(logits[0].meta['val'].shape)}, expected a column for each of {tokens} tokens"
        )
    body.graph.eliminate_dead_code()
    body.recompile()
    return int(logits[0].meta["val"].shape[-1])
