"""Recipes on the command line: --config with a command or a file, --lenient, --stage, and `recipe`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from helix_compile import HelixError, HelixOptions
from helix_compile.cli import commands as cli

FP8 = "vllm serve X -tp 4 -dcp 4 --dcp-comm-backend a2a --dcp-q-replicate --kv-cache-dtype fp8_e5m2 --port 80 --zzz 3"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a command asks of helix_compile(), which is not run."""
    asked: dict[str, Any] = {}

    def record(model: object, *, options: HelixOptions, **_: Any) -> None:
        asked.update(options.to_json())
        raise HelixError("recorded")

    monkeypatch.setattr(cli, "_model", lambda *_, **__: None)
    monkeypatch.setattr("helix_compile.compile.helix_compile", record)
    return asked


def test_a_command_in_quotes(asked: dict[str, Any]) -> None:
    done = run("generate", "tiny", "--prompt-ids", "1", "--config", FP8)
    assert "zzz: got an unknown key" in str(done.exception) and not asked
    done = run("generate", "tiny", "--prompt-ids", "1", "--config", FP8.removesuffix(" --zzz 3"))
    assert "kv_cache_dtype: got 'fp8_e5m2'" in str(done.exception) and not asked
    done = run("generate", "tiny", "--prompt-ids", "1", "--config", FP8, "--lenient", "--max-batch-size", "3")
    assert asked == asdict(HelixOptions(cp=4, ep=1, tokens_per_block=1, max_batch_size=3))
    assert done.stderr.count("command (vLLM): no effect here: port\n") == 1
    assert done.stderr.count("note: zzz is unknown, and was ignored") == 1
    assert done.stderr.count("note: the recipe's KV cache is in fp8_e5m2, here it is in the model's dtype") == 1


def test_the_plan_has_the_notes_once(tmp_path: Path) -> None:
    done = run("inspect", "tiny", "--meta", "--config", FP8, "--lenient")
    assert "note: " not in done.stderr
    assert done.stdout.count("zzz is unknown") == done.stdout.count("the recipe's KV cache is in fp8_e5m2") == 1
    # 4 layers of 32 + 16 elements over 4 ranks
    assert "bfloat16: 96 bytes a token and rank in place of 48 (scales" in done.stdout


def test_lenient_alone_has_no_effect() -> None:
    assert "--lenient has no effect without --config" in str(run("inspect", "tiny", "--cp", "2", "--lenient").exception)


def test_a_stage() -> None:
    recipe = "vllm serve X -tp 2 -dcp 2 -pp 2 --dcp-q-replicate"
    facts = json.loads(run("inspect", "tiny", "--meta", "--json", "--config", recipe, "--stage", "1").stdout)
    assert sum(layer["count"] for layer in facts["layers"]) == 2
    assert any("pipeline stage 1 of 2 (numbered from 0): layers 2-3 of 4" in note for note in facts["notes"])
    refused = str(run("verify", "tiny", "--config", recipe).exception)
    assert "one stage of a pipeline is planned, not run" in refused and "--meta" in refused
    assert "stage=2 is none of the pp=2 stages" in str(
        run("inspect", "tiny", "--meta", "--config", recipe, "--stage", "2").exception
    )


@pytest.mark.parametrize("engine", ["vllm", "sglang", "trtllm"])
def test_recipe_and_back(engine: str, tmp_path: Path) -> None:
    options = ("--cp", "2", "--tpa", "2", "--v-up", "before", "--tokens-per-block", "24")
    done = run("recipe", "tiny", *options, "--for", engine)
    assert done.exit_code == 0, done.exception
    file = tmp_path / ("recipe.yaml" if engine == "trtllm" else "recipe.sh")
    file.write_text(done.stdout)
    asked = run("inspect", "tiny", "--meta", "--json", *options)
    back = run("inspect", "tiny", "--meta", "--json", "--config", str(file))
    assert json.loads(back.stdout) == json.loads(asked.stdout)
    assert "# not in " in done.stdout and ": v_up=before: W_UV is multiplied before the exchange" in done.stdout


def test_recipe_refuses() -> None:
    assert "engine 'tgi' is unknown" in str(run("recipe", "tiny", "--cp", "2", "--for", "tgi").exception)
    assert "3 ranks" in str(run("recipe", "tiny", "--cp", "3", "--for", "vllm").exception)
