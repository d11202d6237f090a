"""Questions about long documents whose answers are known: recall of pairs, needles, and passages to be copied.

A document is filler with facts in it. A fact is a run of words none of which stands anywhere else; it is asked for by its first
word, and the answer is the rest. Many questions share a document, so that one prefill serves them all.

    recall: facts of two words (a key, its value), spread evenly, and some that are said after the document
    needle: facts of five words
    copy:   facts of sixteen words
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from helix_compile.errors import HelixError
from helix_compile.eval.words import FILLERS, WORDS

FACT_WORDS = {"recall": 2, "needle": 5, "copy": 16}
TASKS = tuple(FACT_WORDS)
_SAID_AFTER = 5  # of recall, every n-th fact is said after the document
_PAUSE = 6  # fillers between what is said there and its question


@dataclass(frozen=True)
class Question:
    """One thing to ask of a document.

    Attributes:
        told: tokens that follow the document one by one before the cue; empty where the fact stands in the document.
        cue: tokens that ask.
        answer: tokens that are right, all of them.
        depth: where the fact begins, 0 at the document's start and 1 at its end; None: in `told`.
    """

    told: tuple[int, ...]
    cue: tuple[int, ...]
    answer: tuple[int, ...]
    depth: float | None


@dataclass(frozen=True)
class Document:
    """A text as token ids, and what is asked about it.

    Attributes:
        task: its name in FACT_WORDS.
        context: tokens of the document, what follows it and the longest answer together, at most.
        ids: the document.
        questions: asked one at a time; what one adds to the document is taken back before the next.
    """

    task: str
    context: int
    ids: tuple[int, ...]
    questions: tuple[Question, ...]


def check_task(task: str) -> None:
    """HelixError for a name that is none of TASKS."""
    if task not in FACT_WORDS:
        raise HelixError(f"no task {task!r}; there are {', '.join(TASKS)}")


def make_documents(task: str, tokenizer: Any, context: int, limit: int, seed: int = 0) -> list[Document]:
    """Documents with `limit` questions in all.

    Args:
        task: "recall", "needle" or "copy".
        tokenizer: of transformers; a word may be several of its tokens.
        context: tokens that may be in use at a time.
        limit: questions; documents of as many as the words, and a quarter of the context, hold.
        seed: of everything that is drawn.

    Raises:
        HelixError: no such task, a tokenizer that does not know the words, or a context too short for one fact.
    """
    check_task(task)
    pieces = _Pieces(tokenizer)
    longest = max(map(len, pieces.words)) * FACT_WORDS[task]
    most = min(len(WORDS) // FACT_WORDS[task], context // (4 * longest))
    if most < 1:
        raise HelixError(
            f"context {context}: {task} needs {4 * longest} tokens for one fact of {longest}; ask for a longer one"
        )
    documents = []
    for number, first in enumerate(range(0, limit, most)):
        # a string is hashed alike in every process and version
        draw = random.Random(f"{task} {context} {seed} {number}")
        documents.append(_document(task, pieces, context, min(most, limit - first), draw))
    return documents


class _Pieces:
    """Each word as tokens, as it reads in the middle of a text; what a text begins with."""

    def __init__(self, tokenizer: Any):
        self.words = [self._encoded(tokenizer, word) for word in WORDS]
        self.fillers = [self._encoded(tokenizer, word) for word in FILLERS]
        begun, plain = tokenizer("the").input_ids, tokenizer("the", add_special_tokens=False).input_ids
        self.start = tuple(begun[: len(begun) - len(plain)]) if begun[len(begun) - len(plain) :] == plain else ()

    @staticmethod
    def _encoded(tokenizer: Any, word: str) -> tuple[int, ...]:
        ids = tuple(tokenizer(f" {word}", add_special_tokens=False).input_ids)
        if not ids or tokenizer.unk_token_id in ids:
            raise HelixError(
                f"the tokenizer ({type(tokenizer).__name__}, {len(tokenizer)} tokens) does not know the word {word!r}: "
                "our tasks can't be asked of its model; tasks of lm-evaluation-harness can (--tasks NAME)"
            )
        return ids


def _document(task: str, pieces: _Pieces, context: int, count: int, draw: random.Random) -> Document:
    """One document with `count` facts and a question for each."""
    size = FACT_WORDS[task]
    words = draw.sample(pieces.words, count * size)
    facts = [words[i * size : (i + 1) * size] for i in range(count)]
    after = facts[_SAID_AFTER - 1 :: _SAID_AFTER] if task == "recall" else []
    within = [fact for fact in facts if fact not in after]
    said = [(fact, _flat([*fact, *draw.choices(pieces.fillers, k=_PAUSE)])) for fact in after]
    reserved = max(len(_flat(fact)) for fact in facts) + max((len(told) for _, told in said), default=0)
    length = context - reserved
    ids = list(pieces.start)
    places = []
    room = length - len(ids) - sum(len(_flat(fact)) for fact in within)
    for number, fact in enumerate(within):
        # its share of the filler stands around it, cut at random: facts lie evenly, and at no place that could be learned
        _fill(
            ids, room * number // len(within) + draw.randrange(room // len(within) + 1), within[:number], pieces, draw
        )
        places.append(len(ids))
        ids += _flat(fact)
    _fill(ids, room, within, pieces, draw)
    within_asked = [
        Question((), fact[0], _flat(fact[1:]), place / length) for fact, place in zip(within, places, strict=True)
    ]
    after_asked = [Question(told, fact[0], _flat(fact[1:]), None) for fact, told in said]
    return Document(task, context, tuple(ids), (*within_asked, *after_asked))


def _fill(
    ids: list[int], until: int, facts: Sequence[Sequence[tuple[int, ...]]], pieces: _Pieces, draw: random.Random
) -> None:
    """Append filler until there are `until` tokens of it; a filler of several tokens may be cut."""
    until += len(pieces.start) + sum(len(_flat(fact)) for fact in facts)
    while len(ids) < until:
        ids += draw.choice(pieces.fillers)
    del ids[max(until, 0) :]


def _flat(words: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(token for word in words for token in word)
