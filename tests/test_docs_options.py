"""docs/configuration.md and docs/handover.md are true: their code runs, and every key that a loader knows is in them."""

from __future__ import annotations

import re
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from helix_compile.config import trtllm as trtllm_config
from helix_compile.config import vllm as vllm_config
from helix_compile.config.options import OPTIONS, HelixOptions

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
        values = ", ".join(f"`{c}`" for c in option.offered) or "int >= 1"
        lines.append(f"| `{field.name}` | {default} | {values} | {option.meaning} |")
    return "\n".join(lines)


def test_the_table_is_what_the_fields_say() -> None:
    assert options_table() in (DOCS / "configuration.md").read_text()


def test_their_file_is_taken(tmp_path: Path) -> None:
    (text,) = blocks("configuration.md", "toml")
    (tmp_path / "o.toml").write_text(text)
    options = HelixOptions.from_file(tmp_path / "o.toml")
    assert options == HelixOptions(cp=4, tpa=2, tokens_per_block=16, merge="ag_rs")


@pytest.mark.parametrize(
    ("heading", "keys"),
    [
        (
            "TensorRT-LLM",
            {
                *trtllm_config.WITHOUT_EFFECT,
                *trtllm_config.CACHE_WITHOUT_EFFECT,
                *trtllm_config.REFUSED,
                *(f"kv_cache_config.{k}" for k in trtllm_config.CACHE_REFUSED),
            },
        ),
        ("vLLM", {*vllm_config.WITHOUT_EFFECT, *vllm_config.REFUSED}),
    ],
)
def test_every_key_is_documented(heading: str, keys: set[str]) -> None:
    section = (DOCS / "configuration.md").read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    lists = section.split("Understood")[1]
    named = set(re.findall(r"`([\w.]+)`", lists))
    extra = named - keys - {"cp_config.use_nccl_for_alltoall", "cp_config.fifo_version", "kv_cache_config"}
    assert keys <= named and not extra
