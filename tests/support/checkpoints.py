"""Checkpoint folders for tests: what save_pretrained writes, rewritten tensor by tensor; and FP8 made by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from helix_compile.capture.model import capture
from helix_compile.config.options import HelixOptions
from helix_compile.passes.decide.plan_helix import plan_helix
from helix_compile.passes.match.layers import match_layers
from helix_compile.plan.helix_plan import HelixPlan, ParamShard
from helix_compile.runtime.rank import shard_of_name
from tests.support.models import fresh_model, tiny_model
from tests.support.quantisers import Case

Tensors = dict[str, Tensor]
LAYOUTS = (
    {"cp": 1},
    {"cp": 2},
    {"cp": 4},
    {"cp": 3},
    {"cp": 2, "tpa": 2},
    {"cp": 3, "tpa": 2, "ep": 2},
    {"cp": 5, "ep": 5, "pad_heads": True},
)


def write(folder: Path, variant: str = "short", dtype: torch.dtype = torch.bfloat16) -> Path:
    """A sharded checkpoint of a small model, experts one by one, as transformers saves it."""
    fresh_model(variant, dtype).save_pretrained(folder, max_shard_size="60KB")
    return folder


def rewrite(folder: Path, change: Callable[[Tensors], Tensors | None]) -> Path:
    """Change the tensors of a folder; they end up in one file without an index."""
    tensors: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
        file.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    changed = change(tensors)
    changed = tensors if changed is None else changed
    save_file({n: t.contiguous() for n, t in changed.items()}, folder / "model.safetensors")
    return folder


def set_config(folder: Path, **fields: object) -> None:
    """Change config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def to_fp8(folder: Path, block: tuple[int, int]) -> Tensors:
    """Quantise every projection of a folder in place; returns the whole matrices, dequantised the plain way."""
    whole: Tensors = {}

    def change(tensors: Tensors) -> Tensors:
        stored: Tensors = {}
        for name, tensor in tensors.items():
            stored[name] = tensor
            if not name.endswith("_proj.weight") and "kv_a_proj" not in name:
                continue
            rows, columns = tensor.shape
            grid = (-(-rows // block[0]), -(-columns // block[1]))
            scale = torch.rand(grid) * 3 + 0.01  # neighbours differ: a wrong block is seen
            wide = scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
            wide = wide[:rows, :columns]
            quantised = (tensor.float() / wide).to(torch.float8_e4m3fn)
            stored[name], stored[f"{name}_scale_inv"] = quantised, scale
            whole[name] = (quantised.float() * wide).to(tensor.dtype)
        return stored

    rewrite(folder, change)
    quantisation = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(block)}
    set_config(folder, quantization_config=quantisation)
    return whole


def plan_of(variant: str, **options: int) -> tuple[HelixPlan, dict[str, tuple[str, ParamShard]]]:
    """A plan of a small model, and its shards by full name."""
    captured = capture(tiny_model(variant))
    matches = match_layers(captured, 512)
    plan = plan_helix(captured, matches, HelixOptions(**options))
    return plan, shard_of_name(plan, [(layer.prefix, layer.body) for layer in captured.layers])


def shards_of(variant: str, **options: int) -> Iterator[tuple[str, ParamShard, HelixPlan, int]]:
    """(full name of the original, shard, plan, rank) of everything that is cut, on every rank."""
    plan, shards = plan_of(variant, **options)
    for source, shard in shards.values():
        for rank in range(plan.layout.world_size):
            yield source, shard, plan, rank


def quantise(folder: Path, case: Case, only: str = "", prefix: str = "") -> Tensors:
    """Store projections (with `only` in their names) of a folder in a format; returns what they stand for, in float32.

    `prefix` goes before every name.
    """
    whole: Tensors = {}
    rng = np.random.default_rng(0)

    def change(tensors: Tensors) -> Tensors:
        stored: Tensors = {}
        for name, tensor in tensors.items():
            chosen = name.endswith("_proj.weight") and "kv_a_proj" not in name and only in name
            if not chosen or tensor.shape[1] % case.columns:
                stored[prefix + name] = tensor
                continue
            written, worth = case.quantise((tensor.shape[0], tensor.shape[1]), rng)
            stored |= {f"{prefix}{name}{tail}": t for tail, t in written.items()}
            stored |= {f"{prefix}{name.removesuffix('weight')}{tail}": torch.ones(1) for tail in case.idle}
            whole[name] = torch.from_numpy(worth)
        return stored

    rewrite(folder, change)
    state(folder, case)
    return whole


def state(folder: Path, case: Case) -> None:
    """Write what the configuration says of a format to the file that its quantiser writes it to."""
    if case.file == "config.json":
        set_config(folder, quantization_config=case.said)
    else:
        written = {"producer": {"name": "modelopt", "version": "0.29.0"}, "quantization": case.said}
        (folder / case.file).write_text(json.dumps(written))
