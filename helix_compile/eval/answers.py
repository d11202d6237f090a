"""Who answers: anything that continues a document and a cue. A decoder in this process is one; a server (eval/endpoint.py) another."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Protocol

from helix_compile.eval.decoders import Decoder
from helix_compile.eval.tasks import Document


class Answerer(Protocol):
    """Continues texts greedily.

    For each question of a document it is given ids + told + cue, and generates as many tokens as the answer has, or fewer where the
    model ends it. How it does so is its own: it may hold the document once, or send every prompt whole.
    """

    def answers(self, document: Document, done: Callable[[], None]) -> list[tuple[int, ...]]:
        """New tokens of each question, in order; calls `done` after each."""


class LocalAnswerer:
    """A decoder answers: one prefill a document; what was said after it goes in token by token, as does the answer.

    Args:
        decoder: of the model.
        ends: tokens that end an answer, and are not of it, as generate() and servers have it.
    """

    def __init__(self, decoder: Decoder, ends: Collection[int] = ()):
        self._decoder, self._ends = decoder, ends

    def answers(self, document: Document, done: Callable[[], None]) -> list[tuple[int, ...]]:
        """As Answerer has it."""
        self._decoder.begin(document.ids)
        given = []
        for question in document.questions:
            self._decoder.truncate(len(document.ids))
            given.append(self._answer(question.told, question.cue, len(question.answer)))
            done()
        return given

    def _answer(self, told: Sequence[int], cue: Sequence[int], count: int) -> tuple[int, ...]:
        for token in told:
            self._decoder.step([token])
        new = [int(self._decoder.step(cue)[-1].argmax())]
        while len(new) < count and new[-1] not in self._ends:
            new.append(int(self._decoder.step([new[-1]])[-1].argmax()))
        return until_end(new, self._ends)


def until_end(tokens: Sequence[int], ends: Collection[int]) -> tuple[int, ...]:
    """The tokens before the first that ends an answer."""
    return tuple(tokens[: next((n for n, token in enumerate(tokens) if token in ends), len(tokens))])
