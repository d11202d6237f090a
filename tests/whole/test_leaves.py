"""Layers that can't be captured stay the user's own modules: exact with padding, idle rows and resets; reported; typed."""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import helix_compile.cli.commands as cli
from helix_compile import HelixError, HelixOptions, MatchError, capture, verify
from helix_compile.checkpoint import named
from helix_compile.compile import plan_model
from helix_compile.errors import PlanError, RuntimeFault
from helix_compile.ir.leaves import is_leaf_call
from helix_compile.ir.stage import copy_module
from helix_compile.runtime.claims import graph_digest
from helix_compile.verifier.numeric.reference import WidenedIslands
from helix_compile.verifier.static.graph import type_graph
from tests.support.driver import Reference, deviation, left_padded, random_ids
from tests.support.families import fresh_family, tiny_family
from tests.support.family_run import compiled_family, run_family
from tests.support.numerics import LIMIT
from tests.support.toy_mla import toy_model


@cache
def hybrid() -> Any:
    """A layer of linear attention, and one of MLA."""
    kinds = ("linear_attention", "full_attention")
    return fresh_family("kimi_linear", num_hidden_layers=2, layer_types=list(kinds), mlp_layer_types=["dense"] * 2)


class RowByRow:
    """The original, each sequence alone with a cache of its own and without padding."""

    def __init__(self, model: Any, rows: int):
        self.model, self.rows = model, [Reference(model) for _ in range(rows)]

    def reset(self, row: int) -> None:
        self.rows[row] = Reference(self.model)

    def step(self, ids: Tensor, mask: Tensor) -> Tensor:
        out = torch.zeros(*ids.shape, self.model.config.vocab_size, dtype=torch.float64)
        for row, kept in enumerate(mask.bool()):
            if kept.any():
                alone = ids[row, kept][None]
                out[row, kept] = self.rows[row].step(alone, torch.ones_like(alone))[0]
        return out


def leaf_calls(compiled: Any) -> list[fx.Node]:
    return [n for n in compiled.graph.graph.nodes if is_leaf_call(compiled.graph, n)]


def test_padding_idle_rows_and_row_resets_leave_the_state_of_others_alone() -> None:
    model = hybrid()
    compiled, reference = compiled_family(model, 2), RowByRow(model, 3)
    torch.manual_seed(5)

    def both(mask: Tensor) -> None:
        ids = random_ids(model, *mask.shape)
        with WidenedIslands():
            got, expected = compiled(ids, mask), reference.step(ids, mask)
        assert deviation(got, expected, mask) <= LIMIT[torch.float64]

    both(left_padded([5, 2, 9]))
    both(torch.tensor([[1, 1, 1], [0, 0, 0], [1, 1, 0]]))
    compiled.reset(rows=[1])
    reference.reset(1)
    assert 1 not in compiled.ranks[1].leaves["leaf_0"].rows
    both(torch.tensor([[0, 0, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0]]))
    both(torch.ones(3, 1, dtype=torch.int64))


def test_reset_begins_anew_and_a_full_cache_changes_nothing() -> None:
    model = hybrid()
    compiled = compiled_family(model, 2)
    ids = random_ids(model, 1, 6)
    first = compiled(ids)
    with pytest.raises(RuntimeFault):
        compiled(random_ids(model, 1, 60))  # 66 tokens > 64
    assert compiled.ranks[0].leaves["leaf_0"].rows[0][0] == 6
    compiled.reset()
    assert not compiled.ranks[0].leaves["leaf_0"].rows
    assert torch.equal(compiled(ids), first)


def test_each_rank_has_a_state_of_its_own_and_a_broken_step_is_a_fault() -> None:
    model = hybrid()
    compiled = compiled_family(model, 2)
    compiled(random_ids(model, 1, 3))
    states = [rank.leaves["leaf_0"] for rank in compiled.ranks]
    assert states[0] is not states[1] and states[0].rows[0][1] is not states[1].rows[0][1]
    run = compiled.world.run
    compiled.world.run = lambda *args: (run(*args), 1 / 0)
    with pytest.raises(ZeroDivisionError):
        compiled(random_ids(model, 1, 1))
    compiled.world.run = run
    with pytest.raises(RuntimeFault, match=r"has seen 4 tokens, the step begins at position 3.*reset"):
        compiled(random_ids(model, 1, 1))
    compiled.reset()
    compiled(random_ids(model, 1, 1))


def test_the_graph_calls_the_users_own_layer_and_the_report_says_so(tmp_path: Path) -> None:
    model = hybrid()
    compiled = compiled_family(model, 2)
    (call,) = leaf_calls(compiled)
    leaf: Any = compiled.graph.get_submodule(str(call.target))
    assert leaf.module is model.model.layers[0] and not list(compiled.parameters())
    assert not any(name.startswith("model.layers.0.") for name in compiled.ranks[0].params)
    facts = compiled.inspect(tmp_path / "files").facts
    assert [x["module"] for x in facts["leaves"]] == ["model.layers.0"]
    assert "model.layers.0" in str(compiled.inspect())
    assert type(compiled.plan).from_json(compiled.plan.to_json()) == compiled.plan
    whole = sum(p.numel() * 8 for p in model.model.layers[0].parameters())
    assert compiled.plan.params_bytes_per_rank > whole
    with pytest.raises(HelixError, match=r"model\.layers\.0 stay the user's own modules"):
        compiled.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    latents, ropes = torch.zeros(1, 2, 20), torch.zeros(1, 2, 6)
    with pytest.raises(RuntimeFault, match=r"import_cache: model\.layers\.0 stay"):
        compiled.import_cache([latents], [ropes], [2])


def test_two_captures_share_nothing_but_the_model() -> None:
    first, second = (compiled_family(hybrid(), 2) for _ in range(2))
    ids = random_ids(hybrid(), 1, 4)
    assert torch.equal(first(ids), second(ids))
    first(ids)
    assert second.ranks[0].leaves["leaf_0"].rows[0][0] == 4
    digests = [graph_digest(c.graph) for c in (first, second, compiled_family(hybrid(), 1))]
    assert digests[0] == digests[1] != digests[2]


def test_a_leaf_takes_whole_values_only() -> None:
    compiled = compiled_family(hybrid(), 2)
    shapes = dict(compiled.ranks[0].params)
    layouts: dict = {}
    graph = copy_module(compiled.graph)
    assert not any(f.where == "outer graph" for f in type_graph(graph, shapes, layouts, compiled.plan.layout).findings)
    call = next(n for n in graph.graph.nodes if is_leaf_call(graph, n))
    slots = next(n for n in graph.graph.nodes if n.meta.get("step") == "slots")
    call.args = (*call.args[:2], slots, *call.args[3:])
    found = type_graph(graph, shapes, layouts, compiled.plan.layout).findings
    assert [f.code for f in found if f.where.startswith("outer graph")] == ["HX102"]


def test_python_loops_of_experts_are_leaves_inside_the_one_rewritten_body_of_their_layers(tmp_path: Path) -> None:
    model = fresh_family("longcat_flash")
    compiled = compiled_family(model, 2)
    (plan,) = compiled.plan.bodies
    names = [f"model.layers.{i}.mlp.experts" for i in range(2)]
    assert len(plan.attentions) == 2 and [name for name, _ in compiled.plan.leaves] == names
    with pytest.raises(
        PlanError, match=r"ep=2 has no effect: .* run whole on every rank \(model.layers.0.mlp.experts, model"
    ):
        plan_model(capture(model), HelixOptions(cp=2, ep=2))
    body: Any = compiled.graph.get_submodule(plan.name)
    (call,) = [n for n in body.graph.nodes if n.op == "call_module"]
    kept = body.get_submodule(call.target).kept
    assert all(x.module is layer.mlp.experts for x, layer in zip(kept, model.model.layers, strict=True))
    run = run_family(model, compiled)
    assert run.worst <= LIMIT[torch.float64] and run.same_tokens
    assert all("forward" not in vars(layer.mlp.experts) for layer in model.model.layers)
    assert compiled.inspect(tmp_path).facts["leaves"][1]["module"] == names[1]  # every picture and page is drawn
    # the experts of another layer: verify() is told, and the numbers are others
    second = next(n for n in compiled.graph.graph.nodes if n.op == "call_module" and n.meta["layer"] == 1)
    assert [a for a in second.args if isinstance(a, int)] == [1]
    second.args = tuple(0 if isinstance(a, int) else a for a in second.args)
    compiled.reset()
    assert run_family(model, compiled).worst > 1e-3
    found = type_graph(compiled.graph, dict(compiled.ranks[0].params), {}, compiled.plan.layout).findings
    assert [(f.where, f.got) for f in found if f.code == "HX109"] == [("layer 1, parts of a layer", "those of layer 0")]


def test_one_module_with_several_calls_is_one_leaf() -> None:
    class Twice(nn.Module):
        def __init__(self, inner: nn.Module):
            super().__init__()
            self.inner, self.part = inner, OnData()

        def forward(self, x: Tensor) -> Tensor:
            return self.part(self.part(self.inner(x)))

    class OnData(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.full((1,), 0.5, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.factor if bool(x.abs().sum() >= 0) else x

    model = fresh_family("llama", num_hidden_layers=2)
    for layer in model.model.layers:
        layer.mlp = Twice(layer.mlp).eval()
    with torch.no_grad():
        model.model.layers[1].mlp.part.factor.mul_(3.0)
    compiled = compiled_family(model, 2)
    assert [name for name, _ in compiled.plan.leaves] == [f"model.layers.{i}.mlp.part" for i in range(2)]
    assert len(compiled.plan.bodies) == 1
    run = run_family(model, compiled)
    assert run.worst <= LIMIT[torch.float64] and run.same_tokens


def test_keep_leaves_what_is_not_recognised_and_rewrites_the_rest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = toy_model("cat", "two_sinks", layers=2)
    monkeypatch.setattr(named, "named_model", lambda *a: model)
    command = ["helix-compile", "inspect", "it", "--cp", "2", "--json", "--unmatched"]
    monkeypatch.setattr(sys, "argv", [*command, "keep"])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    (leaf,) = json.loads(capsys.readouterr().out)["leaves"]
    assert leaf["module"] == "model.layers.1" and "sinks" in leaf["reason"]
    monkeypatch.setattr(sys, "argv", [*command, "error"])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert "MatchError: layer 1" in capsys.readouterr().err
    with pytest.raises(MatchError, match="layer 1"):
        compiled_family(model, 2)
    compiled = compiled_family(model, 2, unmatched="keep")
    assert [name for name, _ in compiled.plan.leaves] == ["model.layers.1"]
    assert "sinks" in compiled.plan.leaves[0][1]
    run = run_family(model, compiled)
    assert run.worst <= LIMIT[torch.float64] and run.same_tokens
    with pytest.raises(MatchError, match="no layer with cached attention that could be rewritten"):
        compiled_family(toy_model("cat", "two_sinks"), 2, unmatched="keep")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kimi_linear", "bailing_hybrid", "longcat_flash", "deepseek_v2"])
def test_verify_runs_leaves_and_gates(name: str) -> None:
    model = tiny_family(name)
    report = verify(compiled_family(model, 2), model)
    assert report.ok, f"\n{report}"


@pytest.mark.slow
def test_verify_sees_a_gate_that_another_rank_holds() -> None:
    model = tiny_family("bailing_hybrid")
    compiled = compiled_family(model, 2)
    name = next(n for n in compiled.ranks[0].params if n.endswith("g_proj.weight"))
    params = [rank.params for rank in compiled.ranks]
    params[0][name], params[1][name] = params[1][name], params[0][name]
    report = verify(compiled, model)
    assert not report.ok and any(name in f.where for f in report.findings)


def test_a_leaf_that_broke_off_inside_is_not_taken_for_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its attention has written into its cache by then; a step that begins there again would count the tokens twice."""
    model = fresh_family(
        "kimi_linear",
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        mlp_layer_types=["dense"] * 2,
    )
    compiled = compiled_family(model, 2, unmatched="keep")
    compiled(torch.ones(1, 4, dtype=torch.int64))
    mlp = model.model.layers[0].mlp

    def broken(module: Any, given: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(type(mlp), "forward", broken)
        with pytest.raises(KeyboardInterrupt):
            compiled(torch.ones(1, 1, dtype=torch.int64))
    with pytest.raises(RuntimeFault, match="a step broke off"):
        compiled(torch.ones(1, 1, dtype=torch.int64))
