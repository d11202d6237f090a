"""A folder like Kimi-K2.5's: a text model in a wrapper, int4 experts, vision weights, layers for further tokens."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from helix_compile import CheckpointError, helix_compile
from helix_compile.capture.source import load_folder
from helix_compile.checkpoint.configuration import TEXT_PREFIXES, read_configuration
from helix_compile.checkpoint.model import open_checkpoint
from helix_compile.verifier.numeric.reference import WidenedIslands
from tests.support.checkpoints import Tensors, quantise, rewrite, write
from tests.support.families import fresh_family
from tests.support.gqa_models import SIZES as GQA_SIZES
from tests.support.quantisers import CASES

CASE = CASES["ct_int4"]
VISION = ("vision_tower.blocks.0.wqkv.weight", "mm_projector.linear_1.weight")
MTP = "model.layers.2.mlp.experts.0.up_proj.weight"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("dense"), "grouped")


def wrapped(dense: Path, folder: Path, prefix: str) -> tuple[Path, Tensors]:
    """The folder, and what its experts stand for."""
    folder = Path(shutil.copytree(dense, folder / "wrapped"))
    expected = quantise(folder, CASE, only=".mlp.experts.", prefix=prefix)

    def add(tensors: Tensors) -> None:
        tensors |= {name: torch.ones(3, 3) for name in VISION}
        for tail in ("_packed", "_scale", "_shape"):
            tensors[f"{prefix}{MTP}{tail}"] = tensors[f"{prefix}{next(iter(expected))}{tail}"].clone()
        tensors[f"{prefix}model.layers.2.enorm.weight"] = torch.ones(96)

    rewrite(folder, add)
    text = json.loads((folder / "config.json").read_text())
    said = text.pop("quantization_config")
    names: dict[str, Any] = {"model_type": "kimi_k2", "architectures": ["DeepseekV3ForCausalLM"]}
    wrapper = {
        "model_type": "kimi_k25",
        "architectures": ["KimiK25ForConditionalGeneration"],
        "auto_map": {"AutoModelForCausalLM": "modeling_kimi_k25.KimiK25ForConditionalGeneration"},
        "text_config": {**text, **names, "quantization_config": said},
        "vision_config": {"hidden_size": 3},
    }
    (folder / "config.json").write_text(json.dumps(wrapper))
    (folder / "modeling_kimi_k25.py").write_text("raise SystemExit('this code must not run')\n")
    return folder, expected


def test_it_runs_as_its_text_model_dequantised(dense: Path, tmp_path: Path) -> None:
    """Against transformers' own, loaded whole; what was left out and what was read is in the plan's notes."""
    folder, expected = wrapped(dense, tmp_path, "language_model.")
    assert len(expected) == 24
    plain = Path(shutil.copytree(dense, tmp_path / "plain"))
    rewrite(plain, lambda tensors: tensors | expected)
    compiled, (reference, _) = helix_compile(folder, cp=3, dtype=torch.float32), load_folder(plain, torch.float32)
    ids = torch.arange(14).view(2, 7)
    with torch.no_grad():
        logits = reference(ids).logits
        whole = load_folder(folder, torch.float32)[0](ids).logits
    for got in (whole, compiled(ids)):
        assert (got - logits).abs().max() <= 1e-5 * logits.abs().max()
    told = "\n".join(compiled.plan.notes)
    assert "kimi_k25: its text model (text_config: kimi_k2) is taken; vision_config left out" in told
    assert "25 weight(s) are int4 in groups of 32 (compressed-tensors), by config.json" in told
    assert f"2 tensor(s) are not the text model's (vision, projector): left out: {VISION[1]}, {VISION[0]}" in told
    assert "2 tensor(s) belong to layers of multi-token prediction, behind the model's own: ignored" in told


@pytest.mark.parametrize("prefix", TEXT_PREFIXES)
def test_prefixes_of_wrappers(dense: Path, tmp_path: Path, prefix: str) -> None:
    folder, expected = wrapped(dense, tmp_path, prefix)
    weights = open_checkpoint(folder, torch.float32, torch.device("cpu")).weights
    down = {n: t for n, t in expected.items() if "down_proj" in n}
    stacked = weights["model.layers.1.mlp.experts.down_proj"]
    assert torch.equal(
        stacked, torch.stack([down[f"model.layers.1.mlp.experts.{i}.down_proj.weight"] for i in range(8)])
    )


def test_a_text_weight_that_the_model_does_not_have_is_not_taken_for_vision(dense: Path, tmp_path: Path) -> None:
    folder, _ = wrapped(dense, tmp_path, "language_model.")
    extra = "language_model.model.layers.1.mlp.gate.second.weight"

    def add(tensors: Tensors) -> None:
        tensors[extra] = torch.ones(2)

    with pytest.raises(CheckpointError, match=rf"left over: {extra} \[2\] F32"):
        open_checkpoint(rewrite(folder, add), None, torch.device("cpu"))


def test_scales_of_the_text_model_are_not_taken_for_vision(dense: Path, tmp_path: Path) -> None:
    """Whose names have no prefix where the others' do; layers of an encoder are no layers behind the text model's."""
    folder, _ = wrapped(dense, tmp_path, "language_model.")
    encoder = "vision_tower.encoder.layers.7.norm.weight"
    scales = ("lm_head.weight_scale", "model.layers.0.self_attn.o_proj.weight_scale")

    def add(tensors: Tensors) -> None:
        tensors |= {encoder: torch.ones(2), **{name: torch.ones(1) for name in scales}}

    with pytest.raises(CheckpointError, match="0 missing, 2 left over") as caught:
        open_checkpoint(rewrite(folder, add), None, torch.device("cpu"))
    assert all(f"left over: {name} [1] F32" in str(caught.value) for name in scales)

    def mend(tensors: Tensors) -> None:
        for name in scales:
            del tensors[name]

    told = "\n".join(open_checkpoint(rewrite(folder, mend), None, torch.device("cpu")).notes)
    assert "3 tensor(s) are not the text model's (vision, projector)" in told
    assert "2 tensor(s) belong to layers of multi-token prediction" in told


@pytest.mark.slow
def test_a_wrapper_of_transformers_runs_as_its_text_model(tmp_path: Path) -> None:
    """Gemma 3: its class takes images besides; saved whole, and run without them."""
    text = {**GQA_SIZES, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8, "pad_token_id": 0}
    images = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes = {"image_size": 28, "patch_size": 14}
    ids = {"image_token_index": 90, "boi_token_index": 91, "eoi_token_index": 92}
    config = Gemma3Config(text_config=text, vision_config={**images, **sizes}, mm_tokens_per_image=4, **ids)
    model = Gemma3ForConditionalGeneration(config).double().eval()
    model.save_pretrained(tmp_path)
    compiled, tokens = helix_compile(tmp_path, cp=2, tokens_per_block=4, max_seq_len=64), torch.arange(26).view(2, 13)
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
    assert (compiled(tokens) - expected).abs().max() <= 1e-10 * expected.abs().max()
    assert any("left out: multi_modal_projector" in note for note in compiled.plan.notes)


def test_a_text_model_without_a_class_of_its_own_runs_in_its_wrapper(tmp_path: Path) -> None:
    """Mistral-Large-4: its text configuration alone, and a folder of the whole, whose weights for images are left out and listed."""
    model = fresh_family("mistral_large4")
    text = tmp_path / "config.json"
    text.write_text(json.dumps(model.config.text_config.to_dict()))
    read = read_configuration(text)
    assert read.model_class is type(model)
    assert read.config.text_config.to_dict() == model.config.text_config.to_dict()
    assert any("runs in MistralLarge4ForConditionalGeneration alone" in note for note in read.notes)
    folder = tmp_path / "whole"
    model.save_pretrained(folder)

    def add(tensors: Tensors) -> None:
        assert any(
            name.startswith("vision_encoder.") for name in tensors
        )  # by Mistral's names: q and k in another order
        tensors["vision_encoder.extra.weight"] = torch.ones(3)

    rewrite(folder, add)
    compiled, ids = helix_compile(folder, cp=2, tokens_per_block=2, max_seq_len=64), torch.arange(26).view(2, 13)
    loaded = load_folder(folder, torch.float64)[
        0
    ]  # by transformers, images and all; its rotary tables are float32 ones
    loaded.set_experts_implementation("batched_mm")  # grouped_mm takes no float64
    with torch.no_grad(), WidenedIslands():
        expected, got = loaded(input_ids=ids).logits, compiled(ids)
    assert expected.abs().max() > 0.1 and (got - expected).abs().max() <= 1e-10 * expected.abs().max()
    told = "\n".join(compiled.plan.notes)
    assert (
        "mistral_large4: its text model runs in MistralLarge4ForConditionalGeneration alone, which is taken whole"
        in told
    )
    assert re.search(r"checkpoint: \d+ tensor\(s\) are not the text model's \(vision, projector\): left out: ", told)


def test_a_text_weight_beside_the_models_own_is_not_taken_for_vision(tmp_path: Path) -> None:
    fresh_family("mistral_large4").save_pretrained(tmp_path)

    def add(tensors: Tensors) -> None:
        tensors["layers.0.attention.second.weight"] = torch.ones(2)

    with pytest.raises(CheckpointError, match=r"left over: layers.0.attention.second.weight \[2\] F32"):
        open_checkpoint(rewrite(tmp_path, add), None, torch.device("cpu"))
