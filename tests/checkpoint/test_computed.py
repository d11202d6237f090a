"""What no checkpoint holds and a model's own code computes: the values are those of a model that was built off meta."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import nn
from transformers import FalconH1Config, FalconH1ForCausalLM, PreTrainedModel

from helix_compile.checkpoint.computed import computed_tensors
from helix_compile.errors import CheckpointError
from helix_compile.models.presets import build_model, preset_config
from tests.support.families import FAMILIES, config_of


def compare(model_class: type[PreTrainedModel], config: object) -> set[str]:
    """Names of what is computed; every value is that of the model in memory."""
    with torch.device("meta"):
        on_meta = model_class._from_config(config)
    memory = model_class._from_config(config)
    computed = computed_tensors(on_meta)
    assert all(t.is_meta for t in (*on_meta.parameters(), *on_meta.buffers()))
    for name, _ in memory.named_non_persistent_buffers(remove_duplicate=False):
        value = memory.get_buffer(name)
        assert computed[name].dtype == value.dtype and torch.equal(computed[name], value), name
    return set(computed)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name: str) -> None:
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    compare(getattr(module, FAMILIES[name].model), config_of(name))


def test_a_buffer_that_an_outer_module_computes() -> None:
    config = FalconH1Config(vocab_size=97, hidden_size=32, num_hidden_layers=2, mamba_d_ssm=32, mamba_n_heads=4)
    config.ssm_multipliers = [0.5, 0.7, 1.3, 1.5, 2.0]
    assert "model.layers.1.mamba.mup_vector" in compare(FalconH1ForCausalLM, config)


def test_a_buffer_that_nobody_computes() -> None:
    model = build_model(preset_config("tiny"), meta=True)
    assert set(computed_tensors(model)) == {"model.rotary_emb.inv_freq", "model.rotary_emb.original_inv_freq"}
    model.model.norm.register_buffer("table", torch.empty(3, device="meta"), persistent=False)
    with pytest.raises(CheckpointError, match=r"model\.norm\.table is in no checkpoint"):
        computed_tensors(model)


def test_code_that_fails_is_named() -> None:
    model = build_model(preset_config("tiny"), meta=True)

    def fails(module: nn.Module) -> None:
        raise AttributeError("no such width")

    model.model._init_weights = fails
    with pytest.raises(CheckpointError, match=r"'model.rotary_emb', .* AttributeError: no such width"):
        computed_tensors(model)
