"""config.json as it is published: renames, wrappers, spellings, and what is refused in one line; no code of it runs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DeepseekV3ForCausalLM

from helix_compile import CheckpointError
from helix_compile.checkpoint.configuration import Configuration, causal_class, read_configuration
from helix_compile.checkpoint.named import named_model
from helix_compile.checkpoint.stated import stated_format
from tests.support.models import SIZES, YARN

# a release in the words of its own: no dtype, rope or names of transformers
RELEASE: dict[str, Any] = {
    **{k: v for k, v in SIZES.items() if k != "num_key_value_heads"},
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "rope_theta": 10000,
    "rope_scaling": {"type": "yarn", **{k: v for k, v in YARN.items() if k not in ("rope_type", "rope_theta")}},
}
AUTO_MAP = {"AutoConfig": "configuration_deepseek.DeepseekV3Config", "AutoModel": "modeling_deepseek.DeepseekV3Model"}


def write(folder: Path, values: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def read(folder: Path, **changes: Any) -> Configuration:
    """RELEASE with changes; a key whose value is `...` is left out."""
    return read_configuration(write(folder, {k: v for k, v in (RELEASE | changes).items() if v is not ...}))


def test_a_release_is_read_as_it_is(tmp_path: Path) -> None:
    """By its folder and by its file; nothing is noted where nothing was done."""
    found = read(tmp_path)
    assert found.model_class is DeepseekV3ForCausalLM and found.notes == () and found.quantisations == ()
    assert not found.wrapped and found.config.dtype == torch.bfloat16
    assert found.config.to_dict() == read_configuration(tmp_path / "config.json").config.to_dict()


def test_a_rename_is_noted_with_its_evidence(tmp_path: Path) -> None:
    found = read(tmp_path, model_type="kimi_k2", n_group=1, topk_group=1)
    assert found.model_class is DeepseekV3ForCausalLM and found.config.model_type == "deepseek_v3"
    assert found.notes == (
        "model_type kimi_k2 is read as deepseek_v3: its architectures and its auto_map name DeepSeek's own "
        "DeepseekV3ForCausalLM",
    )


@pytest.mark.parametrize("kind", ["deepseek_v3", "kimi_k2"])
def test_an_auto_map_is_ignored_and_its_code_never_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Nor does anything ask: standard input is closed."""

    def ask(*_: object) -> str:
        raise AssertionError("asked")

    monkeypatch.setattr("builtins.input", ask)
    for file in ("configuration_deepseek.py", "modeling_deepseek.py"):
        (tmp_path / file).write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    found = read(tmp_path, model_type=kind, auto_map=AUTO_MAP)
    assert found.model_class is DeepseekV3ForCausalLM
    assert ("auto_map ignored" in found.notes[0]) == (kind == "deepseek_v3")
    assert named_model(str(tmp_path), "bfloat16", meta=True).config.model_type == "deepseek_v3"  # type: ignore[union-attr]
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("key", ["text_config", "language_config", "llm_config"])
def test_a_text_model_is_taken_out_of_its_wrapper(tmp_path: Path, key: str) -> None:
    """What the wrapper alone says holds for it: dtype and quantisation; what the text says itself comes first."""
    text = {**RELEASE, "model_type": "kimi_k2", "auto_map": AUTO_MAP}
    wrapper = {"model_type": "kimi_k25", "dtype": "float16", "tie_word_embeddings": True, "vision_config": {"depth": 2}}
    found = read_configuration(
        write(tmp_path, {**wrapper, "auto_map": AUTO_MAP, key: {**text, "torch_dtype": "float16"}})
    )
    assert found.wrapped and found.model_class is DeepseekV3ForCausalLM
    assert found.config.dtype == torch.float16 and found.config.tie_word_embeddings
    assert found.notes[0] == f"kimi_k25: its text model ({key}: kimi_k2) is taken; vision_config left out"
    own = {**text, "tie_word_embeddings": False, "torch_dtype": None}  # null says nothing
    found = read_configuration(write(tmp_path, {**wrapper, key: own}))
    assert not found.config.tie_word_embeddings and found.config.dtype == torch.float16


def test_a_dtype_of_the_text_model_is_taken_before_its_wrappers_with_a_note(tmp_path: Path) -> None:
    """By either of the key's names; "auto" is what is stored."""
    path = write(tmp_path, {"model_type": "kimi_k25", "dtype": "float32", "text_config": RELEASE})
    found = read_configuration(path)
    assert found.config.dtype == torch.bfloat16
    assert found.notes[0] == "the wrapper's dtype is 'float32', its text model's 'bfloat16': the latter is taken"
    assert read(tmp_path, torch_dtype="auto").config.dtype is None


def test_a_text_model_without_a_class_of_its_own_in_the_table(tmp_path: Path) -> None:
    """Mistral4Config is in no mapping of causal models, but its model is in transformers."""
    values = {"model_type": "mistral4", "num_hidden_layers": 2}
    found = read_configuration(write(tmp_path, {"model_type": "mistral3", "text_config": values, "vision_config": {}}))
    assert found.model_class.__name__ == "Mistral4ForCausalLM" and found.wrapped
    assert causal_class(found.config) is found.model_class


QUANTISED = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def test_a_quantisation_is_found_wherever_it_is_said(tmp_path: Path) -> None:
    """At the top, in the text model, of a wrapper, or in modelopt's own file; the model's config is without it."""
    file = tmp_path / "config.json"
    found = read(tmp_path, quantization_config=QUANTISED)
    assert found.quantisations == ((QUANTISED, file),) and not hasattr(found.config, "quantization_config")
    for outer, inner in (({"quantization_config": QUANTISED}, {}), ({}, {"quantization_config": QUANTISED})):
        write(tmp_path, {"model_type": "kimi_k25", **outer, "text_config": {**RELEASE, **inner}})
        found = read_configuration(tmp_path)
        assert found.quantisations == ((QUANTISED, file),) and not hasattr(found.config, "quantization_config")
    other = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    write(
        tmp_path,
        {
            "model_type": "kimi_k25",
            "quantization_config": QUANTISED,
            "text_config": {**RELEASE, "quantization_config": other},
        },
    )
    assert read_configuration(tmp_path).quantisations == ((QUANTISED, file), (other, file))
    with pytest.raises(CheckpointError, match=r"states FP8 in blocks .*states NVFP4 .*two formats"):
        stated_format(read_configuration(tmp_path))
    beside = tmp_path / "hf_quant_config.json"
    beside.write_text(json.dumps({"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}}))
    said = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    assert read(tmp_path).quantisations == ((said, beside),)
    assert read(tmp_path, quantization_config=QUANTISED).quantisations == ((QUANTISED, file), (said, beside))
    beside.write_text("[]")
    with pytest.raises(CheckpointError, match=r"hf_quant_config\.json: can't be read: expected an object, got list"):
        read(tmp_path)


SPELLINGS: dict[str, tuple[dict[str, Any], Callable[[Any], object], object]] = {
    "num_experts": ({"n_routed_experts": ..., "num_experts": 16}, lambda c: c.n_routed_experts, 16),
    "num_local_experts": ({"n_routed_experts": ..., "num_local_experts": 16}, lambda c: c.n_routed_experts, 16),
    "both_alike": ({"num_experts": 8}, lambda c: c.n_routed_experts, 8),
    "shared": ({"n_shared_experts": ..., "num_shared_experts": 3}, lambda c: c.n_shared_experts, 3),
    "per_token": ({"num_experts_per_tok": ..., "num_experts_per_token": 5}, lambda c: c.num_experts_per_tok, 5),
    "layers": ({"num_hidden_layers": ..., "num_layers": 7}, lambda c: c.num_hidden_layers, 7),
    "no_groups": ({"n_group": None, "topk_group": None}, lambda c: (c.n_group, c.topk_group), (1, 1)),
    "dtype": ({"torch_dtype": ..., "dtype": "float16"}, lambda c: c.dtype, torch.float16),
    "dtypes_alike": ({"dtype": "bfloat16"}, lambda c: c.dtype, torch.bfloat16),
}


@pytest.mark.parametrize("what", SPELLINGS)
def test_spellings_of_one_meaning(tmp_path: Path, what: str) -> None:
    changes, of, expected = SPELLINGS[what]
    config = read(tmp_path, **changes).config
    assert of(config) == expected


YARN_BARE = {k: v for k, v in YARN.items() if k not in ("rope_type", "rope_theta")}
ROPES: dict[str, dict[str, Any]] = {
    "type": {"rope_scaling": {"type": "yarn", **YARN_BARE}},
    "rope_type": {"rope_scaling": {"rope_type": "yarn", **YARN_BARE}},
    "int_factor": {"rope_scaling": {"type": "yarn", **YARN_BARE, "factor": 4}},
    "parameters": {"rope_scaling": ..., "rope_theta": ..., "rope_parameters": YARN},
    "both": {
        "rope_scaling": {"type": "yarn", **YARN_BARE},
        "rope_parameters": {"rope_type": "yarn", **YARN_BARE, "factor": 4},
    },
    "base_in_one_of_them": {"rope_scaling": {"type": "yarn", **YARN_BARE}, "rope_parameters": YARN},
    "base_alone_in_the_other": {
        "rope_theta": ..., "rope_scaling": {"type": "yarn", **YARN_BARE}, "rope_parameters": {"rope_theta": YARN["rope_theta"]},
    },
    "each_a_part": {
        "rope_scaling": {"type": "yarn", "factor": YARN["factor"]},
        "rope_parameters": {k: v for k, v in YARN.items() if k not in ("factor", "rope_type")},
    },
    "both_names_of_the_type": {"rope_scaling": {"type": "yarn", "rope_type": "yarn", **YARN_BARE}},
    "length_beside_it": {
        "rope_scaling": {"type": "yarn", **{k: v for k, v in YARN_BARE.items() if k != "original_max_position_embeddings"}},
        "original_max_position_embeddings": YARN["original_max_position_embeddings"],
    },
}  # fmt: skip


@pytest.mark.parametrize("what", ROPES)
def test_spellings_of_rope(tmp_path: Path, what: str) -> None:
    rope = read(tmp_path, **ROPES[what]).config.rope_parameters
    assert {k: rope[k] for k in YARN} == YARN


def test_a_base_that_one_of_two_tables_states_is_taken(tmp_path: Path) -> None:
    """Kimi-K2's, where transformers alone would drop the table that states it and take the class's 10,000."""
    changes = {"rope_scaling": {"type": "yarn", **YARN_BARE}, "rope_parameters": {"rope_theta": 50000}}
    found = read(tmp_path, **changes, rope_theta=...)
    assert found.config.rope_parameters == YARN | {"rope_theta": 50000}
    assert found.notes == ("rope_scaling and rope_parameters are read as one table",)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "experts_twice": ({"num_experts": 16}, r"n_routed_experts=8, num_experts=16: of one meaning, but not the same"),
    "layers_twice": ({"num_layers": 5}, r"num_hidden_layers=4, num_layers=5: of one meaning"),
    "dtypes": ({"dtype": "float16"}, r'dtype="float16", torch_dtype="bfloat16": of one meaning'),
    "ropes": ({"rope_parameters": {**YARN, "factor": 8}}, r"rope_parameters=.*rope_scaling=.*of one meaning"),
    "rope_types": ({"rope_scaling": {"type": "yarn", "rope_type": "default", **YARN_BARE}}, r'rope_scaling.rope_type="default", rope_scaling.type="yarn": of one meaning'),
    "a_default_beside_yarn": ({"rope_parameters": {"rope_type": "default"}}, r"rope_parameters=.*rope_scaling=.*of one meaning"),
    "bases": ({"rope_theta": 10000, "rope_scaling": ..., "rope_parameters": {**YARN, "rope_theta": 50000}}, r"rope_theta=10000, rope_parameters.rope_theta=50000: of one meaning"),
    "base_in_the_old_table": ({"rope_theta": 10000, "rope_scaling": {**YARN, "rope_theta": 50000}}, r"rope_theta=10000, rope_scaling.rope_theta=50000"),
    "lengths": ({"original_max_position_embeddings": 7}, r"original_max_position_embeddings=7, rope_scaling.original_max_position_embeddings="),
    "no_type": ({"rope_scaling": {"factor": 4.0}}, r"rope_scaling states factor and no rope_type; expected one"),
    "no_type_by_layers": ({"rope_scaling": ..., "rope_parameters": {"full_attention": {"factor": 4.0}}}, r"rope_parameters.full_attention states factor"),
    "factor_zero": ({"rope_scaling": {"type": "yarn", **YARN_BARE, "factor": 0}}, r"rope_scaling.factor is 0, expected a number > 0"),
    "base_zero": ({"rope_theta": 0}, r"rope_theta is 0, expected a number > 0"),
    "no_layers": ({"num_hidden_layers": -1}, r"num_hidden_layers is -1, expected 1 or more"),
    "kv_heads": ({"num_key_value_heads": 2}, r"num_key_value_heads=2 beside num_attention_heads=\d+: latent attention of transformers' deepseek_v3"),
    "chosen_experts": ({"num_experts_per_tok": 9}, r"9 experts a token of 8: expected 0 to 8"),
    "no_chosen_groups": ({"n_group": 8, "topk_group": None}, r"n_group=8, topk_group=null: expected two numbers, or null for both"),
    "no_groups_but_chosen": ({"n_group": None, "topk_group": 4}, r"n_group=null, topk_group=4: expected two numbers"),
    "more_groups_than_there_are": ({"n_group": 2, "topk_group": 4}, r"topk_group=4 of n_group=2: expected 1 to 2"),
    "v2_norm": ({"model_type": "deepseek_v2", "scoring_func": "softmax", "norm_topk_prob": True}, r"norm_topk_prob=True: transformers' deepseek_v2 reads no norm_topk_prob and computes False"),
    "longcat_scale": ({"model_type": "longcat_flash", "mla_scale_kv_lora": False}, r"mla_scale_kv_lora=False: .* computes True"),
    "kimi_linear_rope": ({"model_type": "kimi_linear", "mla_use_nope": False}, r"mla_use_nope=False: .* computes True"),
    "glm_bias": ({"model_type": "glm_moe_dsa", "mlp_bias": True}, r"mlp_bias=True: .* computes False"),
    "youtu_by_another_name": ({"model_type": "youtu_llm"}, r"'youtu_llm' is not in transformers \(nearest: youtu\)"),
    "like_nothing": ({"model_type": "foo", "kv_lora_rank": ...}, r"model_type 'foo' is not in transformers$"),
    "scores": ({"scoring_func": "softmax"}, r"scoring_func='softmax': transformers' deepseek_v3 reads no scoring_func and computes 'sigmoid'"),
    "top_k": ({"topk_method": "greedy"}, r"topk_method='greedy': .* computes 'noaux_tc'"),
    "every_second": ({"moe_layer_freq": 2}, r"moe_layer_freq=2: .* computes 1"),
    "v2_sigmoid": ({"model_type": "deepseek_v2", "topk_method": "greedy"}, r"scoring_func='sigmoid': transformers' deepseek_v2 .* 'softmax'"),
    "activation": ({"hidden_act": "situ"}, r"hidden_act 'situ' is no activation of transformers"),
    "dtype": ({"torch_dtype": "bf16"}, r"torch_dtype is 'bf16', which is no dtype of torch; did you mean 'bfloat16'\?"),
    "dtype of torch": ({"torch_dtype": "torch.bfloat16"}, r"did you mean 'bfloat16'\?"),
    "value": ({"num_attention_heads": "many"}, r"can't be read: "),
    "unknown_mla": ({"model_type": "deepseek_v9"}, r"model_type 'deepseek_v9' is not in transformers \(nearest: deepseek_v3\)"),
    "unknown": ({"model_type": "llamma", "kv_lora_rank": ...}, r"model_type 'llamma' is not in transformers \(nearest: llama\)"),
    "kimi_k3": ({"model_type": "kimi_k3"}, r"its MLA without rope and with an output gate.*\(nearest: kimi_linear\)"),
    "pangu": ({"model_type": "pangu_ultra_moe"}, r"key names and sandwich norms of its own \(nearest: deepseek_v3\)"),
    "nameless": ({"model_type": ..., "architectures": ...}, r"model_type is None; expected the name of an architecture"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_refused_in_one_line(tmp_path: Path, what: str) -> None:
    changes, message = REFUSED[what]
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path, **changes)
    said = str(caught.value)
    assert said.startswith(f"{tmp_path / 'config.json'}: ") and re.search(message, said), said
    assert len(said.splitlines()) == 1


def test_a_model_that_is_no_causal_one(tmp_path: Path) -> None:
    write(tmp_path, {"model_type": "siglip_vision_model"})
    with pytest.raises(CheckpointError, match="no causal language model of model_type 'siglip_vision_model'"):
        read_configuration(tmp_path)


def test_a_wrapper_of_an_architecture_that_is_not_there(tmp_path: Path) -> None:
    write(tmp_path, {"model_type": "kimi_k3", "text_config": {**RELEASE, "model_type": "kimi_linear"}})
    with pytest.raises(CheckpointError, match="model_type 'kimi_k3' is not in transformers"):
        read_configuration(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"), [("{", "can't be read: Expecting"), ("[]", "expected an object, got list")]
)
def test_no_configuration(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: can't be read"):
        read_configuration(tmp_path)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        read_configuration(tmp_path)


def test_a_byte_order_mark_is_no_error_and_a_hub_is_not_asked(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(RELEASE), encoding="utf-8-sig")
    assert read_configuration(tmp_path).config.model_type == "deepseek_v3"
    with pytest.raises(KeyError, match="a model of a hub is downloaded first, nothing is fetched here"):
        named_model("deepseek-ai/DeepSeek-V3", meta=True)


def test_a_value_that_no_class_can_be_built_with_is_told_in_one_line(tmp_path: Path) -> None:
    folder = write(tmp_path, {**RELEASE, "rope_scaling": {**RELEASE["rope_scaling"], "factor": "40"}})
    with pytest.raises(CheckpointError, match=r"transformers can't build this model: TypeError: .*of another kind"):
        named_model(str(folder), meta=True)


def test_a_class_alone_says_the_architecture(tmp_path: Path) -> None:
    found = read(tmp_path, model_type=...)
    assert found.model_class is DeepseekV3ForCausalLM
    assert found.notes == ("no model_type: read as deepseek_v3, whose class DeepseekV3ForCausalLM is",)
    with pytest.raises(CheckpointError, match=r"model_type is None \(architectures: MineForCausalLM\)"):
        read(tmp_path, model_type=..., architectures=["MineForCausalLM"])


def test_ropes_by_their_old_names_and_by_none(tmp_path: Path) -> None:
    su = {"type": "su", "short_factor": [1.0], "long_factor": [2.0], "original_max_position_embeddings": 64}
    found = read(tmp_path, rope_scaling=su)
    assert found.config.rope_parameters["rope_type"] == "longrope"
    assert found.notes == ("rope_scaling: type 'su' is read as 'longrope', its name today",)
    write(tmp_path, RELEASE | {"rope_scaling": {"type": "mine", "factor": 2.0}})
    with pytest.raises(CheckpointError, match=r"rope_type 'mine' is none that transformers makes: .*longrope.*yarn"):
        named_model(str(tmp_path / "config.json"), meta=True)


def test_a_name_in_capitals_is_the_class_that_the_release_names(tmp_path: Path) -> None:
    """A.X-K1's own files write AXK1; a class of another name is another architecture."""
    found = read(tmp_path, model_type="AXK1", architectures=["AXK1ForCausalLM"])
    assert found.config.model_type == "axk1"
    assert "model_type AXK1 is read as axk1, which has the class that its architectures name" in found.notes
    with pytest.raises(CheckpointError, match="model_type 'AXK1' is not in transformers"):
        read(tmp_path, model_type="AXK1", architectures=["AXK1MoEForCausalLM"])


def test_normed_weights_of_experts_that_the_class_would_not_norm(tmp_path: Path) -> None:
    found = read(tmp_path, model_type="deepseek_v2", scoring_func="softmax", topk_method="greedy", norm_topk_prob=False)
    assert found.config.model_type == "deepseek_v2"
    with pytest.raises(CheckpointError, match="norm_topk_prob=True: transformers' deepseek_v2 reads no norm_topk_prob"):
        read(tmp_path, model_type="deepseek_v2", scoring_func="softmax", topk_method="greedy", norm_topk_prob=True)


@pytest.mark.parametrize(("kind", "text"), [("llama4", "llama4_text"), ("gemma3", "gemma3_text")])
def test_a_wrapper_whose_class_takes_its_text_model_or_images_too(tmp_path: Path, kind: str, text: str) -> None:
    """Transformers' table names a causal language model for the wrapper, which takes the part, or images besides."""
    path = write(
        tmp_path, {"model_type": kind, "text_config": {"model_type": text}, "vision_config": {"hidden_size": 8}}
    )
    found = read_configuration(path)
    assert found.wrapped and found.config.model_type == text
    assert found.model_class.__name__.endswith("ForCausalLM")
    assert found.notes == (f"{kind}: its text model (text_config: {text}) is taken; vision_config left out",)


def test_a_text_model_named_by_its_class_is_held_against_what_the_class_computes(tmp_path: Path) -> None:
    """DeepSeek-OCR's: no latent attention, in the class that has nothing else."""
    text = {"architectures": ["DeepseekV2ForCausalLM"], "use_mla": False, "kv_lora_rank": None}
    path = write(tmp_path, {"model_type": "deepseek_vl_v2", "language_config": text})
    with pytest.raises(CheckpointError, match="use_mla=False: transformers' deepseek_v2 reads no use_mla"):
        read_configuration(path)


@pytest.mark.parametrize(
    ("file", "told"),
    [("params.json", "Mistral's own format"), ("model-q4.gguf", "of llama.cpp"), ("x.distcp", "save_pretrained")],
)
def test_a_folder_of_another_format_is_named(tmp_path: Path, file: str, told: str) -> None:
    (tmp_path / file).write_text("{}")
    with pytest.raises(CheckpointError, match=f"there is no such file; {file} is .*{told}"):
        read_configuration(tmp_path)
