"""Every refusal says what, where and the numbers; a refused step leaves the cache as it was."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

from helix_compile import (
    CaptureError,
    HelixError,
    HelixModule,
    LayoutError,
    LoweringUnavailable,
    MatchError,
    PlanError,
    RuntimeFault,
    helix_compile,
)
from tests.support.driver import random_ids
from tests.support.models import fresh_model, tiny_model

LAYOUTS: list[tuple[dict[str, Any], str]] = [
    ({"cp": 5}, "24 heads can't be divided over N = cp*tpa = 5*1 = 5 ranks (24 % 5 = 4)"),
    ({"cp": 4, "tpa": 4}, "24 heads can't be divided over N = cp*tpa = 4*4 = 16 ranks"),
    ({"cp": 6, "ep": 3}, "8 routed experts can't be divided over ep=3 (8 % 3 = 2)"),
    ({"cp": 4, "ep": 3}, "ep=3 does not divide the world of cp*tpa = 4*1 = 4 ranks"),
    ({"cp": 0}, "cp must be an int >= 1, got 0"),
    ({"cp": -2}, "cp must be an int >= 1, got -2"),
    ({"cp": True}, "cp must be an int >= 1, got True (bool)"),
    ({"cp": 2.0}, "cp must be an int >= 1, got 2.0 (float)"),
    ({"cp": 2, "tpa": 0}, "tpa must be an int >= 1, got 0"),
    ({"cp": 2, "tokens_per_block": 0}, "tokens_per_block must be an int >= 1"),
    ({"cp": 2, "max_batch_size": 0}, "max_batch_size must be an int >= 1"),
    ({"cp": 2, "max_seq_len": 10**30}, "max_seq_len must be at most 2,147,483,647"),
]


@pytest.mark.parametrize(("options", "message"), LAYOUTS, ids=str)
def test_layouts(options: dict[str, Any], message: str) -> None:
    with pytest.raises(LayoutError, match=re.escape(message)):
        helix_compile(tiny_model(), **options)


@pytest.mark.parametrize("name", ["merge", "q_proj", "v_up", "overlap", "lower"])
def test_unknown_values(name: str) -> None:
    with pytest.raises(PlanError, match=f"option {name}='fast' is unknown; expected one of"):
        helix_compile(tiny_model(), cp=2, **{name: "fast"})


@pytest.mark.parametrize(
    "option",
    [{"merge": "ag_rs"}, {"q_proj": "gather"}, {"v_up": "before"}, {"v_up": "after"}, {"overlap": "hopb"}],
    ids=str,
)
def test_options_without_effect_at_cp_1(option: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match="has no effect at cp=1"):
        helix_compile(tiny_model(), cp=1, tpa=2, **option)


def test_ep_without_experts() -> None:
    model = fresh_model()
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    with pytest.raises(PlanError, match="ep=2 has no effect: the model has no routed experts"):
        helix_compile(model, cp=2, ep=2)


def test_one_sequence_is_no_two_parts_of_a_batch() -> None:
    with pytest.raises(PlanError, match="overlap='hopb' has no effect at max_batch_size=1"):
        helix_compile(tiny_model(), cp=2, overlap="hopb", max_batch_size=1)


def test_worlds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without torchrun there is no distributed world; a wrong number of processes is told before they meet."""
    model = tiny_model()
    with pytest.raises(LoweringUnavailable, match=r"RANK, WORLD_SIZE, .* not set .* torchrun"):
        helix_compile(model, cp=2, world="distributed")
    with pytest.raises(PlanError, match="option world=7 is unknown"):
        helix_compile(model, cp=2, world=7)
    for name, value in {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "::", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LayoutError, match=r"cp\*tpa = 2\*1 = 2 ranks, but torchrun's WORLD_SIZE has 3"):
        helix_compile(model, cp=2)
    monkeypatch.setenv("HELIX_TIMEOUT", "soon")
    with pytest.raises(PlanError, match="HELIX_TIMEOUT must be a number of seconds > 0, got 'soon'"):
        helix_compile(model, cp=2)


def test_models() -> None:
    with pytest.raises(CaptureError, match=r"training mode; call model\.eval"):
        helix_compile(fresh_model().train(), cp=2)
    with pytest.raises(CaptureError, match="already compiled"):
        helix_compile(helix_compile(tiny_model(), cp=2, max_seq_len=64), cp=2)
    with pytest.raises(CaptureError, match="expected a transformers causal language model"):
        helix_compile(torch.nn.Linear(2, 2), cp=2)
    with pytest.raises(CaptureError, match="has no config"):
        helix_compile("nowhere", cp=2)


def test_a_model_that_is_not_matched_names_layer_node_and_reason() -> None:
    config = GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=97, bos_token_id=0, eos_token_id=0)
    with pytest.raises(MatchError) as caught:
        helix_compile(GPT2LMHeadModel(config).eval(), cp=2)
    for part in ("layer 0", "`aten.addmm.default` stands between", "`addmm_1`", "expected K and V"):
        assert part in str(caught.value)


def _values_from_elsewhere(self: Any, latent: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
    k, v = _EXPAND(self, latent, rope)
    return k, v * 2.0


def _rope_by_head(self: Any, latent: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
    k, v = _EXPAND(self, latent, rope)
    heads = rope.repeat(1, k.shape[1], 1, 1) * torch.arange(k.shape[1]).view(1, -1, 1, 1)
    return torch.cat([k[..., : -rope.shape[-1]], heads], dim=-1), v


def _undefined_key(self: Any, latent: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
    k, v = _EXPAND(self, latent, rope)
    return k.new_empty(k.shape), v


_EXPAND = DeepseekV3Attention.expand_kv


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (_values_from_elsewhere, "V does not derive from one linear over the cache, but from `mul"),
        (_rope_by_head, "the rope part differs per head"),
        (_undefined_key, "K holds elements that nothing wrote"),
    ],
)
def test_a_broken_site_names_the_closest_reason(broken: Any, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DeepseekV3Attention, "expand_kv", broken)
    with pytest.raises(MatchError) as caught:
        helix_compile(fresh_model(), cp=2)
    assert reason in str(caught.value)
    assert "at node `" in str(caught.value) and "layer 0" in str(caught.value)


@pytest.mark.fresh_capture  # the model looks its mask up in a module
def test_a_window_that_mixes_columns_and_positions_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as modeling

    causal = modeling.create_causal_mask

    def window(**kwargs: Any) -> Tensor:
        mask = causal(**kwargs)
        ages = kwargs["position_ids"][:, None, :, None] - torch.arange(mask.shape[-1])
        return mask & (ages < 100)

    monkeypatch.setattr(modeling, "create_causal_mask", window)
    model = fresh_model()
    with pytest.raises(
        MatchError, match=r"a window of 100 \+ padding at 51 of .* first for the query at 102 and the key at 2 of 128"
    ):
        helix_compile(model, cp=2, max_seq_len=128)


@pytest.fixture
def module() -> HelixModule:
    compiled = helix_compile(tiny_model(), cp=4, tokens_per_block=2, max_batch_size=3, max_seq_len=20)
    compiled(random_ids(tiny_model(), 2, 12))
    return compiled


STEPS: list[tuple[Any, Any, str]] = [
    (torch.zeros(2, 9, dtype=torch.int64), None, "12 tokens + 9 new = 21 > max_seq_len=20"),
    (torch.zeros(4, 1, dtype=torch.int64), None, "4 sequences > max_batch_size=3"),
    (torch.zeros(3, 1, dtype=torch.int64), None, "the batch has 2 sequences since the first step, got 3"),
    (torch.zeros(2, 0, dtype=torch.int64), None, "at least one sequence and one token, got [B, T] = [2, 0]"),
    (torch.full((2, 1), 97), None, "token ids must be in [0, 97), got ids from 97 to 97"),
    (torch.full((2, 1), -1), None, "token ids must be in [0, 97), got ids from -1 to -1"),
    (torch.zeros(2, 1), None, "input_ids must be int64 or int32, got torch.float32"),
    (torch.zeros(2, dtype=torch.int64), None, "input_ids must be [B, T], got shape (2,)"),
    (
        torch.zeros(2, 3, dtype=torch.int64),
        torch.ones(2, 15),
        "[B, T] = (2, 3), the mask of this step's tokens, got (2, 15)",
    ),
    (torch.zeros(2, 3, dtype=torch.int64), torch.tensor([[1, 1, 1], [1, 0, 1]]), "zeros between tokens in rows [1]"),
    (torch.zeros(2, 1, dtype=torch.int64), torch.full((2, 1), 2), "attention_mask must hold 0 and 1 only"),
    (torch.zeros(2, 1, dtype=torch.int64), torch.full((2, 1), 0.5), "attention_mask must hold 0 and 1 only"),
]


@pytest.mark.parametrize(("ids", "mask", "message"), STEPS, ids=[f"{i}-{s[2][:40]}" for i, s in enumerate(STEPS)])
def test_a_refused_step_leaves_every_byte(module: HelixModule, ids: Tensor, mask: Tensor | None, message: str) -> None:
    before = [c.clone() for rank in module.ranks for c in rank.cache]
    lengths = module.lengths
    with pytest.raises(RuntimeFault, match=re.escape(message)):
        module(ids, mask)
    after = [c for rank in module.ranks for c in rank.cache]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert torch.equal(module.lengths, lengths)


def test_capacity_counts_tokens_exactly(module: HelixModule) -> None:
    """20 tokens fit, not the 32 of whole blocks; padding takes no room."""
    mask = torch.tensor([[0] * 4 + [1] * 8, [0] * 12])
    module(random_ids(tiny_model(), 2, 12), mask)
    assert module.lengths.tolist() == [20, 12]
    with pytest.raises(RuntimeFault, match="sequence 0 is full"):
        module(random_ids(tiny_model(), 2, 1))


def test_module_surface(module: HelixModule) -> None:
    assert not list(module.parameters()) and not module.state_dict()
    assert module.training is False
    for call in (lambda: module.to(torch.float32), lambda: module.train()):
        with pytest.raises(HelixError):
            call()
    moves = ("half", "double", "bfloat16", "float", "cpu", "cuda")
    for move in (*(getattr(module, m) for m in moves), lambda: module.to_empty(device="cpu")):
        with pytest.raises(HelixError, match="captured for one dtype and device"):
            move()
    for rows in (1, "01"):
        with pytest.raises(RuntimeFault, match="rows must be a list of row numbers, got"):
            module.reset(rows=rows)
    with pytest.raises(RuntimeFault, match=r"\[7\] are not rows of the current batch of 2"):
        module.reset(rows=[7])
    with pytest.raises(RuntimeFault, match="stage 'captured' can't be run"):
        module.run_stage("captured", random_ids(tiny_model(), 2, 1))
