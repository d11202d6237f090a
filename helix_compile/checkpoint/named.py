"""What a MODEL argument names: a preset, a config.json, a checkpoint folder or an exported program."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from helix_compile.checkpoint.configuration import other_format, read_configuration
from helix_compile.errors import CheckpointError
from helix_compile.models.presets import PRESETS, build_model, preset_config


def named_model(name: str, dtype: str | None = None, meta: bool = False) -> nn.Module | Path:
    """What a MODEL argument names: a preset, a config.json, a checkpoint folder or a .pt2 (both as paths, unread).

    Args:
        name: preset, path of a config.json (random weights), or folder with config.json and safetensors.
        dtype: torch dtype name; presets and configs default to the config's dtype, else float32 (bfloat16 on meta).
        meta: build on the meta device, without weights.

    Raises:
        KeyError: no preset and no path of that name.
        CheckpointError: a config.json that can't be read or built, or of an architecture that transformers does not have.
        ValueError: not a floating dtype, or more random weights than this machine has memory.
    """
    chosen = dtype_named(dtype)
    path = Path(name)
    model_class: type[nn.Module] | None = None
    notes: tuple[str, ...] = ()
    if name in PRESETS:
        config: Any = preset_config(name)
    elif path.is_dir() and not meta:
        return path
    elif path.suffix == ".pt2" and path.is_file():
        if meta or dtype is not None:
            raise ValueError("an exported program has its weights and dtype; drop --meta and --dtype")
        return path
    elif path.is_file() and path.suffix in (".gguf", ".safetensors", ".bin", ".pt", ".pth"):
        raise CheckpointError(
            f"{name}: got a file of weights, expected a config.json or a folder that holds it{other_format(path.parent)}"
        )
    elif path.exists():
        read = read_configuration(path)
        config, model_class, notes = read.config, read.model_class, read.notes
    else:
        hub = "; a model of a hub is downloaded first, nothing is fetched here" if name.count("/") == 1 else ""
        raise KeyError(f"no preset (there are {', '.join(PRESETS)}) and no file or folder of this name{hub}")
    stated = getattr(config, "dtype", None)
    default = stated if isinstance(stated, torch.dtype) else torch.bfloat16 if meta else torch.float32
    made = chosen or default
    if not meta:
        with _built_of(name, config):
            twin = build_model(config, dtype=made, meta=True, model_class=model_class)
        _check_memory(twin, made)
    with _built_of(name, config):
        model = build_model(config, dtype=made, meta=meta, model_class=model_class)
    vars(model)["notes_of_release"] = notes
    return model


@contextmanager
def _built_of(name: str, config: Any) -> Iterator[None]:
    """A value that transformers' class can't be built with ("40" for a factor) is the configuration's fault."""
    try:
        yield
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        said = getattr(config, "rope_parameters", None) or {}
        if isinstance(error, KeyError) and (kind := error.args[0]) in (said.get("rope_type"), said.get("type")):
            raise CheckpointError(
                f"{name}: rope_type {kind!r} is none that transformers makes: {', '.join(sorted(ROPE_INIT_FUNCTIONS))}"
            ) from error
        raise CheckpointError(
            f"{name}: transformers can't build this model: {type(error).__name__}: {' '.join(str(error).split())} "
            f"(in {Path(traceback.extract_tb(error.__traceback__)[-1].filename).name}); a value of another kind than expected?"
        ) from error


def physical_memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _check_memory(twin: nn.Module, dtype: torch.dtype) -> None:
    """Random weights are refused before they are made where they can't fit."""
    needed = sum(t.numel() * t.itemsize for t in (*twin.parameters(), *twin.buffers()))
    if needed > (there := physical_memory()):
        raise ValueError(
            f"needs {needed / 1e9:.4g} GB for random weights in {str(dtype).split('.')[1]}, "
            f"this machine has {there / 1e9:.4g} GB; use inspect --meta"
        )


def dtype_named(name: str | None) -> torch.dtype | None:
    """A floating dtype by its name; ValueError for anything else."""
    if name is None:
        return None
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype {name!r} is not one of float32, bfloat16, float16, float64")
    return dtype
