"""The console script: JSON alone on stdout, files, exit status."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helix_compile.checkpoint import named
from helix_compile.cli import commands as cli
from helix_compile.models.presets import build_model, preset_config
from tests.support.command import run_here


def run_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    """As a user does."""
    command = [sys.executable, "-m", "helix_compile", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


KEYS = {
    "model",
    "world_size",
    "layers",
    "collectives",
    "not_rewritten",
    "kv_bytes_per_token_per_rank",
    "params_bytes_per_rank",
    "decisions",
    "memory_per_rank",
    "predicted",
}


def test_inspect_json_and_files(tmp_path: Path) -> None:
    done = run_process("inspect", "tiny", "--cp", "4", "--json", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert KEYS <= set(facts) and facts["world_size"] == 4
    dense, moe = facts["layers"]
    assert dense["count"] == moe["count"] == 2
    assert dense["roles"] == {"attention": 1, "dense_ffn": 1}
    assert moe["roles"] == {"attention": 1, "shared_expert": 1, "routed_experts": 1}
    assert dense["nodes_before"] > 0 and dense["nodes_after"] > 0
    sent = [(c["op"], c["axis"], c["egress_bytes_per_rank_per_token"]) for c in facts["collectives"]]
    one = [("all_to_all_single", "kvp", 504), ("all_reduce", "world", 768), ("all_reduce", "world", 768)]
    assert sent == one * 2
    assert facts["kv_bytes_per_token_per_rank"] == 4 * (32 + 16) * 4 / 4
    assert {n["what"] for n in facts["not_rewritten"]} >= {"embedding", "norms", "router", "head"}
    assert {d["name"] for d in facts["decisions"]} == {"ep", "v_up", "q_proj"}
    names = {f.name for f in tmp_path.iterdir()}
    bodies = {f"{b}.{m}.py" for b in ("body_0", "body_1", "outer") for m in ("before", "after")}
    stages = ("captured", "attention", "reshard", "ffn", "lowered")
    texts = {f"{i:02d}_{stage}.txt" for i, stage in enumerate(stages)}
    diffs = {f"{i:02d}_{stage}.diff" for i, stage in enumerate(stages) if i}
    assert names == bodies | texts | diffs | {
        "plan.json",
        "report.txt",
        "report.json",
        "schedule.trace.json",
        "report.html",
        "model_explorer.json",
        "body_0.svg",
        "body_1.svg",
        "body_0.schedule.svg",
        "body_1.schedule.svg",
    }
    assert "helix.mla_decode" in (tmp_path / "body_1.after.py").read_text()
    assert "scaled_dot_product_attention" in (tmp_path / "body_1.before.py").read_text()


class Asked(io.StringIO):
    """A standard input that is open and that nobody may read."""

    def read(self, *_: Any) -> str:
        raise AssertionError("asked")

    readline = read


@pytest.mark.parametrize(
    "command",
    [
        ("inspect", "--meta"),
        ("generate", "--prompt-ids", "1"),
        ("verify",),
        ("kernels", "--arch", "sm_90", "--out", "OUT"),
    ],
)
def test_no_command_asks_or_runs_code_of_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    """A release whose architecture only its own code has: where transformers is asked, it prompts on standard input."""
    monkeypatch.setattr(sys, "stdin", Asked())
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # kernels that are interpreted are refused first
    ran = tmp_path / "ran"
    maps = {"AutoConfig": "configuration_mine.Mine", "AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
    for name in ("configuration_mine.py", "modeling_mine.py"):
        (tmp_path / name).write_text(f"open({str(ran)!r}, 'w').close()\n")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine_v9", "auto_map": maps}))
    name, *further = command
    for model in (tmp_path, tmp_path / "config.json"):
        done = run_here(name, str(model), "--cp", "2", *(str(tmp_path / "out") if x == "OUT" else x for x in further))
        assert done.returncode == 2 and "model_type 'mine_v9' is not in transformers" in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) <= 2 and not ran.exists()


def test_inspect_one_node() -> None:
    options = ("--cp", "2", "--meta", "--node", "body_1.all_reduce")
    done = run_here("inspect", "tiny", *options)
    assert done.returncode == 0, done.stderr
    assert "made by   pass lowered" in done.stdout and "modeling_deepseek_v3.py:" in done.stdout
    told = json.loads(run_here("inspect", "tiny", *options, "--json").stdout)
    assert told["made_by"] == "lowered" and told["origins"][0]["op"] == "aten.linear"
    wrong = run_here("inspect", "tiny", "--cp", "2", "--meta", "--node", "body_1.al_reduce")
    assert wrong.returncode == 2 and "close: body_1.all_reduce" in wrong.stderr
    both = run_here("inspect", "tiny", *options, "--out", "somewhere")
    assert both.returncode == 2 and "--node" in both.stderr


def test_inspect_text_and_options_by_name() -> None:
    done = run_here(
        "inspect",
        "tiny",
        "--cp",
        "2",
        "--tpa",
        "2",
        "--tokens-per-block",
        "8",
        "--v-up",
        "after",
        "--merge",
        "ag_rs",
        "--dtype",
        "bfloat16",
        "--meta",
    )
    assert done.returncode == 0, done.stderr
    for part in ("(bfloat16) on 4 ranks: cp=2, tpa=2", "reduce_scatter_tensor", "v_up = after"):
        assert part in done.stdout


@pytest.mark.slow
def test_the_real_configuration_on_meta() -> None:
    done = run_process("inspect", "deepseek-v3", "--meta", "--cp", "8", "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert [layer["count"] for layer in facts["layers"]] == [3, 58]
    assert facts["kv_bytes_per_token_per_rank"] == 61 * (512 + 64) * 2 / 8  # bfloat16


def test_generate_from_a_preset_a_config_and_a_checkpoint(tmp_path: Path) -> None:
    model = build_model(preset_config("tiny"))
    model.save_pretrained(tmp_path)
    arguments = ("--cp", "4", "--prompt-ids", "1,2,3;4", "--max-new-tokens", "5", "--json")
    outputs = [run_here("generate", str(m), *arguments) for m in ("tiny", tmp_path / "config.json", tmp_path)]
    assert all(o.returncode == 0 for o in outputs), [o.stderr for o in outputs]
    documents = [json.loads(o.stdout) for o in outputs]
    assert documents[0] == documents[1] == documents[2]
    assert documents[0]["prompt_ids"] == [[1, 2, 3], [4]]
    assert [len(r) for r in documents[0]["new_ids"]] == [5, 5]
    streamed = run_here("generate", "tiny", "--cp", "2", "--prompt-ids", "1 2 3", "--max-new-tokens", "5")
    assert streamed.stdout.split() and len(streamed.stdout.split()) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("inspect", "tiny", "--cp", "0"), "LayoutError: cp must be an int >= 1, got 0"),
        (("inspect", "tiny", "--cp", "3"), "8 heads can't be divided over N = cp*tpa = 3*1 = 3 ranks"),
        (("inspect", "nowhere", "--cp", "2"), "MODEL 'nowhere': no preset"),
        (("inspect", "tiny", "--cp", "2", "--dtype", "int8"), "dtype 'int8' is not one of"),
        (("inspect", "tiny", "--cp", "2", "--merge", "fast"), "option merge='fast' is unknown"),
        (("inspect", "tiny"), "Missing option '--cp'"),
        (("generate", "tiny", "--cp", "2", "--prompt-ids", "a"), "expected integers"),
        (("generate", "tiny", "--cp", "2", "--prompt-ids", "300"), "token ids must be in [0, 256)"),
        (
            ("generate", "tiny", "--cp", "2", "--prompt-ids", "1", "--device", "nowhere"),
            "device='nowhere' can't be used here",
        ),
        (("verify", "tiny"), "give MODEL and --cp N, or --self-test"),
        (("verify",), "give MODEL and --cp N, or --self-test"),
        (("verify", "tiny", "--cp", "3"), "8 heads can't be divided"),
        (("kernels", "tiny"), "give --out DIR"),
        (("export", "tiny", "--cp", "2"), "Missing option '--out'"),
        (("exportable", "tiny", "--cp", "2"), "No such command 'exportable'"),
        (("kernels", "tiny", "--out", "never-written"), "TRITON_INTERPRET=1 is set"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, tuple) else "",
)
def test_wrong_use_is_exit_status_2(arguments: tuple[str, ...], message: str) -> None:
    done = run_here(*arguments)
    assert done.returncode == 2 and message in done.stderr and done.stdout == ""


def _refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """What main() prints in this process on wrong use."""
    monkeypatch.setattr(sys, "argv", ["helix-compile", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and out == ""
    return err


def test_wrong_values_print_the_message_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.touch()
    generate = ("generate", "tiny", "--cp", "2", "--prompt-ids", "1", "--max-new-tokens")
    inspect = ("inspect", "tiny", "--cp", "2", "--meta", "--out")
    for arguments, message in (
        ((*generate, "0"), "HelixError: --max-new-tokens must be >= 1, got 0\n"),
        ((*generate, "-3"), "HelixError: --max-new-tokens must be >= 1, got -3\n"),
        ((*inspect, str(file)), f"HelixError: --out {file}: {file} is not a folder"),
        ((*inspect, str(file / "sub")), f"HelixError: --out {file / 'sub'}: {file} is not a folder"),
    ):
        assert _refused(capsys, monkeypatch, *arguments).startswith(message)
    monkeypatch.setattr(Path, "mkdir", _full_disk)
    assert "out: can't be written: No space left" in _refused(capsys, monkeypatch, *inspect, str(tmp_path / "out"))


def _full_disk(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


def test_random_weights_that_do_not_fit_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(named, "physical_memory", lambda: 3 * 10**6)
    preset_config("tiny").save_pretrained(tmp_path)
    for name in ("tiny", str(tmp_path / "config.json")):
        message = _refused(capsys, monkeypatch, "inspect", name, "--cp", "2", "--dtype", "float64")
        assert re.search(
            r"needs 0\.00\d+ GB for random weights in float64, this machine has 0\.003 GB; use inspect --meta", message
        )


def test_verify_is_exit_status_0_and_json() -> None:
    done = run_here("verify", "tiny", "--cp", "4", "--tokens-per-block", "8", "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["ok"] is True and facts["findings"] == []
    assert facts["coverage"]["stages"] == ["attention", "reshard", "ffn", "lowered"]
    assert "stage lowered" in done.stderr


def test_a_finding_is_exit_status_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The command on a module that a patched merge breaks; and the self-test when a fault survives."""
    from typer.testing import CliRunner

    from helix_compile.verifier.mutants import self_test as tester

    survivor = tester.Verdict("a fault", 6, "kernel", (), (), 0.0)
    monkeypatch.setattr(tester, "self_test", lambda *a, **k: [survivor])
    done = CliRunner().invoke(cli.app, ["verify", "--self-test"])
    assert done.exit_code == 1 and "SURVIVES" in done.stdout
    monkeypatch.setattr(cli, "_verified", lambda *a: (False, "{}", "NOT equivalent"))
    done = CliRunner().invoke(cli.app, ["verify", "tiny", "--cp", "2"])
    assert done.exit_code == 1 and "NOT equivalent" in done.stdout


def test_the_self_test_measures_each_mutant() -> None:
    from helix_compile.verifier.mutants import self_test as tester

    chosen = {"plain mean of the parts", "no all_reduce behind o_proj", "merge option accepted and ignored"}
    mutants = [m for m in tester.CATALOGUE if m.name in chosen]
    verdicts = {v.name: v for v in tester.self_test(tester.awkward_model(), mutants)}
    assert all(v.caught for v in verdicts.values()) and len(verdicts) == 3
    assert verdicts["merge option accepted and ignored"].off == 0.0  # right numbers: the rule lets it pass
    lost = verdicts["no all_reduce behind o_proj"]
    assert lost.off is not None and lost.off > tester.MAY_FAIL and not lost.passes_rule
    assert "3 of 3 mutants caught" in tester.format_table(list(verdicts.values()))
    assert json.loads(tester.to_json(list(verdicts.values())))["ok"] is True
