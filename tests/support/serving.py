"""examples/disaggregated in one process: its three servers as they are, but for the ranks, which are the virtual world's; and what
its answers must be.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
import torch
from context_server import ContextServer
from generation_server import GenerationServer, perform
from router import Router
from rows import Command, Outcome
from serving import Address, Serving, listen
from torch import Tensor
from transformers import DynamicCache

from helix_compile import HelixModule
from tests.distributed.steps import free_port

BLOCK, ROWS, ROOM = 8, 3, 96
YAML: dict[str, Any] = {
    "hostname": "127.0.0.1",
    "port": 1,
    "schedule_style": "generation_first",
    "req_timeout_secs": 100,
    "context_servers": {
        "num_instances": 1,
        "urls": ["127.0.0.1:2"],
        "cache_transceiver_config": {"backend": "DEFAULT"},
    },
    "generation_servers": {
        "num_instances": 1,
        "urls": ["127.0.0.1:3"],
        "tensor_parallel_size": 1,
        "context_parallel_size": 4,
        "moe_expert_parallel_size": 4,
        "max_batch_size": ROWS,
        "max_seq_len": ROOM,
        "cp_config": {"cp_type": "HELIX", "tokens_per_block": BLOCK},
        "kv_cache_config": {"tokens_per_block": BLOCK},
        "cache_transceiver_config": {
            "backend": "DEFAULT",
            "max_tokens_in_buffer": 72,
            "kv_transfer_timeout_ms": 60_000,
        },
    },
}


@dataclass(frozen=True)
class Prompt:
    """A request, and its answer by the unmodified model alone."""

    ids: list[int]
    max_tokens: int
    expected: list[int]

    def body(self, **more: Any) -> dict[str, Any]:
        words = {"prompt": self.ids, "max_tokens": self.max_tokens, "temperature": 0, "return_token_ids": True}
        return {**words, **more}


def greedy(model: Any, prompt: list[int], max_tokens: int) -> list[int]:
    """The unmodified model's answer to one prompt. No two words are so close that rounding would choose between them."""
    cache, ids, answer = DynamicCache(), torch.tensor([prompt]), list[int]()
    while len(answer) < max_tokens and answer[-1:] != [model.generation_config.eos_token_id]:
        with torch.no_grad():
            logits: Tensor = model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits[0, -1]
        best, second = logits.topk(2).values
        assert best - second > 1e-5 * logits.abs().max()  # float32: sums of hundreds of terms in another order
        ids = logits.argmax()[None, None]
        answer.append(int(ids))
    return answer


def mixed_prompts(model: Any, count: int) -> list[Prompt]:
    """Of one token, around a block, several blocks and as long as there is room for; twice the same; some that end at once."""
    drawn = torch.Generator().manual_seed(4)
    end = model.generation_config.eos_token_id

    def ids(*shape: int) -> Tensor:
        return torch.randint(0, end, shape, generator=drawn)

    short = ids(2000, 3)
    with torch.no_grad():
        firsts = model(input_ids=short, logits_to_keep=1).logits[:, -1].argmax(-1)
    asked = [(short[int((firsts == end).nonzero()[0])].tolist(), 9)]  # ends by its first token
    lengths = [1, BLOCK - 1, BLOCK, BLOCK + 1, 4 * BLOCK, 4 * BLOCK + 1, 72]
    for i in range(count - 2):
        length = lengths[i % len(lengths)] if i < 2 * len(lengths) else int(ids(1)) % 72 + 1
        asked.append((ids(length).tolist(), (1, 8, 5, 16)[i % 4]))
    asked.append(asked[5])
    return [Prompt(prompt, most, greedy(model, prompt, most)) for prompt, most in asked]


class VirtualGroup:
    """Stands for the ranks: all of them in this process."""

    def __init__(self, module: HelixModule, files: Path):
        self.module, self.files = module, files
        self.commands = list[Command]()
        self.most_files = 0

    def take_step(self, command: Command) -> Outcome:
        """As rank 0's."""
        self.commands.append(command)
        self.most_files = max(self.most_files, len(list(self.files.iterdir())))
        return perform(self.module, command)


class Served:
    """The running example."""

    def __init__(self, client: aiohttp.ClientSession, router: Router, generation: GenerationServer, folder: Path):
        self.client, self.router, self.generation, self.folder = client, router, generation, folder

    async def post(self, body: Any) -> tuple[int, dict[str, Any]]:
        """(status, answer) of a request to /v1/completions."""
        url = self.router.serving.router.url("/v1/completions")
        async with self.client.post(url, json=body) as answer:
            return answer.status, await answer.json()

    async def all(self, prompts: list[Prompt]) -> list[list[int] | str]:
        """The answers to all at once: token ids, or what the error says."""
        answers = await asyncio.gather(*(self.post(prompt.body()) for prompt in prompts))
        return [a["error"]["message"] if "error" in a else a["choices"][0]["token_ids"] for _, a in answers]

    async def stream(self, body: dict[str, Any]) -> list[Any]:
        """The events of a streamed answer; the last is "[DONE]" where it is whole."""
        url = self.router.serving.router.url("/v1/completions")
        async with self.client.post(url, json={**body, "stream": True}) as answer:
            lines = [line.decode().removeprefix("data: ") async for line in answer.content if line.strip()]
        return [line.strip() if line.startswith("[DONE]") else json.loads(line) for line in lines]


@asynccontextmanager
async def served(
    model: Any, module: HelixModule, words: dict[str, Any], files: Path, max_waiting: int = 100
) -> AsyncIterator[Served]:
    """The three servers, set up by a YAML's words, on free ports; `files` is where caches lie."""
    addresses = {name: Address("127.0.0.1", int(free_port())) for name in ("router", "context", "generation")}
    serving = replace(Serving.read(words), **addresses)
    module.reset()
    context = ContextServer(model, serving.max_prompt, files)
    generation = GenerationServer(serving, VirtualGroup(module, files), files)  # type: ignore[arg-type] # it takes the same steps
    router = Router(serving, max_waiting)
    runners = [await listen(context.app(), serving.context), await listen(router.app(), serving.router)]
    running = asyncio.create_task(generation.serve())
    try:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=100)) as client:
            while (await client.get(serving.router.url("/health"))).status != 200:
                await asyncio.sleep(0.01)
            yield Served(client, router, generation, files)
    finally:
        running.cancel()
        for runner in runners:
            await runner.cleanup()
        with suppress(asyncio.CancelledError):
            await running
