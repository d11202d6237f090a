"""The layers of one pipeline stage as a model of its own, to be planned: on the meta device, where nothing runs."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

from torch import nn

from helix_compile.capture.layers import find_layers, step_without_values
from helix_compile.capture.reads import Reads, reads_of_earlier
from helix_compile.capture.source import Source
from helix_compile.capture.structure import attributes_kept
from helix_compile.config.options import HelixOptions
from helix_compile.errors import CaptureError, LayoutError

LAYER_NUMBERS = ("kv_source_layers",)  # lists of a configuration that name a layer for each layer


def stage_bounds(depth: int, pp: int, stage: int, split: str) -> tuple[int, int]:
    """[start, stop) of a stage's layers; of what pp does not divide, one more is on the first, middle or last stages."""
    each, more = divmod(depth, pp)
    longer = {"first": range(more), "middle": range(pp - 1 - more, pp - 1), "last": range(pp - more, pp)}[split]
    sizes = [each + (s in longer) for s in range(pp)]
    return sum(sizes[:stage]), sum(sizes[: stage + 1])


def stage_model(model: Source, options: HelixOptions) -> Source:
    """The model as it is at pp = 1, else a twin with the layers of `options.stage`, numbered from 0, and a note.

    Raises:
        CaptureError: anything but a model on the meta device.
        LayoutError: more stages than layers, layers that the embedding feeds one by one, or a layer of the stage that reads what
            one of an earlier stage chose or cached.
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
    depth = len(find_layers(model)[1])
    if options.pp > depth:
        raise LayoutError(f"pp={options.pp}: {type(model).__name__} has {depth} layers; choose at most {depth} stages")
    start, stop = stage_bounds(depth, options.pp, options.stage, options.pp_split)
    config: Any = model.config
    width = getattr(config.get_text_config(), "hidden_size_per_layer_input", None)
    if width:
        raise LayoutError(
            f"pp={options.pp}: {type(model).__name__} embeds every token once more for each of its {depth} layers "
            f"(hidden_size_per_layer_input={width}); got stages of layers, expected layers that are given hidden states alone."
            "\n  nearest that works: pp=1"
        )
    reads = _reads(model)
    _check_cut(reads, options, depth, start, stop)
    twin = copy.deepcopy(model)
    name, layers = find_layers(twin)
    kept = nn.ModuleList(list(layers)[start:stop])
    parent, _, attribute = name.rpartition(".")
    setattr(twin.get_submodule(parent), attribute, kept)
    _renumber(kept)
    _shorten(twin, depth, start, stop)
    notes = (
        *getattr(model, "notes_of_release", ()),
        _note(twin, options, depth, start, stop),
        *_read_later(reads, stop),
    )
    vars(twin)["notes_of_release"] = notes
    return twin


def _renumber(layers: nn.ModuleList) -> None:
    """Attentions know their place among the cached ones; here it counts from the stage's first."""
    numbered: list[tuple[nn.Module, Any]] = [(m, vars(m).get("layer_idx")) for m in layers.modules()]
    least = min((index for _, index in numbered if isinstance(index, int)), default=0)
    for module, index in numbered:
        if isinstance(index, int):
            vars(module)["layer_idx"] = index - least


def _shorten(twin: Any, depth: int, start: int, stop: int) -> None:
    """A configuration of these layers: their number, and what it says of each of them."""
    config = twin.config.get_text_config()
    count = config.num_hidden_layers
    each = count // depth  # cached attentions a layer, where a configuration counts those
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == count and name != "layers":
            own = value[start * each : stop * each]
            setattr(config, name, [source - start * each for source in own] if name in LAYER_NUMBERS else own)
    if getattr(config, "num_kv_shared_layers", None):  # the last ones of all
        first_shared = depth - config.num_kv_shared_layers
        config.num_kv_shared_layers = max(0, stop - max(start, first_shared))
        for module in twin.modules():
            if "first_kv_shared_layer_idx" in vars(module):
                vars(module)["first_kv_shared_layer_idx"] = first_shared - start
    config.num_hidden_layers = (stop - start) * each


def _reads(model: Any) -> Reads:
    """Which layers read of which; none known where the model can't be run: the export says why."""
    try:
        with attributes_kept(model):
            return reads_of_earlier(model, find_layers(model)[1], partial(step_without_values, model))
    except Exception:
        return set()


def _check_cut(reads: Reads, options: HelixOptions, depth: int, start: int, stop: int) -> None:
    across = sorted((reader, maker) for reader, maker in reads if maker < start <= reader < stop)
    if not across:
        return
    cuts = [at for at in range(1, depth) if not any(maker < at <= reader for reader, maker in reads)]

    def works(pp: int, split: str) -> bool:
        return all(stage_bounds(depth, pp, stage, split)[0] in cuts for stage in range(1, pp))

    begin = [max((at for at in cuts if at < start), default=0), *[at for at in cuts if at > start][:1]]
    counts = [pp for pp in range(2, depth + 1) if works(pp, options.pp_split)]
    nearest = [*[pp for pp in counts if pp < options.pp][-1:], *[pp for pp in counts if pp > options.pp][:1]]
    splits = [split for split in ("first", "middle", "last") if works(options.pp, split)]
    stages = " or ".join([f"pp={pp}" for pp in nearest or [1]] + [f'pp_split="{split}"' for split in splits])
    readers, makers = (_numbers({pair[i] for pair in across}) for i in (0, 1))
    raise LayoutError(
        f"pp={options.pp}, stage={options.stage}: of its layers {start}-{stop - 1} (of {depth}) {readers} attend(s) to what "
        f"{makers} of an earlier stage chose or cached (top-k of an indexer, K and V); got a cut before layer {start}, "
        f"expected one that no such layer lies across.\n  nearest that works: a stage that begins with layer "
        f"{' or '.join(map(str, begin))}; {stages}"
    )


def _read_later(reads: Reads, stop: int) -> list[str]:
    """A note, where later stages would read what this one's layers made."""
    later = {reader for reader, maker in reads if maker < stop <= reader}
    if not later:
        return []
    return [
        f"{_numbers(later)} of later stages read(s) what a layer up to {stop - 1} chose or cached: that stage is refused"
    ]


def _numbers(layers: set[int]) -> str:
    return f"layer {min(layers)}" if len(layers) == 1 else f"layers {', '.join(map(str, sorted(layers)))}"


def _note(model: Any, options: HelixOptions, depth: int, start: int, stop: int) -> str:
    def nbytes(module: nn.Module | None) -> int:
        return sum(p.numel() * p.itemsize for p in module.parameters()) if module is not None else 0

    embedding, head = nbytes(model.get_input_embeddings()), nbytes(model.get_output_embeddings())
    return (
        f"pipeline stage {options.stage} of {options.pp} (numbered from 0): layers {start}-{stop - 1} of {depth}, which have "
        f"the numbers 0-{stop - start - 1} here; parameters count the embedding ({embedding:,} bytes), which the first "
        f"stage alone holds, and the head ({head:,} bytes), which the last alone holds"
    )
