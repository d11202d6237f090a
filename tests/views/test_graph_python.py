"""Graphs as Python: the text runs and computes what the graph does, and two stages differ by text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from helix_compile import HelixError, HelixModule, helix_compile
from helix_compile.ir.graph import placeholders
from helix_compile.ir.stage import graphs_of
from helix_compile.views.graph_python import format_function, format_python
from tests.support.models import tiny_model


def function_in(text: str, name: str) -> Any:
    namespace: dict[str, Any] = {}
    exec(compile(text, name, "exec"), namespace)
    return namespace[name]


def random_inputs(gm: fx.GraphModule) -> list[Tensor]:
    """At the capture hints; indices are small enough for every table."""
    values = []
    for node in placeholders(gm.graph):
        fake = node.meta["val"]
        shape = [s if isinstance(s, int) else int(s.node.hint) for s in fake.shape]
        if fake.dtype is torch.bool:
            values.append(torch.ones(shape, dtype=torch.bool))
        elif fake.dtype.is_floating_point:
            values.append(torch.randn(shape, dtype=torch.float64).to(fake.dtype))
        else:
            values.append(torch.zeros(shape, dtype=fake.dtype))
    return values


def tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [t for v in value for t in tensors(v)]


@pytest.mark.parametrize("stage", ["captured", "lowered"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_files_run_and_compute_what_the_graph_does(stage: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """One rank: its lowered graph has no collective, so that a process alone can run it."""
    experts = "batched_mm" if dtype is torch.float64 else "grouped_mm"
    compiled = helix_compile(tiny_model(dtype=dtype, experts=experts), cp=1, max_seq_len=64)
    compiled.inspect(tmp_path)
    moment = "before" if stage == "captured" else "after"
    for name, gm in graphs_of(compiled.stages[stage]):
        function = function_in((tmp_path / f"{name}.{moment}.py").read_text(), name)
        inputs = random_inputs(gm)
        with torch.no_grad():
            expected = tensors(gm(*[t.clone() for t in inputs]))
            got = tensors(function(*[t.clone() for t in inputs]))
        assert expected[0].abs().max() > 0
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b), name


def test_a_graph_of_many_ranks_compiles_and_calls_the_same_ops() -> None:
    compiled = helix_compile(tiny_model(), cp=4, max_seq_len=64)
    for stage in compiled.stages.values():
        for name, gm in graphs_of(stage):
            text = format_python(gm, name)
            assert callable(function_in(text, name))
            own = format_function(gm.graph, name)
            calls = [n for n in gm.graph.nodes if isinstance(n.target, torch._ops.OpOverload)]
            assert own.count("torch.ops.") == len(calls)
    text = format_function(compiled.graph.get_submodule("body_1").graph, "body_1")
    assert "self_attn_o_proj_weight,  # f64[72,84]  world:S(1)\n" in text
    line = (
        "    linear_4 = torch.ops.aten.linear.default(o_flat, self_attn_o_proj_weight)  # f64[B,T,72]  world:P(sum)\n"
    )
    assert "    # modeling_deepseek_v3.py:481\n" + line in text
    assert "modeling_deepseek_v3.py:481, from linear_4 by pass lowered\n" in text
    assert "/" not in text.replace("https://", "")  # no machine's paths


def test_stage_diff_shows_what_a_pass_did() -> None:
    compiled = helix_compile(tiny_model(), cp=4, max_seq_len=64)
    assert compiled.stage_diff("ffn", "ffn") == ""
    diff = compiled.stage_diff("ffn", "lowered")
    changed = [x for x in diff.splitlines() if x[0] in "+-" and "torch.ops." in x and x[1] == " "]
    moves = [x for x in changed if x[0] == "-" and "torch.ops.helix." in x]
    assert len(moves) == 2 * 3  # an exchange and two sums a body
    assert sum("_c10d_functional.all_reduce" in x for x in changed) == 4  # two a body
    assert [x for x in diff.splitlines() if x.startswith("+++")] == ["+++ lowered/body_0", "+++ lowered/body_1"]
    first = compiled.stage_diff("captured", "reshard")
    assert "-    past_latent_0," in first and "+    cache_0," in first
    assert "input_layernorm_weight,  # f64[72]  R" not in first  # a layout alone is no difference
    with pytest.raises(HelixError, match="no stage 'fnn'; this module has captured, attention"):
        compiled.stage_diff("fnn", "lowered")


def test_files_of_stages_and_diffs(tmp_path: Path) -> None:
    compiled = helix_compile(tiny_model(), cp=4, max_seq_len=64)
    before = (compiled.plan.to_json(), [str(g.graph) for s in compiled.stages.values() for _, g in graphs_of(s)])
    compiled.inspect(tmp_path)
    after = (compiled.plan.to_json(), [str(g.graph) for s in compiled.stages.values() for _, g in graphs_of(s)])
    assert before == after
    for number, stage in enumerate(compiled.stages):
        text = (tmp_path / f"{number:02d}_{stage}.txt").read_text()
        assert text.startswith(f'"""Stage {stage}.')
        assert text.count("\ndef ") == 3
    for number, pair in enumerate(zip(list(compiled.stages), list(compiled.stages)[1:], strict=False), 1):
        assert (tmp_path / f"{number:02d}_{pair[1]}.diff").read_text() == compiled.stage_diff(*pair)


def test_a_reloaded_module_writes_the_stages_it_has(tmp_path: Path) -> None:
    compiled = helix_compile(tiny_model(dtype=torch.float32), cp=2, max_seq_len=64)
    compiled.save(tmp_path / "saved")
    loaded = HelixModule.load(tmp_path / "saved")
    loaded.inspect(tmp_path / "loaded")
    compiled.inspect(tmp_path / "compiled")
    for name in ("04_lowered.diff", "body_0.after.py", "body_1.after.py"):
        texts = [(tmp_path / side / name).read_text() for side in ("compiled", "loaded")]
        assert texts[0] == texts[1], name
    written = {f.name for f in (tmp_path / "loaded").glob("0*")}
    assert written == {"03_ffn.txt", "04_lowered.txt", "04_lowered.diff"}


def test_helix_dump_writes_the_same_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HELIX_DUMP", str(tmp_path / "dump"))
    helix_compile(tiny_model("short"), cp=4).inspect(tmp_path / "out")
    dumped = sorted(p.name for p in (tmp_path / "dump").iterdir())
    assert dumped == [f"0{i}_{s}.txt" for i, s in enumerate(("captured", "attention", "reshard", "ffn", "lowered"))]
    for name in dumped:
        assert (tmp_path / "dump" / name).read_text() == (tmp_path / "out" / name).read_text()


def test_what_a_user_edited_is_shown_too() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    weight = graph.get_attr("weight")
    y = graph.call_function(torch.relu, (graph.call_method("add", (x, weight)),))
    graph.output((y, float("-inf"), torch.device("cpu"), torch.float32))
    text = format_function(graph, "edited")
    for part in (
        "weight = graph_module.weight",
        "add = x.add(weight)",
        "relu = torch.relu(add)",
        "return (relu, -inf, torch.device('cpu'), torch.float32)",
    ):
        assert part in text
