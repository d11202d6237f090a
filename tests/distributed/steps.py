"""The steps that the ranks and the test both take."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.support.clock import Durations
from tests.support.families import fresh_family
from tests.support.gqa_models import fresh_gqa

ROOT = Path(__file__).parents[2]
OPTIONS: dict[str, Any] = {"max_seq_len": 64, "max_batch_size": 3, "tokens_per_block": 4}
STEP_TOKENS = (3 * 13, 3, 3)  # of run_steps, padding included: it is computed and exchanged too


# steps of overlap="hopb" against "none": attention of 8 sequences and its exchange, over links that are slowed; long beside what a
# busy machine does to the rest of a step
OVERLAP: dict[str, Any] = {"cp": 2, "max_seq_len": 64, "max_batch_size": 8, "lower": "reference", "check": "off"}
OVERLAP_BATCH = 8
SLOWED = {
    "compute is longer": Durations(row=0.100, latency=0.0, byte=0.250 / 1024),
    "the exchange is longer": Durations(row=0.080, latency=0.050, byte=0.400 / 1024),
    "latency alone": Durations(row=0.030, latency=0.800, byte=0.0),
}


MIXED = {**OPTIONS, "cp": 2, "tpa": 2}
FP8_LATENTS: dict[str, Any] = {"cache_dtype": "fp8_ds_mla"}
FP8_HEADS: dict[str, Any] = {"cache_dtype": "fp8_e4m3", "cache_scale": 0.02}


def grouped_model() -> Any:
    """Grouped-query attention: 4 KV heads over two ranks of tpa."""
    return fresh_gqa("qwen3", torch.float32)


def padded_model() -> Any:
    """6 query heads in groups of 3 KV heads, on four ranks, two of tpa: both are padded."""
    return fresh_gqa("qwen3", torch.float32, num_attention_heads=6, num_key_value_heads=3)


def hybrid_model() -> Any:
    """A leaf layer, which every rank computes with a state of its own, and one of MLA."""
    kinds = ["linear_attention", "full_attention"]
    return fresh_family("kimi_linear", num_hidden_layers=2, layer_types=kinds, mlp_layer_types=["dense"] * 2).float()


def sparse_model() -> Any:
    """An indexer chooses 4 tokens, and the layer behind attends to what it chose."""
    kinds = {"indexer_types": ["full", "shared"], "mlp_layer_types": ["dense"] * 2}
    return fresh_family("glm_moe_dsa", num_hidden_layers=2, **kinds).float()


def windowed_model() -> Any:
    """A window of 5 in one of two layers: 4 KV heads, one a rank where every rank holds the window by itself."""
    kinds = {"layer_types": ["sliding_attention", "full_attention"]}
    return fresh_gqa("gemma3", torch.float32, sliding_window=5, **kinds)


# family, its variant, options: sinks beside windows; latents of earlier layers, with rope and without, and their choice; windows
# of MLA beside indexers; layers of linear attention, which stay leaves
ATTENTIONS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "granite_swa": ("granite_swa", "", {**OPTIONS, "cp": 4}),
    "mistral_large4": ("mistral_large4", "shared", {**OPTIONS, "cp": 4, "topk_exchange": "owner"}),
    "dots3_note": ("dots3_note", "", {**OPTIONS, "cp": 4}),
    "kimi_linear": ("kimi_linear", "", {**OPTIONS, "cp": 4}),
}


def attention_model(name: str) -> Any:
    """One of ATTENTIONS in float32."""
    family, variant, _ = ATTENTIONS[name]
    return fresh_family(family, variant, torch.float32)


def prompts() -> tuple[Tensor, Tensor]:
    """Left-padded ids [3, 13] and mask; rows of 13, 5 and 1 tokens: some shards are empty."""
    ids = torch.randint(1, 97, (3, 13), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[1, :8] = 0
    mask[2, :12] = 0
    return ids, mask


_MARK = "LAUNCHED_BY_TEST"


def run_steps(compiled: Any) -> Tensor:
    """A ragged prompt and two steps of one token: logits [3, 15, vocab]; 0 at padding."""
    compiled.reset()
    compiled.world.reset_counters()
    ids, mask = prompts()
    prompt = compiled(ids, mask)
    logits = [prompt * mask[..., None].to(prompt), compiled(ids[:, :1]), compiled(ids[:, 1:2])]
    return torch.cat(logits, dim=1)


def torchrun(
    script: str, *arguments: str, processes: int = 4, seconds: float = 400, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run tests/distributed/`script` under torchrun; everything it started is dead afterwards.

    Raises:
        AssertionError: it took longer than `seconds`, or left a process.
    """
    # torchrun's own port is fixed: another launch on this machine may have it
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--master-port",
        free_port(),
        "--nproc-per-node",
        str(processes),
    ]
    return launch([*command, str(ROOT / "tests/distributed" / script), *arguments], seconds, **environment)


def free_port() -> str:
    """A port of this host that nobody has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def launch_nodes(
    command: list[str], nodes: int, seconds: float, **environment: str
) -> list[subprocess.CompletedProcess[str]]:
    """Run torchrun's agents of several nodes on this host, by loopback.

    In `command`, $NODE_RANK, node0 and the port 29500 are put for what they are here.
    """
    known = {"node0": "127.0.0.1", "29500": free_port()}
    commands = [[known.get(word, word).replace("$NODE_RANK", str(n)) for word in command] for n in range(nodes)]
    with ThreadPoolExecutor(nodes) as pool:
        return list(pool.map(lambda c: launch(c, seconds, **environment), commands))


def launch(command: list[str], seconds: float, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a session of its own; everything it started is dead afterwards.

    torchrun gives each worker a session, too: a mark in their environment tells them.
    """
    settings, mark = _marked(environment)
    running = subprocess.Popen(
        command, env=settings, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        out, err = running.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        _kill_all(mark)
        out, err = running.communicate()
        raise AssertionError(f"not done after {seconds} s\n{out}\n{err}") from None
    left = started(mark)
    assert not left, f"processes {left} are left of {command}"
    return subprocess.CompletedProcess(command, running.returncode, out, err)


@contextmanager
def service(command: list[str], log: Path, **environment: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A command that goes on, what it prints in a file: (it, its mark, by which started() finds all that it started). Dead afterwards."""
    settings, mark = _marked(environment)
    with log.open("wb") as printed:
        running = subprocess.Popen(command, env=settings, stdout=printed, stderr=printed, start_new_session=True)
    try:
        yield running, mark
    finally:
        _kill_all(mark)
        running.wait()


def _marked(environment: dict[str, str]) -> tuple[dict[str, str], str]:
    """(the environment of what is launched, the mark in it)."""
    path, mark = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]), uuid.uuid4().hex
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", _MARK: mark, **environment}, mark


def _kill_all(mark: str) -> None:
    while left := started(mark):  # one may start another meanwhile
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def started(mark: str) -> list[int]:
    """Processes with this mark in their environment that have not ended."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            marked = folder.name.isdigit() and f"{_MARK}={mark}".encode() in (folder / "environ").read_bytes()
            if marked and (folder / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
                found.append(int(folder.name))
        except OSError:  # it has ended, or is another user's
            continue
    return found
