"""Captures that tests share: one a structure, in a process and between the processes of one run. The product remembers nothing, since
no key sees all that a model is.

A test whose model changes in ways that structure_key does not see (a global, an object's attribute, a closure) is marked
`fresh_capture`.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import pickle
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

import sympy
import torch
from filelock import FileLock
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx._graph_pickler import GraphPickler, Options
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._pytree import tree_leaves, tree_map

from helix_compile.capture import model as capture_model
from helix_compile.capture.captured import CapturedGraph
from helix_compile.capture.structure import structure_key
from helix_compile.ir.fakes import FreshSizes
from helix_compile.ir.sizes import HINT_B
from helix_compile.ir.stage import bodies_of, copy_module

KEPT = 64
FOLDER = "HELIX_TEST_CAPTURES"  # of one run: nothing in it is older than the sources
_SIZED = (torch.SymInt, torch.Tensor)
_LIBRARIES = ("torch.", "transformers.", "helix_compile.", "tests.support.")


def remembered(capture: Callable[..., CapturedGraph]) -> Callable[..., CapturedGraph]:
    """`capture` with a memo."""
    memo: OrderedDict[tuple, CapturedGraph] = OrderedDict()

    def captured(model: Any, whole: bool, keep: dict[int, str], unmatched: str) -> CapturedGraph:
        asked = (whole, unmatched, tuple(sorted(keep.items())))
        # `.to(dtype)` casts a rotary table, a loader does not; structure_key leaves buffers out, some come with the first call
        key = (*asked, structure_key(model), tuple((name, t.dtype) for name, t in model.named_buffers()))
        if key not in memo:
            name = _name_of(model, asked)
            make = lambda: replace(capture(model, whole, keep, unmatched), model=None)  # noqa: E731
            memo[key] = make() if name is None else _between_processes(Path(os.environ[FOLDER]) / name, make)
        memo.move_to_end(key)
        if len(memo) > KEPT:
            memo.popitem(last=False)
        return memo[key]

    captured.remembers = True  # type: ignore[attr-defined]
    return captured


def _between_processes(path: Path, make: Callable[[], CapturedGraph]) -> CapturedGraph:
    """Read what another process of this run captured, or capture and write it; one process at a time does so."""
    with FileLock(path.with_suffix(".lock")):
        if path.exists():
            facts, data = pickle.loads(path.read_bytes())
            read = GraphPickler.loads(data, FakeTensorMode(shape_env=_environment(facts)))
            for module in (read.graph, *read.bodies.values()):
                module.recompile()
            return read
        made = make()
        if not made.leaves:  # what stays the user's own module stays in its process
            copy, facts = _in_one_environment(made)
            options = Options(ops_filter=None)
            if hasattr(
                options, "node_metadata_key_filter"
            ):  # of newer torch: views name norms by the modules they come from
                options = replace(options, node_metadata_key_filter=lambda key: key != "source_fn_stack")
            data = GraphPickler.dumps(copy, options)
            # pickle looks for torch.contiguous_format in every module; one that imports another meanwhile makes it miss all but
            # the script, which other processes lack
            if b"__main__" not in data:
                path.write_bytes(pickle.dumps((facts, data)))
        return made


def _environment(facts: list[tuple[Any, Any, int]]) -> ShapeEnv:
    """The symbols of a file, which carries none of this: (symbol, range, hint)."""
    made = ShapeEnv()
    for symbol, values, hint in facts:
        made.var_to_range[symbol], made.backed_var_to_val[symbol] = values, sympy.Integer(hint)
    return made


def _in_one_environment(captured: CapturedGraph) -> tuple[CapturedGraph, list[tuple[Any, Any, int]]]:
    """A copy whose graphs share their symbols (each capture numbers its own, a file holds one environment), and these."""
    fresh = FreshSizes(HINT_B)  # by its hint a graph knows which size is B

    def there(value: Any) -> Any:
        return fresh.tensor(value) if isinstance(value, FakeTensor) else fresh.size(value)

    copy = copy_module(captured.graph)
    for module in (copy, *bodies_of(copy).values()):
        for node in module.graph.nodes:
            value = node.meta.pop("val", None)
            # what else speaks of sizes does so in the symbols of before, and nothing of ours reads it
            node.meta = {k: v for k, v in node.meta.items() if not any(isinstance(x, _SIZED) for x in tree_leaves(v))}
            if value is not None:
                node.meta["val"] = tree_map(there, value)
    environment = fresh.environment
    facts = [(s, environment.var_to_range[s], int(environment.backed_var_to_val[s])) for s in environment.var_to_range]
    return replace(captured, graph=copy), facts


def _name_of(model: nn.Module, asked: tuple) -> str | None:
    """A file name that says in any process what structure_key says in this one; None if the model is not plain enough."""
    if FOLDER not in os.environ:
        return None
    text = [repr(asked), repr(model.config.to_dict()), model.config._attn_implementation]
    text += [str(getattr(model.config, "_experts_implementation", None))]
    tensors = [
        *model.named_parameters(),
        *model.named_buffers(),
    ]  # `.to(dtype)` casts a rotary table, a loader does not
    text += [f"{n} {tuple(t.shape)} {t.dtype} {t.device}" for n, t in tensors]
    for name, module in model.named_modules():
        own = vars(module)
        kind = type(module)
        hooked = module._forward_hooks or module._forward_pre_hooks
        patched = [v for v in own.values() if inspect.isroutine(v) and not _is_library(v)]
        if hooked or patched or not _is_library(kind) or any(isinstance(v, torch.Tensor) for v in own.values()):
            return None
        functions = [v for v in vars(kind).values() if isinstance(v, FunctionType)]
        if not all(_is_library(f) or f.__module__ in ("dataclasses", None) for f in functions):
            return None
        plain = {k: repr(v) for k, v in own.items() if isinstance(v, (bool, int, float, str, tuple, list, torch.dtype))}
        text.append(f"{name} {kind.__module__}.{kind.__qualname__} {sorted(plain.items())}")
    return hashlib.sha256("\n".join(text).encode()).hexdigest()


def _is_library(thing: Any) -> bool:
    """Defined at the top of a module of a library: the same in every process."""
    function = thing.__func__ if isinstance(thing, MethodType) else thing
    local = "<locals>" in getattr(function, "__qualname__", "")
    decorated = local and getattr(function, "__wrapped__", None) is not None
    return f"{getattr(function, '__module__', '')}.".startswith(_LIBRARIES) and (not local or decorated)


def share() -> None:
    """For a worker process, which no fixture reaches; once, where it has imported a conftest too."""
    if not getattr(capture_model._captured, "remembers", False):
        capture_model._captured = remembered(capture_model._captured)
