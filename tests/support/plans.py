"""Legal models, plans and step patterns for property tests; a failure prints one line that runs it again."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from hypothesis import strategies as st
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from helix_compile import helix_compile, verify
from helix_compile.runtime.rank import originals
from helix_compile.verifier.numeric.reference import EagerReference, wide_copy
from helix_compile.verifier.numeric.scratch import Scratch
from helix_compile.verifier.numeric.steps import Pool, Scenario, batches, run_scenario, stage_params
from helix_compile.verifier.report import Coverage
from tests.support.models import YARN


@dataclass(frozen=True)
class ModelCase:
    """Sizes of a small DeepSeek-V3; few values each, for a capture costs seconds."""

    heads: int = 12
    dense: int = 1
    moe: int = 1
    q_lora: int | None = 12
    latent: int = 10
    rope: int = 4
    nope: int = 6
    value: int = 7
    ffn: int = 20
    experts: int = 6
    shared: int = 1
    yarn: bool = False
    bias: bool = False

    def build(self) -> Any:
        """The model in fp64."""
        return _build(self)


@lru_cache(maxsize=8)
def _build(case: ModelCase) -> Any:
    config = DeepseekV3Config(
        vocab_size=31,
        hidden_size=24,
        intermediate_size=case.ffn,
        moe_intermediate_size=case.ffn // 2,
        num_hidden_layers=case.dense + case.moe,
        first_k_dense_replace=case.dense,
        num_attention_heads=case.heads,
        num_key_value_heads=case.heads,
        q_lora_rank=case.q_lora,
        kv_lora_rank=case.latent,
        qk_rope_head_dim=case.rope,
        qk_nope_head_dim=case.nope,
        v_head_dim=case.value,
        n_routed_experts=case.experts,
        n_shared_experts=case.shared,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        max_position_embeddings=512,
        attention_bias=case.bias,
        eos_token_id=None,
        bos_token_id=None,
        **({"rope_parameters": YARN} if case.yarn else {}),
    )
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(config).to(torch.float64).eval()
    with torch.no_grad():
        for name, tensor in originals(model).items():
            if name.endswith("bias"):
                tensor.normal_(std=0.2)
    model.set_experts_implementation("batched_mm")
    return model


@dataclass(frozen=True)
class PlanCase:
    """Options, and a batch with its steps; `check()` is what must hold for each legal one."""

    model: ModelCase
    options: tuple[tuple[str, Any], ...]
    lengths: tuple[int, ...]
    steps: tuple[int, ...]
    idle: bool
    seed: int

    def check(self) -> None:
        """verify() is silent, and so is the drawn batch."""
        model = self.model.build()
        compiled = helix_compile(model, **dict(self.options))
        again = f"\nagain: python -c 'from tests.support.plans import *; {self!r}.check()'"
        report = verify(compiled, model, seed=self.seed)
        assert report.ok, f"{report}{again}"
        scenario = Scenario("drawn", self.lengths, self.steps, 96, self.idle)
        params = stage_params(compiled, compiled.graph, "lowered")
        outcome = run_scenario(
            Scratch(compiled, compiled.graph, params, len(self.lengths), scenario.capacity, self.seed),
            EagerReference(wide_copy(model)),
            None,
            batches(scenario, compiled.facts.vocab_size, self.seed),
            "drawn",
            Coverage(),
            Pool(),
        )
        assert not outcome.findings, f"{outcome.findings}{again}"


MODELS = st.builds(
    ModelCase,
    heads=st.sampled_from([8, 12]),
    dense=st.integers(0, 2),
    moe=st.integers(1, 2),
    q_lora=st.sampled_from([None, 12]),
    latent=st.sampled_from([5, 10]),
    rope=st.sampled_from([2, 6]),
    nope=st.sampled_from([3, 8]),
    value=st.sampled_from([4, 13]),
    ffn=st.sampled_from([20, 26]),
    experts=st.sampled_from([4, 6]),
    shared=st.integers(1, 2),
    yarn=st.booleans(),
    bias=st.booleans(),
)


@st.composite
def plans(draw: Any, models: st.SearchStrategy[ModelCase] = MODELS) -> PlanCase:
    """A legal plan for a drawn model."""
    model = draw(models)
    cp = draw(st.sampled_from([n for n in (1, 2, 3, 4, 6) if model.heads % n == 0]))
    tpa = draw(st.sampled_from([n for n in (1, 2) if model.heads % (cp * n) == 0]))
    ep = draw(st.sampled_from([None, *(e for e in (1, 2, 3) if (cp * tpa) % e == 0 and model.experts % e == 0)]))
    options: dict[str, Any] = {
        "cp": cp,
        "tpa": tpa,
        "ep": ep,
        "max_seq_len": 96,
        "max_batch_size": 4,
        "tokens_per_block": draw(st.sampled_from([1, 2, 3, 5, 32])),
    }
    if cp > 1:
        options["merge"] = draw(st.sampled_from(["a2a", "ag_rs"]))
        options["q_proj"] = draw(st.sampled_from(["replicate", "gather"]))
        options["v_up"] = draw(st.sampled_from(["auto", "before", "after"]))
    lengths = draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    steps = draw(st.lists(st.integers(1, 5), min_size=2, max_size=5))
    idle = draw(st.booleans()) and len(lengths) > 1
    return PlanCase(model, tuple(options.items()), tuple(lengths), tuple(steps), idle, draw(st.integers(0, 99)))
