"""Our own DeepSeek-V3 computes what transformers' does, alone and compiled, and reads the same checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, DynamicCache

from helix_compile.checkpoint.model import load_deepseek_v3
from helix_compile.errors import CheckpointError
from helix_compile.models.deepseek_v3 import DeepseekV3
from helix_compile.models.presets import PRESETS, preset_config
from helix_compile.models.rope import RotaryEmbedding
from tests.support.checkpoints import Tensors, rewrite, to_fp8, write
from tests.support.driver import Reference, worst_deviation
from tests.support.families import tiny_family
from tests.support.family_run import compiled_family, run_family
from tests.support.models import VARIANTS, tiny_model
from tests.support.numerics import LIMIT


def own_twin(model: nn.Module) -> DeepseekV3:
    """Our model with the weights of transformers'; every name must be there on both sides."""
    own = DeepseekV3(model.config).to(model.dtype)
    own.load_state_dict(model.state_dict(), strict=True)
    for ours, theirs in zip(own.buffers(), model.buffers(), strict=False):
        ours.data = ours.data.to(theirs.dtype)
    return own.eval()


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_transformers(variant: str) -> None:
    model = tiny_model(variant)
    reference = Reference(own_twin(model))
    assert worst_deviation(model, reference.step, [5, 2, 9]) <= LIMIT[torch.float64]


def test_yarn_whose_tables_are_scaled() -> None:
    """Here mscale is not mscale_all_dim: cos and sin are multiplied too."""
    model = tiny_family("deepseek_v3", "yarn")
    own = own_twin(model)
    assert own.model.rotary_emb.scale != 1.0
    assert worst_deviation(model, Reference(own).step, [5, 2, 9]) <= LIMIT[torch.float64]


def test_the_float32_islands_are_the_same() -> None:
    """In bf16 a norm or a router in bf16 would show: every bit is compared."""
    model = tiny_model("plain", torch.bfloat16)
    ids = torch.randint(0, 97, (2, 21), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        assert torch.equal(own_twin(model)(ids).logits, model(input_ids=ids).logits)


def test_a_cache_that_it_makes_itself() -> None:
    own, ids = own_twin(tiny_model()), torch.arange(14).view(2, 7)
    with torch.no_grad():
        first = own(ids[:, :5], use_cache=True)
        rest = own(ids[:, 5:], past_key_values=first.past_key_values)
        torch.testing.assert_close(rest.logits, own(ids).logits[:, 5:], rtol=0, atol=1e-6)
    assert isinstance(first.past_key_values, DynamicCache)
    assert first.past_key_values.get_seq_length() == 7


@cache
def short_twin() -> DeepseekV3:
    """The same object for both degrees, so that its capture is paid once."""
    return own_twin(tiny_model("short"))


@pytest.mark.parametrize("cp", [2, 4])
def test_compiled_it_equals_itself(cp: int) -> None:
    own = short_twin()
    run = run_family(own, compiled_family(own, cp))
    assert 0 < run.worst <= LIMIT[torch.float64] and run.same_tokens


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_the_names_and_shapes_of_transformers(name: str) -> None:
    config = preset_config(name)
    with torch.device("meta"):
        models = [kind(config) for kind in (DeepseekV3, DeepseekV3ForCausalLM)]
    ours, theirs = ({n: t.shape for n, t in m.state_dict().items()} for m in models)
    assert ours == theirs


def test_another_rope_is_refused() -> None:
    rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(ValueError, match="rope_type 'linear' is not known here"):
        RotaryEmbedding(DeepseekV3Config(rope_parameters=rope))


def _stacked(tensors: Tensors) -> Tensors:
    """Experts as transformers holds them in memory."""
    names = {n.split(".experts.")[0] for n in tensors if ".experts." in n}
    packed = {n: t for n, t in tensors.items() if ".experts." not in n}
    for name in names:
        of = lambda kind, n=name: torch.stack(  # noqa: E731 - three uses on two lines
            [tensors[f"{n}.experts.{i}.{kind}.weight"] for i in range(8)]
        )
        packed[f"{name}.experts.gate_up_proj"] = torch.cat([of("gate_proj"), of("up_proj")], dim=1)
        packed[f"{name}.experts.down_proj"] = of("down_proj")
    return packed


def _with_mtp(tensors: Tensors) -> Tensors:
    return {**tensors, "model.layers.61.eh_proj.weight": torch.ones(3)}


@pytest.mark.parametrize("change", [None, _stacked, _with_mtp], ids=["singly", "stacked", "mtp"])
@pytest.mark.parametrize("variant", ["short", "tied"])
def test_a_checkpoint_is_read(tmp_path: Path, variant: str, change: Callable[[Tensors], Tensors] | None) -> None:
    write(tmp_path, variant)
    if change:
        rewrite(tmp_path, change)
    own, model = load_deepseek_v3(tmp_path), tiny_model(variant, torch.bfloat16)
    wanted = model.state_dict()
    assert own.dtype is torch.bfloat16 and own.state_dict().keys() == wanted.keys()
    assert all(torch.equal(t, wanted[n].to(t.dtype)) for n, t in own.state_dict().items())
    assert own.model.layers[-1].mlp.gate.e_score_correction_bias.dtype is torch.float32
    assert (own.lm_head.weight is own.model.embed_tokens.weight) is (variant == "tied")
    assert torch.equal(own.model.rotary_emb.inv_freq, DeepseekV3(own.config).model.rotary_emb.inv_freq)


def test_fp8_blocks_are_dequantised(tmp_path: Path) -> None:
    whole = to_fp8(write(tmp_path), (24, 16))
    own = load_deepseek_v3(tmp_path, dtype=torch.float32).state_dict()
    name = "model.layers.1.mlp.experts.7.up_proj.weight"
    stack = own["model.layers.1.mlp.experts.gate_up_proj"]
    got = {**own, name: stack[7, stack.shape[1] // 2 :]}
    for key in (name, "model.layers.0.self_attn.kv_b_proj.weight"):
        torch.testing.assert_close(got[key].bfloat16(), whole[key].bfloat16(), rtol=0, atol=0)


def test_another_checkpoint_is_refused(tmp_path: Path) -> None:
    """By the reader that tests/checkpoints holds to account."""
    name = "model.norm.weight"
    rewrite(write(tmp_path), lambda tensors: {n: t for n, t in tensors.items() if n != name})
    with pytest.raises(CheckpointError, match=f"missing: {name}"):
        load_deepseek_v3(tmp_path)
