"""transformers' rotary modules whose table of frequencies depends on how long the longest sequence of a call is.

longrope takes a second table once a sequence is longer than original_max_position_embeddings; dynamic makes a new one for every
length beyond max_position_embeddings. Either is one for all positions of the call. transformers puts the choice into a buffer, by a
branch on the data or in place; here it is a function of the positions, which a graph can hold.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

TABLE = "inv_freq"
BY_LENGTH = ("longrope", "dynamic")


def rope_types(module: nn.Module) -> dict[str, str]:
    """Layer type ("" where all layers have one table) -> rope_type of a rotary module; empty for any other module."""
    said = getattr(module, "rope_type", None)
    kinds = said if isinstance(said, Mapping) else {"": said}
    return {str(layers): kind for layers, kind in kinds.items() if isinstance(kind, str)}


def long_tables(module: nn.Module) -> dict[str, Tensor]:
    """Attribute -> table of longrope for long sequences, where the module is, as its first call makes them."""
    return {
        _named(layers, f"long_{TABLE}"): _made(module, layers, kind, _trained(module, layers) + 1)
        for layers, kind in rope_types(module).items()
        if kind == "longrope"
    }


def forward_by_length(module: nn.Module) -> Callable[..., Any]:
    """The forward of a rotary module, with the table chosen, or made, from the positions, and without a trace in the module.

    On meta the long tables are the module's attributes, so that they are told apart from what has values.
    """
    kinds, long, rotary = rope_types(module), long_tables(module), cast(Any, module)
    plain = inspect.unwrap(type(module).forward)

    def forward(x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
        layers = layer_type or ""
        name = _named(layers, TABLE)
        kept, length = module._buffers[name], position_ids.max() + 1
        original = getattr(module, _named(layers, f"original_{TABLE}")).to(x.device)
        if kinds[layers] == "longrope":
            made = long[own := _named(layers, f"long_{TABLE}")]
            other = getattr(module, own, made) if made.is_meta else made
            chosen = torch.where(length > _trained(module, layers), other.to(x.device), original)
        elif kinds[layers] == "dynamic":
            limit = rotary.original_max_seq_len
            chosen = torch.where(length > limit, _stretched(module, layers, length, original), original)
        else:
            chosen = original
        module._buffers[name] = chosen
        try:
            with torch.no_grad():
                return plain(module, x, position_ids, **({} if layer_type is None else {"layer_type": layer_type}))
        finally:
            module._buffers[name] = kept

    return forward


def unlike_the_modules_own(module: nn.Module) -> str:
    """At which lengths forward_by_length() is not bit by bit what the module computes, told on a copy on the CPU; "": at none."""
    rotary: Any = module
    for layers, kind in rope_types(module).items():
        if kind not in BY_LENGTH:
            continue
        limit = _trained(module, layers) if kind == "longrope" else rotary.original_max_seq_len
        more = {"layer_type": layers} if layers else {}
        for length in (1, limit, limit + 1, 2 * limit + 3):
            twin = _fresh_copy(module)
            ours = forward_by_length(twin)
            x, positions = torch.zeros(1, 1, 1), torch.tensor([[0, length - 1]])
            got = ours(x, positions, **more)
            if not all(map(torch.equal, got, twin(x, positions, **more))):
                return f"{length} ({kind}, limit {limit})"
    return ""


def written_by_calls(module: nn.Module) -> set[str]:
    """Attributes that a rotary module's own calls replace or write, and that no result hangs on at the start of a batch."""
    names = {layers for layers, kind in rope_types(module).items() if kind in BY_LENGTH}
    return {_named(layers, own) for layers in names for own in (TABLE, f"long_{TABLE}", "max_seq_len_cached")}


def edited_table(module: nn.Module) -> str:
    """Attribute that someone else wrote, "": none. `module` then computes what no table of its configuration does."""
    rotary: Any = module
    long = long_tables(module)
    for layers, kind in rope_types(module).items():
        name = _named(layers, f"long_{TABLE}" if kind == "longrope" else TABLE)
        if kind not in BY_LENGTH or (kind == "dynamic" and _length_seen(rotary, layers) > rotary.original_max_seq_len):
            continue  # a table that was made for the longest sequence so far
        expected: Tensor = long[name] if kind == "longrope" else getattr(module, _named(layers, f"original_{TABLE}"))
        table: Tensor = getattr(module, name, expected)  # the long one is not there before the first call
        if not (table.is_meta or expected.is_meta or torch.equal(table.to(expected), expected)):
            return name
    return ""


def forget_lengths(model: nn.Module) -> None:
    """Rotary modules are as they were before their first call: dynamic keeps the table of the longest sequence it has seen."""
    for module in model.modules():
        for layers, kind in rope_types(module).items():
            if kind == "dynamic":
                module._buffers[_named(layers, TABLE)] = getattr(module, _named(layers, f"original_{TABLE}"))
                module.max_seq_len_cached = module.original_max_seq_len
                setattr(module, _named(layers, "max_seq_len_cached"), module.original_max_seq_len)


def by_length(model: nn.Module) -> bool:
    """Does a token's result depend on the longest sequence of the call that it comes in?"""
    return any(kind in BY_LENGTH for module in model.modules() for kind in rope_types(module).values())


def _length_seen(module: Any, layers: str) -> int:
    return int(getattr(module, _named(layers, "max_seq_len_cached"), module.max_seq_len_cached))


def _named(layers: str, table: str) -> str:
    """Of an attribute of a rotary module: each type of layers may have its own."""
    return f"{layers}_{table}" if layers else table


def _parameters(module: Any, layers: str) -> dict[str, Any]:
    said = module.config.rope_parameters
    return said[layers] if layers else said


def _trained(module: Any, layers: str) -> int:
    return _parameters(module, layers)["original_max_position_embeddings"]


def _made(module: Any, layers: str, kind: str, length: int | None) -> Tensor:
    device = getattr(module, _named(layers, TABLE)).device
    return ROPE_INIT_FUNCTIONS[kind](module.config, device, seq_len=length, layer_type=layers or None)[0]


def _stretched(module: Any, layers: str, length: Tensor, original: Tensor) -> Tensor:
    """The table of "dynamic" for a length beyond the limit, in the operations of transformers' own."""
    said, limit, dim = _parameters(module, layers), module.config.max_position_embeddings, 2 * original.shape[-1]
    factor = said["factor"]
    base = said["rope_theta"] * ((factor * length / limit) - (factor - 1)) ** (dim / (dim - 2))
    return 1.0 / (base ** (torch.arange(0, dim, 2, device=original.device).to(torch.float) / dim))


def _fresh_copy(module: Any) -> Any:
    """A copy that has run nothing yet, on the CPU."""
    twin: Any = copy.deepcopy(module).cpu() if not any(b.is_meta for b in module.buffers()) else copy.deepcopy(module)
    for layers, kind in rope_types(module).items():
        name, original = _named(layers, TABLE), _named(layers, f"original_{TABLE}")
        table = getattr(twin, original)
        if table.is_meta:
            twin._buffers[name] = torch.empty(0)
            init = ROPE_INIT_FUNCTIONS.get(kind) or twin.compute_default_rope_parameters
            more = {"layer_type": layers} if layers else {}
            table = init(twin.config, None, **more)[0]
            setattr(twin, original, table)
        twin._buffers[name] = table.clone()
        vars(twin).pop(_named(layers, f"long_{TABLE}"), None)
        for cached in ("max_seq_len_cached", _named(layers, "max_seq_len_cached")):
            setattr(twin, cached, twin.original_max_seq_len)
    return twin
