"""eval --endpoint: a server's tokens are read and never guessed, a wrong one shows, what is no answer is refused by name in time.

How it would show that it is wrong: servers that tell ids, that tell OpenAI's texts alone, that know no `return_token_ids`; answers out of
order; one wrong token; every way in which an answer can fail to come or be none.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from helix_compile.capture.source import load_folder
from helix_compile.errors import HelixError
from helix_compile.eval.decoders import ModelDecoder
from helix_compile.eval.endpoint import IDS, Endpoint, EndpointAnswerer
from helix_compile.eval.folder import load_tokenizer
from helix_compile.eval.tasks import Document, Question, make_documents
from tests.support.command import run_here

RECALL = Path(__file__).resolve().parents[1] / "data" / "recall"
Answer = tuple[int, Any]  # status, and JSON, or bytes as they are
TOKENIZER = load_tokenizer(RECALL)
# the answer is the prompt's last token and those that follow it by number
DOCUMENT = Document("needle", 64, (2, 3, 4), tuple(Question((), (n,), (n, n + 1, n + 2), 0.5) for n in range(100, 112)))
RIGHT = [question.answer for question in DOCUMENT.questions]


def choice(**said: Any) -> Answer:
    return 200, {"choices": [{"index": 0, "text": "", "finish_reason": "length", "logprobs": None, **said}]}


def counted(body: dict[str, Any]) -> list[int]:
    last = body["prompt"][-1]
    assert body["prompt"][:3] == [2, 3, 4] and body["temperature"] == 0 and body["max_tokens"] == 3
    return [last, last + 1, last + 2]


@dataclass
class Server:
    """One of OpenAI's API, in this process.

    Attributes:
        answer: of a request's body.
        models: that it lists.
        at_once: requests that were answered at a time, at most.
    """

    answer: Callable[[dict[str, Any]], Answer]
    models: list[str] = field(default_factory=lambda: ["recall"])
    at_once: int = 0
    _now: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def reply(self, path: str, body: dict[str, Any] | None) -> Answer:
        if path == "/v1/models" and body is None:
            return 200, {"object": "list", "data": [{"id": name} for name in self.models]}
        if path != "/v1/completions" or body is None:
            return 404, {"error": {"message": f"no {path}"}}
        with self._lock:
            self._now += 1
            self.at_once = max(self.at_once, self._now)
        try:
            return self.answer(body)
        finally:
            with self._lock:
                self._now -= 1


@contextmanager
def serving(server: Server) -> Iterator[str]:
    """Its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(*server.reply(self.path, None))

        def do_POST(self) -> None:
            self._send(*server.reply(self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))

        def _send(self, status: int, said: Any) -> None:
            content = said if isinstance(said, bytes) else json.dumps(said).encode()
            self.send_response(status)
            if status == 302:
                self.send_header("Location", "/v1/models")
            self.send_header("Content-Length", str(10**6 if said == b"half" else len(content)))
            self.end_headers()
            with suppress(ConnectionError):  # a client that has gone
                self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{running.server_port}"
    finally:
        running.shutdown()
        thread.join()
        running.server_close()


def asked(server: Server, timeout_s: float = 20, ends: tuple[int, ...] = ()) -> list[tuple[int, ...]]:
    with serving(server) as url:
        endpoint = Endpoint.find(url, RECALL, timeout_s, in_flight=4)
        counts = list[int]()
        answers = EndpointAnswerer(endpoint, TOKENIZER, ends).answers(DOCUMENT, lambda: counts.append(1))
        assert len(counts) == len(answers)
        return answers


def test_several_are_in_flight_and_answers_keep_their_order() -> None:
    def answer(body: dict[str, Any]) -> Answer:
        time.sleep(0.01 * (112 - body["prompt"][-1]))  # the first come last
        assert body["model"] == "recall" and body[IDS] is True
        return choice(token_ids=counted(body))

    server = Server(answer)
    assert asked(server) == RIGHT
    assert server.at_once == 4


def test_texts_of_tokens_are_read_where_no_ids_are_told() -> None:
    def answer(body: dict[str, Any]) -> Answer:
        assert body["logprobs"] == 1
        return choice(logprobs={"tokens": [TOKENIZER.decode([i]) for i in counted(body)]})

    assert asked(Server(answer)) == RIGHT

    def strict(body: dict[str, Any]) -> Answer:
        if IDS in body:
            return 400, {"error": {"message": f"Unrecognized request argument supplied: {IDS}"}}
        return answer(body)

    assert asked(Server(strict)) == RIGHT


def test_an_answer_ends_before_its_end_token() -> None:
    """Servers tell it or not; an answer that goes on behind it is cut there too."""
    for told in ([7, 9], [7], [7, 9, 8]):
        stopped = Server(lambda _, told=told: choice(token_ids=told, finish_reason="stop"))  # type: ignore[misc]
        assert asked(stopped, ends=(9,)) == [(7,)] * len(RIGHT)


def with_error(status: int, message: str) -> Answer:
    return status, {"error": {"message": message, "type": "server_error"}}


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (with_error(503, "rank 2 died"), "got status 503, expected 200: rank 2 died"),
        (with_error(400, "prompt too long"), "got status 400, expected 200: prompt too long"),
        ((500, b"<h1>no</h1>"), "got status 500, expected 200: <h1>no</h1>"),
        ((302, {}), "got status 302, expected 200"),
        ((200, b"<h1>no</h1>"), "got <h1>no</h1>, expected JSON"),
        ((200, b"half"), "got ClientPayloadError"),
        ((200, []), r"got \[\], expected an answer with one of `choices`"),
        ((200, {"choices": []}), r"got \{.*\}, expected an answer with one of `choices`"),
        (choice(text="a b c"), "got an answer with index, text, .*, expected token_ids, or logprobs with tokens"),
        (choice(token_ids=["a"]), r"got token_ids \[\"a\"\], expected a list of ints"),
        (choice(token_ids=[1, 2]), "got 2 tokens in token_ids and finish_reason 'length', expected 3"),
        (choice(token_ids=[1, 2, 3, 4]), "got 4 tokens in token_ids and finish_reason 'length', expected 3"),
        (
            choice(token_ids=[1], finish_reason="content_filter"),
            "got finish_reason 'content_filter', expected 'length'",
        ),
        (
            choice(logprobs={"tokens": ["qqq"] * 3}),
            "got 'qqq' in logprobs.tokens, which is the text of 0 of the tokenizer's",
        ),
    ],
)
def test_what_is_no_answer_is_refused_by_name(answer: Answer, said: str) -> None:
    with pytest.raises(HelixError, match=rf"http://127.*/v1/completions, needle 64, question \d+, 4 tokens: {said}"):
        asked(Server(lambda _: answer))


def test_a_text_of_two_tokens_is_not_guessed() -> None:
    """Of a tokenizer of bytes a half character has the text that every other half has."""
    answerer = EndpointAnswerer(Endpoint("u", "m", 1, 1), Halves())
    assert answerer._ids({"logprobs": {"tokens": ["a"]}}, "there") == ([0], "logprobs.tokens")
    with pytest.raises(HelixError, match=r"there: got '.' in logprobs\.tokens, which is the text of 2 of"):
        answerer._ids({"logprobs": {"tokens": ["a", "\ufffd"]}}, "there")


class Halves:
    """A tokenizer of which two tokens are half characters."""

    def __len__(self) -> int:
        return 3

    def decode(self, ids: list[int]) -> str:
        return "a\ufffd\ufffd"[ids[0]]


def test_a_server_that_does_not_answer_is_left() -> None:
    """Neither one that says nothing, nor one that is always about to end; and the others that are in flight are not waited for."""
    gone = threading.Event()

    def never(body: dict[str, Any]) -> Answer:
        gone.wait(20)
        return choice(token_ids=counted(body))

    since = time.monotonic()
    with serving(Server(never)) as url:
        answerer = EndpointAnswerer(Endpoint(f"{url}/v1", "m", 0.2, 4), TOKENIZER)
        with pytest.raises(HelixError, match=r"question \d, 4 tokens: got no whole answer within 0.2 s"):
            answerer.answers(DOCUMENT, lambda: None)
        assert time.monotonic() - since < 10
        gone.set()
    with dripping() as url, pytest.raises(HelixError, match=r"models: got no whole answer within 0.3 s"):
        Endpoint.find(url, RECALL, 0.3, 1)
    assert time.monotonic() - since < 10


@contextmanager
def dripping() -> Iterator[str]:
    """A server that sends a byte now and then, for ever."""
    ended = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def drip() -> None:
            with listening.accept()[0] as client:
                client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
                while not ended.wait(0.02):
                    try:
                        client.sendall(b" ")
                    except OSError:
                        return

        thread = threading.Thread(target=drip)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        ended.set()
        thread.join()


def test_addresses_and_names() -> None:
    for wrong in ("localhost:8000", "ftp://a/v1", "http://", "http://a:b", "http://user:word@a", "http://a?x=1"):
        with pytest.raises(HelixError, match=r"--endpoint: got .*, expected http://host:port or http://host:port/v1"):
            Endpoint.find(wrong, RECALL, 1, 1)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(HelixError, match=rf"127.0.0.1:{port}/v1/models: got ClientConnectorError: .*expected a server"):
        Endpoint.find(f"http://127.0.0.1:{port}", RECALL, 5, 1)
    none, one, several = Server(lambda _: (200, {}), []), ["/served/m"], ["other", "recall"]
    with serving(none) as url:
        with pytest.raises(HelixError, match=r"got status 200 and .*, expected 200 and a list of models"):
            Endpoint.find(url, RECALL, 5, 1)
        none.models = one
        assert Endpoint.find(f"{url}/v1/", RECALL, 5, 1) == Endpoint(f"{url}/v1", "/served/m", 5, 1)
        none.models = several
        assert Endpoint.find(url, RECALL, 5, 1).model == "recall"
        none.models = ["other", "third"]
        with pytest.raises(HelixError, match="it serves other, third, expected one model, or one named recall"):
            Endpoint.find(url, RECALL, 5, 1)


def test_the_command(tmp_path: Path) -> None:
    """The same model behind HTTP answers the same; with one token wrong the row, and the status, say so."""
    known = {
        (*d.ids, *q.told, *q.cue): _answer(d, q)
        for d in make_documents("recall", TOKENIZER, 256, 5)
        for q in d.questions
    }
    wrong = False

    def answer(body: dict[str, Any]) -> Answer:
        right = known[tuple(body["prompt"])]
        return choice(token_ids=[right[0] + (wrong and right == first)])

    first = next(iter(known.values()))
    with serving(Server(answer)) as url:
        given = ["eval", str(RECALL), "--endpoint", url, "--tasks", "recall", "--context", "256", "--limit", "5"]
        done = run_here(*given, "--dtype", "float32", "--json", "--out", str(tmp_path))
        assert done.returncode == 0, done.stderr
        said = json.loads(done.stdout)
        assert said == json.loads((tmp_path / "scores.json").read_text())
        assert said["answered_by"]["helix"] == f"{url}/v1, model recall" and "cp" not in said
        assert [(r["model"], r["n"], r["correct"]) for r in said["rows"]] == [("original", 5, 5), ("helix", 5, 5)]
        assert said["rows"][1]["agreement"] == 1
        wrong = True
        done = run_here(*given, "--dtype", "float32")
        assert done.returncode == 1 and f"helix: {url}/v1, model recall" in done.stdout
        assert "question 0, token 0" in done.stdout and "80.00%" in done.stdout


def _answer(document: Document, question: Question) -> list[int]:
    """The unmodified model's, of one token."""
    decoder = ModelDecoder(_model())
    return [int(decoder.step([*document.ids, *question.told, *question.cue])[-1].argmax())]


_loaded = list[Any]()


def _model() -> Any:
    if not _loaded:
        _loaded.append(load_folder(RECALL, torch.float32)[0])
    return _loaded[0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--cp", "4", "--prefill", "model", "--world", "virtual"], "leave --cp, --prefill, --world: with --endpoint"),
        (["--config", "x.toml"], "leave --config: with --endpoint nothing is compiled"),
        (["--tasks", "recall,mmlu"], "--tasks: mmlu is none of ours, and --endpoint is asked ours alone"),
        (["--timeout", "0"], "--timeout must be > 0 and finite, got 0"),
        (["--in-flight", "0"], "--in-flight must be >= 1, got 0"),
    ],
)
def test_options_without_effect_are_refused(arguments: list[str], said: str) -> None:
    done = run_here("eval", str(RECALL), "--endpoint", "http://127.0.0.1:1", *arguments)
    assert done.returncode == 2 and said in done.stderr


def test_its_options_alone_are_refused() -> None:
    done = run_here("eval", str(RECALL), "--cp", "2", "--timeout", "5", "--in-flight", "2")
    assert done.returncode == 2 and "--timeout, --in-flight can have no effect without --endpoint" in done.stderr


def test_under_torchrun_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    done = run_here("eval", str(RECALL), "--endpoint", "http://127.0.0.1:1")
    assert done.returncode == 2 and "--endpoint is asked by one process" in done.stderr
