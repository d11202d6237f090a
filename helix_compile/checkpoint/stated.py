"""What a configuration says of quantised weights -> the one format that is read, or a refusal by its name.

One function a quantiser's dialect; each key that changes what a weight is, is read or refused. Lists of modules that were
left out are not read: what is stored decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from helix_compile.checkpoint.configuration import Configuration
from helix_compile.checkpoint.formats import (
    FP8_PER_CHANNEL,
    FP8_PER_TENSOR,
    MXFP4,
    MXFP8,
    NVFP4,
    Format,
    fp8_blocks,
    fp8_of,
    int4_packed,
)
from helix_compile.errors import CheckpointError

Said = dict[str, Any]


@dataclass(frozen=True)
class Stated:
    """The format of a folder's quantised weights, the file that says so, and what it says besides."""

    format: Format
    method: str
    file: Path
    notes: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.format.name} ({self.method})"


class _NotReadError(Exception):
    """Why a format is not read; its name is in the words."""


def stated_format(read: Configuration) -> Stated | None:
    """The format that config.json or hf_quant_config.json states; None: no quantised weights.

    Raises:
        CheckpointError: a format that is not read, or two files that state different ones.
    """
    found = [_stated(said, file) for said, file in read.quantisations]
    for one, other in pairwise(found):
        if one.format != other.format:
            raise CheckpointError(f"{one.file} states {one.name}, {other.file} states {other.name}: two formats")
    return found[0] if found else None


def _stated(said: Said, file: Path) -> Stated:
    method = _method(said)
    if method == "modelopt" and isinstance(said.get("quantization"), dict):
        said = said["quantization"]  # as hf_quant_config.json has it
    try:
        if method not in DIALECTS:
            raise _NotReadError(f"quant_method {method!r}: only {', '.join(map(repr, DIALECTS))} are read")
        form = DIALECTS[method](said)
    except _NotReadError as error:
        raise CheckpointError(
            f"{file}: {error}. Dequantise the checkpoint first; docs/checkpoints.md lists what is read"
        ) from error
    cache = next((said[key] for key in ("kv_cache_quant_algo", "kv_cache_scheme") if said.get(key)), None)
    note = f"{file.name} wants a quantised cache ({cache}): no effect here, the cache is in what cache_dtype says"
    return Stated(form, method, file, (note,) if cache else ())


def _method(said: Said) -> str:
    method = str(said.get("quant_method") or "").lower().replace("_", "-")
    if not method and (said.get("quant_algo") or said.get("quant_library") == "modelopt"):
        return "modelopt"
    return "modelopt" if method in ("modelopt-fp4", "modelopt-mixed") else method


def _fp8(said: Said) -> Format:
    """DeepSeek's, and transformers' own: fp8 by blocks; without a size of blocks by tensor or by row."""
    tails = ("_scale_inv", "_scale")
    if said.get("expert_dtype", "fp8") != "fp8":
        raise _NotReadError(f"fp8 with expert_dtype={said['expert_dtype']!r} is not read")
    block = said.get("weight_block_size")
    form = (
        fp8_of(FP8_PER_TENSOR | FP8_PER_CHANNEL, tails)
        if block is None
        else fp8_blocks(*_two(block, "fp8: weight_block_size"), tails, exponents=said.get("scale_fmt") == "ue8m0")
    )
    stated = str(said.get("fmt") or "").upper()
    if not stated:
        return form
    if (values := f"F8_{stated}") not in form.values:
        raise _NotReadError(f"fp8 with fmt={said['fmt']!r} is not read")
    return replace(form, values=(values,))


def _two(block: Any, what: str) -> tuple[int, int]:
    if isinstance(block, str):
        block = [int(part) if part.isdigit() else part for part in block.split("x")]
    good = isinstance(block, (list, tuple)) and len(block) == 2 and all(type(b) is int and b > 0 for b in block)
    if not good:
        raise _NotReadError(f"{what} is {block!r}, expected [rows, columns]")
    return block[0], block[1]


def _modelopt(said: Said) -> Format:
    algorithm = str(said.get("quant_algo")).upper()
    for key in ("has_zero_point", "pre_quant_scale"):
        if said.get(key):
            raise _NotReadError(f"modelopt {algorithm} with {key} is not read")
    group = said.get("group_size")
    if algorithm == "FP8":
        return fp8_of(FP8_PER_TENSOR, ("_scale",))
    if algorithm == "FP8_PER_CHANNEL_PER_TOKEN":
        return fp8_of(FP8_PER_CHANNEL, ("_scale",))
    if algorithm == "FP8_PB_WO":
        size = _group(group, "modelopt FP8_PB_WO", group or 128)
        return fp8_blocks(size, size, ("_scale",))
    if algorithm in ("NVFP4", "W4A16_NVFP4"):
        _group(group or 16, f"modelopt {algorithm}", 16)
        return NVFP4
    if algorithm == "MXFP8":
        _group(group or 32, "modelopt MXFP8", 32)
        return MXFP8
    raise _NotReadError(f"modelopt {algorithm} is not read")


def _group(size: Any, what: str, expected: Any) -> int:
    if type(size) is not int or size < 1 or size != expected:
        raise _NotReadError(f"{what} with group_size={size!r} is not read")
    return size


def _compressed_tensors(said: Said) -> Format:
    for key, plain in (("sparsity_config", ("dense", None)), ("transform_config", (None,))):
        inner = said.get(key)
        if inner and (key == "transform_config" or inner.get("format") not in plain):
            raise _NotReadError(f"compressed-tensors with {key}={inner!r} is not read")
    groups = said.get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(g, dict) for g in groups.values()):
        raise _NotReadError(f"compressed-tensors with config_groups={groups!r} is not read")
    stated = [
        _of_group(group["weights"], str(group.get("format") or said.get("format")))
        for group in groups.values()
        if group.get("weights")
    ]
    return _one(stated, "compressed-tensors: config_groups")


def _of_group(weights: Said, container: str) -> Format:
    bits, kind, strategy, group = (weights.get(k) for k in ("num_bits", "type", "strategy", "group_size"))
    what = f"compressed-tensors {container} ({bits} bits, {kind}, {strategy})"
    if weights.get("symmetric") is False:
        raise _NotReadError(f"{what}, asymmetric, is not read")
    if weights.get("dynamic") or weights.get("actorder") in ("group", True):
        asked = {k: weights[k] for k in ("dynamic", "actorder") if weights.get(k)}
        raise _NotReadError(f"{what} with {asked} is not read")
    match container, bits, kind, strategy:
        case "float-quantized" | "naive-quantized", 8, "float", "tensor":
            return fp8_of(FP8_PER_TENSOR, ("_scale",))
        case "float-quantized" | "naive-quantized", 8, "float", "channel":
            return fp8_of(FP8_PER_CHANNEL, ("_scale",))
        case "float-quantized" | "naive-quantized", 8, "float", "block":
            return fp8_blocks(*_two(weights.get("block_structure"), f"{what}: block_structure"), ("_scale",))
        case "mxfp8-quantized", 8, "float", "group":
            _group(group, what, 32)
            return MXFP8
        case "pack-quantized", 4, "int", "group":
            return int4_packed(_group(group, what, group))
        case "pack-quantized", 4, "int", "channel":
            return int4_packed(None)
        case "nvfp4-pack-quantized", 4, "float", "tensor_group":
            _group(group, what, 16)
            return replace(NVFP4, tail="_packed", whole_scale="_global_scale", divides=True)
        case "mxfp4-pack-quantized", 4, "float", "group":
            _group(group, what, 32)
            return replace(MXFP4, tail="_packed")
    raise _NotReadError(f"{what} is not read")


def _quark(said: Said) -> Format:
    export = said.get("export") or {}
    if export.get("weight_format", "real_quantized") != "real_quantized":
        raise _NotReadError(f"quark with weight_format={export['weight_format']!r} is not read")
    layers = [said.get("global_quant_config"), *(said.get("layer_quant_config") or {}).values()]
    layers += (said.get("layer_type_quant_config") or {}).values()
    weights = [layer["weight"] for layer in layers if layer and layer.get("weight")]
    return _one([_of_spec(spec) for spec in weights], "quark: global_quant_config, layer_quant_config")


def _of_spec(spec: Any) -> Format:
    if not isinstance(spec, dict):
        stages = ", ".join(str(stage.get("dtype")) for stage in spec)
        raise _NotReadError(f"quark weights in stages ({stages}) are not read")
    dtype, scheme = spec.get("dtype"), spec.get("qscheme")
    what = f"quark {dtype} {scheme}"
    if spec.get("symmetric") is False or spec.get("is_dynamic"):
        raise _NotReadError(f"{what}, asymmetric or dynamic, is not read")
    if dtype == "fp8_e4m3" and scheme == "per_tensor":
        return fp8_of(FP8_PER_TENSOR, ("_scale",))
    if dtype == "fp8_e4m3" and scheme == "per_channel" and spec.get("ch_axis", 0) == 0:
        return fp8_of(FP8_PER_CHANNEL, ("_scale",))
    if dtype == "fp4" and scheme == "per_group" and spec.get("scale_format") == "e8m0":
        _group(spec.get("group_size"), what, 32)
        return MXFP4
    raise _NotReadError(f"{what} is not read")


def _one(formats: Iterable[Format], where: str) -> Format:
    different = list(dict.fromkeys(formats))
    if len(different) != 1:
        told = " and ".join(form.name for form in different) or "no weights"
        raise _NotReadError(f"{where}: {told}; one format in a folder is read")
    return different[0]


DIALECTS: dict[str, Callable[[Said], Format]] = {
    "fp8": _fp8,
    "modelopt": _modelopt,
    "compressed-tensors": _compressed_tensors,
    "quark": _quark,
}
