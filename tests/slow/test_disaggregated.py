"""examples/disaggregated as it is meant: a prefill, four torchrun ranks and a router, each a process, under load and when a part of it is killed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp
import make_model
import pytest
import yaml

from tests.distributed.steps import ROOT, free_port, launch, service, started
from tests.support.serving import YAML, Prompt, mixed_prompts

SERVE = str(ROOT / "examples/disaggregated/serve.py")
RECALL = ROOT / "tests/data/recall"
TIMEOUT_S = 60  # HELIX_TIMEOUT


def write_yaml(folder: Path, model: Path, **more: Any) -> tuple[Path, str]:
    """(a YAML with free ports, the router's address); `more` goes to the generation server, `dtype` above it."""
    port, context, generation = (int(free_port()) for _ in range(3))
    dtype = more.pop("dtype", "auto")
    words: dict[str, Any] = {**YAML, "port": port, "model": str(model), "dtype": dtype, "req_timeout_secs": 600}
    words["context_servers"] = {**YAML["context_servers"], "urls": [f"127.0.0.1:{context}"]}
    words["generation_servers"] = {
        **YAML["generation_servers"],
        "urls": [f"127.0.0.1:{generation}"],
        "max_batch_size": 8,
        **more,
    }
    (folder / "serve.yaml").write_text(yaml.safe_dump(words))
    return folder / "serve.yaml", f"http://127.0.0.1:{port}"


def command_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()


def rank_process(mark: str, rank: int) -> int:
    """Process of a rank."""
    said = {pid: Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in started(mark)}
    return next(pid for pid, words in said.items() if f"RANK={rank}".encode() in words)


class Client:
    """Of a router that runs elsewhere."""

    def __init__(self, session: aiohttp.ClientSession, url: str):
        self.session, self.url = session, url

    async def ready(self, seconds: float) -> None:
        """Wait until all servers are well."""
        for _ in range(int(2 * seconds)):
            try:
                async with self.session.get(f"{self.url}/health") as answer:
                    if answer.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.5)
        raise AssertionError(f"not ready within {seconds} s")

    async def ask(self, prompt: Prompt, max_tokens: int | None = None) -> list[int] | str:
        """Token ids, or what the error says."""
        body = {**prompt.body(), "max_tokens": max_tokens or prompt.max_tokens}
        async with self.session.post(f"{self.url}/v1/completions", json=body) as answer:
            said = await answer.json()
            return said["error"]["message"] if answer.status != 200 else said["choices"][0]["token_ids"]


@pytest.mark.slow
@pytest.mark.multi_process
def test_64_requests_a_killed_rank_and_a_killed_prefill(tmp_path: Path) -> None:
    model = make_model.build()[0]
    make_model.main(tmp_path / "model")
    prompts = mixed_prompts(model, 64)
    file, url = write_yaml(tmp_path, tmp_path / "model")

    async def act(running: Any, mark: str) -> None:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600)) as session:
            client = Client(session, url)
            await client.ready(500)
            answers = await asyncio.gather(*map(client.ask, prompts))
            assert answers == [prompt.expected for prompt in prompts]

            long = [prompt for prompt in prompts if len(prompt.ids) < 10 and len(prompt.expected) > 4]
            for rank, reason in ((2, "rank 2 died or is stuck"), (0, "went away in the middle of the answer")):
                asked = [asyncio.create_task(client.ask(prompt, 80)) for prompt in long]
                await asyncio.sleep(1)
                os.kill(rank_process(mark, rank), signal.SIGKILL)
                since = time.monotonic()
                said = await asyncio.gather(*asked)
                assert time.monotonic() - since < TIMEOUT_S
                failed = {text for text in said if isinstance(text, str)}
                assert failed and all(reason in text for text in failed), failed
                await client.ready(500)  # the ranks were started again
                assert await client.ask(prompts[3]) == prompts[3].expected

            os.kill(next(pid for pid in started(mark) if "context_server.py" in command_of(pid)), signal.SIGKILL)
            text = await client.ask(prompts[3])
            assert isinstance(text, str) and "context server 127.0.0.1" in text

            running.terminate()
            assert await asyncio.to_thread(running.wait, 100) == 0 and not started(mark)
            assert not list(tmp_path.glob("helix-generation-*"))  # no cache is left either

    log = tmp_path / "log.txt"
    with service([sys.executable, SERVE, str(file)], log, HELIX_TIMEOUT=str(TIMEOUT_S), TMPDIR=str(tmp_path)) as (
        running,
        mark,
    ):
        try:
            asyncio.run(act(running, mark))
        except BaseException:
            print(log.read_text())
            raise


@pytest.mark.slow
@pytest.mark.multi_process
def test_eval_scores_what_is_served(tmp_path: Path) -> None:
    """From a checkpoint to scores, over HTTP: the ranks' answers are the unmodified model's, which knows them; then the prefill dies."""
    file, url = write_yaml(tmp_path, RECALL, dtype="float32", max_seq_len=544, cache_transceiver_config={})
    command = [sys.executable, "-m", "helix_compile", "eval", str(RECALL), "--endpoint", url, "--dtype", "float32"]
    command += ["--context", "256,512", "--limit", "20", "--timeout", "300", "--json"]

    async def ready() -> None:
        async with aiohttp.ClientSession() as session:
            await Client(session, url).ready(500)

    log = tmp_path / "log.txt"
    with service([sys.executable, SERVE, str(file)], log, HELIX_TIMEOUT=str(TIMEOUT_S), TMPDIR=str(tmp_path)) as (
        _,
        mark,
    ):
        asyncio.run(ready())
        done = launch(command, 900)
        assert done.returncode == 0, (done.stderr, log.read_text())
        said = json.loads(done.stdout)
        assert said["answered_by"]["helix"] == f"{url}/v1, model recall"
        rows = {(row["task"], row["context"], row["model"]): row for row in said["rows"]}
        assert len(rows) == 3 * 2 * 2
        for row in rows.values():
            assert row["correct"] >= 0.9 * row["n"] == 18 and row["agreement"] in (None, 1.0), row

        os.kill(next(pid for pid in started(mark) if "context_server.py" in command_of(pid)), signal.SIGKILL)
        lost = launch(command, 300)
        assert lost.returncode == 2 and not lost.stdout, lost
        words = " ".join(lost.stderr.split())
        assert f"{url}/v1/completions, recall 256, question" in words, words
        assert "got status 502, expected 200: context server 127.0.0.1" in words, words


@pytest.mark.slow
@pytest.mark.multi_process
def test_nothing_is_left_when_the_launcher_is_killed(tmp_path: Path) -> None:
    make_model.main(tmp_path / "model")
    file, _ = write_yaml(tmp_path, tmp_path / "model")
    with service([sys.executable, SERVE, str(file)], tmp_path / "log.txt", TMPDIR=str(tmp_path)) as (running, mark):
        for _ in range(400):
            if any(b"RANK=3" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in started(mark)):
                break
            time.sleep(0.5)
        assert len(started(mark)) >= 1 + 3 + 4
        running.kill()
        for _ in range(200):
            if not started(mark):
                return
            time.sleep(0.5)
        raise AssertionError([command_of(pid) for pid in started(mark)])
