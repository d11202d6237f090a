"""Is the graph that Dynamo gave the model's own forward, op for op? And which of its outputs is what?

The passes run on what helix_compile captures of the model: dynamic in every size, one body a layer, at tiny hints. A
Dynamo graph has this call's sizes baked in (a batch of 2, one token, 4096 past ones), so it can't be cut into such
bodies. What makes it safe to run the one instead of the other is this check: both the graph and the model's forward
are executed on fakes with the very same call, and every output must have the same digest. A graph that computes
anything else (another frame around the model, a patched function, a hook that Dynamo saw and eager mode does not) is
refused with the first node that differs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import DataDependentOutputException

from helix_compile.capture.value_digest import DigestMode
from helix_compile.dynamo.frame import (
    NO_CACHE,
    CacheLayer,
    Frame,
    GraphInput,
    copied_cache,
    layers_of_cache,
    named_weights,
    tensors_of_cache,
)
from helix_compile.dynamo.user_state import INDEX_KEYS, LATENTS, STATES
from helix_compile.errors import CaptureError
from helix_compile.ir.cache_argument import cache_of_output
from helix_compile.ir.graph import source_line

_FIELDS = (*LATENTS, INDEX_KEYS, "cumulative_length")
_WINDOW = "_sliding_window_tensor"  # the window of a DynamicSlidingWindowLayer once more


@dataclass(frozen=True)
class GraphOutput:
    """What the graph returns at one place.

    Attributes:
        kind: "logits", "cache" or "length" (an int: columns of the cache).
        field: of a cache tensor its name in the layer: "keys", "values", or a number ("cumulative_length" or the window).
        layer: its layer; of a number, any layer that has this one.
        shape: its shape in the call that was compared.
        dtype: its dtype.
        room: what its layer keeps.
    """

    kind: str
    field: str = ""
    layer: int = -1
    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    room: CacheLayer = NO_CACHE


def compared_outputs(gm: fx.GraphModule, frame: Frame, args: tuple[Any, ...]) -> list[GraphOutput]:
    """Role of each output of `gm`, once it is shown to be the model's forward.

    Args:
        gm: the Dynamo graph.
        frame: the call it was traced from.
        args: its inputs in this first call (nothing is written into them).

    Raises:
        CaptureError: a value that the model's forward does not compute, with node and source line.
    """
    try:
        return _outputs_of(gm, frame, args, _by_forward(frame, exporting=False))
    except CaptureError as error:
        # torch 2.11 traces `torch.compiler.is_exporting()` as True, which models ask: the same values by other ops
        try:
            return _outputs_of(gm, frame, args, _by_forward(frame, exporting=True))
        except CaptureError:
            raise error from None


def _outputs_of(gm: fx.GraphModule, frame: Frame, args: tuple[Any, ...], expected: _Expected) -> list[GraphOutput]:
    mode = DigestMode()
    stand_ins = [_enter(mode, role, value) for role, value in zip(frame.inputs, args, strict=True)]
    with torch.no_grad(), mode.fake, mode:
        run = _Recorder(gm, mode)
        try:
            results = run.run(*stand_ins)
        except DataDependentOutputException:
            raise CaptureError(
                "torch.compile: the graph reads a value on the host (.item()): a number of the model that Dynamo made an input "
                "because it was changed between calls, or a branch on data; call torch._dynamo.reset() and torch.compile it again"
            ) from None
        results = results if isinstance(results, (list, tuple)) else (results,)
        digests = [mode.digest(r) for r in results]
        after = [mode.digest(s) if isinstance(s, Tensor) else "" for s in stand_ins]
    outputs = []
    for place, (digest, value) in enumerate(zip(digests, results, strict=True)):
        found = expected.roles.get(digest)
        if found is None:
            raise _different(run, expected, f"output {place}")
        outputs.append(_output(found, value, expected))
    for role, digest in zip(frame.inputs, after, strict=True):
        if role.kind == "cache" and digest not in expected.after[(role.layer, role.name)]:
            raise _different(run, expected, f"the cache's {role.name} of layer {role.layer}")
    if not any(o.kind == "logits" for o in outputs):
        raise CaptureError("torch.compile: the graph does not return the model's logits")
    return outputs


def _output(found: tuple[str, str, int], value: Tensor | int, expected: _Expected) -> GraphOutput:
    kind, field, layer = found
    if not isinstance(value, Tensor):
        return GraphOutput(kind, field, layer)
    shape, dtype = tuple(value.shape), value.dtype
    if kind == "logits":
        return GraphOutput(kind, field, layer, shape, dtype)
    if field not in (*_FIELDS, _WINDOW) and not field.startswith(STATES):
        raise CaptureError(
            f"torch.compile: layer {layer} of the cache keeps {field}; a Helix step fills {', '.join((*LATENTS, *STATES))}"
        )
    return GraphOutput(kind, field, layer, shape, dtype, expected.layers[layer])


@dataclass
class _Expected:
    """Digests of what the forward returns, of the cache afterwards (updated in place or replaced), and of all values."""

    roles: dict[str, tuple[str, str, int]]
    after: dict[tuple[int, str], set[str]]
    seen: set[str]
    layers: list[CacheLayer]


def _by_forward(frame: Frame, exporting: bool) -> _Expected:
    mode = DigestMode()
    stand_ins: dict[int, Any] = {}

    def enter(role: GraphInput, value: Tensor) -> Any:
        if id(value) not in stand_ins:
            stand_ins[id(value)] = _enter(mode, role, value)
        return stand_ins[id(value)]

    named = named_weights(frame.model)
    first = {id(tensor): name for name, tensor in reversed(named)}
    weights = {name: enter(GraphInput("weight", first[id(t)]), t) for name, t in named}
    call = {
        name: enter(GraphInput("call", name), value) if isinstance(value, Tensor) else value
        for name, value in frame.arguments.items()
    }
    cache, before = frame.cache, {}
    if cache is not None:
        for (layer, name), tensor in tensors_of_cache(cache).items():
            before[(layer, name)] = enter(GraphInput("cache", name, layer), tensor)
        call[frame.cache_name] = cache = copied_cache(cache, before)
    # models branch on torch.compiler.is_compiling() (a mask may be left out in eager mode): take Dynamo's branch
    compiling = patch.multiple(torch.compiler, _is_compiling_flag=True, _is_exporting_flag=exporting)
    with torch.no_grad(), compiling, mode.fake, mode:
        out = torch.func.functional_call(frame.model, weights, (), call)
        logits = out.logits if hasattr(out, "logits") else out[0]
        roles = {mode.digest(logits): ("logits", "", -1)}
        cache = cache if cache is not None else cache_of_output(out)
        left = tensors_of_cache(cache)
        after = {key: {mode.digest(t)} for key, t in before.items()}
        for (layer, name), tensor in left.items():
            roles[mode.digest(tensor)] = ("cache", name, layer)
            after.setdefault((layer, name), set()).add(mode.digest(tensor))
        layers = layers_of_cache(cache)
        for number, room in enumerate(layers):
            if room.length is not None:
                roles[mode.digest(room.length)] = ("length", "", number)
    return _Expected(roles, after, mode.seen, layers)


def _enter(mode: DigestMode, role: GraphInput, value: Any) -> Any:
    """What stands for an input: real where masks and positions are made from it, else a fake named by its role."""
    if not isinstance(value, Tensor):
        return value
    if not value.is_floating_point() and role.name != "input_ids" and role.kind != "weight":
        return mode.known(value)
    return value if role.kind == "constant" else mode.stand_in(value, f"{role.kind} {role.name} {role.layer}")


class _Recorder(fx.Interpreter):
    """Runs the graph and keeps the digest of each node, to name the first that differs."""

    def __init__(self, gm: fx.GraphModule, mode: DigestMode):
        super().__init__(gm, garbage_collect_values=False)
        self.mode = mode
        self.digests: dict[fx.Node, str] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and n.op not in ("placeholder", "get_attr"):
            self.digests[n] = self.mode.digest(value)
        return value


def _different(run: _Recorder, expected: _Expected, what: str) -> CaptureError:
    for node, digest in run.digests.items():
        # a value that is known by content never passed through the mode as a value of its own
        if digest in run.mode.seen and digest not in expected.seen:
            line = source_line(node)
            return CaptureError(
                f"torch.compile: {what} of the graph is not what the model's forward computes; the first node that "
                f"differs is `{node.name}` = {node.target}" + (f" ({line})" if line else "") + ". "
                "Compile the model itself, unchanged between calls; other code belongs around the compiled model"
            )
    return CaptureError(
        f"torch.compile: {what} of the graph is no value that the model returns; return the model's own output"
    )
