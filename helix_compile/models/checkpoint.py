"""Fill a model from the safetensors files of a Hugging Face folder, whole tensors, names and shapes checked first."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

_FP8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}  # safetensors' names
_SCALE = "_scale_inv"


def read_weights(
    model: nn.Module,
    folder: Path,
    fp8_block: tuple[int, int] | list[int] | None,
    device: str | torch.device,
) -> None:
    """Give `model`, which is on meta, memory on `device` and the stored weights.

    A stack of experts `X.gate_up_proj` [E, 2F, D], `X.down_proj` [E, D, F] may be stored whole or as `X.0.gate_proj.weight`
    [F, D] and so on. Layers beyond the model's own (multi-token prediction) and rotary tables are passed over.

    Args:
        model: holds the names, shapes and dtypes that are wanted.
        folder: with *.safetensors.
        fp8_block: rows and columns that share one scale `NAME_scale_inv`, where weights are float8.
        device: where the weights go.

    Raises:
        ValueError: names that miss or are left over, or shapes that do not fit; nothing was read then.
    """
    files = sorted(folder.glob("*.safetensors"))
    shapes: dict[str, list[int]] = {}
    where: dict[str, Path] = {}
    fp8: set[str] = set()
    for file in files:
        with safe_open(file, framework="pt") as stored:
            for key in stored.keys():  # noqa: SIM118 - no mapping
                header = stored.get_slice(key)
                shapes[key], where[key] = header.get_shape(), file
                fp8 |= {key} if header.get_dtype() in _FP8 else set()
    problems = _problems(model, shapes, fp8_block)
    problems += [f"missing: {k}{_SCALE}" for k in sorted(fp8) if f"{k}{_SCALE}" not in shapes]
    if problems:
        more = f"\n  ... and {len(problems) - 20} more" if len(problems) > 20 else ""
        told = "\n  ".join(problems[:20])
        raise ValueError(
            f"{folder} does not hold what its config.json describes; nothing was read:\n  {told}{more}"
        )
    tied = _tied(model)
    model.to_empty(device=device)
    for name, other in tied.items():  # to_empty gave each its own memory
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, model.get_parameter(other))
    places = _places(model)
    for file in files:
        with safe_open(file, framework="pt") as stored, torch.no_grad():
            for key in stored.keys():  # noqa: SIM118 - no mapping
                if key not in places:
                    continue
                tensor = stored.get_tensor(key)
                if tensor.dtype in _FP8.values():
                    assert fp8_block is not None  # refused above
                    with safe_open(where[key + _SCALE], framework="pt") as other:
                        tensor = _dequantised(tensor, other.get_tensor(key + _SCALE), fp8_block)
                places[key].copy_(tensor)


def _places(model: nn.Module) -> dict[str, Tensor]:
    """Name that a checkpoint may use -> the tensor, or the part of a stack of experts, that it fills."""
    places: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        places[name] = tensor
        places |= _experts_of(name, tensor)
    return places


def _experts_of(name: str, tensor: Tensor) -> dict[str, Tensor]:
    stack, _, kind = name.rpartition(".")
    if tensor.dim() != 3:
        return {}
    found: dict[str, Tensor] = {}
    for i, expert in enumerate(tensor):
        parts = expert.chunk(2) if kind == "gate_up_proj" else (expert,)
        kinds = ("gate_proj", "up_proj") if kind == "gate_up_proj" else (kind,)
        found |= {f"{stack}.{i}.{k}.weight": p for k, p in zip(kinds, parts, strict=True)}
    return found


def _tied(model: nn.Module) -> dict[str, str]:
    """Second name of a parameter that has two -> the first."""
    first = {id(p): name for name, p in model.named_parameters()}
    names = model.named_parameters(remove_duplicate=False)
    return {name: first[id(p)] for name, p in names if first[id(p)] != name}


def _problems(model: nn.Module, shapes: dict[str, list[int]], block: object) -> list[str]:
    places, problems, tied = _places(model), [], _tied(model)
    for name, tensor in model.state_dict().items():
        pieces = _experts_of(name, tensor)
        if name in shapes or tied.get(name) in shapes:
            problems += [f"stored twice: {name} and {p}" for p in pieces if p in shapes]
        else:
            problems += [f"missing: {p}" for p in pieces or [name] if p not in shapes]
    for key, shape in shapes.items():
        weight = key.removesuffix(_SCALE)
        if key in places and list(places[key].shape) != shape:
            problems.append(f"does not fit: {key} {shape}, expected {list(places[key].shape)}")
        elif weight != key and weight in shapes:
            if block is None:
                problems.append(f"{key}: config.json states no weight_block_size")
        elif key not in places and not _ignored(model, key):
            problems.append(f"left over: {key} {shape}")
    return problems


def _ignored(model: nn.Module, key: str) -> bool:
    config: Any = model.config
    count: int = config.num_hidden_layers
    number = re.match(r"model\.layers\.(\d+)\.", key)
    return key.endswith("rotary_emb.inv_freq") or (number is not None and int(number[1]) >= count)


def _dequantised(tensor: Tensor, scale: Tensor, block: tuple[int, int] | list[int]) -> Tensor:
    """FP8 [M, N] times the scale of its block, float32."""
    wide = scale.float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return tensor.float() * wide[: tensor.shape[0], : tensor.shape[1]]
