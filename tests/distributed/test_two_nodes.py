"""Two nodes of four ranks: two torchrun agents by loopback, gloo. The command is the one that docs/distributed.md gives."""

from __future__ import annotations

import ast
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from helix_compile import helix_compile
from tests.distributed.steps import OPTIONS, ROOT, launch_nodes, run_steps
from tests.support.models import fresh_model

pytestmark = [pytest.mark.slow, pytest.mark.multi_process]
SECONDS = 550


def documented() -> list[str]:
    """The words of the command under "Several nodes"."""
    section = (ROOT / "docs/distributed.md").read_text().split("\n## Several nodes\n")[1]
    block = re.search(r"```\n(torchrun .*?)```", section, re.DOTALL)
    assert block is not None
    words = shlex.split(block[1].replace("\\\n", " "))
    assert words[0] == "torchrun"
    return [sys.executable, "-m", "torch.distributed.run", *words[1:]]


def test_the_documented_command_generates_what_one_process_does(tmp_path: Path) -> None:
    original = fresh_model("short", torch.float32)
    original.save_pretrained(tmp_path)
    command = [str(tmp_path) if word == "FOLDER" else word for word in documented()]
    assert str(tmp_path) in command and command[-2] == "--prompt-ids"
    first, second = launch_nodes(command, 2, SECONDS)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    prompt = torch.tensor([[int(word) for word in command[-1].split(",")]])
    expected = original.generate(prompt, max_new_tokens=16, do_sample=False, pad_token_id=0)
    assert first.stdout.split() == [str(t) for t in expected[0, prompt.shape[1] :].tolist()]
    assert second.stdout == ""  # one rank of eight prints


def test_logits_and_where_the_cp_groups_lie(tmp_path: Path) -> None:
    """The same agents and layout, with a worker that keeps its logits."""
    command = documented()
    assert [command[command.index(n) + 1] for n in ("--nproc-per-node", "--cp", "--tpa")] == ["4", "4", "2"]
    virtual = helix_compile(fresh_model("short", torch.float32), cp=4, tpa=2, world="virtual", **OPTIONS)
    virtual.save(tmp_path / "saved")
    own = command.index("-m", 2)  # behind the agent's options
    worker = [str(ROOT / "tests/distributed/load_worker.py"), str(tmp_path)]
    results = launch_nodes([*command[:own], *worker], 2, SECONDS)
    assert [r.returncode for r in results] == [0, 0], results[0].stderr + results[1].stderr
    expected = run_steps(virtual)
    files = [tmp_path / f"seen_{rank}.safetensors" for rank in range(8)]
    seen = [load_file(file)["saved"] for file in files]
    assert (seen[0] - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert all(torch.equal(logits, seen[0]) for logits in seen)
    places = [safe_open(file, framework="pt").metadata() for file in files]
    assert [place["node"] for place in places] == [*"00001111"]
    for place in places:
        group = ast.literal_eval(place["kvp"])
        assert len(group) == 4 and {places[rank]["node"] for rank in group} == {place["node"]}
