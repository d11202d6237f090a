"""Does the graph around the layers take the path that was captured at T = 1, S = 0 and B = 1 too? See paths.py.

Layers are stand-ins, in the model as in its graph: what reaches each of them is compared, and the logits.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from helix_compile.capture.body import CONSTANTS
from helix_compile.capture.layers import (
    LAYER_OP,
    RESULT_OP,
    Around,
    ConcatenatingCache,
    layers_as,
    model_inputs,
    recorder,
    result_shapes,
)
from helix_compile.capture.paths import COMPILING, Lines, Sizes, compare_paths, registered, traced
from helix_compile.capture.same_values import Exported, same_values
from helix_compile.capture.structure import tensors_of
from helix_compile.capture.trial import Replay, Trial, relative_gap, widened
from helix_compile.ir.graph import input_ref, placeholders
from helix_compile.ir.leaves import Returned, record_call

_LARGEST = 1e4  # a mask's "large negative number" would leave nothing else to see


class _Stations:
    """Stands in for the layers of one run, and keeps what reaches them."""

    def __init__(self) -> None:
        self.reached: list[dict[str, Tensor]] = []

    def pass_on(self, hidden: Tensor, others: dict[str, Tensor], index: int) -> Tensor:
        """What a layer is given, by name; gives hidden with its channels turned."""
        self.reached.append({"hidden": hidden, **others})
        return hidden.roll(index + 1, dims=-1)

    def forward_of(self, index: int, returned: Returned) -> Any:
        """A layer's forward."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            call = record_call(args, kwargs, returned)
            out = self.pass_on(call.hidden, dict(zip(call.names, call.others, strict=True)), index)
            shapes = result_shapes(call, args, kwargs)
            others = [_result(out, [], index, i, shape, like.dtype) for i, (like, shape) in enumerate(shapes)]
            return call.as_returned([out, *others], args, kwargs)

        return forward


def _result(
    hidden: Tensor, others: list[Tensor], index: int, number: int, shape: list[int], dtype: torch.dtype
) -> Tensor:
    """What a stand-in returns besides hidden states: whose it is shows by its value."""
    return hidden.new_full(shape, (7 * index + number) % 2 if dtype is torch.bool else 7 * index + number, dtype=dtype)


def check_around(
    model: nn.Module,
    layers: nn.ModuleList,
    returned: tuple[Returned, ...],
    outer: fx.GraphModule,
    exported: Exported,
    names: Mapping[int, list[str]],
    vocab_size: int,
) -> list[str]:
    """Of a model and its graph around the layers; see compare_paths().

    Args:
        returned: what each layer returns.
        names: of each layer, those of the tensors that it is given beside hidden.
        exported: the same graph as torch.export wrote it.
        outer: with a LAYER_OP for each layer; its inputs are input_ids, attention_mask, position_ids, the past, parameters.
    """
    inside = {id(t) for t in tensors_of(layers).values()}
    around = {name: t for name, t in tensors_of(model).items() if id(t) not in inside}
    trial = functools.cache(lambda: Trial(around, outer.meta[CONSTANTS]))

    def run(weights: dict[str, Tensor] | None, sizes: Sizes, device: torch.device) -> list[dict[str, Tensor]]:
        stations = _Stations()
        with layers_as(layers, lambda i: stations.forward_of(i, returned[i])):
            given = _inputs(model, sizes, vocab_size, device, padded=weights is not None)
            around_it = Around(model, lambda pasts: ConcatenatingCache(model.config, None, pasts[0]))
            named = {f"model.{n}": t for n, t in registered(model, weights).items()} if weights is not None else {}
            logits, _ = functional_call(around_it, named, given)
        return [{"logits": logits}, *stations.reached]

    def calls(sizes: Sizes) -> Lines:
        device = next(model.parameters()).device

        def run_traced(trace: Any) -> None:
            with trace:
                run(None, sizes, device)

        return traced(f"{type(model).__name__} can't be run at {sizes}", model, run_traced)

    def gap(sizes: Sizes) -> float:
        numbers, stations = trial(), _Stations()

        def stand_in(hidden: Tensor, others: list[Tensor], index: int) -> Tensor:
            return stations.pass_on(hidden, dict(zip(names[index], others, strict=True)), index)

        weights, given = numbers.of_graph(), _inputs(model, sizes, vocab_size, numbers.device, padded=True)
        known = dict(
            zip(("input_ids", "attention_mask", "position_ids", "past_shape"), (*given[:3], given[3][0]), strict=True)
        )
        values = []
        for node in placeholders(outer.graph):
            kind, name = input_ref(node)
            values.append((weights if kind == "param" else known)[name])
        with torch.no_grad():
            logits = Replay(outer, numbers.device, {LAYER_OP: stand_in, RESULT_OP: _result}).run(*values)[0]
            got = [{"logits": logits}, *stations.reached]
            with COMPILING:
                own = wide = run(numbers.weights(), sizes, numbers.device)
                if any(widened(t).dtype != t.dtype for reached in own for t in reached.values()):
                    wide = run(numbers.weights(wide=True), sizes, numbers.device)
        return max(_gap(*reached) for reached in zip(got, own, wide, strict=True))

    def same(sizes: Sizes) -> bool:
        def compute(own: dict[str, Tensor], inputs: list[Tensor]) -> list[Tensor]:
            with layers_as(layers, partial(recorder, {}, returned)):
                around_it = Around(model, lambda pasts: ConcatenatingCache(model.config, None, pasts[0]))
                named = {f"model.{n}": t for n, t in registered(model, own).items()}
                logits, _ = functional_call(around_it, named, (*inputs[:3], inputs[3:]))
            return [logits]

        device = next(model.parameters()).device
        *given, past = _inputs(model, sizes, vocab_size, torch.device("meta"))
        return same_values(exported, around, [*given, *past], device, compute, COMPILING)

    return compare_paths(f"{type(model).__name__}, around its layers,", calls, gap, same)


def _gap(got: dict[str, Tensor], own: dict[str, Tensor], wide: dict[str, Tensor]) -> float:
    """The largest; a tensor that only one of the two is given must be a mask that hides nothing."""
    alone = [x for name, x in (got | own).items() if name not in got or name not in own]
    if not all(bool((x == (1 if x.dtype in (torch.bool, torch.int64) else 0)).all()) for x in alone):
        return float("inf")
    both = [name for name in got if name in own]
    return max(relative_gap(*(_bounded(x[name]) for x in (got, own, wide))) for name in both)


def _bounded(tensor: Tensor) -> Tensor:
    return tensor.clamp(-_LARGEST, _LARGEST) if tensor.is_floating_point() else tensor


def _inputs(
    model: Any, sizes: Sizes, vocab_size: int, device: torch.device, padded: bool = False
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """input_ids, attention_mask, position_ids and a past of one number a token; `padded`: the first sequence is shorter."""
    ids, mask, positions = model_inputs(device, sizes.B, sizes.T, sizes.S)
    if padded:
        mask[0, : sizes.S // 2] = 0
    ids = (7 * torch.arange(ids.numel(), device=device) + 3).view_as(ids) % vocab_size
    return ids, mask, positions, [torch.zeros(sizes.B, 1, sizes.S, 1, dtype=model.dtype, device=device)]
