"""A step of one shape on tape: what it launches, recorded once and played again without the Python between the launches.

    [piece] call apart [piece] call apart ... [piece]

A *piece* is a run of launches that a recorder holds as one (a CUDA graph); where nothing stands in the way the whole step is one.
What can't be recorded stands apart, and is called at every step: collectives of a transport that works through the host, ops whose
host code reads values. Its results are copied to where the next piece has read them. Nothing may be read off a tensor between two
recorded launches, and what a piece computed lies where it was: the next step writes over it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from helix_compile.errors import RuntimeFault


class Piece(Protocol):
    """Launches that were recorded."""

    def replay(self) -> None:
        """Do them again, in their order, on the tensors that they were recorded with."""


class Recorder(Protocol):
    """Makes pieces. What is launched between begin() and end() need not have been computed then."""

    def warm_up(self, run: Callable[[], Any]) -> Any:
        """Run what will be recorded later, as it will be: what is made once (code, handles, workspaces) is made here."""

    def begin(self) -> None:
        """Record from here on."""

    def launch(self, call: Callable[..., Any], arguments: Sequence[Any]) -> Any:
        """One call inside of a piece."""

    def end(self) -> Piece:
        """What was recorded since begin()."""

    def abandon(self) -> None:
        """Forget it: something raised."""

    def wait(self) -> None:
        """Until what was replayed is done: a piece may go then."""

    def mark(self) -> Callable[[], bool]:
        """Asks, without waiting, whether all that was replayed before is done."""


class Tape:
    """Args: recorder: of its pieces.

    Attributes:
        pieces, apart: how many there are of each.
        sent, collectives: what one step adds to the counters of its world.
    """

    def __init__(self, recorder: Recorder):
        self._recorder = recorder
        self._items: list[Callable[[], None]] = []
        self._recording = False
        self._outputs: Any = None
        self.is_done = False
        self.pieces, self.apart_calls = 0, 0
        self.sent: Counter[Any] = Counter()
        self.collectives: Counter[tuple[str, str]] = Counter()

    def launch(self, call: Callable[..., Any], arguments: Sequence[Any]) -> Any:
        """Call what a piece can hold."""
        if not self._recording:
            self._recorder.begin()
            self._recording = True
        return self._recorder.launch(call, arguments)

    def apart(self, call: Callable[..., Any], arguments: Sequence[Any] = ()) -> Any:
        """Call what no piece can hold, now and at every step; its tensors are copied to a place of their own."""
        self._close()
        self.apart_calls += 1
        kept = pytree.tree_map(_place_for, call(*arguments))
        self._items.append(lambda: _fill(kept, call(*arguments)))
        return kept

    def finish(self, outputs: Any) -> Any:
        """The step is recorded, and was taken once; its outputs, which the next one writes over."""
        self._close()
        self._outputs, self.is_done = outputs, True
        return outputs

    def mark(self) -> Callable[[], bool]:
        """See Recorder."""
        return self._recorder.mark()

    @property
    def what(self) -> str:
        """What a rank is at while it takes the step."""
        if not self.is_done:
            return "a step that is recorded"
        count, graphs = sum(self.collectives.values()), f"{self.pieces} graphs" if self.pieces > 1 else "graph"
        return f"replayed {graphs} of {count} collective{'s' * (count != 1)}"

    def abandon(self) -> None:
        """The step raised while it was recorded."""
        if self._recording:
            self._recorder.abandon()
            self._recording = False

    def play(self) -> Any:
        """Take the step again; its outputs, which the next one writes over."""
        assert self.is_done
        for again in self._items:
            again()
        return self._outputs

    def _close(self) -> None:
        """End the piece and run it: what was recorded has not been computed yet."""
        if self._recording:
            self._recording = False
            piece = self._recorder.end()
            self.pieces += 1
            self._items.append(piece.replay)
            piece.replay()


@contextmanager
def recorded(tape: Tape, sent: Counter[Any], collectives: Counter[tuple[str, str]]) -> Iterator[None]:
    """Around the step that is recorded: what it adds to these counters of its world is kept, and no piece is left open."""
    before = Counter(sent), Counter(collectives)
    try:
        yield
    except BaseException:
        tape.abandon()
        raise
    tape.sent, tape.collectives = sent - before[0], collectives - before[1]


def _place_for(value: Any) -> Any:
    """Memory for what a call gives, filled with it; of a number the number."""
    if not isinstance(value, Tensor):
        return value
    with torch.inference_mode(False):  # written at steps in any mode
        return torch.empty_like(value).copy_(value)


def _fill(kept: Any, result: Any) -> None:
    places, spec = pytree.tree_flatten(kept)
    values, now = pytree.tree_flatten(result)
    if spec != now:
        raise RuntimeFault(f"a call gave {now} where it gave {spec} when the step was recorded; use cuda_graphs=False")
    for place, value in zip(places, values, strict=True):
        if not isinstance(place, Tensor):
            same = place == value
        else:
            same = isinstance(value, Tensor) and place.shape == value.shape and place.dtype == value.dtype
            if same:
                place.copy_(value)
        if not same:
            raise RuntimeFault(
                f"a call gave {_said(value)} where it gave {_said(place)} when the step was recorded, in a step of the same shape; "
                "use cuda_graphs=False"
            )


def _said(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
