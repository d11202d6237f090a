"""What helix_compile accepts as `model`, and what it reads off it: a module, a folder, or a CapturedGraph."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from helix_compile.capture import CapturedGraph, capture
from helix_compile.capture_checks import check_model, check_surroundings
from helix_compile.errors import CaptureError, HelixError
from helix_compile.matches import LayerMatch
from helix_compile.module import HelixModule
from helix_compile.params import originals, shard_of_name
from helix_compile.plan import HelixPlan
from helix_compile.process_groups import local_device
from helix_compile.ranks import ModelFacts
from helix_compile.world import World, is_distributed


def captured_from(
    model: nn.Module | CapturedGraph | str | Path,
    dtype: torch.dtype | None,
    unmatched: str = "error",
) -> CapturedGraph:
    """Capture `model`, loading or converting it first where asked.

    `unmatched` "keep": a layer that can't be captured stays a leaf.

    Raises:
        CaptureError: not a model, already compiled, or a dtype that a captured graph can't take.
    """
    check_surroundings()
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise CaptureError(f"dtype must be a torch.dtype, got {dtype!r} ({type(dtype).__name__})")
    if isinstance(model, CapturedGraph):
        if dtype is not None and dtype != model.dtype:
            raise CaptureError(
                f"a graph captured in {model.dtype} can't be retyped to {dtype}; pass the model instead"
            )
        if model.model is None:
            raise CaptureError("this CapturedGraph does not hold its model; use capture(model)")
        return model
    if isinstance(model, (str, Path)):
        model = load_folder(Path(model), dtype)
    if isinstance(model, HelixModule):
        raise CaptureError(
            "this model is already compiled by helix_compile; pass the original model"
        )
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise CaptureError(
            f"expected a transformers causal language model, a checkpoint folder or a CapturedGraph, "
            f"got {type(model).__name__}"
        )
    check_model(model)
    if dtype is None or dtype == model.dtype:
        return capture(model, unmatched=unmatched)
    if not dtype.is_floating_point:
        raise CaptureError(f"dtype must be a floating dtype, got {dtype}")
    return capture(converted_copy(model, dtype), owner=model, unmatched=unmatched)


def converted_copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A deep copy whose weights are `dtype`. What the model keeps wider on purpose (tables, fp32 islands) stays."""
    twin = copy.deepcopy(model)
    keep = tuple(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    narrow = dtype.itemsize < torch.float32.itemsize
    stored = dict(twin.state_dict(keep_vars=True))
    for name, tensor in stored.items():
        kept = narrow and any(k in name for k in keep)
        if tensor.dtype == model.dtype and not kept:
            tensor.data = tensor.data.to(dtype)
    return twin


def load_folder(folder: Path, dtype: torch.dtype | None) -> nn.Module:
    """The model of a checkpoint folder, in eval mode; CaptureError if there is none or it can't be loaded."""
    if folder.is_file() and folder.suffix == ".json":
        raise CaptureError(
            f"{folder} is a configuration alone: it has no weights; pass a checkpoint folder, or a model with random "
            "weights: AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path)).eval()"
        )
    if folder.is_file():
        raise CaptureError(f"{folder} is a file; pass the checkpoint folder that holds it")
    if not (folder / "config.json").is_file():
        raise CaptureError(f"{folder} is not a checkpoint folder: it has no config.json")
    from transformers import AutoModelForCausalLM  # slow to import, and only this path needs it

    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype or "auto", local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise CaptureError(f"{folder}: can't load the checkpoint: {error}") from error
    return model.eval()


def device_of(captured: CapturedGraph) -> torch.device:
    """Where the model is."""
    assert captured.model is not None
    return next(captured.model.parameters()).device


def device_for(device: str | torch.device | None, world: object = "virtual") -> torch.device | None:
    """The asked device, checked to exist; None means where the model is. "cuda" is this rank's own GPU."""
    if device is None:
        return None
    try:
        place = torch.device(device)
        place = local_device(place) if is_distributed(world) else place
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise HelixError(f"device={str(device)!r} can't be used here: {error}") from error
    return place


def facts_of(
    captured: CapturedGraph,
    matches: dict[str, LayerMatch],
    plan: HelixPlan,
    device: torch.device | None,
    world: World,
) -> ModelFacts:
    """Original tensors, their cuts, cache widths and configurations.

    Where all ranks live here the originals go to `device` whole, and shards are views of them; a rank of its own
    process takes its cuts there alone.
    """
    model = captured.model
    assert model is not None
    here = next(model.parameters()).device
    if captured.leaves and device is not None and device != here:
        raise CaptureError(
            f"device={str(device)!r}: {', '.join(x.name for x in captured.leaves)} stay the model's own modules, which "
            f"are on {here}; move the model there first"
        )
    tensors: dict[str, Tensor] = originals(model)
    if device is not None and len(world.ranks) == world.mesh.world_size:
        tensors = {n: t.to(device) for n, t in tensors.items()}
    sites = [a for layer in captured.layers for a in matches[layer.body].attentions]
    return ModelFacts(
        vocab_size=captured.vocab_size,
        cache_widths=tuple(a.kv_lora_rank + a.qk_rope_head_dim for a in sites),
        latent_widths=tuple(a.kv_lora_rank for a in sites),
        originals=tensors,
        shards=shard_of_name(plan, [(layer.prefix, layer.body) for layer in captured.layers]),
        config=model.config,
        generation_config=getattr(model, "generation_config", None),
        device=device or device_of(captured),
    )
