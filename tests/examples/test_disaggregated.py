"""examples/disaggregated: the YAML, the rows, text and fields of answers, and all of it in one process against the unmodified model alone.

How it would show that it is wrong: prompts of one token, around a block, as long as there is room for; the same prompt twice; answers
that end at once; more requests than rows, so that rows are idle, empty and used again while others decode. The same check must
reject five broken versions. tests/slow/test_disaggregated.py has it with processes.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import context_server
import generation_server
import make_model
import pytest
import torch
import yaml
from context_server import ContextServer
from generation_server import perform
from router import Text, read_request
from rows import Command, Rows, Sequence
from serving import Choice, Serving, ServingError
from transformers import AutoModelForCausalLM, AutoTokenizer

from helix_compile import CacheEntries, HelixError, HelixModule, helix_compile, write_cache
from helix_compile.eval.tasks import make_documents
from tests.support.serving import BLOCK, ROOM, ROWS, YAML, Prompt, Served, mixed_prompts, served

RECALL = Path(__file__).parents[1] / "data/recall"
EXAMPLE = Path(__file__).parents[2] / "examples/disaggregated"
Run = Callable[..., Any]


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model.build()[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    make_model.main(made)
    return made


@pytest.fixture(scope="module")
def prompts(model: Any) -> list[Prompt]:
    return mixed_prompts(model, 12)


@pytest.fixture(scope="module")
def module(model: Any) -> HelixModule:
    return helix_compile(model, options=Serving.read({**YAML, "model": "m"}).options)


@pytest.fixture
def run(model: Any, module: HelixModule, folder: Path, tmp_path: Path) -> Run:
    """Run a coroutine function on the served example."""

    def within(act: Callable[[Served], Any], **more: Any) -> Any:
        async def whole() -> Any:
            async with served(model, module, {**YAML, "model": str(folder)}, tmp_path, **more) as example:
                return await act(example)

        return asyncio.run(whole())

    return within


# the YAML


def test_the_yaml_of_the_example_is_read() -> None:
    serving = Serving.read(EXAMPLE / "serve.yaml")
    assert (serving.options.cp, serving.options.ep, serving.options.max_batch_size) == (4, 4, 8)
    assert (str(serving.router), str(serving.context), serving.transfer_s) == ("localhost:8000", "localhost:8001", 60)
    assert (serving.max_prompt, serving.request_s) == (512, 180)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("context_servers.tensor_parallel_size", 2, "context_servers.tensor_parallel_size: got 2, expected 1"),
        ("context_servers.enable_magic", True, "context_servers.enable_magic: got True, expected one of urls"),
        ("generation_servers.num_instances", 2, "generation_servers.num_instances: got 2, expected 1"),
        ("generation_servers.urls", ["a:1", "b:2"], r"generation_servers.urls: got \['a:1', 'b:2'\], expected one"),
        ("generation_servers.cp_config.cp_type", "RING", "CP type must be HELIX"),
        ("context_servers.cache_transceiver_config.backend", "NIXL", "backend: got 'NIXL', expected 'DEFAULT'"),
        ("schedule_style", "context_first", "schedule_style: got 'context_first', expected 'generation_first'"),
        ("hostnam", "x", "hostnam"),
        ("model", None, "model: got None, expected a text"),
        ("port", "80", "port"),
        ("dtype", "fp4", "dtype: got 'fp4'"),
    ],
)
def test_a_key_that_would_have_no_effect_is_refused(path: str, value: Any, said: str) -> None:
    given = yaml.safe_load(yaml.safe_dump({**YAML, "model": "m"}))
    *above, last = path.split(".")
    section = given
    for key in above:
        section = section[key]
    section[last] = value
    with pytest.raises(HelixError, match=said):
        Serving.read(given)


# rows


def sequence(name: str, remaining: int = 3) -> Sequence:
    return Sequence(name, 5, 7, remaining, {99})


def outcome(command: Command, **refused: Any) -> Any:
    chosen = {row: Choice(token + 1, 0.0, []) for row, token in enumerate(command.tokens) if token is not None}
    return SimpleNamespace(refused={}, chosen=chosen, **refused)


def test_rows_are_taken_in_turn_and_emptied_before_they_are_used_again() -> None:
    rows, first, second, third = Rows(2), sequence("a", 2), sequence("b"), sequence("c")
    for each in (first, second, third):
        rows.enter(each)
    command = rows.next_command()
    assert [(a.row, a.path) for a in command.arrivals] == [(0, "a"), (1, "b")] and command.left == []
    rows.take(outcome(command))
    command = rows.next_command()
    assert command.tokens == [8, 8] and not command.arrivals  # the third waits
    rows.take(outcome(command))  # the first is done
    command = rows.next_command()
    assert command.left == [0] and [(a.row, a.path) for a in command.arrivals] == [(0, "c")]
    assert command.tokens == [7, 9]


def test_who_leaves_while_a_step_runs_gets_nothing_of_it() -> None:
    rows, gone, stays = Rows(2), sequence("a"), sequence("b")
    rows.enter(gone)
    rows.enter(stays)
    command = rows.next_command()
    rows.leave(gone)
    rows.leave(gone)
    rows.take(outcome(command))
    assert gone.last == 7 and stays.last == 8
    assert rows.next_command() == Command([0], [], [None, 8])
    waits = sequence("c")
    rows.enter(waits)
    rows.leave(waits)
    assert not rows.next_command().arrivals


def test_a_fault_ends_all_and_what_comes_later() -> None:
    async def main() -> None:
        rows, runs, waits = Rows(1), sequence("a"), sequence("b")
        rows.enter(runs)
        rows.next_command()
        rows.enter(waits)
        rows.fail(ServingError(503, "rank 2 died"))
        for each in (runs, waits):
            with pytest.raises(ServingError, match="rank 2 died"):
                [choice async for choice in each]
        with pytest.raises(ServingError, match="rank 2 died"):
            rows.enter(sequence("c"))

    asyncio.run(main())


# text and fields


@pytest.mark.parametrize("words", ["bytes", "recall"])
def test_pieces_of_text_are_the_text(folder: Path, words: str) -> None:
    """Whatever bytes come: whole characters, half ones, stop strings over several tokens; and whole words with blanks between them."""
    tokenizer = AutoTokenizer.from_pretrained(folder if words == "bytes" else RECALL)
    drawn = torch.Generator().manual_seed(0)
    for case in range(60):
        ids = torch.randint(0, len(tokenizer), (30,), generator=drawn).tolist()
        ids = ids if case % 2 else tokenizer.encode("the né 漢字 😀 of\n\nof the")[: case + 2]
        whole = tokenizer.decode(ids, skip_special_tokens=True)
        stop = [] if case % 3 else [whole[4:7] or "q", "\n\n\n"]
        text, said = Text(tokenizer, stop), ""
        for token in ids:
            said += text.push(token)
            assert not any(s in said for s in stop)
            if text.is_stopped:
                break
        found = [whole.find(s) for s in stop if s in whole]
        assert said + text.end() == whole[: min(found, default=None)]
        assert text.is_stopped == bool(found)


@pytest.mark.parametrize(
    ("given", "status", "said"),
    [
        ({"temperature": 0.7}, 400, "temperature: got 0.7, expected 0"),
        ({"temperature": None}, 400, "temperature: got 'none, so 1', expected 0"),
        ({"n": 2}, 400, "n: got 2, expected 1"),
        ({"echo": True}, 400, "echo: got True, expected False"),
        ({"top_k": 5}, 400, "top_k: got 5, expected one of model"),
        ({"model": "gpt"}, 404, "model: got 'gpt', expected 'm'"),
        ({"max_tokens": 0}, 400, "max_tokens: got 0, expected 1 to 96"),
        ({"logprobs": 9}, 400, "logprobs: got 9, expected 0 to 5"),
        ({"stop": [""]}, 400, "stop: got"),
        ({"prompt": []}, 400, "prompt: got '0 tokens', expected 1 to 72"),
        ({"prompt": [1] * 73}, 400, "prompt: got '73 tokens', expected 1 to 72: .* a cache of up to 72"),
        (
            {"prompt": [1] * 60, "max_tokens": 40},
            400,
            "got '60 tokens', expected 1 to 56: max_seq_len is 96, .* takes 40",
        ),
        ({"prompt": [1, 300]}, 400, "prompt: got 'ids from 1 to 300', expected 0 to 255"),
        ({"prompt": {"a": 1}}, 400, "prompt: got .*, expected a text, a list of token ids"),
        ({"prompt": ["a", "b"], "stream": True}, 400, "prompt: got '2 prompts', expected one"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options: .*, where stream is false"),
    ],
)
def test_what_is_not_served_is_refused_by_name(folder: Path, given: dict[str, Any], status: int, said: str) -> None:
    body = {"prompt": "ab", "temperature": 0, **given}
    with pytest.raises(ServingError, match=said) as caught:
        read_request(body, "m", AutoTokenizer.from_pretrained(folder), Serving.read({**YAML, "model": "m"}))
    assert caught.value.status == status and caught.value.param in body


def test_neutral_values_are_taken(folder: Path) -> None:
    more = {"n": 1, "top_p": 1.0, "seed": 3, "presence_penalty": 0.0, "echo": False, "logit_bias": None, "stop": "x"}
    body = {"prompt": ["ab", "c"], "temperature": 0.0, **more}
    asked = read_request(body, "m", AutoTokenizer.from_pretrained(folder), Serving.read({**YAML, "model": "m"}))
    assert (len(asked.prompts), asked.max_tokens, asked.stop, asked.logprobs) == (2, 16, ["x"], None)


# answers


def test_answers_under_load_are_the_unmodified_models(run: Run, prompts: list[Prompt]) -> None:
    async def act(example: Served) -> None:
        assert await example.all(prompts) == [prompt.expected for prompt in prompts]
        group = example.generation.group
        fed = [sum(token is not None for token in command.tokens) for command in group.commands]
        assert set(range(1, ROWS + 1)) <= set(fed)  # full, and with idle rows
        assert 0 < group.most_files <= ROWS + 2  # in rows to be, one ahead, one that is written
        assert not example.generation.rows.running and not list(example.folder.iterdir()) and example.router.taken == 0

    run(act)


def without_reset(patch: pytest.MonkeyPatch) -> None:
    """A row is used again as it was left."""
    whole = HelixModule.reset
    patch.setattr(HelixModule, "reset", lambda self, rows=None: None if rows else whole(self))


def shifted_positions(patch: pytest.MonkeyPatch) -> None:
    """The prefill counts positions from 1."""

    def prefill(model: Any, prompt: list[int], alternatives: int) -> Any:
        positions = torch.arange(1, len(prompt) + 1)[None]
        return whole(partial(model, position_ids=positions), prompt, alternatives)

    whole = context_server.prefill
    patch.setattr(context_server, "prefill", prefill)


def changed_entries(change: Callable[[CacheEntries], CacheEntries], patch: pytest.MonkeyPatch) -> None:
    whole = generation_server.read_cache
    patch.setattr(generation_server, "read_cache", lambda path: change(whole(path)))


def swapped_blocks(entries: CacheEntries) -> CacheEntries:
    """The first two blocks of the latents change places; a roped key carries its position with it, and stays."""
    if entries.latents[0].shape[1] < 2 * BLOCK:
        return entries
    order = [*range(BLOCK, 2 * BLOCK), *range(BLOCK), *range(2 * BLOCK, entries.latents[0].shape[1])]
    return entries._replace(latents=[part[:, order] for part in entries.latents])


def last_token_lost(entries: CacheEntries) -> CacheEntries:
    return entries._replace(
        latents=[torch.cat([part[:, :-1], torch.zeros_like(part[:, :1])], 1) for part in entries.latents]
    )


def wrong_row(patch: pytest.MonkeyPatch) -> None:
    """A cache goes into the row beside its own."""
    whole = generation_server.admit
    patch.setattr(generation_server, "admit", lambda m, a: whole(m, replace(a, row=(a.row + 1) % ROWS)))


BROKEN: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "row not reset": without_reset,
    "positions from 1": shifted_positions,
    "blocks swapped": partial(changed_entries, swapped_blocks),
    "last token lost": partial(changed_entries, last_token_lost),
    "wrong row": wrong_row,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BROKEN)
def test_the_same_check_rejects(run: Run, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    few = [prompt for prompt in prompts if len(prompt.expected) >= 5 and BLOCK <= len(prompt.ids) <= 5 * BLOCK]
    asked = (few * ROWS)[: 2 * ROWS]  # so short that two fit into one row: what is wrong must show in answers

    async def act(example: Served) -> list[Any]:
        return await example.all(asked)

    expected = [prompt.expected for prompt in asked]
    if name == "row not reset":
        assert run(act) == expected
    BROKEN[name](monkeypatch)
    assert run(act) != expected


def test_one_answer_in_full(run: Run, prompts: list[Prompt]) -> None:
    """Streamed and whole: the same text, tokens and log-probabilities, usage, stop strings."""
    prompt = max(prompts, key=lambda p: len(p.expected))

    async def act(example: Served) -> None:
        text = example.router.tokenizer.decode(prompt.expected, skip_special_tokens=True)
        status, whole = await example.post(prompt.body(logprobs=2))
        choice, usage = whole["choices"][0], whole["usage"]
        assert status == 200 and whole["object"] == "text_completion" and whole["model"] == example.router.name
        assert choice["text"] == text and choice["token_ids"] == prompt.expected
        assert usage["completion_tokens"] == len(prompt.expected) and usage["prompt_tokens"] == len(prompt.ids)
        told = choice["logprobs"]
        for logprob, top in zip(told["token_logprobs"], told["top_logprobs"], strict=True):
            assert max(top.values()) == logprob < 0 and 1 <= len(top) <= 2
        *events, last, done = await example.stream(prompt.body(logprobs=2, stream_options={"include_usage": True}))
        assert done == "[DONE]" and last["usage"] == usage and last["choices"] == []
        pieces = [event["choices"][0] for event in events]
        assert "".join(p["text"] for p in pieces) == text
        assert [t for p in pieces for t in p["token_ids"]] == prompt.expected
        assert [t for p in pieces for t in p["logprobs"]["token_logprobs"]] == pytest.approx(told["token_logprobs"])
        assert [p["finish_reason"] for p in pieces] == [None] * (len(pieces) - 1) + [choice["finish_reason"]]
        stop = next(text[i : i + 2] for i in range(2, len(text)) if "\ufffd" not in text[i : i + 2])
        _, cut = await example.post(prompt.body(stop=stop))
        assert cut["choices"][0]["text"] == text[: text.find(stop)] and cut["choices"][0]["finish_reason"] == "stop"
        assert cut["usage"]["completion_tokens"] < len(prompt.expected)
        many = await example.post({**prompt.body(), "prompt": [prompt.ids, prompt.ids[:4]]})
        assert [c["index"] for c in many[1]["choices"]] == [0, 1]
        assert many[1]["choices"][0]["token_ids"] == prompt.expected

    run(act)


def test_a_client_that_goes_leaves_its_row(run: Run, prompts: list[Prompt]) -> None:
    async def act(example: Served) -> None:
        long = {"prompt": [5, 6, 7], "max_tokens": ROOM - 3, "temperature": 0, "stream": True}
        url = example.router.serving.router.url("/v1/completions")
        for _ in range(2 * ROWS):
            async with example.client.post(url, json=long) as answer:
                assert (await answer.content.readline()).startswith(b"data: ")
        assert await example.all(prompts[:4]) == [prompt.expected for prompt in prompts[:4]]
        assert not example.generation.rows.running and example.router.taken == 0

    run(act)


def test_more_than_may_wait_is_refused_at_once(run: Run, prompts: list[Prompt]) -> None:
    async def act(example: Served) -> None:
        answers = await asyncio.gather(*(example.post(prompt.body()) for prompt in prompts[1:7]))
        assert sorted(status for status, _ in answers) == [200] * 2 + [429] * 4
        said = next(a["error"]["message"] for status, a in answers if status == 429)
        assert said == "2 prompts are under way, expected at most 2: try again later"
        assert (await example.post(prompts[1].body()))[0] == 200

    run(act, max_waiting=2)


@pytest.mark.slow
def test_a_model_that_finds_facts_answers(tmp_path: Path) -> None:
    """From a checkpoint to answers: eval's questions, each with a document of 512 tokens."""
    tokenizer = AutoTokenizer.from_pretrained(RECALL)
    documents = [d for task, n in (("needle", 6), ("copy", 4)) for d in make_documents(task, tokenizer, 512, n)]
    asked = [(d, question) for d in documents for question in d.questions]
    prompts = [Prompt([*d.ids, *q.told, *q.cue], len(q.answer), list(q.answer)) for d, q in asked]
    words = {**YAML, "model": str(RECALL), "dtype": "float32", "context_servers": {"urls": ["127.0.0.1:2"]}}
    words["generation_servers"] = {**YAML["generation_servers"], "max_seq_len": 544, "cache_transceiver_config": {}}
    serving = Serving.read(words)
    module = helix_compile(RECALL, options=serving.options, dtype=serving.dtype)
    model = AutoModelForCausalLM.from_pretrained(RECALL, dtype=serving.dtype).eval()

    async def main() -> None:
        async with served(model, module, words, tmp_path) as example:
            assert await example.all(prompts) == [prompt.expected for prompt in prompts]

    asyncio.run(main())


# damaged hand-overs


def damaged(kind: str, path: Path, entries: CacheEntries) -> None:
    """Write a cache that is not what it should be."""
    latents, k_ropes, lengths = entries
    if kind == "lengths":
        entries = CacheEntries(latents, k_ropes, lengths - 1)
    elif kind == "columns":
        entries = CacheEntries([p[:, :-1] for p in latents], [p[:, :-1] for p in k_ropes], lengths)
    elif kind == "shapes":
        entries = CacheEntries(k_ropes, latents, lengths)
    elif kind == "layers":
        entries = CacheEntries(latents[:1], k_ropes[:1], lengths)
    elif kind == "dtype":
        entries = CacheEntries([p.bfloat16() for p in latents], [p.bfloat16() for p in k_ropes], lengths)
    elif kind == "values":
        entries = CacheEntries([p / 0 for p in latents], k_ropes, lengths)
    write_cache(path, entries)
    if kind == "keys":
        path.write_bytes(path.read_bytes().replace(b"k_ropes.1", b"k_ropes.7"))


DAMAGED = {
    "sha256": r"context server .*: the cache that came is damaged: sha256: got \w{64}, expected \w{64}",
    "keys": "the prefilled cache was refused: .* says 4 attentions and holds 9 tensors; expected latents.N",
    "lengths": r"refused: lengths: got \[7\], expected \[8\], the tokens of the prompt: positions 0 to 7",
    "columns": r"refused: latents.0: got \[1, 7, 32\], expected \[1, 8, width\]",
    "shapes": "refused: .*latent and k_rope have widths 16 and 32; expected R = 32 and r = 16; .* swapped",
    "layers": "refused: .*1 latents and 1 k_ropes for 4 cached attentions",
    "dtype": "refused: latents.0: got torch.bfloat16, expected torch.float32, the model's",
    "values": "refused: latents.0: got values that are not finite",
}


def test_a_damaged_cache_is_refused_by_name_and_others_go_on(
    run: Run, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each kind once, among requests that are answered; a refusal comes before anything is written, also as a batch's first."""
    bad = {i: (kind, [i] * 8) for i, kind in enumerate(DAMAGED)}
    whole = ContextServer.write

    def write(self: ContextServer, prompt: list[int], alternatives: int, path: Path) -> Any:
        handover = whole(self, prompt, alternatives, path)
        kind, ids = bad.get(prompt[0], ("", []))
        if prompt != ids:
            return handover
        damaged(kind, path, context_server.prefill(self.model, prompt, 0)[0])
        if kind == "sha256":
            path.write_bytes(path.read_bytes()[:-1] + b"!")
            return handover
        return replace(handover, sha256=context_server.hashlib.sha256(path.read_bytes()).hexdigest())

    monkeypatch.setattr(ContextServer, "write", write)

    async def act(example: Served) -> None:
        for kind, ids in bad.values():
            body = {"prompt": ids, "max_tokens": 5, "temperature": 0}
            (status, answer), *good = await asyncio.gather(
                example.post(body), *(example.post(p.body()) for p in prompts[2:4])
            )
            assert status == 502 and re.search(DAMAGED[kind], answer["error"]["message"]), answer
            assert answer["error"]["type"] == "handover_error"
            for prompt, (_, given) in zip(prompts[2:4], good, strict=True):
                assert given["choices"][0]["token_ids"] == prompt.expected
        first, error = await example.stream({"prompt": bad[2][1], "max_tokens": 5, "temperature": 0})
        assert first["choices"][0]["text"] is not None and "lengths" in error["error"]["message"]  # and no [DONE]
        assert not example.generation.rows.running and not list(example.folder.iterdir())

    run(act)


def test_without_a_prefill_and_with_a_rank_that_stops_requests_end_with_the_reason(
    run: Run, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(module: HelixModule, command: Command) -> Any:
        if command.arrivals:
            raise HelixError("rank 0 lost its peers in step 3: rank 2 died")
        return perform(module, command)

    def no_memory(*_: object) -> Any:
        raise RuntimeError("out of memory")

    async def act(example: Served) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(ContextServer, "write", no_memory)
            status, answer = await example.post(prompts[2].body())
            assert status == 502 and re.fullmatch(
                r"context server 127.0.0.1:\d+: RuntimeError: out of memory", answer["error"]["message"]
            )
        assert (await example.all(prompts[2:3])) == [prompts[2].expected]
        monkeypatch.setattr("tests.support.serving.perform", lost)
        answers = await example.all([p for p in prompts if len(p.expected) > 1][:6])
        assert sum("ranks stopped: rank 0 lost its peers in step 3: rank 2 died" in str(a) for a in answers) >= ROWS
        assert all(isinstance(a, str) for a in answers)
        assert (await example.post(prompts[2].body()))[0] == 503

    with pytest.raises(HelixError, match="rank 2 died"):
        run(act)
