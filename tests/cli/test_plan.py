"""helix-compile plan: one run with everything that it writes, which inspect, recipe and helix_compile() read back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from helix_compile import HelixOptions, HelixPlan, helix_compile
from helix_compile.cli import commands
from helix_compile.errors import HelixError, PlanError
from helix_compile.models.presets import build_model, preset_config

ASKED = ["plan", "tiny", "--gpu", "gb200", "--ranks", "4", "--context", "1M", "--batch", "32,64"]
ASKED += ["--kv-dtype", "fp8", "--min-tokens-per-s", "900"]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["helix-compile", *arguments])
    with pytest.raises(SystemExit) as stopped:
        commands.main()
    return int(stopped.value.code or 0)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder, patch = tmp_path_factory.mktemp("planned"), pytest.MonkeyPatch()
    said: list[str] = []
    (folder / "own.toml").write_text("cp = 2\ntpa = 2\ntokens_per_block = 16\n")
    patch.setattr("builtins.print", lambda *a, file=None, **_: said.append(str(a[0])) if file is None else None)
    out = [*ASKED, "--config", str(folder / "own.toml"), "--json", "--out", str(folder / "plan.json")]
    try:
        assert run(patch, *out, "--html", str(folder / "plan.html")) == 0
    finally:
        patch.undo()
    assert len(said) == 1  # stdout is one document
    return folder, json.loads(said[0])


def test_the_document(written: tuple[Path, dict[str, Any]]) -> None:
    _, facts = written
    assert facts["predicted"] is True and facts["assumptions"]
    names = {
        "cp",
        "tpa",
        "ep",
        "tpf",
        "batch",
        "tokens_per_s_per_user",
        "tokens_per_s_per_gpu",
        "kv_bytes_per_rank",
        "fits",
    }
    best = facts["recommended"]
    assert all(names <= row.keys() and row["fits"] for row in (*facts["pareto"], best))
    assert (
        best["tokens_per_s_per_user"] >= 900
        and best["cp"] > 1
        and best["cp"] * best["tpa"] == best["ep"] * best["tpf"] == best["ranks"]
    )
    assert facts["configured"]["cp"] == 2 and facts["configured"]["batch"] == 8
    assert any("blocks of 16 tokens" in line for line in facts["assumptions"])  # of --config, and not searched
    assert any("fitted, not predicted" in line for line in facts["assumptions"])
    assert [row["batch"] for row in facts["by_batch"]] == facts["batches"] == [32, 64]


def test_the_plan_goes_on(written: tuple[Path, dict[str, Any]], capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, facts = written
    path, best = folder / "plan.json", facts["recommended"]
    plan = HelixPlan.from_json(path.read_text())
    layout = {"cp": plan.layout.kvp, "tpa": plan.layout.tpa, "ep": plan.layout.ep, "tpf": plan.layout.tpf}
    assert layout == {name: best[name] for name in layout}
    assert plan.options.cache_dtype == "fp8_e4m3" and plan.options.max_batch_size == best["batch"]
    assert plan.params_bytes_per_rank == best["params_bytes_per_rank"]
    in_cache = plan.kv_bytes_per_token_per_rank * plan.layout.kvp * (plan.options.max_seq_len // plan.layout.kvp)
    assert best["kv_bytes_per_rank"] == in_cache * best["batch"]
    assert HelixOptions.from_file(path) == replace(plan.options, ep=plan.layout.ep)
    model = build_model(preset_config("tiny"), dtype=torch.bfloat16, meta=True)
    for given in (path, str(path), plan):
        assert helix_compile(model, plan=given).plan.decides_otherwise(plan) == []
    assert run(monkeypatch, "recipe", "tiny", "--for", "vllm", "--config", str(path)) == 0
    assert f"--decode-context-parallel-size {best['cp']}" in capsys.readouterr().out


def test_a_plan_of_another_model_is_refused(written: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    path = written[0] / "plan.json"
    plan, model = HelixPlan.from_json(path.read_text()), build_model(preset_config("tiny"), meta=True)
    first, *rest = plan.bodies
    other = replace(plan, model="Another", bodies=(replace(first, layers=(0, 1, 2)), *rest))
    (tmp_path / "plan.json").write_text(other.to_json())
    with pytest.raises(
        PlanError, match=r"made for Another, .* comes out otherwise, in 1 places; .*layers\[2\]: 2 -> 'absent'"
    ):
        helix_compile(model, plan=tmp_path / "plan.json")
    with pytest.raises(PlanError, match="got plan and cp, expected one or the other"):
        helix_compile(model, cp=4, plan=path)
    with pytest.raises(PlanError, match=r"is no plan\.json"):
        helix_compile(model, plan=written[0] / "own.toml")
    with pytest.raises(PlanError, match="plan must be a HelixPlan or the path"):
        helix_compile(model, plan=3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--kv-dtype", "int8"], "--kv-dtype 'int8' is unknown"),
        (["--batch", "0"], "--batch '0'"),
        (["--gpu", "tpu"], "--gpu 'tpu' is unknown"),
        (["--lenient"], "--lenient has no effect"),
        (["--out", "/dev/null/x/plan.json"], "--out /dev/null/x: /dev/null is not a folder"),
        (["--html", "/dev/null/x/plan.html"], "--html /dev/null/x: /dev/null is not a folder"),
        (["--out", "/tmp"], "--out /tmp: is a folder"),
        (["--out", "never", "--html", "./never"], "got never for both"),
        (["--ranks", "-3"], "ranks >= 1, context >= 2 and batches of 1 to 2,147,483,648 expected, got -3"),
        (["--batch", "1..9999999999"], "batches of 1 to 2,147,483,648 expected"),
        (["--batch", "64..8"], "--batch '64..8'"),
        (["--context", "0"], "--context '0'"),
        (["--min-tokens-per-s", "nan"], "--min-tokens-per-s: got nan"),
    ],
)
def test_wrong_use(monkeypatch: pytest.MonkeyPatch, capsys: Any, more: list[str], message: str) -> None:
    assert run(monkeypatch, *ASKED, *more) == 2
    assert message in capsys.readouterr().err


def test_a_cache_that_no_plan_holds_is_not_written(tmp_path: Path) -> None:
    from helix_compile.predict.formats import cache_format
    from helix_compile.predict.planner import Planned, plan_text
    from tests.support.planned import goal, tiny_costed

    with pytest.raises(HelixError, match="no plan holds its cache in fp4; nearest that works: --kv-dtype fp8"):
        plan_text(Planned(tiny_costed(), goal(cache=cache_format("fp4"))))
