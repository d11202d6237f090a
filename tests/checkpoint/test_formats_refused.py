"""Quantised folders that are damaged, in two formats, or in one that is not read: named, before a weight is read."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from helix_compile import CheckpointError, helix_compile
from helix_compile.checkpoint.configuration import read_configuration
from helix_compile.checkpoint.entries import read_entries
from helix_compile.checkpoint.files import CheckpointFiles
from helix_compile.checkpoint.formats import MXFP8, Format, Quantised, fp8_blocks
from helix_compile.checkpoint.model import open_checkpoint
from helix_compile.checkpoint.stated import stated_format
from tests.support.checkpoints import Tensors, quantise, rewrite, set_config, state, write
from tests.support.quantisers import CASES, compressed_tensors, quark

UP = "model.layers.1.mlp.experts.3.up_proj.weight"
HEAD = "lm_head.weight"
# of each family one
FAMILIES = ("fp8_blocks_e8m0", "quark_channel", "modelopt_fp8", "modelopt_nvfp4", "ct_nvfp4", "quark_mxfp4", "ct_int4")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("grouped"), "grouped")


@pytest.fixture(scope="module")
def written(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each family."""
    folders = {}
    for case in FAMILIES:
        folders[case] = Path(shutil.copytree(plain, tmp_path_factory.mktemp(case) / "folder"))
        quantise(folders[case], CASES[case])
    return folders


def refused(folder: Path, *messages: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder, None, torch.device("cpu"))
    for message in messages:
        assert re.search(message, str(caught.value)), f"{message!r} is not in:\n{caught.value}"


def changed(written: dict[str, Path], case: str, tmp_path: Path, change: Callable[[Tensors], object]) -> Path:
    folder = Path(shutil.copytree(written[case], tmp_path / "copy"))

    def apply(tensors: Tensors) -> None:
        change(tensors)

    return rewrite(folder, apply)


def scale_of(case: str) -> str:
    return UP + ("_scale_inv" if case.startswith("fp8") else "_scale")


@pytest.mark.parametrize("case", FAMILIES)
def test_a_missing_scale(written: dict[str, Path], tmp_path: Path, case: str) -> None:
    name = scale_of(case)
    folder = changed(written, case, tmp_path, lambda t: t.pop(name))
    refused(folder, rf"missing: (\S+ or )?{name}[, ].*the scales of {UP}\S* .*: {CASES[case].name}")


@pytest.mark.parametrize("case", FAMILIES)
def test_a_scale_of_another_shape_or_dtype(written: dict[str, Path], tmp_path: Path, case: str) -> None:
    name = scale_of(case)

    def longer(tensors: Tensors) -> None:
        tensors[name] = torch.cat([tensors[name].reshape(-1), tensors[name].reshape(-1)[:1]])

    folder = changed(written, case, tmp_path, longer)
    refused(
        folder, r"0 missing, 0 left over, 1 does not fit", rf"does not fit: {name}: \[\d+\] .*, expected \[\d+, \d+\]"
    )
    shutil.rmtree(folder)

    def integers(tensors: Tensors) -> None:
        tensors[name] = torch.ones(tensors[name].shape, dtype=torch.int64)

    refused(changed(written, case, tmp_path, integers), rf"does not fit: {name}: .* I64, expected")


@pytest.mark.parametrize("case", FAMILIES)
def test_a_scale_that_nothing_needs(written: dict[str, Path], tmp_path: Path, case: str) -> None:
    """Of a plain weight; and a second one, or zero points, of a quantised weight."""
    extra = (f"{HEAD}_scale", f"{UP}_scale_3", f"{UP}_zero_point")
    folder = changed(written, case, tmp_path, lambda t: t.update({name: torch.ones(1) for name in extra}))
    refused(folder, "3 left over", *(rf"left over: {name} \[1\] F32" for name in extra))


WRONG: dict[str, tuple[str, Callable[[Tensors], object], tuple[str, ...]]] = {
    "no_global_scale": (
        "modelopt_nvfp4",
        lambda t: t.pop(f"{UP}_scale_2"),
        (rf"missing: {UP}_scale_2, the scale of all of {UP} \[96, 48\] U8: NVFP4",),
    ),
    "global_scale_of_another_shape": (
        "ct_nvfp4",
        lambda t: t.update({f"{UP}_global_scale": torch.ones(2)}),
        (rf"does not fit: {UP}_global_scale: \[2\] F32, expected one F32",),
    ),
    "no_shape": ("ct_int4", lambda t: t.pop(f"{UP}_shape"), (rf"missing: {UP}_shape, the shape of {UP}_packed",)),
    "another_shape": (
        "ct_int4",
        lambda t: t.update({f"{UP}_shape": torch.tensor([96, 88])}),
        (rf"does not fit: {UP}_shape: says \[96, 88\], {UP}_packed is \[96, 12\] I32",),
    ),
    "values_of_another_width": (
        "ct_int4",
        lambda t: t.update({f"{UP}_packed": t[f"{UP}_packed"].to(torch.int64)}),
        (rf"does not fit: {UP}_packed: \[96, 12\] I64: int4 in groups of 32 is read for matrices of I32 only",),
    ),
    "no_matrix": (
        "modelopt_nvfp4",
        lambda t: t.update({UP: t[UP].view(1, 96, 48)}),
        (rf"does not fit: {UP}: \[1, 96, 48\] U8: NVFP4 is read for matrices",),
    ),
    "fp8_among_nvfp4": (
        "modelopt_nvfp4",
        lambda t: t.update({HEAD: t[HEAD].to(torch.float8_e4m3fn), f"{HEAD}_scale": torch.ones(())}),
        (
            rf"does not fit: {HEAD}: dtype F8_E4M3 is not one of .*, and is not NVFP4 \(modelopt\), which hf_quant_config",
        ),
    ),
    "int4_among_fp8": (
        "quark_channel",
        lambda t: t.update({f"{HEAD}_packed": torch.ones(97, 12, dtype=torch.int32), f"{HEAD}_scale": t.pop(HEAD)}),
        (rf"does not fit: {HEAD}_packed: dtype I32 .* is not FP8 per channel \(quark\), which config\.json states",),
    ),
    "packed_and_plain": (
        "ct_int4",
        lambda t: t.update({UP: torch.zeros(96, 96)}),
        (rf"does not fit: {UP}: stored as {UP} and in another format too",),
    ),
    "bytes_without_a_format": (
        "quark_channel",
        lambda t: t.update({HEAD: torch.ones(97, 96, dtype=torch.uint8)}),
        (rf"does not fit: {HEAD}: dtype U8 is not one of F64",),
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_belong_together(written: dict[str, Path], tmp_path: Path, what: str) -> None:
    case, change, messages = WRONG[what]
    refused(changed(written, case, tmp_path, change), "nothing was read", *messages)


def test_values_of_another_kind_than_stated(written: dict[str, Path], tmp_path: Path) -> None:
    folder = changed(
        written, "fp8_blocks_e8m0", tmp_path, lambda t: t.update({UP: t[UP].float().to(torch.float8_e5m2)})
    )
    assert open_checkpoint(folder, None, torch.device("cpu"))  # nothing is stated: the file's own word
    set_config(folder, quantization_config={**CASES["fp8_blocks_e8m0"].said, "fmt": "e4m3"})
    refused(folder, rf"does not fit: {UP}: dtype F8_E5M2 is not one of")


@pytest.mark.parametrize(
    ("form", "scales"),
    [
        (MXFP8, torch.tensor([[127], [255]], dtype=torch.uint8)),  # the exponent of E8M0 that is no number
        (fp8_blocks(1, 32, ("_scale",)), torch.tensor([[1.0], [math.inf]])),
        (fp8_blocks(1, 32, ("_scale",)), torch.tensor([[1.0], [math.nan]])),
    ],
)
def test_scales_that_are_no_numbers(form: Format, scales: torch.Tensor) -> None:
    stored = {"w": torch.ones(2, 32).to(torch.float8_e4m3fn), "w_scale": scales}
    weight = Quantised(form, "w", "w_scale", 2, (1, 32), "")
    read = lambda name, ranges: stored[name][ranges[0][0] : ranges[0][1]]  # noqa: E731
    target = torch.empty(1, 32)
    weight.copy_part(read, (0, 1), (0, 32), target)
    assert bool((target == 1).all())
    with pytest.raises(CheckpointError, match="w_scale: 1 of the 1 scales that were read are no finite numbers"):
        weight.copy_part(read, (1, 2), (0, 32), target)


def _damaged(tensor: torch.Tensor, value: float) -> torch.Tensor:
    """Its first element is no number, as far as its dtype has such a thing."""
    changed = tensor.clone()
    first = changed.view(torch.uint8 if tensor.itemsize == 1 else tensor.dtype).reshape(-1)
    first[0] = {torch.float8_e4m3fn: 0x7F}.get(tensor.dtype, 0xFF) if tensor.itemsize == 1 else value
    return changed


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_every_scale_of_every_format_is_a_finite_number(tmp_path: Path, case: str, value: float) -> None:
    """Those of parts, and that of the whole weight; one that divides is not zero either."""
    how = CASES[case]
    stored, worth = how.quantise((96, 96), np.random.default_rng(0))
    said: Any = SimpleNamespace(quantisations=((how.said, tmp_path / how.file),))
    scales = [tail for tail in stored if "scale" in tail]
    assert scales

    def read(tensors: Tensors) -> torch.Tensor:
        save_file({f"{HEAD}{tail}": t for tail, t in tensors.items()}, tmp_path / "model.safetensors")
        files = CheckpointFiles(tmp_path)
        return read_entries(files, stated_format(said))[HEAD].part(files, ((0, 96), (0, 96)))

    assert torch.equal(read(stored), torch.from_numpy(worth).to(torch.float32))
    for tail in scales:
        with pytest.raises(CheckpointError, match=rf"^{HEAD}{tail}: 1 of the \d+ scales .* are no finite numbers"):
            read({**stored, tail: _damaged(stored[tail], value)})
    if "_global_scale" in stored:
        with pytest.raises(CheckpointError, match=rf"^{HEAD}_scale over {HEAD}_global_scale: \d+ of the "):
            read({**stored, "_global_scale": torch.zeros(1)})
    if "_scale_2" in stored:  # all weights are zero
        assert not read({**stored, "_scale_2": torch.zeros(())}).any()


def test_two_files_that_state_different_formats(written: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(written["modelopt_nvfp4"], tmp_path / "copy"))
    set_config(folder, quantization_config={"quant_method": "modelopt", "quant_algo": "NVFP4"})
    assert open_checkpoint(folder, None, torch.device("cpu"))
    set_config(folder, quantization_config=CASES["fp8_channel"].said)
    refused(folder, r"config\.json states FP8 per .*\(fp8\), \S+hf_quant_config\.json states NVFP4 \(modelopt\): two")


def test_a_file_with_scales_that_is_not_there(written: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(written["modelopt_nvfp4"], tmp_path / "copy"))
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {name: "scales.safetensors" if "_scale" in name else "weights.safetensors" for name in tensors}
    save_file({n: t for n, t in tensors.items() if "_scale" not in n}, folder / "weights.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    refused(folder, r"scales\.safetensors is missing \(model\.safetensors\.index\.json names it\)")


def _weights(name: str, **changes: Any) -> dict[str, Any]:
    group = CASES[name].said["config_groups"]["group_0"]
    return {**CASES[name].said, "config_groups": {"group_0": {**group, "weights": {**group["weights"], **changes}}}}


_FP8_GROUP = CASES["ct_channel"].said["config_groups"]["group_0"]
_INT4_GROUP = CASES["ct_int4"].said["config_groups"]["group_0"]
_QUARK = CASES["quark_tensor"].said
# what a configuration says -> what our error says
NOT_READ: dict[str, tuple[dict[str, Any], str]] = {
    "awq": ({"quant_method": "awq", "bits": 4}, r"quant_method 'awq': only 'fp8', 'modelopt', .* are read"),
    "gptq": ({"quant_method": "gptq", "bits": 4}, "quant_method 'gptq'"),
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quant_method 'bitsandbytes'"),
    "mxfp4": ({"quant_method": "mxfp4"}, "quant_method 'mxfp4'"),
    "nameless": ({"bits": 4}, "quant_method ''"),
    "fp4_experts": ({"quant_method": "fp8", "expert_dtype": "fp4"}, "fp8 with expert_dtype='fp4'"),
    "fp8_of_another_kind": ({"quant_method": "fp8", "fmt": "e3m4"}, "fp8 with fmt='e3m4' is not read"),
    "fp8_block": (
        {"quant_method": "fp8", "weight_block_size": [128]},
        r"weight_block_size is \[128\], expected \[rows",
    ),
    "fp8_block_0": ({"quant_method": "fp8", "weight_block_size": [0, 8]}, r"weight_block_size is \[0, 8\]"),
    "modelopt_awq": ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "modelopt W4A8_AWQ is not read"),
    "modelopt_mixed": ({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}, "modelopt MIXED_PRECISION is"),
    "modelopt_scaled": ({"quant_algo": "NVFP4", "pre_quant_scale": True}, "modelopt NVFP4 with pre_quant_scale"),
    "nvfp4_by_32": ({"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 32}, "NVFP4 with group_size=32"),
    "int8": (
        compressed_tensors("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
        r"int-quantized \(8 bits, int",
    ),
    "marlin": (
        compressed_tensors("marlin-24", {"num_bits": 4, "type": "int", "strategy": "group"}),
        "compressed-tensors marlin-24",
    ),
    "int8_packed": (_weights("ct_int4", num_bits=8), r"pack-quantized \(8 bits, int, group\) is not read"),
    "asymmetric": (_weights("ct_int4", symmetric=False), r"pack-quantized \(4 bits, int, group\), asymmetric"),
    "reordered": (_weights("ct_int4", actorder="group"), r"with \{'actorder': 'group'\} is not read"),
    "groups_of_nothing": (_weights("ct_int4", group_size=None), r"group_size=None is not read"),
    "ct_nvfp4_by_32": (_weights("ct_nvfp4", group_size=32), r"nvfp4-pack-quantized .* with group_size=32"),
    "ct_block": (_weights("ct_blocks", block_structure=None), r"block_structure is None, expected \[rows"),
    "two_groups": (
        {
            **CASES["ct_int4"].said,
            "config_groups": {"a": {**_FP8_GROUP, "format": "float-quantized"}, "b": _INT4_GROUP},
        },
        "config_groups: FP8 per channel and int4 in groups of 32; one format",
    ),
    "no_groups": ({"quant_method": "compressed-tensors", "config_groups": {"W8A8": ["Linear"]}}, "with config_groups="),
    "sparse": ({**CASES["ct_int4"].said, "sparsity_config": {"format": "sparse-24-bitmask"}}, "with sparsity_config="),
    "rotated": ({**CASES["ct_int4"].said, "transform_config": {"config_groups": {}}}, "with transform_config="),
    "quark_int4": (quark(dtype="int4", qscheme="per_group", group_size=32), "quark int4 per_group is not read"),
    "quark_columns": (quark(dtype="fp8_e4m3", qscheme="per_channel", ch_axis=1), "quark fp8_e4m3 per_channel is not"),
    "quark_fp4_by_16": (
        quark(dtype="fp4", qscheme="per_group", group_size=16, scale_format="e8m0"),
        "quark fp4 per_group with group_size=16",
    ),
    "quark_stages": (
        {**_QUARK, "global_quant_config": {"weight": [{"dtype": "fp8_e4m3"}, {"dtype": "int4"}]}},
        r"quark weights in stages \(fp8_e4m3, int4\) are not read",
    ),
    "quark_two": (
        {
            **_QUARK,
            "layer_quant_config": {"*experts*": {"weight": CASES["quark_mxfp4"].said["global_quant_config"]["weight"]}},
        },
        "quark: global_quant_config, layer_quant_config: FP8 per tensor and MXFP4; one format",
    ),
    "quark_fake": ({**_QUARK, "export": {"weight_format": "fake_quantized"}}, "weight_format='fake_quantized'"),
}


@pytest.mark.parametrize("what", NOT_READ)
def test_formats_that_are_not_read(plain: Path, tmp_path: Path, what: str) -> None:
    """By the format's name and the file that says so."""
    said, message = NOT_READ[what]
    shutil.copy(plain / "config.json", tmp_path)
    state(tmp_path, replace(CASES["fp8_channel"], said=said))
    with pytest.raises(CheckpointError, match=message) as caught:
        stated_format(read_configuration(tmp_path))
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: ")
    with pytest.raises(CheckpointError, match=message):
        helix_compile(tmp_path, cp=2)


def test_a_file_of_modelopt_alone_is_named(plain: Path, tmp_path: Path) -> None:
    shutil.copy(plain / "config.json", tmp_path)
    state(tmp_path, replace(CASES["modelopt_fp8"], said={"quant_algo": "W4A16_AWQ"}))
    with pytest.raises(CheckpointError, match=r"hf_quant_config\.json: modelopt W4A16_AWQ is not read"):
        stated_format(read_configuration(tmp_path))
    state(tmp_path, replace(CASES["modelopt_fp8"], said={"quant_algo": None, "kv_cache_quant_algo": "FP8"}))
    read = read_configuration(tmp_path)
    assert stated_format(read) is None and "hf_quant_config.json quantises no weights: no effect" in read.notes


@pytest.mark.parametrize(("file", "method"), [("quantize_config.json", "gptq"), ("quant_config.json", "awq")])
def test_an_old_file_of_a_quantiser_is_named(plain: Path, tmp_path: Path, file: str, method: str) -> None:
    shutil.copy(plain / "config.json", tmp_path)
    (tmp_path / file).write_text('{"bits": 4}')
    with pytest.raises(CheckpointError, match=rf"{file}: quant_method '{method}'"):
        stated_format(read_configuration(tmp_path))
