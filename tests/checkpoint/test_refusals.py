"""A folder that is damaged or holds another model is refused with names and numbers, before a tensor is read."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helix_compile import CheckpointError, helix_compile
from helix_compile.checkpoint.files import CheckpointFiles
from helix_compile.checkpoint.model import open_checkpoint
from tests.support.checkpoints import rewrite, set_config, to_fp8, write

INDEX = "model.safetensors.index.json"
FIRST = "model-00001-of-00010.safetensors"
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def folder(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy, of which no tensor may be read."""

    def fail(*_: object) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(CheckpointFiles, "slice", fail)
    return Path(shutil.copytree(original, tmp_path / "checkpoint"))


def refused(folder: Path, *messages: str) -> None:
    """helix_compile(folder) says all of `messages`, each a regular expression."""
    with pytest.raises(CheckpointError) as caught:
        helix_compile(folder, cp=4)
    for message in messages:
        assert re.search(message, str(caught.value)), f"{message!r} is not in:\n{caught.value}"


def test_files_are_the_expected_ones(folder: Path) -> None:
    assert (folder / FIRST).is_file() and (folder / INDEX).is_file()


def _truncate(folder: Path, keep: float) -> None:
    content = (folder / FIRST).read_bytes()
    (folder / FIRST).write_bytes(content[: int(len(content) * keep)])


def _reindex(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing_file": (lambda f: (f / FIRST).unlink(), rf"1 problem.*\n  {FIRST} is missing \({INDEX} names it\)"),
    "truncated": (lambda f: _truncate(f, 0.7), rf"{FIRST} \(\d+ bytes\) is damaged, truncated or not safetensors"),
    "truncated_header": (lambda f: _truncate(f, 0.01), rf"{FIRST} \(\d+ bytes\) is damaged, truncated"),
    "empty": (lambda f: _truncate(f, 0), rf"{FIRST} \(0 bytes\) is damaged"),
    "garbage": (lambda f: (f / FIRST).write_bytes(b"\xff" * 999), rf"{FIRST} \(999 bytes\) is damaged"),
    "index_not_json": (lambda f: (f / INDEX).write_text("{"), "not an index of a sharded checkpoint"),
    "index_is_a_list": (lambda f: (f / INDEX).write_text("[]"), "not an index of a sharded checkpoint"),
    "index_empty": (lambda f: _reindex(f, dict.clear), "weight_map is empty"),
    "index_leaves_the_folder": (
        lambda f: _reindex(f, lambda m: m.update({"lm_head.weight": "../other.safetensors"})),
        r"names \.\./other\.safetensors, not a file of the folder",
    ),
    "index_names_the_wrong_file": (
        lambda f: _reindex(f, lambda m: m.update({"model.norm.weight": FIRST})),
        rf"model\.norm\.weight is said to be in {FIRST}, which does not hold it",
    ),
    "one_tensor_twice": (
        lambda f: (
            shutil.copy(f / FIRST, f / "again.safetensors"),
            _reindex(f, lambda m: m.update({next(k for k, v in m.items() if v == FIRST): "again.safetensors"})),
        ),
        rf"is in {FIRST} and in|is in again\.safetensors and in",
    ),
    "pickles_only": (
        lambda f: [
            *(p.unlink() for p in [*f.glob("*.safetensors"), f / INDEX]),
            (f / "pytorch_model.bin").write_bytes(b"x"),
        ],
        r"pickled weights only \(pytorch_model\.bin\).*runs code.*save_pretrained",
    ),
    "no_weights": (
        lambda f: [p.unlink() for p in [*f.glob("*.safetensors"), f / INDEX]],
        r"has no weights: expected model\.safetensors, or",
    ),
    "config_not_json": (lambda f: (f / "config.json").write_text("{"), r"config\.json: can't be read"),
    "other_quantisation": (
        lambda f: set_config(f, quantization_config={"quant_method": "awq"}),
        r"config\.json: quant_method 'awq': only 'fp8', .* are read",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_files(folder: Path, case: str) -> None:
    damage, message = DAMAGE[case]
    damage(folder)
    refused(folder, message)


def _join(tensors: dict[str, Tensor]) -> None:
    """A stacked copy beside the experts one by one."""
    tensors["model.layers.1.mlp.experts.down_proj"] = torch.zeros(8, 72, 40, dtype=torch.bfloat16)


WRONG: dict[str, tuple[Callable[[dict[str, Tensor]], object], tuple[str, ...]]] = {
    "missing": (
        lambda t: [t.pop("model.norm.weight"), t.pop("lm_head.weight")],
        (
            r"\(2 missing, 0 left over, 0 does not fit\)",
            r"missing: model\.norm\.weight \[72\]",
            r"missing: lm_head\.weight \[97, 72\]",
        ),
    ),
    "left_over": (
        lambda t: t.update({"model.layers.1.third_layernorm.weight": torch.zeros(72), "what": torch.zeros(2, 3)}),
        (
            r"0 missing, 2 left over",
            r"left over: model\.layers\.1\.third_layernorm\.weight \[72\] F32",
            r"left over: what \[2, 3\]",
        ),
    ),
    "shape": (
        lambda t: t.update({"model.norm.weight": torch.zeros(71)}),
        (
            r"1 does not fit",
            r"model\.norm\.weight: the checkpoint has \[71\] \(model\.norm\.weight\), the model needs \[72\]",
        ),
    ),
    "transposed": (
        lambda t: t.update(
            {"model.layers.0.mlp.down_proj.weight": t["model.layers.0.mlp.down_proj.weight"].t().clone()}
        ),
        (r"the checkpoint has \[112, 72\].*the model needs \[72, 112\]",),
    ),
    "expert_missing": (
        lambda t: t.pop(EXPERT),
        (r"experts\.gate_up_proj: tensors of different shapes are to be joined: \[7, 72\], \[8, 72\]",),
    ),
    "expert_missing_everywhere": (
        lambda t: [t.pop(k) for k in list(t) if ".experts.7." in k],
        (
            r"2 does not fit",
            r"gate_up_proj: the checkpoint has \[7, 80, 72\] \(14 tensors such as .*experts\.0\.gate_proj\.weight\), the model needs \[8, 80, 72\]",
        ),
    ),
    "expert_of_another_size": (
        lambda t: t.update({EXPERT: torch.zeros(41, 72)}),
        (r"different shapes are to be joined: \[40, 72\], \[41, 72\]",),
    ),
    "gates_missing": (
        lambda t: [t.pop(k) for k in list(t) if ".experts." in k and "gate_proj" in k],
        (r"experts\.gate_up_proj: nothing is stored as mlp\.experts\.\*\.gate_proj\.weight",),
    ),
    "stacked_and_single": (_join, (r"experts\.down_proj: stored one by one and also as",)),
    "integers": (
        lambda t: t.update({"model.norm.weight": torch.zeros(72, dtype=torch.int64)}),
        (r"model\.norm\.weight: dtype I64 is not one of F64, F32",),
    ),
    "fp8_without_a_statement": (
        lambda t: t.update(
            {
                "lm_head.weight": t["lm_head.weight"].to(torch.float8_e4m3fn),
                "lm_head.weight_scale_inv": torch.ones(1, 1),
            }
        ),
        (r"lm_head\.weight: dtype F8_E4M3 is not one of F64, .*, and config\.json states no quantization_config",),
    ),
    "scales_of_nothing": (
        lambda t: t.update({"lm_head.weight_scale_inv": torch.ones(1, 1)}),
        (r"left over: lm_head\.weight_scale_inv \[1, 1\] F32",),
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_names_and_shapes(folder: Path, case: str) -> None:
    change, messages = WRONG[case]

    def apply(tensors: dict[str, Tensor]) -> None:
        change(tensors)

    refused(rewrite(folder, apply), "nothing was read", *messages)


def test_scales_that_do_not_fit_their_blocks(folder: Path) -> None:
    to_fp8(folder, (16, 24))
    name = "model.layers.0.self_attn.o_proj.weight_scale_inv"

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name][:-1].clone()

    rewrite(folder, change)
    refused(folder, rf"{name}: \[4, 14\] F32, expected \[5, 14\] in .*: the scales of .*: FP8 in blocks of 16 x 24")


def test_a_long_list_is_cut(folder: Path) -> None:
    set_config(folder, num_hidden_layers=9)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder, None, torch.device("cpu"))
    lines = str(caught.value).splitlines()
    missing = int(re.search(r"\((\d+) missing", lines[0])[1])  # type: ignore[index]
    assert missing > 60 and len(lines) == 22 and lines[-1].strip() == f"... and {missing - 20} more"
