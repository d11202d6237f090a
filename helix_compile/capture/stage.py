"""The layers of one pipeline stage as a model of its own, to be planned: on the meta device, where nothing runs."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from helix_compile.capture.captured import CapturedGraph
from helix_compile.capture.layers import find_layers
from helix_compile.capture.source import Source, captured_from
from helix_compile.config.options import HelixOptions
from helix_compile.errors import CaptureError, HelixError, LayoutError


def stage_bounds(depth: int, pp: int, stage: int, split: str) -> tuple[int, int]:
    """[start, stop) of a stage's layers; of what pp does not divide, one more is on the first, middle or last stages."""
    each, more = divmod(depth, pp)
    longer = {"first": range(more), "middle": range(pp - 1 - more, pp - 1), "last": range(pp - more, pp)}[split]
    sizes = [each + (s in longer) for s in range(pp)]
    return sum(sizes[:stage]), sum(sizes[: stage + 1])


def captured_stage(
    model: Source, options: HelixOptions, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> CapturedGraph:
    """The model captured as it is at pp = 1, else the layers of `options.stage` alone.

    Raises:
        CaptureError: what captured_from() refuses; a stage whose layers share with another stage what one layer computes.
        LayoutError: more stages than layers.
    """
    staged = stage_model(model, options)
    try:
        return captured_from(staged, dtype, device, options.unmatched)
    except HelixError as error:
        if options.pp == 1 or not _is_captured(model, dtype, device, options):
            raise
        raise CaptureError(
            f"pp={options.pp}: the layers of stage {options.stage} can't be planned as a model of their own, though the whole model "
            "can: they share with layers of another stage what one of them computes (a choice of keys, cached K and V).\n"
            f"  alone: {str(error).splitlines()[0]}\n"
            "  nearest that works: stages that begin at a layer which chooses and caches by itself (pp, pp_split)"
        ) from error


def _is_captured(model: Source, dtype: torch.dtype | None, device: torch.device | None, options: HelixOptions) -> bool:
    try:
        captured_from(model, dtype, device, options.unmatched)
    except HelixError:
        return False
    return True


def stage_model(model: Source, options: HelixOptions) -> Source:
    """The model as it is at pp = 1, else a twin with the layers of `options.stage`, numbered from 0, and a note.

    Raises:
        CaptureError: anything but a model on the meta device.
        LayoutError: more stages than layers.
    """
    if options.pp == 1:
        return model
    first = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    if not isinstance(model, nn.Module) or first is None or first.device.type != "meta":
        what = type(model).__name__ if first is None else f"a model on {first.device}"
        raise CaptureError(
            f"pp={options.pp}: one stage of a pipeline is planned, not run, and that takes a model without weights; got {what}, "
            "expected one on the meta device: a configuration or a preset with --meta, or build it under "
            "torch.device('meta')"
        )
    twin = copy.deepcopy(model)
    name, layers = find_layers(twin)
    depth = len(layers)
    if options.pp > depth:
        raise LayoutError(f"pp={options.pp}: {type(model).__name__} has {depth} layers; choose at most {depth} stages")
    start, stop = stage_bounds(depth, options.pp, options.stage, options.pp_split)
    kept = nn.ModuleList(list(layers)[start:stop])
    parent, _, attribute = name.rpartition(".")
    setattr(twin.get_submodule(parent), attribute, kept)
    _renumber(kept)
    config: Any = twin.config
    _shorten(config.get_text_config(decoder=True), depth, start, stop)
    notes = (*getattr(model, "notes_of_release", ()), _note(twin, options, depth, start, stop))
    vars(twin)["notes_of_release"] = notes
    return twin


def _renumber(layers: nn.ModuleList) -> None:
    """Attentions know their place among the cached ones; here it counts from the stage's first."""
    numbered: list[tuple[nn.Module, Any]] = [(m, vars(m).get("layer_idx")) for m in layers.modules()]
    least = min((index for _, index in numbered if isinstance(index, int)), default=0)
    for module, index in numbered:
        if isinstance(index, int):
            vars(module)["layer_idx"] = index - least


def _shorten(config: Any, depth: int, start: int, stop: int) -> None:
    """A configuration of these layers: their number, and what it says of each of them."""
    count = config.num_hidden_layers
    each = count // depth  # cached attentions a layer, where a configuration counts those
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == count and name != "layers":
            setattr(config, name, value[start * each : stop * each])
    config.num_hidden_layers = (stop - start) * each


def _note(model: Any, options: HelixOptions, depth: int, start: int, stop: int) -> str:
    def nbytes(module: nn.Module | None) -> int:
        return sum(p.numel() * p.itemsize for p in module.parameters()) if module is not None else 0

    embedding, head = nbytes(model.get_input_embeddings()), nbytes(model.get_output_embeddings())
    return (
        f"pipeline stage {options.stage} of {options.pp} (numbered from 0): layers {start}-{stop - 1} of {depth}, which have "
        f"the numbers 0-{stop - start - 1} here; parameters count the embedding ({embedding:,} bytes), which the first "
        f"stage alone holds, and the head ({head:,} bytes), which the last alone holds"
    )
