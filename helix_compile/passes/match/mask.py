"""Learn what a mask does: evaluate it whole at the first positions and at strips further on. Causal + padding passes, and
with it a window (a query at p sees keys in (p - W, p]) or chunks (keys in [p // C * C, p]).

W and C are read off the first query that does not see all before it, then the whole mask must be what they say. A window
of 4096 looks causal near 0, a top-k mask needs the hidden states: neither can pass for what it is not. Every layer that a
body computes is looked at: layers of one body may be given different masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from helix_compile.capture.captured import CapturedGraph
from helix_compile.errors import MatchError, PlanError
from helix_compile.ir.dataflow import NotRun, ancestors, evaluate
from helix_compile.ir.graph import input_ref, node_named, placeholders, source_line
from helix_compile.plan.matches import AttentionMatch, permuted

ROWS = 4  # sequences of the square at the first positions; two of them padded on the left


SQUARE = 512  # its side: all queries of an empty cache against all keys


STRIP, STRIP_ELEMENTS = 64, 2**21  # queries of a strip at most, and queries x keys


LONGEST = 2**24  # tokens; the mask of one query over them takes a few hundred MB to evaluate


@dataclass(frozen=True)
class _Subject:
    """The mask of one site, as one layer's call gives it."""

    captured: CapturedGraph
    body: str
    match: AttentionMatch
    call: fx.Node


@dataclass(frozen=True)
class _Reach:
    """How far back a query sees: a window, chunks, or (both 0) all."""

    window: int = 0
    chunk: int = 0

    def hidden(self, query: Tensor, key: Tensor) -> Tensor:
        """Where a key at a position is forgotten by a query at another."""
        if self.window:
            return key <= query - self.window
        return key < query // self.chunk * self.chunk if self.chunk else torch.zeros_like(key <= query)

    def __str__(self) -> str:
        if self.window:
            return f"a window of {self.window}"
        return f"chunks of {self.chunk}" if self.chunk else "causal"


def with_reach(captured: CapturedGraph, body: str, match: AttentionMatch, max_seq_len: int) -> AttentionMatch:
    """The site with its window or chunks, which count tokens: its mask is that and padding, up to `max_seq_len`, in every layer.

    Raises:
        MatchError: a mask that does something else, or that differs between the layers of the body.
        PlanError: a capacity at which no mask can be evaluated.
    """
    if max_seq_len > LONGEST:
        raise PlanError(
            f"option max_seq_len={max_seq_len}: got more than masks can be evaluated for, expected at most {LONGEST}"
        )
    found: _Reach | None = None
    for subject in _subjects(captured, body, match):
        reach = _reach_of(subject, max_seq_len)
        if found is not None and reach != found:
            raise _mask_error(subject, f"it is {reach}, that of another layer with the same graph is {found}")
        found = reach
    assert found is not None
    return replace(match, window=found.window, chunk=found.chunk)


def _reach_of(subject: _Subject, max_seq_len: int) -> _Reach:
    """The window or chunks of one mask, which is compared with them wherever it is looked at."""
    side = min(max_seq_len, SQUARE)
    mask = torch.ones(ROWS, side, dtype=torch.int64)
    mask[0, : min(2, side - 1)] = 0
    mask[1, : side // 3] = 0
    square = _allowed(subject, mask, side)
    reach = _learned(subject, square, side, max_seq_len)
    _compare(subject, mask, square, reach)
    for total in _totals(reach, side, max_seq_len):
        strip = min(STRIP, total, max(1, STRIP_ELEMENTS // total))
        ones = torch.ones(1, total, dtype=torch.int64)
        _compare(subject, ones, _allowed(subject, ones, strip), reach)
    return reach


def _totals(reach: _Reach, side: int, max_seq_len: int) -> Iterator[int]:
    """Where strips of queries are looked at: halfway and halfway again, and where a window or the first chunks end."""
    total = max_seq_len
    while total > side:
        yield total
        total = max(side, total // 2)
    starts = [reach.window] if reach.window else [reach.chunk, 2 * reach.chunk] if reach.chunk else []
    yield from {total for start in starts if side < (total := min(start + STRIP // 2, max_seq_len))}


def _learned(subject: _Subject, square: Tensor, side: int, max_seq_len: int) -> _Reach:
    """What the first query that does not see all before it says, in a sequence without padding."""
    lost = torch.ones(side, side).tril().bool() & ~square[-1, 0]
    forgetful = lost.any(dim=1).nonzero().flatten()
    if len(forgetful):
        query = int(forgetful[0])
        seen = square[-1, 0, query]
    elif max_seq_len > side and _forgets(subject, max_seq_len):
        query = _first_forgetful(subject, side, max_seq_len) - 1
        seen = _allowed(subject, torch.ones(1, query + 1, dtype=torch.int64), 1)[0, 0, 0]
    else:
        return _Reach()
    oldest = int(seen.to(torch.int64).argmax())
    if oldest == 1:
        return _Reach(window=query)
    return _Reach(chunk=query) if oldest == query else _Reach()


def _forgets(subject: _Subject, total: int) -> bool:
    """True if the last of `total` tokens does not see all before it."""
    return not bool(_allowed(subject, torch.ones(1, total, dtype=torch.int64), 1).all())


def _first_forgetful(subject: _Subject, low: int, high: int) -> int:
    """The shortest sequence whose last token does not see all: that of `high` tokens has such a one, of `low` not."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _forgets(subject, middle) else (middle, high)
    return high


def _subjects(captured: CapturedGraph, body: str, match: AttentionMatch) -> Iterator[_Subject]:
    """One for each set of outer values that layers of this body give to what the mask is computed from."""
    graph = captured.bodies[body].graph
    read = ancestors([node_named(graph, match.mask)], until=[])
    read_arguments = [i for i, p in enumerate(placeholders(graph)) if p in read]
    seen = set()
    for node in captured.graph.graph.nodes:
        if node.op == "call_module" and node.target == body:
            key = tuple(node.args[i] for i in read_arguments if not _is_past(node.args[i]))
            if key not in seen:
                seen.add(key)
                yield _Subject(captured, body, match, node)


def _is_past(node: Any) -> bool:
    """A layer's own past: zeros of its shape stand for it here, whichever layer's it is."""
    return node.op == "placeholder" and input_ref(node).kind == "past"


def _compare(subject: _Subject, mask: Tensor, got: Tensor, reach: _Reach) -> None:
    """The last T queries against all keys, for a padding mask [B, S + T]; queries that are padding may see anything."""
    total, T = mask.shape[1], got.shape[2]
    places = mask.cumsum(1) - 1  # of tokens: padding in front does not count
    query, key = places[:, None, -T:, None], places[:, None, None]
    seen = torch.arange(total) <= torch.arange(total - T, total)[:, None]
    expected = seen & ~reach.hidden(query, key) & (mask[:, None, None] > 0)
    different = (got != expected) & (mask[:, None, -T:, None] > 0)
    if count := int(different.sum()):
        *_, query_at, key_at = (int(x) for x in different.nonzero()[0])
        on_padding = not bool((different & (mask[:, None, None] > 0)).any())
        guess = (
            "keys of padding are seen: attention_mask is not part of it"
            if on_padding
            else "bidirectional attention, keys that are always or never seen, or a window by columns?"
        )
        raise _mask_error(
            subject,
            f"it differs from {reach} + padding at {count:,} of {different.numel():,} places, first for the query at "
            f"{total - T + query_at} and the key at {key_at} of {total:,} ({guess})",
        )


def _mask_error(subject: _Subject, why: str) -> MatchError:
    node = node_named(subject.captured.bodies[subject.body].graph, subject.match.anchor)
    return MatchError(
        f"layer {subject.call.meta['layer']}: attention at node `{node.name}` ({source_line(node)}) has a mask that Helix "
        f"can't keep: {why}. Expected: every key at a position <= the query's, or the last W of them, or those of the query's "
        "chunk of C, except padding. nearest that works: full causal attention, a sliding window, chunks; "
        'unmatched="keep" leaves such layers as they are, if others match'
    )


def _allowed(subject: _Subject, mask: Tensor, T: int) -> Tensor:
    """Mask of the site [B, 1 or H, T, S + T], True = visible, for a 2-D padding mask [B, S + T]."""
    B, total = mask.shape
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -T:]
    inputs = {"input_ids": torch.zeros(B, T, dtype=torch.int64), "attention_mask": mask, "position_ids": positions}
    captured = subject.captured
    graph = captured.bodies[subject.body].graph
    outer_args = dict(zip(placeholders(graph), subject.call.args, strict=True))
    sizes = B, T, total - T

    def outer_input(node: fx.Node) -> Any:
        kind, name = input_ref(node)
        if kind == "input":
            return inputs[name]
        if kind == "past":
            _, heads, _, width = node.meta["val"].shape
            return torch.zeros(1).expand(B, heads, total - T, width)
        raise KeyError(name)

    known: dict[fx.Node, Any] = {}
    outer_size = _size_reader(captured.graph.graph, *sizes)
    try:
        value = evaluate(
            node_named(graph, subject.match.mask),
            {},
            lambda n: evaluate(outer_args[n], known, outer_input, given=outer_size),
            given=_size_reader(graph, *sizes),
        )
    except KeyError as missing:
        raise _mask_error(
            subject, f"it is computed from {missing} (sparse attention over a top-k of keys?)"
        ) from missing
    except NotRun as stopped:
        raise _mask_error(subject, f"it does not run for B={B}, T={T}, S={total - T}: {stopped}") from stopped
    value = value[(None,) * (4 - value.dim())]
    if subject.match.mask_form != "BHTS":
        value = permuted(value, subject.match.mask_form, "BHTS")
    if value.dtype is torch.bool:
        return value
    seen = value > torch.finfo(value.dtype).min / 2
    if bool((value[seen] != 0).any()):
        raise _mask_error(subject, "it adds other numbers than 0 to scores of visible keys (a bias by distance?)")
    return seen


def _size_reader(graph: fx.Graph, B: int, T: int, S: int) -> Callable[[fx.Node], int | None]:
    """Numbers for the nodes that are sizes, so that nobody asks for the hidden states they are read off."""
    numbers: dict[Any, int] = {}
    for node in placeholders(graph):
        kind, name = input_ref(node)
        shape = getattr(node.meta["val"], "shape", ())
        dims = {0: B, 1: T} if kind == "hidden" or name == "input_ids" else {2: S} if kind == "past" else {}
        for dim, number in dims.items():
            if isinstance(shape[dim], torch.SymInt):
                numbers[shape[dim].node.expr] = number

    def size(node: fx.Node) -> int | None:
        value = node.meta.get("val")
        if not isinstance(value, torch.SymInt):
            return None
        number = value.node.expr.subs(numbers)
        return int(number) if number.is_number else None

    return size
