"""What the three servers share: the YAML, the hand-over's form, errors as OpenAI words them."""

from __future__ import annotations

import asyncio
import ctypes
import json
import signal
import traceback
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from aiohttp import web

from helix_compile import HelixError, HelixOptions

HANDOVER = "Helix-Handover"  # header of a prefill's answer, whose body is the file of write_cache()
PREFILL, GENERATE, HEALTH = "/prefill", "/generate", "/health"

# of cache_transceiver_config; a cache goes as a safetensors file over HTTP, whatever backend an engine would choose by default
_TRANSCEIVER: dict[str, Any] = {"backend": "DEFAULT", "max_tokens_in_buffer": None, "kv_transfer_timeout_ms": 60_000}
# what a server here can be, where the YAML says it: key -> the one value
_ONE = {"num_instances": 1, "pipeline_parallel_size": 1}
_CONTEXT = {**_ONE, "tensor_parallel_size": 1, "context_parallel_size": 1, "max_batch_size": 1, "backend": "pytorch"}
_TOP = {"schedule_style": "generation_first", "backend": "pytorch"}
_DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SECTIONS = ("dtype", "hostname", "port", "model", "req_timeout_secs", "context_servers", "generation_servers")


@dataclass(frozen=True)
class Address:
    """host:port of a server."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    def url(self, path: str) -> str:
        return f"http://{self}{path}"


@dataclass(frozen=True)
class Serving:
    """One YAML of disaggregated serving.

    Attributes:
        model: checkpoint folder.
        dtype: of weights and caches; None: the folder's.
        router, context, generation: where they listen.
        options: of the Helix group, as its section says them.
        max_prompt: tokens of the longest cache that is handed over.
        transfer_s: how long a prefill and its hand-over may take, in seconds.
        request_s: how long a request may take.
    """

    model: Path
    dtype: torch.dtype | None
    router: Address
    context: Address
    generation: Address
    options: HelixOptions
    max_prompt: int
    transfer_s: float
    request_s: float

    @classmethod
    def read(cls, source: str | Path | Mapping[str, Any]) -> Serving:
        """Of a file, or the mapping that it holds.

        Raises:
            HelixError: key, got, expected; also for a key that would have no effect here.
        """
        said = source if isinstance(source, Mapping) else yaml.safe_load(Path(source).read_text())
        if not isinstance(said, Mapping):
            raise HelixError(f"{source}: got {type(said).__name__}, expected a mapping: see serve.yaml")
        options = HelixOptions.from_trtllm(said)
        _only(said, "", _TOP, _SECTIONS)
        context, generation = (_section(said, f"{kind}_servers") for kind in ("context", "generation"))
        _only(context, "context_servers.", _CONTEXT, ("urls", "cache_transceiver_config"))
        _only(generation, "generation_servers.", _ONE)
        sender = _transceiver(context, "context_servers.")
        receiver = _transceiver(generation, "generation_servers.")
        buffers = {t["max_tokens_in_buffer"] or options.max_seq_len for t in (sender, receiver)}
        return cls(
            model=Path(_text(said, "model")),
            dtype=_dtype(said.get("dtype", "auto")),
            router=Address(said.get("hostname", "localhost"), _number(said, "", "port", 8000)),
            context=_address(context, "context_servers."),
            generation=_address(generation, "generation_servers."),
            options=options,
            max_prompt=min(*buffers, options.max_seq_len),
            transfer_s=receiver["kv_transfer_timeout_ms"] / 1000,
            request_s=_number(said, "", "req_timeout_secs", 180),
        )


def _section(said: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    if not isinstance(found := said.get(key), Mapping):
        raise HelixError(f"{key}: got {found!r}, expected the options of one server")
    return found


def _only(said: Mapping[str, Any], prefix: str, one: Mapping[str, Any], other: tuple[str, ...] = ()) -> None:
    """Keys with one possible value, and, where `other` is given, no keys beside those two."""
    for key, value in said.items():
        if key in one and value != one[key]:
            raise HelixError(f"{prefix}{key}: got {value!r}, expected {one[key]!r}: the one that this example serves")
        if other and key not in one and key not in other:
            raise HelixError(f"{prefix}{key}: got {value!r}, expected one of {', '.join([*other, *one])}")


def _transceiver(server: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    said = server.get("cache_transceiver_config", {})
    prefix += "cache_transceiver_config."
    _only(said, prefix, {"backend": "DEFAULT"}, tuple(_TRANSCEIVER))
    read = {key: _number(said, prefix, key, usual) for key, usual in _TRANSCEIVER.items() if key != "backend"}
    return {**_TRANSCEIVER, **read}


def _number(said: Mapping[str, Any], prefix: str, key: str, usual: int | None) -> Any:
    value = said.get(key, usual)
    if value is not usual and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise HelixError(f"{prefix}{key}: got {value!r}, expected an int >= 1")
    return value


def _text(said: Mapping[str, Any], key: str) -> str:
    if not isinstance(value := said.get(key), str):
        raise HelixError(f"{key}: got {value!r}, expected a text")
    return value


def _dtype(name: object) -> torch.dtype | None:
    if name not in _DTYPES:
        raise HelixError(f"dtype: got {name!r}, expected one of {', '.join(_DTYPES)}")
    return _DTYPES[str(name)]


def _address(server: Mapping[str, Any], prefix: str) -> Address:
    urls = server.get("urls")
    host, _, port = urls[0].rpartition(":") if isinstance(urls, list) and len(urls) == 1 else ("", "", "")
    if not (host and port.isdecimal()):
        raise HelixError(f"{prefix}urls: got {urls!r}, expected one, [host:port]")
    return Address(host, int(port))


@dataclass(frozen=True)
class Handover:
    """What a prefill says beside the file of its cache.

    Attributes:
        sha256: of the file.
        tokens: of the prompt, which the cache holds, positions 0 to tokens - 1.
        first: the token behind the prompt.
    """

    sha256: str
    tokens: int
    first: Choice

    def header(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def of_header(cls, text: str) -> Handover:
        said = json.loads(text)
        return cls(said["sha256"], said["tokens"], Choice(**said["first"]))


@dataclass(frozen=True)
class Choice:
    """A token that was chosen, by the largest logit.

    Attributes:
        token: its id.
        logprob: its natural log of probability.
        top: the most likely tokens with theirs, likeliest first; empty where nobody asked.
    """

    token: int
    logprob: float
    top: list[list[Any]]


class ServingError(Exception):
    """A request that is answered by an error.

    Attributes:
        status: of HTTP.
        kind: OpenAI's `type`.
        param: the field of the request that is to blame.
    """

    def __init__(self, status: int, message: str, kind: str = "server_error", param: str | None = None):
        super().__init__(message)
        self.status, self.kind, self.param = status, kind, param

    def body(self) -> dict[str, Any]:
        """As OpenAI's API has it."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.status}}

    @classmethod
    def of_body(cls, body: Mapping[str, Any]) -> ServingError:
        said = body["error"]
        return cls(said["code"], said["message"], said["type"], said["param"])


@web.middleware
async def errors_as_json(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """What a handler raises, as an answer."""
    try:
        return await handler(request)
    except ServingError as error:
        retry = {"Retry-After": "1"} if error.status in (429, 503) else None
        return web.json_response(error.body(), status=error.status, headers=retry)
    except web.HTTPException as error:
        body = ServingError(error.status, f"{request.method} {request.path}: {error.reason}", "invalid_request_error")
        return web.json_response(body.body(), status=error.status)
    except ConnectionError:  # the client has gone: nobody to tell
        raise
    except Exception as error:  # whoever asked hears what it was; the log has where
        traceback.print_exc()
        return web.json_response(ServingError(500, f"{type(error).__name__}: {error}").body(), status=500)


async def listen(app: web.Application, address: Address) -> web.AppRunner:
    """Serve; a handler whose client has gone is cancelled. Signals stay as they are: a rank has words to say before it ends."""
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=5)
    await runner.setup()
    await web.TCPSite(runner, address.host, address.port).start()
    return runner


async def until_ended() -> None:
    """Until SIGINT or SIGTERM comes."""
    ended, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, ended.set)
    await ended.wait()


def end_with_parent() -> None:
    """SIGTERM for this process when the one that started it is gone, however it went (Linux)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
