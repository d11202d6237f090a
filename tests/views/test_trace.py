"""TORCH_TRACE: the plan and every stage are in torch's structured log, where tlparse finds them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.support.captures import FOLDER

CODE = """
from helix_compile import helix_compile
from helix_compile.models.presets import build_model, preset_config
from tests.support import captures
captures.share()
compiled = helix_compile(build_model(preset_config("tiny"), meta=True), cp=4)
compiled.inspect({out!r})
"""


ROOT = Path(__file__).parents[2]
SURROUNDINGS = {"PYTHONPATH": ":".join([str(ROOT), *sys.path]), FOLDER: os.environ[FOLDER]}


def records(folder: Path) -> list[tuple[dict, str]]:
    """(metadata, payload) of each record of the logs: a JSON line, then the payload's lines behind tabs."""
    found: list[tuple[dict, list[str]]] = []
    for file in sorted(folder.glob("*.log")):
        for line in file.read_text().splitlines():
            if line.startswith("\t"):
                found[-1][1].append(line[1:])
            elif "{" in line:
                found.append((json.loads(line[line.index("{") :]), []))
    return [(metadata, "\n".join(lines)) for metadata, lines in found]


def test_plan_and_stages_are_in_the_trace(tmp_path: Path) -> None:
    environment = {"TORCH_TRACE": str(tmp_path / "trace"), **SURROUNDINGS}
    code = CODE.format(out=str(tmp_path / "out"))
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True)
    logged = records(tmp_path / "trace")
    plans = [p for m, p in logged if m.get("artifact", {}).get("name") == "helix_plan"]
    assert len(plans) == 1
    assert json.loads(plans[0]) == json.loads((tmp_path / "out/plan.json").read_text())
    graphs = {
        m["graph_dump"]["name"]: p for m, p in logged if m.get("graph_dump", {}).get("name", "").startswith("helix_")
    }
    stages = ["00_captured", "01_attention", "02_reshard", "03_ffn", "04_lowered"]
    assert list(graphs) == [f"helix_{stage}" for stage in stages]
    for stage in stages:
        text = (tmp_path / f"out/{stage}.txt").read_text()
        assert graphs[f"helix_{stage}"].strip() == text.strip()


def test_without_a_trace_nothing_is_formatted(tmp_path: Path) -> None:
    code = CODE.format(out=str(tmp_path / "out")).replace(
        "compiled.inspect",
        "import helix_compile.passes.runner as g\ndef no(*a):\n    raise SystemExit('formatted')\n"
        "g.format_python = no\nhelix_compile(build_model(preset_config('tiny'), meta=True), cp=2)\ncompiled.inspect",
    )
    done = subprocess.run([sys.executable, "-c", code], env=SURROUNDINGS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
