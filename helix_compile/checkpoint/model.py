"""A checkpoint folder as a model without weights (meta device) and a source to read its parameters from.

load_deepseek_v3() is our own DeepSeek-V3 with what that source reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import build_glob_alternation

from helix_compile.checkpoint.computed import computed_tensors
from helix_compile.checkpoint.configuration import TEXT_PREFIXES, Configuration, read_configuration
from helix_compile.checkpoint.entries import Entries, Entry, read_entries
from helix_compile.checkpoint.files import FLOATS, CheckpointFiles
from helix_compile.checkpoint.names import Assembly, assemble
from helix_compile.checkpoint.stated import Stated, stated_format
from helix_compile.checkpoint.weights import CheckpointWeights
from helix_compile.errors import CheckpointError
from helix_compile.models.deepseek_v3 import DeepseekV3
from helix_compile.models.rope import RotaryEmbedding


def load_deepseek_v3(
    folder: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> DeepseekV3:
    """The model of a folder, whole, in eval mode. What is read and what is refused: docs/checkpoints.md.

    Args:
        folder: config.json and safetensors of a DeepseekV3ForCausalLM; quantised weights are dequantised.
        dtype: of the weights; default: config.json's, else what is stored. The router's bias stays float32.
        device: where the weights go.

    Raises:
        CheckpointError: what is stored is not what config.json describes; nothing was read then.
    """
    checkpoint = open_checkpoint(Path(folder), dtype, torch.device(device))
    config = checkpoint.model.config
    with torch.device("meta"):
        model = DeepseekV3(config)
    weights = {name: checkpoint.weights[name] for name in model.state_dict()}
    model.load_state_dict(weights, assign=True)
    if weights["lm_head.weight"] is weights["model.embed_tokens.weight"]:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.model.rotary_emb = RotaryEmbedding(config).to(device)
    return model.eval()


@dataclass(frozen=True)
class Checkpoint:
    """A folder that was checked against its configuration, of which no weight has been read.

    Attributes:
        model: transformers' model on the meta device, in eval mode.
        weights: where its parameters are read from.
        computed: names of tensors that no checkpoint holds.
        notes: what the checkpoint holds beyond the model.
    """

    model: PreTrainedModel
    weights: CheckpointWeights
    computed: tuple[str, ...]
    notes: tuple[str, ...]


def open_checkpoint(folder: Path, dtype: torch.dtype | None, device: torch.device) -> Checkpoint:
    """Open config.json and the headers of the safetensors files; names and shapes are compared, nothing is read.

    Args:
        dtype: of the weights once read; default: what config.json states, else what is stored.
        device: where what is read goes.

    Raises:
        CheckpointError: a configuration that can't be built, a format of weights that is not read, files that can't be
            read, or that hold another model.
    """
    read = read_configuration(folder)
    stated = stated_format(read)
    files = CheckpointFiles(folder)
    entries = read_entries(files, stated)
    model = _meta_model(folder, read, dtype or read.config.dtype or _stored_dtype(entries))
    parts = parts_beside_text(model)
    beside = [name for name in model.state_dict() if any(name.startswith(f"{part}.") for part in parts)]
    assembly = assemble(model, entries, str(folder), TEXT_PREFIXES if read.wrapped else (), beside)
    for part in parts:
        owner, _, own = part.rpartition(".")
        setattr(model.get_submodule(owner), own, None)  # what reads it could only compute on nothing
    computed = computed_tensors(model)
    _untie(model, files, entries, assembly)
    like = {
        name: tensor.detach()
        for named in (model.named_parameters, model.named_buffers)
        for name, tensor in named(remove_duplicate=False)
    }
    like |= {name: tensor.to("meta") for name, tensor in computed.items()}
    weights = CheckpointWeights(files, entries, assembly, like, computed, device)
    notes = (*read.notes, *_quantised_notes(stated, entries, model.dtype), *assembly.notes)
    return Checkpoint(model, weights, tuple(computed), notes)


def load_whole(folder: Path, dtype: torch.dtype | None) -> PreTrainedModel:
    """The model of a folder in transformers' class, with the weights that open_checkpoint() reads, whole, on the CPU.

    Raises:
        CheckpointError: as open_checkpoint().
    """
    checkpoint = open_checkpoint(folder, dtype, torch.device("cpu"))
    model, weights = checkpoint.model, checkpoint.weights
    held = {name: weights[name] for name in weights}  # a tied tensor is one, under both names
    model.load_state_dict({name: held[name] for name in model.state_dict()}, assign=True)
    for name in checkpoint.computed:
        owner, _, own = name.rpartition(".")
        setattr(model.get_submodule(owner), own, held[name])
    model.tie_weights()
    return model


def _quantised_notes(stated: Stated | None, entries: Entries, dtype: torch.dtype) -> list[str]:
    if stated is None:
        return []
    number = sum(entry.quantised is not None for entry in entries.values())
    told = f"{number} weight(s) are {stated.name}, by {stated.file.name}: dequantised into {dtype}"
    if number == 0:
        told = f"{stated.file.name} states {stated.name}, but all weights are stored in plain floats"
    notes = [f"checkpoint: {told}", *stated.notes]
    if idle := entries.idle:
        more = ", ..." if idle[2:] else ""
        what = "scale(s) of activations or of the cache have no effect: both stay in the model's dtype"
        notes.append(f"checkpoint: {len(idle)} {what}: {', '.join(idle[:2])}{more}")
    return notes


def parts_beside_text(model: PreTrainedModel) -> list[str]:
    """Of a model that takes images besides, the largest modules that hold nothing of its text model: a tower, a projector."""
    if model.config.get_text_config(decoder=True) is model.config:
        return []
    of_text = (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())
    kept = {id(m) for part in of_text if part is not None for m in part.modules()}
    found: list[str] = []
    for name, module in model.named_modules():
        is_apart = not any(id(m) in kept for m in module.modules())
        if name and is_apart and not any(name.startswith(f"{other}.") for other in found):
            found.append(name)
    return found


def _stored_dtype(entries: Entries) -> torch.dtype:
    """The first plain one, as transformers' dtype="auto" has it; bfloat16 where all are quantised."""
    found = (e.stored.dtype for e in entries.values() if e.quantised is None and not e.problems)
    return FLOATS[next(found, "BF16")]


def _meta_model(folder: Path, read: Configuration, dtype: torch.dtype) -> PreTrainedModel:
    from transformers import GenerationConfig

    try:
        with torch.device("meta"):
            model = read.model_class._from_config(read.config, dtype=dtype)
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
    except Exception as error:  # a model's class may raise anything at a value that it does not know
        raise CheckpointError(f"{folder}: can't build the model that config.json describes: {error}") from error
    for pattern, kept in model._get_dtype_plan(dtype).items():  # fp32 islands of a 16-bit model
        found, *_ = build_glob_alternation([pattern])
        for name, tensor in model.state_dict(keep_vars=True).items():
            if found.search(name):
                tensor.data = tensor.data.to(kept)
    if getattr(model.config, "_experts_implementation", None) is not None:
        # grouped_mm is traced differently on each device; this form is not, and the FFN pass replaces either
        model.set_experts_implementation("batched_mm")
    return model.eval()


def _untie(model: PreTrainedModel, files: CheckpointFiles, entries: Entries, assembly: Assembly) -> None:
    """Tied by the configuration but stored twice: one tensor if both are equal, else two, as transformers does."""
    for one, other in list(model.all_tied_weights_keys.items()):
        if one not in assembly.tensors or other not in assembly.tensors:
            continue
        mine, theirs = (assembly.tensors[name].pieces[0].key for name in (one, other))
        if _equal(files, entries[mine], entries[theirs]):
            assembly.same[one] = other
            continue
        owner, _, name = one.rpartition(".")
        old = model.get_parameter(one)
        setattr(model.get_submodule(owner), name, nn.Parameter(torch.empty_like(old), old.requires_grad))
        model.all_tied_weights_keys.pop(one)


def _equal(files: CheckpointFiles, one: Entry, other: Entry) -> bool:
    rows = one.shape[0]
    for start in range(0, rows, 1024):
        part = ((start, min(start + 1024, rows)), *((0, size) for size in one.shape[1:]))
        if not torch.equal(one.part(files, part), other.part(files, part)):
            return False
    return True
