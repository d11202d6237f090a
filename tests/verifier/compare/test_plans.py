"""Two plans and two saved modules side by side, in words and as JSON; the command and its exit status."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from helix_compile import HelixError, HelixModule, capture, compare, helix_compile
from tests.distributed.steps import OPTIONS
from tests.support.command import run_here
from tests.support.models import tiny_model


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, HelixModule, HelixModule]:
    root = tmp_path_factory.mktemp("plans")
    captured = capture(tiny_model("short", torch.float32))
    first = helix_compile(captured, cp=2, **OPTIONS)
    first.save(root / "saved")
    second = helix_compile(captured, cp=4, **OPTIONS)
    (root / "plan.json").write_text(second.plan.to_json())
    return root, first, second


def test_what_differs_between_plans(modules: tuple[Path, HelixModule, HelixModule]) -> None:
    root, first, second = modules
    comparison = compare(first.plan, root / "plan.json")
    told = json.loads(comparison.to_json())
    assert told["kind"] == "plans" and not told["equal"]
    found = {(d["about"], d["where"]): (d["a"], d["b"]) for d in told["differences"]}
    assert found["layout", "layout.kvp"] == (2, 4)
    assert found["options", "options.cp"] == (2, 4)
    assert found["decisions", "decisions.ep.result"] == (2, 4)
    kv = found["bytes", "kv_bytes_per_token_per_rank"]
    assert kv == (2 * (20 + 6) * 4 / 2, 2 * (20 + 6) * 4 / 4)
    sent = found["bytes", "egress_bytes_per_rank_per_token"]
    assert sent == tuple(float(m.plan.egress_bytes_per_rank_per_token) for m in (first, second))
    assert list(dict.fromkeys(about for about, _ in found))[:4] == ["layout", "options", "decisions", "bytes"]
    assert "layout.kvp: 2 -> 4" in str(comparison)
    assert compare(first.plan, first.plan).equal


def test_saved_modules_down_to_a_weight(modules: tuple[Path, HelixModule, HelixModule], tmp_path: Path) -> None:
    root, *_ = modules
    same = tmp_path / "same"
    shutil.copytree(root / "saved", same)
    assert compare(root / "saved", same).equal
    edited = HelixModule.load(root / "saved")
    name = "model.layers.1.input_layernorm.weight"
    edited.ranks[1].params[name] = edited.ranks[1].params[name] * 1.5
    edited.save(tmp_path / "edited")
    comparison = compare(root / "saved", tmp_path / "edited")
    assert [d.where for d in comparison.found.differences] == [f"rank 1, {name}"]
    assert "72 elements differ" in str(comparison)
    graphs = json.loads((same / "graphs.json").read_text())
    (node,) = [n for n in graphs["stages"]["lowered"]["bodies"]["body_1"] if n["name"] == "silu_1"]
    node["target"] = "aten.gelu.default"
    (same / "graphs.json").write_text(json.dumps(graphs))
    (difference,) = compare(root / "saved", same).found.differences
    assert difference.where == "body_1, first at node silu_1" and "aten.gelu.default" in difference.b


def test_the_command(modules: tuple[Path, HelixModule, HelixModule], tmp_path: Path) -> None:
    root, *_ = modules
    equal = run_here("compare", str(root / "saved"), str(root / "saved" / "plan.json"))
    assert equal.returncode == 0 and "nothing differs" in equal.stdout, equal.stderr
    page = tmp_path / "page.html"
    unlike = run_here("compare", str(root / "saved"), str(root / "plan.json"), "--json", "--html", str(page))
    assert unlike.returncode == 1 and json.loads(unlike.stdout)["equal"] is False
    assert "They differ" in page.read_text()
    engine = tmp_path / "engine"
    engine.mkdir()
    save_file({"layer_0.attn_out": torch.ones(2, 3, 4)}, engine / "x.safetensors")
    for arguments, message in (
        ([str(root / "saved"), str(tmp_path / "nowhere")], "nowhere: no such file or folder"),
        ([str(root / "saved"), str(engine)], "are a plan and a run"),
        ([str(root / "saved"), str(tmp_path)], "neither a plan (plan.json), a dump"),
        ([str(root / "saved"), str(page)], "expected a plan.json or a folder"),
        ([str(root / "saved"), str(root / "plan.json"), "--tolerance", "1"], "a tolerance has no effect on plans"),
    ):
        refused = run_here("compare", *arguments)
        assert refused.returncode == 2 and message in refused.stderr, refused.stderr
        assert refused.stdout == ""


def test_a_plan_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(HelixError, match="not a plan of this version"):
        compare(tmp_path, tmp_path)
