"""torch.compile(model, backend="helix", options={"cp": 4}): a user's own decode loop on the sharded cache.

Dynamo traces the model's forward and hands over a graph for each shape of call. All of them are one decode step at
different sizes, so all are served by one HelixModule: see dynamo_check.py for what makes that safe, dynamo_cache.py
for the user's cache, docs/torch_compile.md for how to use it.
"""

from __future__ import annotations

import inspect
import weakref
from typing import Any, NoReturn

import torch
from torch import fx, nn
from torch._dynamo.exc import ShortenTraceback

from helix_compile.compile import helix_compile
from helix_compile.config.options import OPTIONS, HelixOptions
from helix_compile.dynamo.frame import traced_frame
from helix_compile.dynamo.session import CompiledGraph, Session
from helix_compile.errors import HelixError, PlanError
from helix_compile.module import HelixModule

# model -> id of the options object -> session; Dynamo's cache of compiled graphs is what keeps a session alive
_SESSIONS: weakref.WeakKeyDictionary[nn.Module, weakref.WeakValueDictionary[int, Session]] = weakref.WeakKeyDictionary()


def helix_backend(
    gm: fx.GraphModule, example_inputs: list[Any], *, options: dict[str, Any] | None = None, mode: str | None = None
) -> CompiledGraph:
    """A Dynamo backend; use it by name: torch.compile(model, backend="helix", fullgraph=True, options={"cp": 4}).

    Args:
        gm: the graph that Dynamo traced.
        example_inputs: its inputs in this call.
        options: keywords of helix_compile; cp is required.
        mode: refused.

    Raises:
        HelixError: unknown options, a graph break, a frame that is no model's forward. What the graph itself is
            refused for is raised by the same call, when the graph is run.
    """
    try:
        checked = _checked_options(options, mode)
        frame = traced_frame(gm, example_inputs)
        _check_place(checked, frame.model)
        sessions = _SESSIONS.setdefault(frame.model, weakref.WeakValueDictionary())
        session = sessions.get(id(options))
        if session is None:
            # the session holds `options`, so the id names this torch.compile() as long as the session lives
            session = sessions[id(options)] = Session(options)  # type: ignore[arg-type]
        return CompiledGraph(gm, frame, session)
    except HelixError as error:
        _raise_through_dynamo(error)


helix_backend.reset = _SESSIONS.clear  # type: ignore[attr-defined]  # torch._dynamo.reset() calls it


def compiled_modules(model: nn.Module) -> list[HelixModule]:
    """The HelixModules behind a torch.compiled model (or its original), in no order: to inspect() or verify() them.

    Empty before the first call.
    """
    original = getattr(model, "_orig_mod", model)
    return [s.module for s in _SESSIONS.get(original, {}).values() if s.is_compiled]


def _checked_options(options: dict[str, Any] | None, mode: str | None) -> dict[str, Any]:
    known = [n for n in inspect.signature(helix_compile).parameters if n not in ("model", "options")]
    given = dict(options or {})
    if mode is not None:
        raise PlanError(f"torch.compile: mode={mode!r} has no meaning for backend='helix'; drop it")
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise PlanError(
            f"torch.compile: unknown options {unknown}; backend='helix' takes the keywords of helix_compile: "
            + ", ".join(known)
        )
    if "cp" not in given:
        raise PlanError(
            "torch.compile: backend='helix' needs options={\"cp\": ...}, the ranks that share a cache by sequence"
        )
    HelixOptions(**{name: value for name, value in given.items() if name in OPTIONS})
    return given


def _check_place(options: dict[str, Any], model: nn.Module) -> None:
    """The graph that is replaced computes in the model's dtype on its device, and so must what replaces it."""
    first = next(model.parameters())
    for name, own in (("dtype", getattr(model, "dtype", first.dtype)), ("device", first.device)):
        asked = options.get(name)
        if asked is not None and (torch.device(asked) if name == "device" else asked) != own:
            raise PlanError(
                f"torch.compile: option {name}={asked} differs from the model's own {own}; convert or move the model "
                "before torch.compile, or use helix_compile(model, ...)"
            )


def _raise_through_dynamo(error: HelixError) -> NoReturn:
    """Dynamo wraps a backend's error in BackendCompilerFailed, except one of this base: so it arrives as it is."""

    def start(self: Any, message: str) -> None:
        ShortenTraceback.__init__(self, message, first_useful_frame=None)

    kind = type(error)
    body = {"__init__": start, "__module__": kind.__module__}
    through = type(kind.__name__, (kind, ShortenTraceback), body)
    raise through(str(error)) from None
