"""head="shard": embedding and output head cut by rows of the vocabulary compute what the unmodified model computes."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helix_compile import HelixModule, HelixPlan, LayoutError, MatchError, PlanError, helix_compile, verify
from helix_compile.capture.model import capture
from tests.support.driver import worst_deviation
from tests.support.gqa_models import fresh_gqa, tiny_gqa
from tests.support.graphs import stage_text
from tests.support.models import tiny_model
from tests.support.numerics import LIMIT

RAGGED = [6, 11, 9]
SIZES: dict[str, Any] = {"tokens_per_block": 2, "max_batch_size": 3, "max_seq_len": 64, "world": "virtual"}
SHARD: dict[str, Any] = {**SIZES, "head": "shard", "pad_heads": True}  # 97 words divide by no number of ranks


def of(name: str) -> Any:
    """MLA with experts; grouped-query attention; tied, scaled embeddings and a softcap; a bias in the head."""
    if name == "mla":
        return tiny_model("short")
    if name == "gemma3":
        return _gemma()
    return tiny_gqa(name)


def _gemma() -> Any:
    """Tied, scaled embeddings and a softcap so low that it bends every logit."""
    if "gemma" not in _MADE:
        _MADE["gemma"] = fresh_gqa("gemma3", final_logit_softcapping=0.5)
        assert _MADE["gemma"].lm_head.weight is _MADE["gemma"].model.embed_tokens.weight
    return _MADE["gemma"]


_MADE: dict[str, Any] = {}
RUNS = [
    ("mla", {"cp": 4}),
    ("mla", {"cp": 2, "tpa": 2, "merge": "ag_rs"}),
    ("gemma3", {"cp": 2, "tpa": 2}),
    ("gemma3", {"cp": 3}),
    pytest.param("llama", {"cp": 1, "tpa": 4}, marks=pytest.mark.slow),
    pytest.param("cohere", {"cp": 4}, marks=pytest.mark.slow),  # tied, the logits scaled
]


@pytest.mark.parametrize(("name", "plan"), RUNS, ids=str)
def test_fp64(name: str, plan: dict[str, Any]) -> None:
    """Prompts of unequal length, steps of one and of several tokens, a padded vocabulary."""
    model, compiled = of(name), helix_compile(of(name), **SHARD, **plan)
    assert worst_deviation(model, compiled, RAGGED) <= LIMIT[torch.float64]


def compiled_mla(**plan: Any) -> HelixModule:
    return helix_compile(of("mla"), **{**SHARD, "cp": 2, "tpa": 2, **plan})


def test_the_graph_around_the_layers_after_it() -> None:
    compiled = compiled_mla()
    assert list(compiled.stages) == ["captured", "attention", "reshard", "ffn", "head", "lowered"]
    text = stage_text(compiled.stages["head"])
    assert "embed_rows" in text and "world:S(2)" in text
    outer = compiled.graph.graph
    ops = [str(n.target) for n in outer.nodes if "_c10d_functional" in str(n.target) and "wait" not in str(n.target)]
    assert ops == ["_c10d_functional.all_reduce.default", "_c10d_functional.all_gather_into_tensor.default"]


def test_each_rank_holds_its_rows_and_zeros_behind_the_last() -> None:
    model, compiled = of("mla"), compiled_mla()
    for name, whole in (
        ("lm_head.weight", model.lm_head.weight),
        ("model.embed_tokens.weight", model.model.embed_tokens.weight),
    ):
        parts = [rank.params[name] for rank in compiled.ranks]
        assert [p.shape[0] for p in parts] == [25] * 4
        rows: Tensor = torch.cat(parts)
        assert torch.equal(rows[:97], whole) and not rows[97:].any()


def test_bytes_are_those_of_the_plan() -> None:
    compiled, whole = compiled_mla(), compiled_mla(head="replicate")
    ids = torch.randint(0, 97, (2, 3))
    sent = []
    for module in (compiled, whole):
        module.world.reset_counters()
        module(ids)
        assert module.world.sent_bytes == [module.plan.egress_bytes_per_rank_per_token * ids.numel()] * 4
        sent.append(module.world.sent_bytes[0])
    hidden, item = of("mla").config.hidden_size, 8
    assert sent[0] - sent[1] == (Fraction(3, 2) * hidden + 3 * 25) * item * ids.numel()
    said = [(c["op"], c["what"]) for c in compiled.inspect().facts["collectives"] if c["body"] == "outer"]
    assert said == [("all_reduce", "token embeddings"), ("all_gather_into_tensor", "logits")]
    assert HelixPlan.from_json(compiled.plan.to_json()) == compiled.plan
    saved = whole.plan.params_bytes_per_rank - compiled.plan.params_bytes_per_rank
    assert saved == 2 * (97 - 25) * hidden * item
    held = sum(math.prod(t.shape) * t.itemsize for t in compiled.ranks[0].params.values())
    assert compiled.plan.params_bytes_per_rank == held


def test_its_stage_runs_and_a_saved_module_is_bitwise_the_same(tmp_path: Path) -> None:
    compiled = compiled_mla()
    ids = torch.randint(0, 97, (2, 5), generator=torch.Generator().manual_seed(1))
    expected = compiled(ids)
    compiled.reset()
    assert (compiled.run_stage("head", ids) - expected).abs().max() <= 1e-12 * expected.abs().max()
    compiled.save(tmp_path / "m")
    assert torch.equal(HelixModule.load(tmp_path / "m", world="virtual")(ids), expected)


def test_verify_judges_it() -> None:
    report = verify(compiled_mla(), of("mla"))
    assert report.ok, report


def test_refusals() -> None:
    with pytest.raises(
        LayoutError,
        match=r"the embedding's 97 rows can't be divided over N = cp\*tpa = 4\*1 = 4 .*pad_heads=True, 97 -> 100",
    ):
        helix_compile(of("mla"), **SIZES, cp=4, head="shard")
    with pytest.raises(PlanError, match=r"option head='shard' has no effect at cp\*tpa = 1"):
        helix_compile(of("mla"), **SIZES, cp=1, head="shard")


def test_a_table_that_is_read_elsewhere_is_named() -> None:
    """The head's weight as the model computes with it besides: cutting its rows would change that."""
    captured = capture(of("mla"))
    graph = captured.graph.graph
    head = next(n for n in graph.nodes if n.op == "placeholder" and n.meta["input"][1] == "lm_head.weight")
    linear = next(iter(head.users))
    with graph.inserting_after(linear):
        extra = graph.call_function(torch.ops.aten.mean.dim, (head, [0, 1]))
    try:
        with pytest.raises(MatchError, match=r"`lm_head_weight`, which node `linear.*` .* is read by `mean.*` too"):
            helix_compile(captured, **SHARD, cp=2)
    finally:
        graph.erase_node(extra)
