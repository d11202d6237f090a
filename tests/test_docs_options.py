"""docs/configuration.md and docs/handover.md are true: their code runs, and every key that a loader knows is in them."""

from __future__ import annotations

import re
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from helix_compile.config.keys_sglang import SGLANG
from helix_compile.config.keys_trtllm import CACHE_REFUSED, CACHE_WITHOUT_EFFECT, MOE_WITHOUT_EFFECT, TRTLLM
from helix_compile.config.keys_vllm import VLLM
from helix_compile.config.options import OPTIONS, HelixOptions
from helix_compile.config.recipe import EngineKeys

DOCS = Path(__file__).parents[1] / "docs"


def blocks(document: str, language: str) -> list[str]:
    text = (DOCS / document).read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@pytest.mark.parametrize("document", ["configuration.md", "handover.md"])
def test_their_python_runs(document: str, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = blocks(document, "python")
    exec(compile(code, document, "exec"), {})
    assert document != "configuration.md" or "'cp': 4, 'tpa': 2, 'ep': 8" in capsys.readouterr().out


def options_table() -> str:
    """What docs/configuration.md must hold: a line for each field of HelixOptions."""
    lines = ["| key | default | values | what |", "|---|---|---|---|"]
    for field in fields(HelixOptions):
        option = OPTIONS[field.name]
        default = "required" if field.default is MISSING else "" if field.default is None else f"`{field.default}`"
        choices = (False, True) if option.flag else option.choices
        values = ", ".join(f"`{c}`" for c in choices) or f"int >= {option.least}"
        values = "number > 0, or several" if option.numbers else values
        lines.append(f"| `{field.name}` | {default} | {values} | {option.meaning} |")
    return "\n".join(lines)


def test_the_table_is_what_the_fields_say() -> None:
    assert options_table() in (DOCS / "configuration.md").read_text()


def test_their_file_is_taken(tmp_path: Path) -> None:
    (text,) = blocks("configuration.md", "toml")
    (tmp_path / "o.toml").write_text(text)
    options = HelixOptions.from_file(tmp_path / "o.toml")
    assert options == HelixOptions(cp=4, tpa=2, tokens_per_block=16, merge="ag_rs")


OF_SECTIONS = {*CACHE_WITHOUT_EFFECT, *MOE_WITHOUT_EFFECT, *(f"kv_cache_config.{k}" for k in CACHE_REFUSED)}
# what the paragraphs say besides
BESIDES = {
    "TensorRT-LLM": {
        "cp_config.use_nccl_for_alltoall",
        "cp_config.fifo_version",
        "kv_cache_config",
        "moe_config",
        "moe_config.load_balancer",
    },
    "vLLM": {"block_size"},
    "SGLang": {"speculative_..."},
}


@pytest.mark.parametrize("engine", [TRTLLM, VLLM, SGLANG], ids=lambda e: e.name)
def test_every_key_is_documented(engine: EngineKeys) -> None:
    section = (DOCS / "configuration.md").read_text().split(f"## {engine.name}\n")[1].split("\n## ")[0]
    table, lists = section.split("Understood")
    named = set(re.findall(r"`([\w.]+)`", lists))
    beside = {k for k in engine.beside if engine is not SGLANG or not k.startswith("speculative_")}
    keys = {*engine.without_effect, *engine.refused, *beside, *(OF_SECTIONS if engine is TRTLLM else ())}
    assert keys <= named and not named - keys - BESIDES[engine.name]
    applied = {k for k in engine.applied if k not in ("block_size", "cp_config", "moe_config", "kv_cache_config")}
    assert {*applied, *engine.graphs} <= set(re.findall(r"\b\w+\b", table))
