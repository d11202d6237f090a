"""What can't be captured is refused in one short message: model class, cause, what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helix_compile import CaptureError, helix_compile
from helix_compile.models.presets import preset_config
from tests.support.families import fresh_family
from tests.support.models import fresh_model, tiny_model


def _compile(model: Any) -> None:
    helix_compile(model, cp=2, max_seq_len=64)


def _branching(self: Any, hidden: torch.Tensor) -> torch.Tensor:
    return hidden * 2 if bool(hidden.sum() > 0) else hidden


def _failing(self: Any, hidden: torch.Tensor) -> torch.Tensor:
    raise KeyError("a table\nand many more lines")


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (_branching, r"DeepseekV3ForCausalLM.*around its layers: GuardOnDataDependentSymNode: .*branches on data"),
        (_failing, r"DeepseekV3ForCausalLM.*KeyError: 'a table"),
    ],
)
def test_an_error_around_the_layers_is_a_short_capture_error(
    forward: Callable, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    model = fresh_model()
    model.model.norm.forward = forward.__get__(model.model.norm)
    with pytest.raises(CaptureError, match=message) as caught:
        _compile(model)
    assert len(str(caught.value).splitlines()) == 1 and caught.value.__cause__ is None
    assert "GraphModule" not in "".join(capfd.readouterr())
    assert not any("forward" in vars(layer) for layer in model.model.layers)


@pytest.mark.parametrize("place", ["self_attn.kv_a_layernorm", "input_layernorm"])
def test_an_error_inside_a_layer_is_as_short(place: str) -> None:
    model = fresh_model("short")
    part = model.model.layers[0].get_submodule(place)
    part.forward = _failing.__get__(part)
    with pytest.raises(CaptureError, match=r"DeepseekV3DecoderLayer .*KeyError") as caught:
        _compile(model)
    assert len(str(caught.value).splitlines()) == 1


def test_a_part_that_branches_on_data_stays_a_leaf() -> None:
    model = fresh_model("short")
    part = model.model.layers[0].self_attn.kv_a_layernorm
    part.forward = _branching.__get__(part)
    compiled = helix_compile(model, cp=2, max_seq_len=64)
    ((name, reason),) = compiled.plan.leaves
    assert name == "model.layers.0.self_attn.kv_a_layernorm" and "branches on data" in reason
    assert part.forward.__func__ is _branching


def test_models_that_are_not_a_causal_language_model_in_eval_mode() -> None:
    with pytest.raises(CaptureError, match="DeepseekV3Model has no logits: pass the causal"):
        _compile(fresh_model().model)
    model = fresh_model()
    model.model.layers[1].mlp.train()
    with pytest.raises(CaptureError, match=r"`model\.layers\.1\.mlp` is in training mode"):
        _compile(model)
    with pytest.raises(CaptureError, match=r"torch\.compile; pass the original module"):
        _compile(torch.compile(tiny_model()))


@pytest.mark.parametrize(
    ("around", "message"),
    [
        (torch.inference_mode, "inside torch.inference_mode"),
        (lambda: torch.device("meta"), r'inside torch.device\("meta"\)'),
        (lambda: torch.autocast("cpu", torch.bfloat16), 'inside torch.autocast\\("cpu"\\)'),
    ],
    ids=["inference", "meta", "autocast"],
)
def test_modes_that_change_what_is_captured(around: Callable[[], Any], message: str) -> None:
    model = tiny_model()  # which tests share
    with around(), pytest.raises(CaptureError, match=message):
        _compile(model)


def test_a_configuration_alone_has_no_weights(tmp_path: Path) -> None:
    preset_config("tiny").save_pretrained(tmp_path)
    with pytest.raises(CaptureError, match=r"config\.json is a configuration alone.*no weights.*from_config"):
        _compile(tmp_path / "config.json")
    with pytest.raises(CaptureError, match="is a file; pass the checkpoint folder"):
        (tmp_path / "model.safetensors").touch()
        _compile(tmp_path / "model.safetensors")


def test_a_width_that_grouped_products_do_not_take_is_told_with_what_works() -> None:
    model = fresh_family("deepseek_v3", num_hidden_layers=1, first_k_dense_replace=0, dtype=torch.bfloat16)
    model.set_experts_implementation("grouped_mm")
    with pytest.raises(RuntimeError, match="multiple of 16 bytes"):
        model(torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(CaptureError, match=r"multiples of 16 bytes.*set_experts_implementation\('batched_mm'\)"):
        _compile(model)
    model.set_experts_implementation("batched_mm")
    _compile(model)
