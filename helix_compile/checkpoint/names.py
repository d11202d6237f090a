"""Which stored tensors make up which tensor of the model, by transformers' own conversion rules; checked by shape.

transformers keeps the experts of a layer as stacked `gate_up_proj` [E, 2F, D] and `down_proj` [E, D, F], while a
checkpoint holds `experts.3.gate_proj.weight` [F, D] and so on. Its rules (transformers.conversion_mapping) say which
names are stacked and joined; here they are applied to names and shapes only, so that a slice can be read.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from helix_compile.checkpoint.entries import Entry
from helix_compile.errors import CheckpointError

_LISTED = 20
# what a layer of multi-token prediction has and no other: norms and projection of two inputs, its own way in and out
_OF_PREDICTION = re.compile(r"\.layers\.\d+\.(enorm|hnorm|eh_proj|embed_tokens|shared_head)\.")


@dataclass(frozen=True)
class Piece:
    """An entry of the checkpoint inside a tensor of the model: it begins at `start` and is `size` large there.

    Dims in `stacked` have size 1 and are not in the entry.
    """

    key: str
    start: tuple[int, ...]
    size: tuple[int, ...]
    stacked: tuple[int, ...] = ()


@dataclass(frozen=True)
class Assembled:
    """A tensor of the model out of pieces; `shape` is what they add up to."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Assembly:
    """Name in the model -> its pieces; `same` says which other name a tied tensor is read as; notes for the plan."""

    tensors: dict[str, Assembled]
    same: dict[str, str]
    notes: tuple[str, ...]


def assemble(
    model: PreTrainedModel,
    stored: Mapping[str, Entry],
    where: str,
    prefixes: tuple[str, ...] = (),
    beside_text: Collection[str] = (),
) -> Assembly:
    """Find every tensor of `model` (on meta) in what is stored.

    Args:
        stored: entry by the name of the weight.
        where: the folder, for messages.
        prefixes: of the names of a text model inside another one; what has none of them is not the text model's.
        beside_text: tensors of the model that are not its text model's: left out, however they are stored.

    Raises:
        CheckpointError: names or shapes that miss, are left over or do not fit, listed with their numbers.
    """
    wanted = model.state_dict()
    keys = sorted(stored, key=dot_natural_key)
    collected, unknown = _by_target(model, wanted, keys, prefixes)
    apart = [
        key for name in beside_text if name in collected for key in itertools.chain(*collected.pop(name)[1].values())
    ]
    wanted = {name: tensor for name, tensor in wanted.items() if name not in beside_text}
    nowhere = {*unknown, *apart}
    problems = [problem for key in keys if key not in nowhere for problem in stored[key].problems]
    found: dict[str, Assembled] = {}
    for name, (converter, sources) in collected.items():
        try:
            found[name] = _assembled(converter, sources, stored)
        except ValueError as error:
            problems.append(f"does not fit: {name}: {error}")
    same = _tied(model, found)
    wrong = {n: a for n, a in found.items() if a.shape != tuple(wanted[n].shape)}
    for name, assembled in wrong.items():
        keys_of = [p.key for p in assembled.pieces]
        made_of = keys_of[0] if len(keys_of) == 1 else f"{len(keys_of)} tensors such as {keys_of[0]}"
        problems.append(
            f"does not fit: {name}: the checkpoint has {list(assembled.shape)} ({made_of}), "
            f"the model needs {list(wanted[name].shape)}"
        )
    failed = {line.split(": ")[1] for line in problems if line.startswith("does not fit")}
    problems += [
        f"missing: {name} {list(wanted[name].shape)}"
        for name in wanted
        if name not in found and name not in same and name not in failed
    ]
    # what transformers ignores too: layers for multi-token prediction, old rotary tables
    patterns = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"]
    depth = model.config.get_text_config(decoder=True).num_hidden_layers
    parts = {part for name in wanted for part in _parts_of(name)} - {model.base_model_prefix}
    behind = [k for k in unknown if _layer_of(k) >= depth and _in_layers(k, prefixes, parts)]
    further = _prediction_layers(behind)
    # transformers' own patterns name DeepSeek's layer 61 and the like, whatever is in it: not here
    ignored = [k for k in unknown if k not in behind and any(re.search(p, k) for p in patterns)]
    texts = {_home(key) for _, sources in collected.values() for each in sources.values() for key in each}
    others = [k for k in unknown if k not in (*behind, *ignored) and _is_beside(k, prefixes, texts if apart else None)]
    beside = [k for k in others if parts.isdisjoint(_parts_of(k))]
    known_of = {*further, *ignored, *beside}
    problems += [f"left over: {key} {stored[key]}" for key in unknown if key not in known_of]
    if problems:
        raise CheckpointError(_report(where, type(model).__name__, problems))
    notes = (
        *_notes(ignored, "are no part of the model: ignored, as transformers does"),
        *_notes(
            further,
            f"belong to layers of multi-token prediction, behind the model's own: ignored{_unlike(further, model)}",
        ),
        *_notes(sorted([*apart, *beside]), "are not the text model's (vision, projector): left out"),
    )
    return Assembly(found, same, notes)


def _by_target(
    model: PreTrainedModel, wanted: Mapping[str, object], keys: list[str], prefixes: tuple[str, ...]
) -> tuple[dict[str, tuple[WeightConverter | None, dict[str, list[str]]]], list[str]]:
    """(name in the model -> converter and stored keys by its source pattern, keys that lead nowhere)."""
    rules = get_model_conversion_mapping(model)
    renamings = [r for r in rules if isinstance(r, WeightRenaming)]
    converters = [r for r in rules if isinstance(r, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    prefix, state = model.base_model_prefix, dict(wanted)
    collected: dict[str, tuple[WeightConverter | None, dict[str, list[str]]]] = {}
    unknown = []
    for key in keys:
        own = _without_prefix(key, prefixes)
        name, pattern = rename_source_key(own, renamings, converters, prefix, state)
        if name not in wanted and own in wanted:  # as transformers does: the model's own name wins
            name, pattern = own, None
        if name not in wanted:
            unknown.append(key)
            continue
        converter = by_pattern[pattern] if pattern is not None else None
        entry = collected.setdefault(name, (converter, defaultdict(list)))
        if entry[0] is not converter:  # stacked and one by one at once
            entry[1]["another form of it"].append(key)
        else:
            entry[1][pattern or key].append(key)
    return collected, unknown


def _assembled(
    converter: WeightConverter | None, sources: dict[str, list[str]], stored: Mapping[str, Entry]
) -> Assembled:
    """The converter's operations on shapes. ValueError says what can't be done."""

    def one(key: str) -> Assembled:
        shape = stored[key].shape
        return Assembled(shape, (Piece(key, (0,) * len(shape), shape),))

    if converter is None:
        keys = [key for each in sources.values() for key in each]
        if len(keys) > 1:
            raise ValueError(f"stored {len(keys)} times: {', '.join(keys[:3])}")
        return one(keys[0])
    if extra := sources.get("another form of it"):
        raise ValueError(f"stored one by one and also as {extra[0]}")
    # in the order of the rule: gate before up
    parts = {p: [one(k) for k in sources[p]] for p in converter.source_patterns if p in sources}
    if absent := [p for p in converter.source_patterns if p not in sources]:
        raise ValueError(f"nothing is stored as {', '.join(absent)}")
    for operation in converter.operations:
        if isinstance(operation, MergeModulelist):
            parts = {p: [_stack(each, operation.dim)] for p, each in parts.items()}
        elif isinstance(operation, Concatenate):
            parts = {"": [_concatenate([a for each in parts.values() for a in each], operation.dim)]}
        else:
            raise ValueError(
                f"transformers makes it by {type(operation).__name__}, which can't be read by slices; load the model "
                "by from_pretrained and pass it instead of the folder"
            )
    made = [a for each in parts.values() for a in each]
    if len(made) != 1:
        raise ValueError(f"{len(made)} tensors take its place")
    return made[0]


def _stack(parts: list[Assembled], dim: int) -> Assembled:
    shape = _common([p.shape for p in parts])
    pieces = []
    for i, part in enumerate(parts):
        for piece in part.pieces:
            start = (*piece.start[:dim], i, *piece.start[dim:])
            size = (*piece.size[:dim], 1, *piece.size[dim:])
            dims = tuple(sorted((dim, *(d + (d >= dim) for d in piece.stacked))))
            pieces.append(replace(piece, start=start, size=size, stacked=dims))
    return Assembled((*shape[:dim], len(parts), *shape[dim:]), tuple(pieces))


def _concatenate(parts: list[Assembled], dim: int) -> Assembled:
    _common([p.shape[:dim] + p.shape[dim + 1 :] for p in parts])
    pieces, at = [], 0
    for part in parts:
        for piece in part.pieces:
            start = (*piece.start[:dim], piece.start[dim] + at, *piece.start[dim + 1 :])
            pieces.append(replace(piece, start=start))
        at += part.shape[dim]
    first = parts[0].shape
    return Assembled((*first[:dim], at, *first[dim + 1 :]), tuple(pieces))


def _common(shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    if len(set(shapes)) > 1:
        told = ", ".join(str(list(s)) for s in sorted(set(shapes)))
        raise ValueError(f"tensors of different shapes are to be joined: {told}")
    return shapes[0]


def _tied(model: PreTrainedModel, found: Mapping[str, Assembled]) -> dict[str, str]:
    """Name that is not stored -> the name that it is tied to and that is; either of the two may be the stored one."""
    pairs = [pair for one, other in model.all_tied_weights_keys.items() for pair in ((one, other), (other, one))]
    return {one: other for one, other in pairs if one not in found and other in found}


def _without_prefix(key: str, prefixes: tuple[str, ...]) -> str:
    """The name inside the text model; the longest prefix that fits is the wrapper's."""
    fitting = [p for p in prefixes if key.startswith(p)]
    return key.removeprefix(max(fitting, key=len)) if fitting else key


def _is_beside(key: str, prefixes: tuple[str, ...], texts: set[str] | None) -> bool:
    """Is a name that leads nowhere another model's, by where the text model's names are?"""
    return bool(prefixes and not key.startswith(prefixes)) or (texts is not None and _home(key) not in texts)


def _home(key: str) -> str:
    """The first modules of a name: model.language_model, lm_head."""
    return ".".join(key.split(".")[:-1][:2])


def _layer_of(key: str) -> int:
    """The number of the layer that a stored tensor belongs to; -1: none."""
    found = re.search(r"(?:^|\.)layers\.(\d+)\.", key)
    return int(found[1]) if found else -1


def _parts_of(key: str) -> list[str]:
    """The modules that a tensor is inside of, the outermost first."""
    words = key.split(".")[:-1]
    return [".".join(words[: i + 1]) for i in range(len(words))]


def _in_layers(key: str, prefixes: tuple[str, ...], parts: set[str]) -> bool:
    """The layers of its name are the text model's, and not those of an encoder beside it."""
    of = re.split(r"(?:^|\.)layers\.\d+\.", _without_prefix(key, prefixes))[0]
    return any(part == f"{of}.layers".lstrip(".") or (not of and part.endswith(".layers")) for part in parts)


def _prediction_layers(keys: list[str]) -> list[str]:
    """Those of layers that have what only a layer of multi-token prediction has; others are layers of a deeper model."""
    own = {_layer_of(k) for k in keys if _OF_PREDICTION.search(k)}
    return [k for k in keys if _layer_of(k) in own]


def _unlike(further: list[str], model: PreTrainedModel) -> str:
    """What the configuration says of their number, where that is another one."""
    stated = getattr(model.config.get_text_config(decoder=True), "num_nextn_predict_layers", None)
    there = len({_layer_of(k) for k in further})
    return f" ({there} such layer(s), config.json says {stated})" if type(stated) is int and stated != there else ""


def _notes(keys: list[str], what: str) -> tuple[str, ...]:
    if not keys:
        return ()
    return (f"checkpoint: {len(keys)} tensor(s) {what}: {', '.join(keys[:2])}{', ...' if keys[2:] else ''}",)


def _report(where: str, model: str, problems: list[str]) -> str:
    kinds = {kind: sum(p.startswith(kind) for p in problems) for kind in ("missing", "left over", "does not fit")}
    counts = ", ".join(f"{number} {kind}" for kind, number in kinds.items())
    more = [f"... and {len(problems) - _LISTED} more"] if len(problems) > _LISTED else []
    return "\n  ".join(
        [
            f"{where} is not a checkpoint of the {model} that its config.json describes ({counts}); nothing was read:",
            *problems[:_LISTED],
            *more,
        ]
    )
