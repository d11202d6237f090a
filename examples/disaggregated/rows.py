"""Which sequence lies in which row of the batch, and what the next step does: continuous batching, without processes or tensors."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass, field

from serving import Choice, ServingError


@dataclass(frozen=True)
class Arrival:
    """A cache that enters a row.

    Attributes:
        path: its file, which every rank reads.
        tokens: that it must hold.
    """

    row: int
    path: str
    tokens: int


@dataclass(frozen=True)
class Command:
    """What every rank does next: rows that are left are emptied, caches enter rows, one token goes into each row that has one.

    Attributes:
        left: rows to empty.
        arrivals: caches that enter, each into an empty row.
        tokens: of each row the token to feed, None where it is idle.
        alternatives: how many likely words beside the best one are told.
    """

    left: list[int]
    arrivals: list[Arrival]
    tokens: list[int | None]
    alternatives: int = 0


@dataclass(frozen=True)
class Outcome:
    """What came of a command, the same on every rank.

    Attributes:
        refused: row -> why its cache did not enter; the row is empty.
        chosen: row -> its next token.
    """

    refused: dict[int, str]
    chosen: dict[int, Choice]


@dataclass(eq=False)
class Sequence:
    """A prompt whose cache has come, and its answer as it grows."""

    path: str
    tokens: int
    last: int
    remaining: int
    stop: Collection[int]
    alternatives: int = 0
    row: int | None = None
    _said: asyncio.Queue[Choice | ServingError | None] = field(default_factory=asyncio.Queue)

    def push(self, choice: Choice) -> bool:
        """The next token; True: it was the last one."""
        self.last, self.remaining = choice.token, self.remaining - 1
        self._said.put_nowait(choice)
        if ends := self.remaining == 0 or choice.token in self.stop:
            self._said.put_nowait(None)
        return ends

    def fail(self, error: ServingError) -> None:
        self._said.put_nowait(error)

    async def __aiter__(self) -> AsyncIterator[Choice]:
        """Its tokens, as they come.

        Raises:
            ServingError: what ended it.
        """
        while (said := await self._said.get()) is not None:
            if isinstance(said, ServingError):
                raise said
            yield said


class Rows:
    """The sequences in flight and those that wait for a row."""

    def __init__(self, count: int):
        self.running: dict[int, Sequence] = {}
        self._free, self._left = list(range(count)), list[int]()
        self._waiting: deque[Sequence] = deque()
        self._count = count
        self._fault: ServingError | None = None
        self.has_work = asyncio.Event()

    def check(self) -> None:
        """Raise what ended the rows, if anything did."""
        if self._fault is not None:
            raise self._fault

    def enter(self, sequence: Sequence) -> None:
        """Wait for a row.

        Raises:
            ServingError: there are no rows any more.
        """
        self.check()
        self._waiting.append(sequence)
        self.has_work.set()

    def leave(self, sequence: Sequence) -> None:
        """The sequence is over, or nobody wants it any more; its row is emptied by the next command. May be said twice."""
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        if sequence.row is not None and self.running.get(sequence.row) is sequence:
            del self.running[sequence.row]
            self._left.append(sequence.row)
            self.has_work.set()

    def next_command(self) -> Command:
        """What comes next; sequences that wait have their rows by it."""
        left, self._left = self._left, []
        self._free = sorted({*self._free, *left})
        arrivals = []
        while self._waiting and self._free:
            sequence = self._waiting.popleft()
            sequence.row = self._free.pop(0)
            self.running[sequence.row] = sequence
            arrivals.append(Arrival(sequence.row, sequence.path, sequence.tokens))
        tokens = [self.running[row].last if row in self.running else None for row in range(self._count)]
        self.has_work.clear()
        if self.running:
            self.has_work.set()
        return Command(left, arrivals, tokens, max((s.alternatives for s in self.running.values()), default=0))

    def take(self, outcome: Outcome) -> None:
        """Deal out what came of a command; who left meanwhile gets nothing."""
        for row, why in outcome.refused.items():
            if (sequence := self.running.get(row)) is not None:
                sequence.fail(ServingError(502, f"the prefilled cache was refused: {why}", "handover_error"))
                self.leave(sequence)
        for row, choice in outcome.chosen.items():
            if (sequence := self.running.get(row)) is not None and sequence.push(choice):
                self.leave(sequence)

    def fail(self, error: ServingError) -> None:
        """Nobody gets an answer any more."""
        self._fault = error
        for sequence in [*self.running.values(), *self._waiting]:
            sequence.fail(error)
