"""Whole models on a CUDA device: where weights come from, what is saved there, verify, and real ranks over nccl and gloo."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helix_compile import HelixModule, helix_compile, verify
from helix_compile.runtime.claims import graph_digest
from tests.distributed.steps import OPTIONS, run_steps, torchrun
from tests.support.models import fresh_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
LIMIT = 2e-5  # float32, kernels against torch


def off(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest logit."""
    got, expected = got.cpu(), expected.cpu()
    return float((got - expected).abs().max() / expected.abs().max())


def test_a_model_on_the_cpu_is_compiled_for_the_card() -> None:
    model = fresh_model("short", torch.float32)
    expected = run_steps(helix_compile(model, cp=4, **OPTIONS))
    compiled = helix_compile(model, cp=4, device="cuda", **OPTIONS)
    assert compiled.device.type == "cuda"
    assert next(model.parameters()).device.type == "cpu"
    assert off(run_steps(compiled), expected) <= LIMIT


def test_saved_on_the_card_and_read_on_the_cpu(tmp_path: Path) -> None:
    model = fresh_model("short", torch.float32).cuda()
    compiled = helix_compile(model, cp=4, lower="reference", **OPTIONS)
    compiled.save(tmp_path / "saved")
    there, here = (HelixModule.load(tmp_path / "saved", device=d) for d in ("cuda", "cpu"))
    expected = run_steps(compiled)
    assert torch.equal(run_steps(there), expected)
    assert off(run_steps(here), expected) <= LIMIT
    assert graph_digest(here.graph) == graph_digest(there.graph) == graph_digest(compiled.graph)


@pytest.mark.parametrize("lower", ["triton", "reference"])
def test_verify_finds_nothing(lower: str) -> None:
    model = fresh_model("short", torch.float32).cuda()
    report = verify(helix_compile(model, cp=4, lower=lower, **OPTIONS), model)
    assert report.ok, str(report)


def test_generate_streams_the_same_tokens_on_the_card() -> None:
    command = [
        sys.executable,
        "-m",
        "helix_compile",
        "generate",
        "tiny",
        "--prompt-ids",
        "5 6 7",
        "--cp",
        "4",
        "--json",
    ]
    said = [
        json.loads(subprocess.run([*command, *more], capture_output=True, check=True).stdout)
        for more in ([], ["--device", "cuda"])
    ]
    assert said[0] == said[1]


@pytest.mark.parametrize("lower", ["triton", "triton+inductor", "reference"])
def test_steps_are_replayed(lower: str) -> None:
    """Prompt, steps, drafts taken back, a row that starts anew, an edit: as launched one by one; nothing is allocated from then on."""
    model = fresh_model("short", torch.float32).cuda()
    modules = [helix_compile(model, cp=4, lower=lower, cuda_graphs=on, **OPTIONS) for on in (True, False)]
    replayed = modules[0]
    assert replayed.replays is not None and modules[1].replays is None

    def step(T: int) -> None:
        ids = torch.randint(0, 97, (3, T))
        got, expected = (module(ids.cuda()) for module in modules)
        assert off(got, expected) <= LIMIT

    for T in (7, 1, 1, 1, 3, 3):
        step(T)
    for module in modules:
        module.truncate([int(n) - 2 for n in module.lengths])
        module.reset([1])
    for T in (3, 1, 1):
        step(T)
    tapes, told = replayed.replays.recordings, replayed.inspect().facts["cuda_graphs"]
    assert told["used"] and len(tapes) == 2 and all((tape.apart_calls > 0) == bool(told["apart"]) for tape in tapes)
    name = "model.layers.1.self_attn.o_proj.weight"
    for module in modules:
        module.ranks[1].params[name] = module.ranks[1].params[name] * 2
    for _ in range(3):
        step(1)
    before = torch.cuda.memory_allocated()
    for _ in range(20):
        step(1)
    assert torch.cuda.memory_allocated() == before


def test_a_replayed_step_never_waits_for_the_card() -> None:
    """Ids of the host: torch is told to raise where the host would wait."""
    model = fresh_model("short", torch.bfloat16).cuda()
    compiled = helix_compile(model, cp=4, lower="triton", **OPTIONS)
    ids = torch.tensor([[5], [6], [7]])
    for _ in range(3):
        compiled(ids)
    torch.cuda.set_sync_debug_mode("error")
    try:
        logits = compiled(ids)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert logits.isfinite().all()


def test_recordings_that_go_give_their_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("helix_compile.runtime.replays.KEPT", 2)
    model = fresh_model("short", torch.float32).cuda()
    replayed, launched = (helix_compile(model, cp=4, lower="triton", cuda_graphs=on, **OPTIONS) for on in (True, False))
    for T in (1, 1, 2, 2, 3, 3, 1, 1, 2, 2, 3, 3, 1, 1):
        ids = torch.randint(0, 97, (2, T)).cuda()
        assert off(replayed(ids), launched(ids)) <= LIMIT
    assert replayed.replays is not None and len(replayed.replays.recordings) == 2


@pytest.mark.multi_process
@pytest.mark.parametrize(("backend", "processes"), [("nccl", 1), ("gloo", 4)])
def test_processes_that_share_the_card(backend: str, processes: int, tmp_path: Path) -> None:
    """One process a card over nccl; gloo copies through the host, so four can share one."""
    model = fresh_model("short", torch.float32).cuda()
    expected = run_steps(helix_compile(model, cp=processes, **OPTIONS))
    done = torchrun("card_worker.py", str(tmp_path), backend, processes=processes)
    assert done.returncode == 0, done.stderr
    seen = [load_file(tmp_path / f"seen_{r}.safetensors")["logits"] for r in range(processes)]
    assert off(seen[0], expected) <= LIMIT
    assert all(torch.equal(s, seen[0]) for s in seen)


@pytest.mark.multi_process
def test_nccl_ranks_of_all_cards(tmp_path: Path) -> None:
    cards = torch.cuda.device_count()
    if cards < 2:
        pytest.skip("needs two cards")
    cp = 2 if cards < 4 else 4
    expected = run_steps(helix_compile(fresh_model("short", torch.float32).cuda(), cp=cp, **OPTIONS))
    done = torchrun("card_worker.py", str(tmp_path), "nccl", processes=cp)
    assert done.returncode == 0, done.stderr
    for rank in range(cp):
        assert off(load_file(tmp_path / f"seen_{rank}.safetensors")["logits"], expected) <= LIMIT
