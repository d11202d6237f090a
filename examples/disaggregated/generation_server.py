"""Decode: a group of Helix ranks under torchrun. Rank 0 takes requests and says what comes next, every rank does it.

python examples/disaggregated/generation_server.py examples/disaggregated/serve.yaml

starts torchrun with as many ranks as the YAML says.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sys
import tempfile
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import aiohttp
import torch
import torch.distributed as dist
from aiohttp import web
from context_server import choose
from rows import Arrival, Command, Outcome, Rows, Sequence
from serving import (
    GENERATE,
    HANDOVER,
    HEALTH,
    PREFILL,
    Choice,
    Handover,
    Serving,
    ServingError,
    end_with_parent,
    errors_as_json,
    listen,
)
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

from helix_compile import CacheEntries, HelixError, HelixModule, RuntimeFault, helix_compile, read_cache

STARTS = 4  # of the group
# without requests rank 0 still speaks this often: peers that wait longer than HELIX_TIMEOUT take it for dead
IDLE_S = 1.0


def admit(module: HelixModule, arrival: Arrival) -> None:
    """Put a prefilled cache into its row; the others stay as they are.

    Raises:
        HelixError: what is wrong with it; nothing was written then.
    """
    latents, k_ropes, lengths = entries = read_cache(arrival.path)
    check_entries(module, entries, arrival.tokens)
    rows = module.plan.options.max_batch_size
    counts = [int(lengths) if row == arrival.row else 0 for row in range(rows)]
    # one sequence stands for each row: of rows with no new tokens nothing is read
    wide = [[part.expand(rows, -1, -1) for part in parts] for parts in (latents, k_ropes)]
    module.import_cache(*wide, counts, append=bool(len(module.lengths)))


def check_entries(module: HelixModule, entries: CacheEntries, tokens: int) -> None:
    """What import_cache() takes as it is: whose tokens, which numbers. Shapes are its own to check."""
    if entries.lengths.tolist() != [tokens]:
        raise RuntimeFault(
            f"lengths: got {entries.lengths.tolist()}, expected [{tokens}], the tokens of the prompt: positions 0 to {tokens - 1}"
        )
    for name, parts in (("latents", entries.latents), ("k_ropes", entries.k_ropes)):
        for site, part in enumerate(parts):
            if part.shape[:2] != (1, tokens):
                raise RuntimeFault(f"{name}.{site}: got {list(part.shape)}, expected [1, {tokens}, width]")
            if str(part.dtype) != f"torch.{module.plan.dtype}":
                raise RuntimeFault(f"{name}.{site}: got {part.dtype}, expected torch.{module.plan.dtype}, the model's")
            if not bool(part.isfinite().all()):
                raise RuntimeFault(f"{name}.{site}: got values that are not finite")


def perform(module: HelixModule, command: Command) -> Outcome:
    """What a command says, on this rank; the same comes of it on every rank."""
    if command.left and len(module.lengths):  # before the first cache that fits there is no batch
        module.reset(rows=command.left)
    refused = {}
    for arrival in command.arrivals:
        try:
            admit(module, arrival)
        except HelixError as error:
            refused[arrival.row] = str(error)
    fed = [row for row, token in enumerate(command.tokens) if token is not None and row not in refused]
    if not fed:
        return Outcome(refused, {})
    ids = torch.tensor([[token or 0] for token in command.tokens])
    mask = torch.tensor([[int(row in fed)] for row in range(len(ids))])
    logits = module(ids, attention_mask=mask)[:, -1]
    return Outcome(refused, {row: choose(logits[row], command.alternatives) for row in fed})


class Group:
    """The ranks: rank 0 says a command, and each performs it."""

    def __init__(self, module: HelixModule):
        self.module = module
        timeout = timedelta(seconds=float(os.environ.get("HELIX_TIMEOUT", "300")))
        self._words = dist.new_group(backend="gloo", timeout=timeout)  # on a card too, commands are words of the host

    def take_step(self, command: Command | None = None) -> Outcome:
        """Rank 0 gives the command, the others hear it.

        Raises:
            RuntimeFault: a peer that raised, died or is stuck, by name.
        """
        said = [command]
        try:
            dist.broadcast_object_list(said, src=0, group=self._words)
        except RuntimeError as error:  # gloo's: which peer it was stands in what the ranks said of themselves
            world: Any = self.module.world
            raise world.guard.lost_peers("the next command", error) from error
        assert said[0] is not None
        return perform(self.module, said[0])


class GenerationServer:
    """Rank 0: requests come in, a prefill is asked for, its cache waits for a row, tokens go out as they come."""

    def __init__(self, serving: Serving, group: Group, folder: Path):
        self.serving, self.group, self.folder = serving, group, folder
        self.rows = Rows(serving.options.max_batch_size)
        # one cache more than there are rows: it comes while they decode. What else comes waits as a prompt
        self.places = asyncio.Semaphore(serving.options.max_batch_size + 1)

    async def decode(self) -> None:
        """Steps, for ever; in a thread, so that requests are heard meanwhile."""
        loop, worker = asyncio.get_running_loop(), ThreadPoolExecutor(1)
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self.rows.has_work.wait(), IDLE_S)
            command = self.rows.next_command()
            self.rows.take(await loop.run_in_executor(worker, self.group.take_step, command))
            for arrival in command.arrivals:
                Path(arrival.path).unlink()

    async def generate(self, request: web.Request) -> web.StreamResponse:
        """POST {prompt, max_tokens, stop_token_ids, logprobs} -> a line of JSON a token; one with an error ends it early."""
        asked, path = await request.json(), self.folder / uuid.uuid4().hex
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        sequence = None
        try:
            await response.prepare(request)
            async with self.places:
                self.rows.check()
                first = await self.prefill(asked, path)
                tokens, stop = len(asked["prompt"]), asked["stop_token_ids"]
                sequence = Sequence(str(path), tokens, first.token, asked["max_tokens"], stop, asked["logprobs"])
                if not sequence.push(first):
                    self.rows.enter(sequence)
                async for choice in sequence:
                    await response.write(json.dumps(vars(choice)).encode() + b"\n")
        except ServingError as error:
            await response.write(json.dumps(error.body()).encode() + b"\n")
        finally:  # also where the client has gone
            if sequence is not None:
                self.rows.leave(sequence)
            if sequence is None or sequence.row is None:  # else decode() removes it, when every rank has read it
                path.unlink(missing_ok=True)
        return response

    async def prefill(self, asked: dict[str, Any], path: Path) -> Choice:
        """The token behind a prompt, whose cache is at `path` then.

        Raises:
            ServingError: no answer, or a file that is not what was sent.
        """
        where, digest = f"context server {self.serving.context}", hashlib.sha256()
        words = {"prompt": asked["prompt"], "logprobs": asked["logprobs"]}
        timeout = aiohttp.ClientTimeout(total=self.serving.transfer_s)
        try:
            async with (
                aiohttp.ClientSession(timeout=timeout) as client,
                client.post(self.serving.context.url(PREFILL), json=words) as answer,
            ):
                if answer.status != 200:
                    raise ServingError(502, f"{where}: {ServingError.of_body(await answer.json())}", "handover_error")
                handover = Handover.of_header(answer.headers[HANDOVER])
                with path.open("wb") as file:
                    async for chunk in answer.content.iter_chunked(2**20):
                        digest.update(chunk)
                        file.write(chunk)
        except TimeoutError as error:
            late = f"{where}: no cache within {self.serving.transfer_s:g} s (kv_transfer_timeout_ms)"
            raise ServingError(504, late, "handover_error") from error
        except (aiohttp.ClientError, KeyError, TypeError, ValueError) as error:
            raise ServingError(502, f"{where}: {type(error).__name__}: {error}", "handover_error") from error
        for name, got, expected in (
            ("tokens", handover.tokens, len(asked["prompt"])),
            ("sha256", digest.hexdigest(), handover.sha256),
        ):
            if got != expected:
                raise ServingError(
                    502,
                    f"{where}: the cache that came is damaged: {name}: got {got}, expected {expected}",
                    "handover_error",
                )
        return handover.first

    async def health(self, request: web.Request) -> web.Response:
        self.rows.check()
        return web.json_response({"status": "ok", "rows": len(self.rows.running)})

    async def serve(self) -> None:
        """Until a rank is lost: then every request gets the reason, and the error goes on."""
        app = web.Application(
            middlewares=[errors_as_json], client_max_size=2**16 + 32 * self.serving.options.max_seq_len
        )
        app.add_routes([web.post(GENERATE, self.generate), web.get(HEALTH, self.health)])
        runner = await listen(app, self.serving.generation)
        print(f"generation server: {self.serving.generation}", flush=True)
        try:
            await self.decode()
        except Exception as error:
            self.rows.fail(ServingError(503, f"the generation server's ranks stopped: {error}"))
            raise
        finally:
            await runner.cleanup()  # answers that are under way are ended first


def run_rank(serving: Serving, folder: Path) -> None:
    """One rank, under torchrun."""
    end_with_parent()
    group = Group(helix_compile(serving.model, options=serving.options, dtype=serving.dtype))
    if dist.get_rank() == 0:
        asyncio.run(GenerationServer(serving, group, folder).serve())
    while True:
        group.take_step()


def main(yaml: str) -> None:
    """Start the ranks; after a fault again, STARTS times in all.

    By a torchrun of their own each time: what --max-restarts starts finds the dead ranks' addresses in the store that it kept (torch 2.13).
    It looks every three seconds, so that the others can say what they saw.
    """
    options = Serving.read(yaml).options
    ranks = ["--standalone", f"--nproc-per-node={options.cp * options.tpa}", "--monitor-interval=3"]
    for _ in range(STARTS):
        with tempfile.TemporaryDirectory(prefix="helix-generation-") as folder, suppress(ChildFailedError):
            torchrun([*ranks, __file__, yaml, folder])


if __name__ == "__main__":
    if "RANK" in os.environ:
        run_rank(Serving.read(sys.argv[1]), Path(sys.argv[2]))
    else:
        main(sys.argv[1])
        sys.exit("generation server: its ranks stopped too often")
