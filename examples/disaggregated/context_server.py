"""Prefill: the unmodified transformers model reads a prompt; its cache leaves as a safetensors file, the first new token beside it.

python examples/disaggregated/context_server.py examples/disaggregated/serve.yaml
"""

from __future__ import annotations

import asyncio
import hashlib
import sys
import tempfile
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from aiohttp import web
from serving import (
    HANDOVER,
    HEALTH,
    PREFILL,
    Choice,
    Handover,
    Serving,
    ServingError,
    errors_as_json,
    listen,
    until_ended,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from helix_compile import CacheEntries, write_cache


def choose(logits: Tensor, alternatives: int) -> Choice:
    """The best word of logits [vocab], ties to the lower id, with as many alternatives."""
    logprobs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    token = int(logits.argmax())
    top = logprobs.topk(alternatives)
    pairs = [[int(i), float(p)] for p, i in zip(top.values, top.indices, strict=True)]
    return Choice(token, float(logprobs[token]), pairs)


def prefill(model: Any, prompt: list[int], alternatives: int) -> tuple[CacheEntries, Choice]:
    """The cache of a prompt, and the token behind it."""
    cache = DynamicCache()  # without the model's configuration: layers with windows keep all tokens too
    with torch.no_grad():
        out = model(input_ids=torch.tensor([prompt]), past_key_values=cache, logits_to_keep=1)
    # MLA caches one latent and one roped key for all heads; where there are K and V of several, all stand side by side
    keys = [layer.keys.transpose(1, 2).flatten(2) for layer in cache.layers]
    values = [layer.values.transpose(1, 2).flatten(2) for layer in cache.layers]
    return CacheEntries(keys, values, torch.tensor([len(prompt)])), choose(out.logits[0, -1], alternatives)


class ContextServer:
    """One prompt at a time; the others wait for their turn."""

    def __init__(self, model: Any, max_prompt: int, folder: Path):
        self.model, self.max_prompt, self.folder = model, max_prompt, folder
        self.worker = ThreadPoolExecutor(1)

    def write(self, prompt: list[int], alternatives: int, path: Path) -> Handover:
        """Prefill, and leave the cache at `path`."""
        entries, first = prefill(self.model, prompt, alternatives)
        write_cache(path, entries)
        with path.open("rb") as file:
            return Handover(hashlib.file_digest(file, "sha256").hexdigest(), len(prompt), first)

    async def prefill(self, request: web.Request) -> web.StreamResponse:
        """POST {prompt: ids, logprobs: n} -> the file of its cache, what is said beside it in a header."""
        asked = await request.json()
        if not 0 < len(asked["prompt"]) <= self.max_prompt:
            raise ServingError(400, f"prompt: got {len(asked['prompt'])} tokens, expected 1 to {self.max_prompt}")
        path = self.folder / uuid.uuid4().hex
        job = self.worker.submit(self.write, asked["prompt"], asked["logprobs"], path)
        try:
            handover = await asyncio.wrap_future(job)  # of a client that has gone before its turn: cancelled
            return web.Response(body=path.open("rb"), headers={HANDOVER: handover.header()})
        finally:  # a file that is open can still be read
            job.add_done_callback(lambda _: path.unlink(missing_ok=True))

    async def health(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    def app(self) -> web.Application:
        """Its two routes."""
        app = web.Application(middlewares=[errors_as_json], client_max_size=2**16 + 32 * self.max_prompt)
        app.add_routes([web.post(PREFILL, self.prefill), web.get(HEALTH, self.health)])
        return app


async def main(serving: Serving) -> None:
    """Load the model, and serve until a signal comes."""
    model = AutoModelForCausalLM.from_pretrained(serving.model, dtype=serving.dtype or "auto").eval()
    with tempfile.TemporaryDirectory(prefix="helix-context-") as folder:
        await listen(ContextServer(model, serving.max_prompt, Path(folder)).app(), serving.context)
        print(f"context server: {serving.context}", flush=True)
        await until_ended()


if __name__ == "__main__":
    asyncio.run(main(Serving.read(sys.argv[1])))
