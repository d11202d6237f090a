"""One stage of a pipeline: its layers as a model of its own, against a configuration that has these layers alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import Qwen3Config

from helix_compile import HelixError, HelixOptions, HelixPlan, helix_compile
from helix_compile.capture.source import captured_from
from helix_compile.capture.stage import stage_bounds, stage_model
from helix_compile.compile import plan_model
from helix_compile.models.presets import TINY, build_model, preset_config
from tests.support.families import fresh_family

pytestmark = pytest.mark.fresh_capture  # notes say where a model comes from


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


def test_a_stage_of_a_model_in_its_wrapper() -> None:
    """What a configuration says of layers stands in the text model's."""
    twin = stage_model(fresh_family("mistral_large4").to("meta"), HelixOptions(cp=2, pp=2, stage=1))
    assert isinstance(twin, torch.nn.Module)
    text = twin.config.get_text_config()
    assert len(twin.model.language_model.layers) == text.num_hidden_layers == len(text.no_rope_layers) == 1


@pytest.mark.slow
def test_a_stage_that_begins_at_a_layer_with_an_earlier_ones_choice() -> None:
    kinds = {"indexer_types": ["full", "shared", "shared", "full"], "mlp_layer_types": ["dense"] * 4}
    model = fresh_family("glm_moe_dsa", num_hidden_layers=4, **kinds).to("meta")
    with pytest.raises(
        HelixError, match=r"pp=2: the layers of stage 1 can't be planned .*share with layers of another stage"
    ):
        helix_compile(model, cp=2, pp=2, stage=1, max_seq_len=64)
    assert sum(len(b.layers) for b in helix_compile(model, cp=2, pp=2, max_seq_len=64).plan.bodies) == 2


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
