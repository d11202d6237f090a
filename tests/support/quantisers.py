"""Quantisers of weights, and what their weights are worth, written from the formats' descriptions in numpy.

Each takes a matrix and gives (what stands behind the weight's name -> stored tensor, the matrix that it stands for in
float32). Values and scales are drawn so that neighbours differ: a wrong nibble, group or block is seen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]
Stored = dict[str, Tensor]
Quantiser = Callable[[tuple[int, int], np.random.Generator], tuple[Stored, Array]]


def minifloat(codes: Array, exponent: int, mantissa: int, bias: int) -> Array:
    """What codes of sign, `exponent` and `mantissa` bits are worth."""
    sign = np.where(codes >> (exponent + mantissa) & 1, -1.0, 1.0)
    e, m = codes >> mantissa & (1 << exponent) - 1, (codes & (1 << mantissa) - 1) / (1 << mantissa)
    worth = np.where(e == 0, np.ldexp(m, 1 - bias), np.ldexp(1 + m, e.astype(int) - bias))
    return (sign * worth).astype(np.float32)


def e4m3(codes: Array) -> Array:
    """Without infinities; 0x7f is not a number."""
    return minifloat(codes, 4, 3, 7)


def e8m0(codes: Array) -> Array:
    """An exponent alone, 127 more than it is."""
    return np.ldexp(np.float32(1), codes.astype(int) - 127).astype(np.float32)


def _codes(shape: tuple[int, ...], rng: np.random.Generator, top: int = 256) -> Array:
    codes = rng.integers(0, top, shape, dtype=np.uint8)
    return np.where(codes & 0x7F == 0x7F, 1, codes).astype(np.uint8) if top == 256 else codes


def _spread(scales: Array, rows: int, columns: int, shape: tuple[int, int]) -> Array:
    return scales.repeat(rows, 0).repeat(columns, 1)[: shape[0], : shape[1]]


def _scales(shape: tuple[int, ...], rng: np.random.Generator, dtype: torch.dtype) -> tuple[Tensor, Array]:
    stored = torch.from_numpy(rng.uniform(0.001, 0.004, shape).astype(np.float32)).to(dtype)
    return stored, stored.float().numpy()


def fp8(rows: int, columns: int, tail: str, dtype: torch.dtype = torch.float32, like: str = "grid") -> Quantiser:
    """One scale for each rows x columns; 0: for all of them. `like`: how the scales' dims are stored."""

    def quantise(shape: tuple[int, int], rng: np.random.Generator) -> tuple[Stored, Array]:
        high, wide = rows or shape[0], columns or shape[1]
        grid = (-(-shape[0] // high), -(-shape[1] // wide))
        codes = _codes(shape, rng)
        if dtype in (torch.uint8, torch.float8_e8m0fnu):
            exponents = rng.integers(116, 121, grid, dtype=np.uint8)
            stored, worth = torch.from_numpy(exponents).view(dtype), e8m0(exponents)
        else:
            stored, worth = _scales(grid, rng, dtype)
        dims = {"grid": grid, "row": grid[:1], "scalar": (), "four": (grid[0], 1, grid[1], 1)}[like]
        values = torch.from_numpy(codes).view(torch.float8_e4m3fn)
        return {"": values, tail: stored.view(dims)}, e4m3(codes) * _spread(worth, high, wide, shape)

    return quantise


def _two_to_a_byte(codes: Array) -> Tensor:
    return torch.from_numpy(codes[:, 0::2] | codes[:, 1::2] << 4)


def nvfp4(tail: str, whole: str, divides: bool) -> Quantiser:
    """e2m1 in groups of 16, a scale in e4m3 for each, and one float32 for the whole matrix."""

    def quantise(shape: tuple[int, int], rng: np.random.Generator) -> tuple[Stored, Array]:
        codes, scales = _codes(shape, rng, 16), _codes((shape[0], shape[1] // 16), rng, 0x7F)
        one = np.float32(rng.uniform(50, 90) if divides else rng.uniform(0.0001, 0.0002))
        of_group = e4m3(scales) / one if divides else e4m3(scales) * one
        stored = {
            tail: _two_to_a_byte(codes),
            "_scale": torch.from_numpy(scales).view(torch.float8_e4m3fn),
            whole: torch.tensor([one] if divides else one),
        }
        return stored, minifloat(codes, 2, 1, 1) * _spread(of_group, 1, 16, shape)

    return quantise


def mxfp4(tail: str) -> Quantiser:
    """e2m1 in groups of 32, an exponent for each."""

    def quantise(shape: tuple[int, int], rng: np.random.Generator) -> tuple[Stored, Array]:
        codes = _codes(shape, rng, 16)
        exponents = rng.integers(120, 125, (shape[0], shape[1] // 32), dtype=np.uint8)
        stored = {tail: _two_to_a_byte(codes), "_scale": torch.from_numpy(exponents)}
        return stored, minifloat(codes, 2, 1, 1) * _spread(e8m0(exponents), 1, 32, shape)

    return quantise


def int4(group: int) -> Quantiser:
    """-8 to 7, eight to an int32 from its lowest bits up, the last one filled up; 0: one group a row."""

    def quantise(shape: tuple[int, int], rng: np.random.Generator) -> tuple[Stored, Array]:
        size = group or shape[1]
        whole = rng.integers(-8, 8, shape)
        filled = np.zeros((shape[0], -(-shape[1] // 8) * 8), dtype=np.uint32)
        filled[:, : shape[1]] = whole + 8
        words = np.zeros((shape[0], filled.shape[1] // 8), dtype=np.uint32)
        for place in range(8):
            words |= filled[:, place::8] << np.uint32(4 * place)
        scale, worth = _scales((shape[0], shape[1] // size), rng, torch.bfloat16)
        stored = {
            "_packed": torch.from_numpy(words.view(np.int32)),
            "_scale": scale,
            "_shape": torch.tensor(shape, dtype=torch.int32),
        }
        return stored, whole.astype(np.float32) * _spread(worth, 1, size, shape)

    return quantise


@dataclass(frozen=True)
class Case:
    """A format as a quantiser writes it: what its configuration says, how it stores a matrix, what columns it needs."""

    name: str  # what our notes call it
    said: dict[str, Any]
    quantise: Quantiser
    columns: int = 1
    file: str = "config.json"
    idle: tuple[str, ...] = field(default=())  # scales of activations that it writes beside a weight


def compressed_tensors(container: str, weights: dict[str, Any], **further: Any) -> dict[str, Any]:
    plain = {"dynamic": False, "symmetric": True, "actorder": None, "block_structure": None, "group_size": None}
    group = {"targets": ["Linear"], "input_activations": None, "weights": {**plain, **weights}}
    return {
        "quant_method": "compressed-tensors",
        "format": container,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*kv_a_proj.*"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
        **further,
    }


def quark(**weight: Any) -> dict[str, Any]:
    spec = {"is_dynamic": False, "symmetric": None, "group_size": None, "scale_format": None, **weight}
    return {
        "quant_method": "quark",
        "global_quant_config": {"weight": spec, "input_tensors": {"dtype": "fp8_e4m3"}, "bias": None},
        "layer_quant_config": {"*q_b_proj": {"weight": spec}},
        "exclude": ["lm_head"],
        "export": {"kv_cache_group": [], "pack_method": "reorder", "weight_format": "real_quantized"},
    }


_FLOAT8 = {"num_bits": 8, "type": "float"}
_FLOAT4 = {"num_bits": 4, "type": "float"}
_INT4 = {"num_bits": 4, "type": "int"}
BF16, E8M0 = torch.bfloat16, torch.float8_e8m0fnu
CASES = {
    "fp8_blocks_bf16": Case(
        "FP8 in blocks of 16 x 24",
        {"quant_method": "fp8", "weight_block_size": [16, 24]},
        fp8(16, 24, "_scale_inv", BF16),
    ),
    "fp8_blocks_e8m0": Case(
        "FP8 in blocks of 7 x 5",
        {"quant_method": "fp8", "weight_block_size": [7, 5], "scale_fmt": "ue8m0"},
        fp8(7, 5, "_scale_inv", E8M0),
    ),
    "fp8_tensor_static": Case(
        "FP8 per tensor or per channel",
        {"quant_method": "fp8", "activation_scheme": "static"},
        fp8(0, 0, "_scale", like="row"),
        idle=("input_scale",),
    ),
    "fp8_tensor_inverse": Case(
        "FP8 per tensor or per channel",
        {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None},
        fp8(0, 0, "_scale_inv", BF16, like="scalar"),
        idle=("activation_scale",),
    ),
    "fp8_channel": Case(
        "FP8 per tensor or per channel", {"quant_method": "fp8", "activation_scheme": "dynamic"}, fp8(1, 0, "_scale")
    ),
    "quark_tensor": Case(
        "FP8 per tensor",
        quark(dtype="fp8_e4m3", qscheme="per_tensor"),
        fp8(0, 0, "_scale", like="scalar"),
        idle=("input_scale", "output_scale"),
    ),
    "quark_channel": Case(
        "FP8 per channel", quark(dtype="fp8_e4m3", qscheme="per_channel", ch_axis=0), fp8(1, 0, "_scale", like="row")
    ),
    "ct_tensor": Case(
        "FP8 per tensor",
        compressed_tensors("float-quantized", {**_FLOAT8, "strategy": "tensor"}),
        fp8(0, 0, "_scale", BF16, like="row"),
        idle=("input_scale",),
    ),
    "ct_channel": Case(
        "FP8 per channel",
        compressed_tensors("float-quantized", {**_FLOAT8, "strategy": "channel"}),
        fp8(1, 0, "_scale", BF16),
    ),
    "ct_blocks": Case(
        "FP8 in blocks of 16 x 24",
        compressed_tensors("float-quantized", {**_FLOAT8, "strategy": "block", "block_structure": [16, 24]}),
        fp8(16, 24, "_scale"),
    ),
    "modelopt_fp8": Case(
        "FP8 per tensor",
        {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]},
        fp8(0, 0, "_scale", like="scalar"),
        file="hf_quant_config.json",
        idle=("input_scale", "k_scale", "v_scale"),
    ),
    "modelopt_channel": Case(
        "FP8 per channel",
        {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
        fp8(1, 0, "_scale", like="row"),
        file="hf_quant_config.json",
    ),
    "modelopt_blocks": Case(
        "FP8 in blocks of 24 x 24",
        {"quant_method": "modelopt", "quant_algo": "fp8_pb_wo", "group_size": 24},
        fp8(24, 24, "_scale", like="four"),
    ),
    "modelopt_nvfp4": Case(
        "NVFP4",
        {"quant_algo": "NVFP4", "group_size": 16, "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]},
        nvfp4("", "_scale_2", divides=False),
        columns=16,
        file="hf_quant_config.json",
        idle=("input_scale",),
    ),
    "modelopt_nvfp4_in_config": Case(
        "NVFP4",
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"], "config_groups": {}},
        nvfp4("", "_scale_2", divides=False),
        columns=16,
    ),
    "ct_nvfp4": Case(
        "NVFP4",
        compressed_tensors("nvfp4-pack-quantized", {**_FLOAT4, "strategy": "tensor_group", "group_size": 16}),
        nvfp4("_packed", "_global_scale", divides=True),
        columns=16,
        idle=("input_global_scale",),
    ),
    "ct_mxfp4": Case(
        "MXFP4",
        compressed_tensors("mxfp4-pack-quantized", {**_FLOAT4, "strategy": "group", "group_size": 32}),
        mxfp4("_packed"),
        columns=32,
    ),
    "quark_mxfp4": Case(
        "MXFP4",
        quark(dtype="fp4", qscheme="per_group", group_size=32, scale_format="e8m0", ch_axis=-1),
        mxfp4(""),
        columns=32,
    ),
    "ct_mxfp8": Case(
        "MXFP8",
        compressed_tensors("mxfp8-quantized", {**_FLOAT8, "strategy": "group", "group_size": 32}),
        fp8(1, 32, "_scale", torch.uint8),
        columns=32,
    ),
    "modelopt_mxfp8": Case(
        "MXFP8",
        {"quant_algo": "MXFP8", "group_size": 32},
        fp8(1, 32, "_scale", torch.uint8),
        columns=32,
        file="hf_quant_config.json",
    ),
    "ct_int4": Case(
        "int4 in groups of 32",
        compressed_tensors("pack-quantized", {**_INT4, "strategy": "group", "group_size": 32}),
        int4(32),
        columns=32,
    ),
    "ct_int4_channel": Case(
        "int4 per channel", compressed_tensors("pack-quantized", {**_INT4, "strategy": "channel"}), int4(0)
    ),
}
