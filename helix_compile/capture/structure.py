"""What the structure of a model is: a digest of configuration, constants and code, by which a changed model is told.

It sees what stands in the modules themselves. What their code looks up elsewhere (a global, an object's attribute, a
closure) it does not see, so nothing may be reused because two digests are equal; that they differ is a reason to refuse.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

OWN_NAMES = frozenset(vars(nn.Module()))  # of every module; what of these matters is compared below


def structure_key(model: PreTrainedModel) -> tuple:
    """Shapes, dtypes, configuration, constants, hooks and code of every module, not weights."""
    shapes = tuple((n, tuple(p.shape), p.dtype, p.device) for n, p in model.named_parameters())
    config = model.config
    implementations = (config._attn_implementation, getattr(config, "_experts_implementation", None))
    modules = tuple((name, _constants_and_code(m)) for name, m in model.named_modules())
    return shapes, implementations, repr(config.to_dict()), modules


def _constants_and_code(module: nn.Module) -> tuple:
    """Plain attributes, hooks, and the functions of the class and of the instance (someone may have patched one)."""
    plain = {k: v for k, v in vars(module).items() if k not in OWN_NAMES and _is_plain(v)}
    tensors = [(k, v.data_ptr(), v._version, tuple(v.shape)) for k, v in vars(module).items() if isinstance(v, Tensor)]
    code = [(k, v) for k, v in vars(type(module)).items() if inspect.isroutine(v)]
    return repr(plain), tuple(tensors), code_of(module), tuple(code)


def attributes_of(module: nn.Module) -> dict[str, tuple[Tensor, dict[str, Any], str]]:
    """Full name -> tensor, where it is kept, its key: attributes that are tensors, but neither parameters nor buffers."""
    return {
        f"{prefix}.{key}" if prefix else key: (value, vars(part), key)
        for prefix, part in module.named_modules(remove_duplicate=False)
        for key, value in vars(part).items()
        if isinstance(value, Tensor)
    }


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter, buffer and plain tensor attribute by full name; one of several names under each of them."""
    attributes = {name: value for name, (value, _, _) in attributes_of(module).items()}
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {**attributes, **dict(named)}


@contextmanager
def on_meta(module: nn.Module) -> Iterator[None]:
    """Every tensor of a module is one on meta while this is open: it runs in a fraction of the time that fake tensors take."""
    metas: dict[int, Tensor] = {}

    def meta(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.device.type == "meta":
            return value
        return metas.setdefault(id(value), torch.empty_like(value, device="meta", requires_grad=False))

    before = [(vars(part), dict(vars(part))) for part in module.modules()]
    try:
        for own, kept in before:
            own.update({k: meta(v) for k, v in kept.items() if isinstance(v, Tensor)})
            own.update({n: {k: meta(v) for k, v in kept[n].items()} for n in ("_parameters", "_buffers")})
        yield
    finally:
        for own, kept in before:
            own.clear()
            own.update(kept)


@contextmanager
def attributes_kept(module: nn.Module) -> Iterator[None]:
    """What a forward puts on its modules while it is only traced (a table made at its first call) is taken back."""
    before = [(part, dict(vars(part))) for part in module.modules()]
    try:
        yield
    finally:
        for part, own in before:
            now = vars(part)
            for key in [k for k in now if k not in own]:
                del now[key]
            for key, value in own.items():
                if now.get(key, before) is not value:
                    now[key] = value


@contextmanager
def tensors_forgotten(module: nn.Module) -> Iterator[None]:
    """Of tensors that a forward makes for later (a table at its first call) nothing stays.

    A module that made one is as before, in all its attributes; others keep the numbers that they changed, which may be read.
    """
    before = [(vars(part), dict(vars(part)), dict(part._buffers)) for part in module.modules()]
    try:
        yield
    finally:
        for own, kept, buffers in before:
            made = any(isinstance(value, Tensor) and value is not kept.get(key) for key, value in own.items())
            if made or any(value is not buffers.get(key) for key, value in own["_buffers"].items()):
                own.clear()
                own.update(kept)
                own["_buffers"].clear()
                own["_buffers"].update(buffers)


def code_of(module: nn.Module) -> tuple:
    """What a module runs, as far as it says so itself: its class, its hooks, functions that someone put on the instance."""
    # handles count up and are never used twice, so they name a set of hooks without holding what hooks close over
    hooks = (tuple(module._forward_hooks), tuple(module._forward_pre_hooks))
    # a bound method's function alone: the method would keep the model alive
    patched = [(k, getattr(v, "__func__", v)) for k, v in vars(module).items() if inspect.isroutine(v)]
    return type(module), hooks, tuple(patched)


def alike_but_values(one: nn.Module, other: nn.Module) -> bool:
    """Do two modules run the same code on tensors of the same kind? Values of tensors may differ, and nothing else.

    What can't be told from its text is the same only if it is one object. False is always safe to say.
    """
    if type(one) is not type(other) or list(one._modules) != list(other._modules):
        return False
    pairs = ((child, other._modules[name]) for name, child in one._modules.items())
    own, others = ({k: v for k, v in vars(m).items() if k != "_modules"} for m in (one, other))
    return _alike(own, others) and all(
        mine is its or (mine is not None and its is not None and alike_but_values(mine, its)) for mine, its in pairs
    )


def _alike(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        kinds = [(t.shape, t.stride(), t.dtype, t.device, t.requires_grad) for t in (one, other)]
        return kinds[0] == kinds[1]
    if isinstance(one, dict):
        return [*map(repr, one)] == [*map(repr, other)] and all(_alike(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_alike, one, other))
    return _is_plain(one) and repr(one) == repr(other)


def _is_plain(value: Any) -> bool:
    """A value whose repr says all there is to say."""
    if isinstance(value, dict):
        return all(_is_plain(k) and _is_plain(v) for k, v in value.items())
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype))
