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
from helix_compile.runtime.ends import KEPT
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
    note = next(n for n in compiled.plan.notes if n.startswith("pad_heads: "))
    zeros = (
        Fraction(3, 4) * hidden * item * 2,
        Fraction(3, 100) * 3 * 25 * item,
    )  # of two tables; of the logits that are sent
    assert note.startswith("pad_heads: 97 -> 100 words; ") and all(f"{float(z):,.10g} bytes" in note for z in zeros), (
        note
    )
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


# shorter ends: of a prompt the last column's logits alone are gathered, and for greedy search none


@pytest.mark.parametrize("kept", [1, 2, 6])
def test_of_a_prompt_only_what_is_kept_is_gathered(kept: int) -> None:
    """Of more columns too than a graph was traced with; the bytes say what was sent."""
    compiled = helix_compile(_gemma(), **SHARD, cp=2, tpa=2)
    ids = torch.randint(0, 97, (3, 7), generator=torch.Generator().manual_seed(3))
    whole = compiled(ids)
    compiled.reset()
    compiled.world.reset_counters()
    last = compiled(ids, logits_to_keep=kept)
    assert (last - whole[:, -kept:]).abs().max() <= 1e-14 and last.shape == (3, kept, 97)
    _, logits = compiled.plan.outer.collectives
    unsent = logits.egress_bytes_per_rank_per_token * 3 * (7 - kept)
    assert compiled.world.sent_bytes == [compiled.plan.egress_bytes_per_rank_per_token * 3 * 7 - unsent] * 4


def test_columns_that_are_kept_over_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 3 of 11 tokens: of the first nothing is kept (and one column gathered), of the second a part, then all."""
    compiled = helix_compile(of("llama"), **SHARD, cp=2)
    ids = torch.randint(0, 97, (2, 11), generator=torch.Generator().manual_seed(3))
    whole = compiled(ids)
    monkeypatch.setattr("helix_compile.runtime.step.MAX_CHUNK", 3)
    for kept, gathered in ((7, 1 + 2 + 3 + 2), (2, 1 + 1 + 1 + 2), (1, 4), (11, 11)):
        compiled.reset()
        compiled.world.reset_counters()
        last = compiled(ids, logits_to_keep=kept)
        assert (last - whole[:, -kept:]).abs().max() <= 1e-13 and last.shape[1] == kept
        _, logits = compiled.plan.outer.collectives
        unsent = logits.egress_bytes_per_rank_per_token * 2 * (11 - gathered)
        assert compiled.world.sent_bytes == [compiled.plan.egress_bytes_per_rank_per_token * 2 * 11 - unsent] * 2
    for kept in range(1, 11):
        assert compiled.short_end(f"last{kept}") is compiled.short_end(f"last{kept}")
    assert len(compiled._ends._ends) <= KEPT


def test_greedy_search_exchanges_one_candidate_a_rank() -> None:
    """Through scale, softcap and padding; the bytes say that no logits were gathered."""
    model, compiled = _gemma(), helix_compile(_gemma(), **SHARD, cp=2, tpa=2)
    ids = torch.randint(0, 97, (3, 7), generator=torch.Generator().manual_seed(3))
    greedy: dict[str, Any] = {"max_new_tokens": 9, "do_sample": False}
    compiled.world.reset_counters()
    assert torch.equal(compiled.generate(ids, **greedy), model.generate(ids, **greedy))
    _, logits = compiled.plan.outer.collectives
    tokens, candidates = 3 * (7 + 8), 3 * 9 * 16 * 3  # rows x (prompt + new), and steps x rows x bytes x peers
    layers = compiled.plan.egress_bytes_per_rank_per_token - logits.egress_bytes_per_rank_per_token
    assert compiled.world.sent_bytes == [layers * tokens + candidates] * 4
    # what reads other logits gets them
    for more in ({"repetition_penalty": 1.3}, {"output_logits": True, "return_dict_in_generate": True}):
        got, expected = (m.generate(ids, **greedy, **more) for m in (compiled, model))
        if isinstance(got, Tensor):
            assert torch.equal(got, expected)
        else:
            assert torch.equal(got.sequences, expected.sequences)
            assert all((a - b).abs().max() <= 1e-6 for a, b in zip(got.logits, expected.logits, strict=True))


def test_ties_go_to_the_lowest_word_and_rows_of_zeros_are_never_chosen() -> None:
    """All real logits are equal and below 0, which is what a row of zeros has."""
    model = fresh_gqa("llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(1.0)
        model.lm_head.weight.zero_()
    compiled = helix_compile(model, **SHARD, cp=4)
    ids = torch.randint(0, 97, (2, 5), generator=torch.Generator().manual_seed(3))
    assert compiled.best_words(ids).tolist() == [[[0.0, 0.0]]] * 2
    with torch.no_grad():  # of the words 30 and 60, on two ranks, 30 is the one
        model.lm_head.weight[[60, 30]] = torch.randn(36, generator=torch.Generator().manual_seed(1)).double()
    compiled.reset()
    logits = compiled(ids)[:, -1]
    compiled.reset()
    best = compiled.best_words(ids)
    assert best[:, 0, 1].tolist() == logits.argmax(-1).tolist() and (logits[:, 30] == logits[:, 60]).all()
    with torch.no_grad():  # every logit below the 0 of a row of zeros
        hidden = model.model(ids).last_hidden_state[:, -1].mean(0)
        model.lm_head.weight[:] = -hidden * torch.linspace(2, 1, 97)[:, None].double()
    compiled.reset()
    logits = compiled(ids[:1])[:, -1]
    compiled.reset()
    best = compiled.best_words(ids[:1])
    assert logits.max() < 0 and best[:, 0].tolist() == [[float(logits.max()), float(logits.argmax())]]


def test_an_edit_of_the_graph_shows_in_its_shorter_ends() -> None:
    compiled = helix_compile(_gemma(), **SHARD, cp=2)
    ids = torch.randint(0, 97, (2, 5), generator=torch.Generator().manual_seed(3))
    before = compiled.best_words(ids)
    cap = [n for n in compiled.graph.graph.nodes if n.target is torch.ops.aten.mul.Tensor][-1]
    cap.args = (cap.args[0], -1.0)  # behind the softcap: the least logit is the largest
    compiled.reset()
    after = compiled.best_words(ids)
    compiled.reset()
    assert not torch.equal(before, after)
    assert after[:, 0, 1].tolist() == compiled(ids)[:, -1].argmax(-1).tolist()
    with compiled.graph.graph.inserting_after(cap):  # what mixes logits ends them as a whole
        mixed = compiled.graph.graph.call_function(torch.ops.aten.softmax.int, (cap, -1))
    cap.replace_all_uses_with(mixed, delete_user_cb=lambda user: user is not mixed)
    assert compiled.best_words(ids) is None and compiled.short_end("last1") is None


@pytest.mark.parametrize("tied", [False, True], ids=["", "ties"])
def test_top_k_sampling_exchanges_the_top_of_each_rank(tied: bool) -> None:
    """The same tokens as of the unmodified model. Of words that share the k-th logit, more than a rank sends, all may be drawn."""
    model = fresh_gqa("llama", vocab_size=800)
    if tied:
        with torch.no_grad():
            model.lm_head.weight[:] = model.lm_head.weight[:40].repeat_interleave(20, 0)
    compiled = helix_compile(model, **{**SHARD, "cp": 4})
    ids = torch.randint(0, 97, (3, 7), generator=torch.Generator().manual_seed(3))
    drawn: dict[str, Any] = {"max_new_tokens": 9, "do_sample": True, "top_k": 5, "top_p": 0.9, "temperature": 3.0}
    torch.manual_seed(4)
    expected = model.generate(ids, **drawn)
    torch.manual_seed(4)
    compiled.world.reset_counters()
    assert torch.equal(compiled.generate(ids, **drawn), expected)
    _, logits = compiled.plan.outer.collectives
    rows, layers = 3, compiled.plan.egress_bytes_per_rank_per_token - logits.egress_bytes_per_rank_per_token
    sent = layers * rows * (7 + 8) + 9 * rows * (5 + 8) * 16 * 3
    assert compiled.world.sent_bytes == [sent + tied * 9 * rows * logits.egress_bytes_per_rank_per_token] * 4


@pytest.mark.slow
def test_shorter_ends_in_bfloat16_are_equal_bit_for_bit() -> None:
    """Compiled and node by node: of the last column alone, of several, and what greedy search and sampling choose."""
    model = fresh_gqa("llama", torch.bfloat16)
    ids = torch.randint(0, 97, (3, 7), generator=torch.Generator().manual_seed(3))
    modules = [helix_compile(model, **SHARD, cp=2, lower=lower) for lower in ("reference", "inductor")]
    whole = [module(ids) for module in modules]
    assert torch.equal(*whole)
    for kept in (1, 3):
        for module in modules:
            module.reset()
            assert torch.equal(module(ids, logits_to_keep=kept), whole[0][:, -kept:])
    for asked in ({"do_sample": False}, {"do_sample": True, "top_k": 5}):
        found = []
        for module in modules:
            torch.manual_seed(1)
            found.append(module.generate(ids, max_new_tokens=8, **asked))
        assert torch.equal(*found)


@pytest.mark.slow
def test_compiled_segments_and_a_module_of_its_own_folder(tmp_path: Path) -> None:
    """lower="inductor": whole steps, shorter ends, and the same of what was saved, without the model."""
    model = fresh_gqa("gemma3", torch.float32, final_logit_softcapping=0.5)
    compiled = helix_compile(model, **SHARD, cp=2, lower="inductor")
    ids = torch.randint(0, 97, (3, 7), generator=torch.Generator().manual_seed(3))
    expected = model.generate(ids, max_new_tokens=6, do_sample=False)
    whole = compiled(ids)
    with torch.no_grad():
        assert (whole - model(ids).logits).abs().max() <= 1e-5
    compiled.save(tmp_path / "m")
    for module in (compiled, HelixModule.load(tmp_path / "m", world="virtual")):
        module.reset()
        for kept in (1, 5):
            module.reset()
            assert (module(ids, logits_to_keep=kept) - whole[:, -kept:]).abs().max() <= 1e-6
        assert torch.equal(module.generate(ids, max_new_tokens=6, do_sample=False), expected)
