"""Quantised linears: refused with the reason where attention has them, whole on every rank and reported elsewhere."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from helix_compile import helix_compile
from helix_compile.errors import MatchError
from tests.support.models import fresh_model


class Fp8Linear(nn.Module):
    """Weights in FP8 with one scale, made wide in the forward, as serving checkpoints are patched into models."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        scale = linear.weight.detach().abs().max() / 448
        self.scale = nn.Parameter(scale, requires_grad=False)
        narrow = (linear.weight.detach() / scale).to(torch.float8_e4m3fn)
        self.weight = nn.Parameter(narrow, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale)


def with_fp8(part: str) -> nn.Module:
    """The model with the linears below `part` of each layer in FP8."""
    model: nn.Module = fresh_model("short", torch.float32)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and f".{part}." in name:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, Fp8Linear(module))
    return model.eval()


def test_attention_over_quantised_linears_is_refused() -> None:
    with pytest.raises(MatchError) as caught:
        helix_compile(with_fp8("self_attn"), cp=2)
    said = str(caught.value)
    assert said.startswith("layer 0 of DeepseekV3ForCausalLM")
    assert re.search(r"`linear_\d+` is a quantised linear: .* from self_attn\.\w+\.weight \(float8_e4m3fn\)", said)
    assert "dequantise" in said and "at node `linear" in said


def test_a_quantised_ffn_stays_whole_and_is_reported() -> None:
    model = with_fp8("mlp")
    compiled = helix_compile(model, cp=2, max_seq_len=64)
    reasons = {what: why for what, why in compiled.plan.not_rewritten if what.startswith("quantised")}
    names = {f"quantised mlp.{part}{n}_proj.weight" for part in ("", "shared_experts.") for n in ("gate", "up", "down")}
    assert set(reasons) == names
    assert all(why.startswith("float8_e4m3fn, ") for why in reasons.values())
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        expected = model(ids).logits
    assert (compiled(ids) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization:DeprecationWarning")
def test_packed_weights_are_refused_before_capture() -> None:
    model = fresh_model("short", torch.float32)
    packed = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8).eval()
    with pytest.raises(MatchError, match=r"model\.layers\.0\.self_attn\.q_a_proj` is a quantised linear \(Linear\)"):
        helix_compile(packed, cp=2)
