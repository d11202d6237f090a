"""A server of OpenAI's API answers: each prompt whole, as token ids, to /v1/completions, several of them at a time."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from helix_compile.errors import HelixError
from helix_compile.eval.answers import until_end
from helix_compile.eval.heat_map import short_count
from helix_compile.eval.tasks import Document, Question

IDS = "return_token_ids"  # vLLM's word; servers that have only OpenAI's refuse it by name, or leave it unread


@dataclass(frozen=True)
class Endpoint:
    """Where a server answers, and how it is asked.

    Attributes:
        url: of its API, as far as /v1.
        model: the name by which it serves the model.
        timeout_s: of one answer, from the connection to its last byte, in seconds.
        in_flight: requests at a time, at most.
    """

    url: str
    model: str
    timeout_s: float
    in_flight: int

    @classmethod
    def find(cls, url: str, folder: Path, timeout_s: float, in_flight: int) -> Endpoint:
        """The server at http://host:port or http://host:port/v1, which says what it serves.

        Raises:
            HelixError: an address that is none, nobody there, or of several models none with the folder's name.
        """
        base = _base_of(url)

        async def models() -> Any:
            async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=timeout_s)) as session:
                return await _answer_of(session, f"{base}/models", None, f"--endpoint {base}/models", timeout_s)

        status, said = asyncio.run(models())
        listed = said.get("data") if status == 200 and isinstance(said, dict) else None
        if not isinstance(listed, list) or not listed or not all(isinstance(m, dict) and "id" in m for m in listed):
            raise HelixError(
                f"--endpoint {base}/models: got status {status} and {_short(said)}, expected 200 and a list of models, "
                "as a server of OpenAI's API answers"
            )
        names = [str(model["id"]) for model in listed]
        own = names if len(names) == 1 else [n for n in names if n in (str(folder), folder.resolve().name)]
        if len(own) != 1:
            raise HelixError(
                f"--endpoint {base}: it serves {', '.join(names)}, expected one model, or one named {folder.resolve().name}"
            )
        return cls(base, own[0], timeout_s, in_flight)


def _base_of(url: str) -> str:
    try:
        parts = urlsplit(url)
        fits = parts.scheme in ("http", "https") and parts.hostname and "@" not in parts.netloc and parts.port != 0
    except ValueError:  # a port that is no number
        fits = False
    if not fits or parts.query or parts.fragment:
        raise HelixError(f"--endpoint: got {url!r}, expected http://host:port or http://host:port/v1")
    path = parts.path.rstrip("/")
    return f"{parts.scheme}://{parts.netloc}{path if path.endswith('/v1') else f'{path}/v1'}"


class EndpointAnswerer:
    """An Answerer that sends every prompt whole, greedily.

    Which tokens came back is read, not guessed: the ids where the server tells them (`return_token_ids`: vLLM, examples/disaggregated),
    else the texts of OpenAI's `logprobs.tokens`, each of which must be the text of exactly one token. A text alone can often be
    cut in several ways.

    Args:
        endpoint: who answers.
        tokenizer: the model's own.
        ends: tokens that end an answer.
    """

    def __init__(self, endpoint: Endpoint, tokenizer: Any, ends: Collection[int] = ()):
        self._endpoint, self._tokenizer, self._ends = endpoint, tokenizer, ends
        self._tells_ids = True
        self._ids_of_text: dict[str, list[int]] | None = None

    def answers(self, document: Document, done: Callable[[], None]) -> list[tuple[int, ...]]:
        """As Answerer has it; `done` is called as answers come.

        Raises:
            HelixError: a request that got no answer, or another one than it should; the others in flight are given up.
        """
        return asyncio.run(self._answers(document, done))

    async def _answers(self, document: Document, done: Callable[[], None]) -> list[tuple[int, ...]]:
        places = asyncio.Semaphore(self._endpoint.in_flight)
        timeout = aiohttp.ClientTimeout(total=self._endpoint.timeout_s)

        async def one(session: aiohttp.ClientSession, number: int, question: Question) -> tuple[int, ...]:
            async with places:
                where = f"{document.task} {short_count(document.context)}, question {number}"
                answer = await self._answer(session, [*document.ids, *question.told, *question.cue], question, where)
            done()
            return answer

        async with aiohttp.ClientSession(timeout=timeout) as session:
            try:
                async with asyncio.TaskGroup() as group:  # one that fails ends the others
                    tasks = [group.create_task(one(session, n, q)) for n, q in enumerate(document.questions)]
            except* HelixError as errors:
                raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _answer(
        self, session: aiohttp.ClientSession, prompt: list[int], question: Question, what: str
    ) -> tuple[int, ...]:
        url, count = f"{self._endpoint.url}/completions", len(question.answer)
        where = f"{url}, {what}, {len(prompt)} tokens"
        words: dict[str, Any] = {"model": self._endpoint.model, "prompt": prompt, "max_tokens": count, "temperature": 0}
        words["logprobs"] = 1  # the tokens' texts come with it; by 0 some servers mean none
        told = self._tells_ids
        body = {**words, IDS: True} if told else words
        status, said = await _answer_of(session, url, body, where, self._endpoint.timeout_s)
        if told and status in (400, 422) and IDS in json.dumps(said):
            self._tells_ids = False
            status, said = await _answer_of(session, url, words, where, self._endpoint.timeout_s)
        if status != 200:
            raise HelixError(f"{where}: got status {status}, expected 200: {_short(said)}")
        return self._tokens(said, count, where)

    def _tokens(self, said: Any, count: int, where: str) -> tuple[int, ...]:
        """Of an answer up to its end token."""
        choices = said.get("choices") if isinstance(said, dict) else None
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            raise HelixError(f"{where}: got {_short(said)}, expected an answer with one of `choices`")
        choice, (ids, named) = choices[0], self._ids(choices[0], where)
        if choice.get("finish_reason") not in ("stop", "length"):
            raise HelixError(
                f"{where}: got finish_reason {choice.get('finish_reason')!r}, expected 'length', or 'stop' at an end token"
            )
        is_ended = choice["finish_reason"] == "stop"
        if len(ids) > count or (len(ids) < count and not is_ended):
            raise HelixError(
                f"{where}: got {len(ids)} tokens in {named} and finish_reason {choice['finish_reason']!r}, expected {count}"
            )
        return until_end(ids, self._ends)

    def _ids(self, choice: dict[str, Any], where: str) -> tuple[list[int], str]:
        """(the tokens of a choice, the field that they stand in)."""
        if (ids := choice.get("token_ids")) is not None:
            if not isinstance(ids, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
                raise HelixError(f"{where}: got token_ids {_short(ids)}, expected a list of ints")
            return ids, "token_ids"
        logprobs = choice.get("logprobs")
        texts = logprobs.get("tokens") if isinstance(logprobs, dict) else None
        if not isinstance(texts, list):
            raise HelixError(
                f"{where}: got an answer with {', '.join(choice)}, expected token_ids, or logprobs with tokens: a text alone may "
                "be cut into tokens in several ways"
            )
        return [self._id(text, where) for text in texts], "logprobs.tokens"

    def _id(self, text: Any, where: str) -> int:
        if self._ids_of_text is None:
            self._ids_of_text = defaultdict(list)
            for token in range(len(self._tokenizer)):
                self._ids_of_text[self._tokenizer.decode([token])].append(token)
        found = self._ids_of_text.get(text, []) if isinstance(text, str) else []
        if len(found) != 1:
            raise HelixError(
                f"{where}: got {text!r} in logprobs.tokens, which is the text of {len(found)} of the tokenizer's tokens, expected of one: "
                f"only a server that tells ids ({IDS}) can be scored with this tokenizer"
            )
        return found[0]


async def _answer_of(
    session: aiohttp.ClientSession, url: str, body: dict[str, Any] | None, where: str, timeout_s: float
) -> tuple[int, Any]:
    """(status, JSON), of a POST where there is a body; what is no JSON is an error where the status is 200, else a text.

    Raises:
        HelixError: no answer, or no whole one in time.
    """
    method = "GET" if body is None else "POST"
    try:
        # whoever is asked is who answers: the table says so
        async with session.request(method, url, json=body, allow_redirects=False) as answer:
            status, text = answer.status, (await answer.read()).decode(errors="replace")
    except TimeoutError as error:
        raise HelixError(f"{where}: got no whole answer within {timeout_s:g} s, expected one (--timeout)") from error
    except (aiohttp.ClientError, ValueError) as error:  # yarl's for a host that is none
        raise HelixError(
            f"{where}: got {type(error).__name__}: {error}; expected a server that answers there"
        ) from error
    try:
        return status, json.loads(text)
    except ValueError as error:
        if status == 200:
            raise HelixError(f"{where}: got {_short(text)}, expected JSON") from error
        return status, text


def _short(said: Any) -> str:
    """What a server said, in a line; of OpenAI's errors the message."""
    error = said.get("error") if isinstance(said, dict) else None
    if isinstance(error, dict) and "message" in error:
        said = error["message"]
    text = " ".join((said if isinstance(said, str) else json.dumps(said)).split())
    return text if len(text) <= 300 else f"{text[:300]}..."
