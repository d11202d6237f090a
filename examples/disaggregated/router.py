"""The router: OpenAI's /v1/completions in front, prompts as token ids behind it, text out of the tokens that come.

python examples/disaggregated/router.py examples/disaggregated/serve.yaml
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web
from serving import GENERATE, HEALTH, Choice, Serving, ServingError, errors_as_json, listen, until_ended
from tokenizers.decoders import DecodeStream
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

# fields of a request that may be there with this value alone: what else they could say is not served
NEUTRAL: dict[str, Any] = {
    "n": 1, "best_of": 1, "echo": False, "top_p": 1, "presence_penalty": 0, "frequency_penalty": 0, "logit_bias": {}, "suffix": None,
}  # fmt: skip
# of a greedy answer any seed is the same; a user's name is for logs
SERVED = ("model", "prompt", "max_tokens", "temperature", "stop", "stream", "stream_options", "logprobs", "return_token_ids", "seed", "user")  # fmt: skip
MAX_LOGPROBS, MAX_STOPS = 5, 4  # OpenAI's


@dataclass(frozen=True)
class Asked:
    """A request to /v1/completions that can be served."""

    prompts: list[list[int]]
    max_tokens: int
    stop: list[str]
    stream: bool
    include_usage: bool
    logprobs: int | None
    return_token_ids: bool


def refused(param: str, got: object, expected: str) -> ServingError:
    return ServingError(400, f"{param}: got {got!r}, expected {expected}", "invalid_request_error", param)


def read_request(body: Any, model: str, tokenizer: Any, serving: Serving) -> Asked:
    """Check all of it.

    Raises:
        ServingError: 400 or 404, the field, got, expected.
    """
    if not isinstance(body, dict):
        raise refused("body", body, "a JSON object")
    body = {key: value for key, value in body.items() if value is not None}
    for key, value in body.items():
        if key not in (*SERVED, *NEUTRAL):
            raise refused(key, value, f"one of {', '.join([*SERVED, *NEUTRAL])}")
        if key in NEUTRAL and (value != NEUTRAL[key] or isinstance(value, bool) != (key == "echo")):
            raise refused(key, value, f"{NEUTRAL[key]!r}: nothing else is served")
    if body.get("model", model) != model:
        raise ServingError(404, f"model: got {body['model']!r}, expected {model!r}", "not_found_error", "model")
    if body.get("temperature", 1) != 0 or body["temperature"] is False:
        raise refused("temperature", body.get("temperature", "none, so 1"), "0: answers are greedy")
    options = body.get("stream_options", {})
    if not isinstance(options, dict) or set(options) - {"include_usage"}:
        raise refused("stream_options", options, "{include_usage: true or false}, where stream is true")
    stop = body.get("stop", [])
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or len(stop) > MAX_STOPS or not all(isinstance(s, str) and s for s in stop):
        raise refused("stop", stop, f"a text, or a list of up to {MAX_STOPS}, none empty")
    asked = Asked(
        _prompts(body.get("prompt"), tokenizer),
        _count(body, "max_tokens", 16, 1, serving.options.max_seq_len),
        stop,
        _flag(body, "stream"),
        _flag(options, "include_usage"),
        _count(body, "logprobs", None, 0, MAX_LOGPROBS),
        _flag(body, "return_token_ids"),
    )
    for prompt in asked.prompts:
        room = min(serving.max_prompt, serving.options.max_seq_len - asked.max_tokens)
        if not 1 <= len(prompt) <= room:
            words = f"1 to {room}: max_seq_len is {serving.options.max_seq_len}, of which max_tokens takes {asked.max_tokens}"
            raise refused(
                "prompt", f"{len(prompt)} tokens", f"{words}, and a cache of up to {serving.max_prompt} is handed over"
            )
        if not 0 <= min(prompt) <= max(prompt) < len(tokenizer):
            raise refused("prompt", f"ids from {min(prompt)} to {max(prompt)}", f"0 to {len(tokenizer) - 1}")
    if asked.stream and len(asked.prompts) > 1:
        raise refused("prompt", f"{len(asked.prompts)} prompts", "one, where stream is true")
    if options and not asked.stream:
        raise refused("stream_options", options, "none, where stream is false")
    return asked


def _flag(body: dict[str, Any], key: str) -> bool:
    if not isinstance(value := body.get(key, False), bool):
        raise refused(key, value, "true or false")
    return value


def _count(body: dict[str, Any], key: str, usual: int | None, least: int, most: int) -> Any:
    value = body.get(key, usual)
    if value is not usual and (isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most):
        raise refused(key, value, f"{least} to {most}")
    return value


def _prompts(given: object, tokenizer: Any) -> list[list[int]]:
    """A text, token ids, or a list of such."""
    many = given if isinstance(given, list) and given and not isinstance(given[0], int) else [given]
    prompts: list[Any] = [tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in many]
    for prompt in prompts:
        if not isinstance(prompt, list) or any(isinstance(i, bool) or not isinstance(i, int) for i in prompt):
            raise refused("prompt", given, "a text, a list of token ids, or a list of such")
    return prompts


class Text:
    """Tokens -> text as soon as it is certain: no half characters, nothing that may be the beginning of a stop string."""

    def __init__(self, tokenizer: Any, stop: list[str]):
        self._tokenizer, self._stop, self._ids = tokenizer, stop, list[int]()
        self._stream = DecodeStream(skip_special_tokens=True)
        self._text, self._sent = "", 0
        self.is_stopped = False

    def push(self, token: int) -> str:
        """What of the text is certain now, behind what was."""
        self._ids.append(token)
        return self._more(self._stream.step(self._tokenizer.backend_tokenizer, token) or "")

    def end(self) -> str:
        """The rest, where no token comes any more."""
        if self.is_stopped:
            return ""
        whole = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        rest = self._more(whole[len(self._text) :])  # half a character stays one, a sign of that in its place
        if self.is_stopped:
            return rest
        self._sent, held = len(self._text), self._text[self._sent :]
        return rest + held

    def _more(self, piece: str) -> str:
        searched = max(0, len(self._text) - max(map(len, self._stop), default=0))
        self._text += piece
        found = [at for stop in self._stop if (at := self._text.find(stop, searched)) >= 0]
        self.is_stopped = bool(found)
        certain = min(found, default=len(self._text) - self._held())
        new, self._sent = self._text[self._sent : certain], max(certain, self._sent)
        return new

    def _held(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        lengths = range(max(map(len, self._stop), default=1) - 1, 0, -1)
        return next((n for n in lengths if any(s.startswith(self._text[-n:]) for s in self._stop if n < len(s))), 0)


@dataclass
class Answer:
    """One prompt's answer, as it grows.

    Attributes:
        finish: "stop" or "length" once it is whole.
    """

    text: str = ""
    choices: list[Choice] = field(default_factory=list)
    finish: str | None = None


def end_tokens(folder: Path) -> list[int]:
    """Tokens that end an answer, as generate() takes them from a folder."""
    try:
        said = GenerationConfig.from_pretrained(folder).eos_token_id
    except OSError:  # no generation_config.json
        said = AutoConfig.from_pretrained(folder).eos_token_id
    return said if isinstance(said, list) else [] if said is None else [said]


class Router:
    """One context server, one generation server."""

    def __init__(self, serving: Serving, max_waiting: int):
        self.serving, self.max_waiting = serving, max_waiting
        self.name = serving.model.name
        self.tokenizer = AutoTokenizer.from_pretrained(serving.model)
        self.ends = end_tokens(serving.model)
        self.taken = 0

    @asynccontextmanager
    async def _places(self, count: int) -> AsyncIterator[None]:
        """Room for so many prompts; refused at once where there is none."""
        if self.taken + count > self.max_waiting:
            raise ServingError(429, f"{self.taken} prompts are under way, expected at most {self.max_waiting}: try again later", "overloaded_error")  # fmt: skip
        self.taken += count
        try:
            yield
        finally:
            self.taken -= count

    async def _tokens(self, asked: Asked, prompt: list[int]) -> AsyncGenerator[Choice, None]:
        """The generation server's lines.

        Raises:
            ServingError: what the server says, or that it went away.
        """
        where = f"generation server {self.serving.generation}"
        words = {
            "prompt": prompt,
            "max_tokens": asked.max_tokens,
            "stop_token_ids": self.ends,
            "logprobs": asked.logprobs or 0,
        }
        try:
            async with (
                aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=self.serving.request_s)) as client,
                client.post(self.serving.generation.url(GENERATE), json=words) as answer,
            ):
                if answer.status != 200:
                    raise ServingError.of_body(await answer.json())
                async for line in answer.content:
                    said = json.loads(line)
                    if "error" in said:
                        raise ServingError.of_body(said)
                    yield Choice(**said)
        except TimeoutError as error:
            late = f"{where}: no whole answer within {self.serving.request_s:g} s (req_timeout_secs)"
            raise ServingError(504, late) from error
        except (aiohttp.ClientError, ValueError) as error:
            gone = f"{where} is not there, or went away in the middle of the answer ({type(error).__name__}: {error}); its log says why"
            raise ServingError(503, gone) from error

    async def _answer(self, asked: Asked, prompt: list[int]) -> AsyncGenerator[tuple[Answer, str], None]:
        """(the answer so far, what its last token adds to the text); the last of them has its reason to end."""
        answer, text = Answer(), Text(self.tokenizer, asked.stop)
        async with aclosing(self._tokens(asked, prompt)) as tokens:
            async for choice in tokens:
                answer.choices.append(choice)
                new = text.push(choice.token)
                ends = choice.token in self.ends or text.is_stopped
                if ends or len(answer.choices) == asked.max_tokens:
                    new += text.end()
                    answer.finish = "stop" if ends or text.is_stopped else "length"
                answer.text += new
                yield answer, new
                if answer.finish:
                    return
        raise ServingError(503, f"generation server {self.serving.generation}: its answer ended after {len(answer.choices)} tokens, expected {asked.max_tokens}")  # fmt: skip

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/completions."""
        try:
            body = await request.json()
        except ValueError as error:
            raise refused("body", str(error), "JSON") from error
        asked = read_request(body, self.name, self.tokenizer, self.serving)
        said = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": self.name,
        }
        async with self._places(len(asked.prompts)):
            if asked.stream:
                return await self._stream(request, asked, said)
            try:
                async with asyncio.TaskGroup() as group:  # one that fails ends the others
                    tasks = [group.create_task(self._whole(asked, prompt)) for prompt in asked.prompts]
            except* ServingError as errors:
                raise errors.exceptions[0] from None
        answers = [task.result() for task in tasks]
        choices = [self._choice(asked, i, a.text, a.choices, a.finish) for i, a in enumerate(answers)]
        return web.json_response({**said, "choices": choices, "usage": self._usage(asked, answers)})

    async def _whole(self, asked: Asked, prompt: list[int]) -> Answer:
        async with aclosing(self._answer(asked, prompt)) as parts:
            return [answer async for answer, _ in parts][-1]

    async def _stream(self, request: web.Request, asked: Asked, said: dict[str, Any]) -> web.StreamResponse:
        """Server-sent events, one a token; an error after the first of them is an event, and no [DONE] follows."""
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})

        async def send(words: dict[str, Any] | str) -> None:
            text = words if isinstance(words, str) else json.dumps(words)
            await response.write(f"data: {text}\n\n".encode())

        try:
            async with aclosing(self._answer(asked, asked.prompts[0])) as parts:
                async for answer, new in parts:
                    if not response.prepared:
                        await response.prepare(request)
                    offset = len(answer.text) - len(new)
                    await send(
                        {**said, "choices": [self._choice(asked, 0, new, answer.choices[-1:], answer.finish, offset)]}
                    )
        except ServingError as error:
            if not response.prepared:
                raise
            await send(error.body())
            return response
        if asked.include_usage:
            await send({**said, "choices": [], "usage": self._usage(asked, [answer])})
        await send("[DONE]")
        return response

    def _choice(
        self, asked: Asked, index: int, text: str, choices: list[Choice], finish: str | None, offset: int = 0
    ) -> dict[str, Any]:
        """As OpenAI has it; `text` begins `offset` characters behind the answer's beginning."""
        said: dict[str, Any] = {"index": index, "text": text, "logprobs": None, "finish_reason": finish}
        if asked.return_token_ids:
            said["token_ids"] = [choice.token for choice in choices]
        if asked.logprobs is not None:
            words = [self.tokenizer.decode([choice.token]) for choice in choices]
            said["logprobs"] = {
                "tokens": words,
                "token_logprobs": [choice.logprob for choice in choices],
                "top_logprobs": [self._likely(choice) for choice in choices],
                "text_offset": [offset + sum(map(len, words[:i])) for i in range(len(words))],
            }
        return said

    def _likely(self, choice: Choice) -> dict[str, float]:
        """Word -> log of its probability; of several tokens with one text the likeliest."""
        likely: dict[str, float] = {}
        for token, logprob in choice.top:
            likely.setdefault(self.tokenizer.decode([token]), logprob)
        return likely

    def _usage(self, asked: Asked, answers: list[Answer]) -> dict[str, int]:
        read, written = sum(map(len, asked.prompts)), sum(len(answer.choices) for answer in answers)
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    async def models(self, request: web.Request) -> web.Response:
        """GET /v1/models."""
        model = {
            "id": self.name,
            "object": "model",
            "created": 0,
            "owned_by": "helix_compile",
            "max_model_len": self.serving.options.max_seq_len,
        }
        return web.json_response({"object": "list", "data": [model]})

    async def health(self, request: web.Request) -> web.Response:
        """GET /health: 200 where both servers are well."""
        said = {}
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as client:
            for name, address in (("context", self.serving.context), ("generation", self.serving.generation)):
                try:
                    async with client.get(address.url(HEALTH)) as answer:
                        said[f"{name} server"] = "ok" if answer.status == 200 else await answer.text()
                except (aiohttp.ClientError, TimeoutError) as error:
                    said[f"{name} server"] = f"{address}: {type(error).__name__}: {error}"
        well = set(said.values()) == {"ok"}
        return web.json_response({"status": "ok" if well else "not ready", **said}, status=200 if well else 503)

    def app(self) -> web.Application:
        """Its routes."""
        app = web.Application(
            middlewares=[errors_as_json], client_max_size=2**16 + 64 * self.serving.options.max_seq_len
        )
        app.add_routes(
            [
                web.post("/v1/completions", self.completions),
                web.get("/v1/models", self.models),
                web.get("/health", self.health),
            ]
        )
        return app


async def main() -> None:
    """Serve until a signal comes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("yaml")
    parser.add_argument(
        "--max-waiting", type=int, default=256, help="prompts under way; what comes beyond is answered by 429"
    )
    given = parser.parse_args()
    serving = Serving.read(given.yaml)
    await listen(Router(serving, given.max_waiting).app(), serving.router)
    print(f"router: http://{serving.router}/v1", flush=True)
    await until_ended()


if __name__ == "__main__":
    asyncio.run(main())
