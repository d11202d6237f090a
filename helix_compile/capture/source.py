"""What helix_compile accepts as `model`, and what it reads off it: a module, a folder, or a CapturedGraph."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from helix_compile.capture.captured import CapturedGraph
from helix_compile.capture.checks import check_model, check_surroundings, raised_not_logged
from helix_compile.capture.model import capture
from helix_compile.capture.program import capture_program, load_program
from helix_compile.checkpoint.configuration import TEXT_PREFIXES, other_format, read_configuration
from helix_compile.checkpoint.model import load_whole, open_checkpoint
from helix_compile.errors import CaptureError
from helix_compile.ir.graph import input_ref, inputs_of
from helix_compile.ir.stage import copy_module

COMPUTED = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_ASKED = ("config", "dtype", "get_input_embeddings")  # of transformers' models, and of those written in their style
Source = nn.Module | CapturedGraph | ExportedProgram | str | Path


def captured_from(
    model: Source, dtype: torch.dtype | None, device: torch.device | None = None, unmatched: str = "error"
) -> CapturedGraph:
    """Capture `model`, converting it first where asked; of a folder, no weight is read yet.

    `unmatched` "keep": a layer that can't be captured stays a leaf. Graphs say `device`, where one is given.

    Raises:
        CaptureError: not a model, already compiled, or a dtype that a captured graph can't take.
        CheckpointError: a folder that does not hold what its config.json describes.
    """
    with raised_not_logged():
        captured = _captured(model, dtype, device, unmatched)
    if device is None or captured.weights is not None or device == device_of(captured):
        return captured
    captured = replace(captured, graph=copy_module(captured.graph))  # which may be the user's
    _place(captured, device)
    return captured


def _captured(model: Source, dtype: torch.dtype | None, device: torch.device | None, unmatched: str) -> CapturedGraph:
    check_surroundings()
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise CaptureError(f"dtype must be a torch.dtype, got {dtype!r} ({type(dtype).__name__})")
    if dtype not in (None, *COMPUTED):
        raise CaptureError(f"dtype must be one that a step computes in ({', '.join(map(str, COMPUTED))}), got {dtype}")
    if isinstance(model, CapturedGraph):
        if dtype is not None and dtype != model.dtype:
            raise CaptureError(f"a graph captured in {model.dtype} can't be retyped to {dtype}; pass the model instead")
        if model.model is None:
            raise CaptureError("this CapturedGraph does not hold its model; use capture(model)")
        return model
    if isinstance(model, (str, Path)) and Path(model).suffix == ".pt2":
        model = load_program(Path(model))
    if isinstance(model, ExportedProgram):
        captured = capture_program(model)
        if dtype not in (None, captured.dtype):
            raise CaptureError(
                f"a program exported in {captured.dtype} can't be retyped to {dtype}; export it in that dtype"
            )
        return captured
    if isinstance(model, (str, Path)):
        return _captured_folder(Path(model), dtype, device or torch.device("cpu"), unmatched)
    if not isinstance(model, nn.Module) or not all(hasattr(model, name) for name in _ASKED):
        inside = (
            [n for n, m in model.named_modules() if isinstance(m, PreTrainedModel)]
            if isinstance(model, nn.Module)
            else []
        )
        raise CaptureError(
            f"expected a transformers causal language model, a checkpoint folder, an ExportedProgram or a "
            f"CapturedGraph, got {type(model).__name__}"
            + (
                f", a wrapper of one: pass its `.{inside[0]}` (an adapter's weights must be merged first)"
                if inside
                else ""
            )
        )
    check_model(model)
    if dtype is None or dtype == model.dtype:
        return capture(model, unmatched=unmatched)
    return capture(converted_copy(model, dtype), unmatched=unmatched)


def converted_copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A deep copy whose weights are `dtype`. What the model keeps wider on purpose (tables, fp32 islands) stays."""
    twin = copy.deepcopy(model)
    keep = tuple(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    narrow = dtype.itemsize < torch.float32.itemsize
    for name, tensor in twin.state_dict(keep_vars=True).items():
        if tensor.dtype == model.dtype and not (narrow and any(k in name for k in keep)):
            tensor.data = tensor.data.to(dtype)
    return twin


def _captured_folder(folder: Path, dtype: torch.dtype | None, device: torch.device, unmatched: str) -> CapturedGraph:
    """The model of a checkpoint folder, captured on the meta device; its weights are read when ranks are built."""
    _check_checkpoint_folder(folder)
    checkpoint = open_checkpoint(folder, dtype, device)
    check_model(checkpoint.model)
    captured = capture(checkpoint.model, unmatched=unmatched)
    _place(captured, device)
    read = [input_ref(n).name for n in inputs_of(captured.graph.graph, "param")]
    known = {*checkpoint.weights, *captured.constants}  # asking a source for a name would read the tensor
    _check_values(name for name in read if name not in known)
    _check_values(name for name, tensor in captured.constants.items() if tensor.is_meta)
    checkpoint.weights.hold(captured.constants)
    return replace(captured, weights=checkpoint.weights, notes=(*captured.notes, *checkpoint.notes))


def _check_values(without: Iterable[str]) -> None:
    """Raise CaptureError for a tensor that has no value: what is computed from it would have none."""
    for name in without:
        raise CaptureError(
            f"capture: `{name}` is a tensor of the model that is neither a parameter nor a buffer, and has no value "
            "on the meta device; register_buffer() it, or load the model first"
        )


def _place(captured: CapturedGraph, device: torch.device) -> None:
    """Make graphs that were captured on meta say `device`: in arange and the like, and in the example values."""

    def there(value: Any) -> Any:
        if not isinstance(value, FakeTensor):
            return value
        with value.fake_mode:
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)

    for module in (captured.graph, *captured.bodies.values()):
        for node in module.graph.nodes:
            if node.kwargs.get("device") is not None:
                node.kwargs = {**node.kwargs, "device": device}
            if "val" in node.meta:
                node.meta["val"] = tree_map(there, node.meta["val"])
        module.recompile()


def _check_checkpoint_folder(folder: Path) -> None:
    if folder.is_file() and folder.suffix == ".json":
        raise CaptureError(
            f"{folder} is a configuration alone: it has no weights; pass a checkpoint folder, or a model with random "
            "weights: AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path)).eval()"
        )
    if folder.is_file():
        raise CaptureError(f"{folder} is a file; pass the checkpoint folder that holds it")
    if (folder / "adapter_config.json").exists():
        raise CaptureError(
            f"{folder} holds adapter_config.json: the weights beside it are completed by an adapter (LoRA), which is not read; "
            "merge it first (peft: model.merge_and_unload(), then save_pretrained) and pass that folder"
        )
    if not (folder / "config.json").is_file():
        raise CaptureError(f"{folder} is not a checkpoint folder: it has no config.json{other_format(folder)}")


def load_folder(folder: Path, dtype: torch.dtype | None) -> tuple[nn.Module, tuple[str, ...]]:
    """The model of a checkpoint folder, loaded whole by transformers, in eval mode; for verify(). And notes on how.

    Quantised weights are those of our own reader: transformers needs a package of each quantiser for them.

    Raises:
        CaptureError: no such folder, or it can't be loaded.
        CheckpointError: quantised weights that can't be read.
    """
    _check_checkpoint_folder(folder)
    read = read_configuration(folder)
    if read.quantisations:
        note = "the reference's quantised weights were dequantised by the same reader: verify checks what is done with them"
        return load_whole(folder, dtype), (note,)
    of_text = {f"^{re.escape(prefix)}": "" for prefix in TEXT_PREFIXES} if read.wrapped else None
    try:
        model = read.model_class.from_pretrained(
            folder,
            config=read.config,
            dtype=dtype or "auto",
            key_mapping=of_text,
            local_files_only=True,
            use_safetensors=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise CaptureError(f"{folder}: can't load the checkpoint: {error}") from error
    return model.eval(), ()


def device_of(captured: CapturedGraph) -> torch.device:
    """Where the model is; what is read from a folder goes to the CPU."""
    assert captured.model is not None
    if captured.weights is not None:
        return torch.device("cpu")
    return next(captured.model.parameters()).device


def device_of_input(model: object) -> torch.device:
    """Where a model that is not captured yet is; anything but a module counts as on the CPU."""
    held = model.model if isinstance(model, CapturedGraph) else model
    first = next(held.parameters(), None) if isinstance(held, nn.Module) else None
    return torch.device("cpu") if first is None else first.device
