"""Who answers: anything that continues a document and a cue. A decoder in this process is one; a server would be another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from helix_compile.eval.decoders import Decoder
from helix_compile.eval.tasks import Document


class Answerer(Protocol):
    """Continues texts greedily.

    For each question of a document it is given ids + told + cue, and generates as many tokens as the answer has. How it does so is
    its own: it may hold the document once, or send every prompt whole.
    """

    def answers(self, document: Document, done: Callable[[], None]) -> list[tuple[int, ...]]:
        """New tokens of each question, in order; calls `done` after each."""


class LocalAnswerer:
    """A decoder answers: one prefill a document; what was said after it goes in token by token, as does the answer."""

    def __init__(self, decoder: Decoder):
        self._decoder = decoder

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
        while len(new) < count:
            new.append(int(self._decoder.step([new[-1]])[-1].argmax()))
        return tuple(new)
