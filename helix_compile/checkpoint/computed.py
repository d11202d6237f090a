"""Values of the tensors that no checkpoint holds: the model's own code computes them from its configuration.

Non-persistent buffers (rotary frequencies, scales) are computed where transformers' from_pretrained does it, in
_init_weights; tables of longrope as its rotary modules do in their first call.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from helix_compile.errors import CheckpointError
from helix_compile.models.rotary_tables import long_tables


def computed_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Full name -> value, on the CPU. `model` stays on meta; of a table that is not there yet it gets one on meta.

    transformers is asked twice, over zeros and over ones: what it left as it was would differ.

    Raises:
        CheckpointError: a buffer that it does not compute.
    """
    names = [name for name, _ in model.named_non_persistent_buffers(remove_duplicate=False)]
    first, second = (_computed_over(model, names, fill) for fill in (0, 1))
    for name, value in first.items():
        if not torch.equal(value, second[name]):
            raise CheckpointError(
                f"{type(model).__name__}: buffer {name} is in no checkpoint and transformers does not compute it; "
                "load the model by from_pretrained and pass it instead of the folder"
            )
        owner, own = _owner(model, name)
        if getattr(owner, own, None) is None:
            setattr(owner, own, value.to("meta"))
    return first


def _computed_over(model: PreTrainedModel, names: list[str], fill: int) -> dict[str, Tensor]:
    owners = {name.rpartition(".")[0] for name in names}
    # FalconH1's outer model computes a buffer of its layers' mixers
    around = {owner[:end] for owner in owners for end in (0, *_ends(owner))}
    values: dict[str, Tensor] = {}
    with _off_meta(model, names, fill):
        for name, module, of in _innermost_first(model):
            if name not in around:
                continue
            try:
                of._init_weights(module)
            except Exception as error:  # any model's own code
                raise CheckpointError(
                    f"{type(model).__name__}: transformers can't compute the buffers of {name or 'the model'!r}, which are in no "
                    f"checkpoint: {type(error).__name__}: {error}"
                ) from error
            tables = long_tables(module) if name in owners else {}
            values |= {f"{name}.{own}" if name else own: table for own, table in tables.items()}
        values |= {name: model.get_buffer(name) for name in names}
    return values


def _ends(name: str) -> Iterator[int]:
    """Where the names of what holds a module end, and its own."""
    return (i for i in range(1, len(name) + 1) if i == len(name) or name[i] == ".")


def _innermost_first(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module, PreTrainedModel]]:
    """Name, module and the model whose _init_weights is its own, in the order in which from_pretrained asks them."""

    def below(name: str, module: nn.Module, of: PreTrainedModel) -> Iterator[tuple[str, nn.Module, PreTrainedModel]]:
        of = module if isinstance(module, PreTrainedModel) else of
        for own, child in module.named_children():
            yield from below(f"{name}.{own}" if name else own, child, of)
        yield name, module, of

    return below("", model, model)


@contextmanager
def _off_meta(model: PreTrainedModel, names: list[str], fill: int) -> Iterator[None]:
    """These buffers hold `fill` on the CPU while this is open; what else modules are given then is taken back."""
    modules = {id(owner): owner for owner, _ in (_owner(model, name) for name in names)}
    before = [(vars(m), dict(vars(m)), m._buffers, dict(m._buffers)) for m in modules.values()]
    try:
        for owner, own in (_owner(model, name) for name in names):
            owner._buffers[own] = torch.full_like(owner.get_buffer(own), fill, device="cpu")
        yield
    finally:
        for attributes, kept, buffers, kept_buffers in before:
            attributes.clear()
            attributes.update(kept)
            buffers.clear()
            buffers.update(kept_buffers)


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, own = name.rpartition(".")
    return model.get_submodule(path), own
