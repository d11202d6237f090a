"""One stage of a pipeline: its layers as a model of its own, against a configuration that has these layers alone."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch
from transformers import Qwen3Config

from helix_compile import HelixError, HelixOptions, HelixPlan, helix_compile
from helix_compile.capture.source import captured_from
from helix_compile.capture.stage import stage_bounds, stage_model
from helix_compile.compile import plan_model
from helix_compile.errors import LayoutError
from helix_compile.models.presets import TINY, build_model, preset_config
from tests.support.families import FAMILIES, config_of

pytestmark = pytest.mark.fresh_capture  # notes say where a model comes from


def without_weights(name: str, **changes: Any) -> torch.nn.Module:
    module = import_module(f"transformers.models.{name}.modeling_{name}")
    return build_model(config_of(name, **changes), meta=True, model_class=getattr(module, FAMILIES[name].model))


def planned(model: torch.nn.Module, options: HelixOptions) -> HelixPlan:
    return plan_model(captured_from(stage_model(model, options), None), options).plan


# of 61 layers: TensorRT-LLM splits as torch.tensor_split does, vLLM spares the last stage, SGLang the first ones
@pytest.mark.parametrize(
    ("split", "sizes"), [("first", [16, 15, 15, 15]), ("middle", [15, 15, 16, 15]), ("last", [15, 15, 15, 16])]
)
def test_how_layers_are_dealt(split: str, sizes: list[int]) -> None:
    bounds = [stage_bounds(61, 4, stage, split) for stage in range(4)]
    assert [stop - start for start, stop in bounds] == sizes
    assert [stop for _, stop in bounds[:-1]] == [start for start, _ in bounds[1:]] and bounds[-1][1] == 61
    assert stage_bounds(62, 4, 1, "middle") == (15, 31)  # of two more: before the last, 15 16 16 15
    if split == "first":
        assert [len(t) for t in torch.arange(61).tensor_split(4)] == sizes


def test_a_stage_is_what_a_model_of_its_layers_is() -> None:
    whole = build_model(preset_config("tiny"), meta=True)
    before = {n: p.shape for n, p in whole.named_parameters()}
    for stage, dense in ((0, 3), (1, 0)):
        options = HelixOptions(cp=2, tpa=2, pp=2, stage=stage)
        plan = planned(whole, options)
        # tiny has 2 dense layers and 2 with experts
        config = type(whole.config)(**{**TINY, "num_hidden_layers": 2, "first_k_dense_replace": min(dense, 2)})
        alone = planned(build_model(config, meta=True), HelixOptions(cp=2, tpa=2))
        assert replace(plan, options=alone.options, notes=alone.notes) == alone
        (note,) = [n for n in plan.notes if n.startswith("pipeline stage")]
        assert f"stage {stage} of 2 (numbered from 0): layers {2 * stage}-{2 * stage + 1} of 4" in note
        assert f"the embedding ({256 * 128 * 4:,} bytes)" in note
    assert {n: p.shape for n, p in whole.named_parameters()} == before and whole.config.num_hidden_layers == 4


def test_a_stage_whose_configuration_lists_layers() -> None:
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 16,
    }
    config = Qwen3Config(num_hidden_layers=3, vocab_size=64, **sizes)
    twin = stage_model(build_model(config, meta=True), HelixOptions(cp=2, pp=2, stage=1))
    assert isinstance(twin, torch.nn.Module)
    assert len(twin.model.layers) == twin.config.num_hidden_layers == len(twin.config.layer_types) == 1
    assert twin.model.layers[0].self_attn.layer_idx == 0


SHARES = {
    "num_hidden_layers": 4,
    "no_rope_layers": [1, 1, 1, 1],
    "mlp_layer_types": ["dense"] * 4,
    "kv_source_layers": [0, 0, 2, 2],  # numbers of layers: in the second stage 0, 0
    "indexer_types": ["full", "shared", "full", "shared"],
}


def test_a_stage_of_a_text_model_in_its_wrapper_that_names_layers() -> None:
    twin = stage_model(without_weights("mistral_large4", **SHARES), HelixOptions(cp=2, pp=2, stage=1))
    assert isinstance(twin, torch.nn.Module) and len(twin.model.language_model.layers) == 2
    text = twin.config.get_text_config()
    assert (text.num_hidden_layers, text.kv_source_layers, text.indexer_types) == (2, [0, 0], ["full", "shared"])
    assert text.kv_sharing_modes == ["store", "reuse"]  # what transformers' cache is made by


# what a layer only hands on was made before: 2 reads of 0, not of 1
GLM = {"indexer_types": ["full", "shared", "shared", "full"], "mlp_layer_types": ["sparse"] * 4}


@pytest.mark.parametrize(
    ("name", "changes", "pp", "words"),
    [
        (
            "glm_moe_dsa",
            GLM,
            4,
            r"of its layers 1-1 \(of 4\) layer 1 attend\(s\) to what layer 0 of an earlier stage.*layer 0 or 3; pp=1",
        ),
        ("glm_moe_dsa", GLM, 3, r"layer 2 attend.*layer 0 of an.*layer 0 or 3; pp=1$"),
        ("glm_moe_dsa", {}, 4, r"layer 1 attend.*; got a cut before layer 1.*layer 0 or 2; pp=2$"),
        (
            "mistral_large4",
            {**SHARES, "kv_source_layers": [0, 0, 0, 3]},
            2,
            r"layer 2 attend.*layer 0 of an.*layer 0; pp=1$",
        ),
        ("gemma4", {}, 2, r"embeds every token once more for each of its 4 layers \(hidden_size_per_layer_input=7\)"),
    ],
)
def test_layers_that_read_what_an_earlier_stage_has(name: str, changes: dict, pp: int, words: str) -> None:
    model = without_weights(name, **changes)
    with pytest.raises(LayoutError, match=f"(?s){words}"):
        stage_model(model, HelixOptions(cp=2, pp=pp, stage=1))


def test_a_stage_that_reads_of_itself_alone() -> None:
    """In float32, whose experts don't run on fake tensors as they are; and what a later stage reads is a note."""
    plan = planned(without_weights("glm_moe_dsa"), HelixOptions(cp=2, pp=2, stage=1))
    # of two layers the latents with their ropes, of the one that chooses an index key, 4 bytes an element, on two ranks
    assert plan.kv_bytes_per_token_per_rank == (2 * (20 + 6) + 16) * 4 / 2
    assert not any("later stages" in note for note in plan.notes)
    before = stage_model(without_weights("glm_moe_dsa", **GLM), HelixOptions(cp=2, pp=4))
    (note,) = [n for n in vars(before)["notes_of_release"] if "later" in n]
    assert note.startswith("layers 1, 2 of later stages read(s) what a layer up to 0 chose or cached")


def test_what_is_no_stage() -> None:
    model = build_model(preset_config("tiny"))
    with pytest.raises(
        HelixError, match=r"pp=2: one stage of a pipeline is planned, not run.*got a model on cpu, expected one on the"
    ):
        helix_compile(model, cp=2, pp=2)
    with pytest.raises(HelixError, match="got str"):
        stage_model("folder", HelixOptions(cp=2, pp=2))
    with pytest.raises(HelixError, match="pp=5: DeepseekV3ForCausalLM has 4 layers; choose at most 4 stages"):
        stage_model(build_model(preset_config("tiny"), meta=True), HelixOptions(cp=2, pp=5))
    assert stage_model(model, HelixOptions(cp=2)) is model
