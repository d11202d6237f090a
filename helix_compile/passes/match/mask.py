"""Learn what a mask does: evaluate it whole at the first positions and at strips further on. Causal + padding passes, and
with it a window (a query at p sees keys in (p - W, p]) or chunks (keys in [p // C * C, p]).

W and C are read off the first query that does not see all before it, then the whole mask must be what they say. A window
of 4096 looks causal near 0: it can't pass for that. Where an indexer chooses keys (selection.py), other indices are put in
place of the chosen ones: causal + padding + "is one of them" passes. Every layer that a body computes is looked at: layers
of one body may be given different masks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer

from helix_compile.capture.captured import CapturedGraph, source_of
from helix_compile.errors import MatchError, PlanError
from helix_compile.ir.dataflow import NotRun, ancestors, evaluate
from helix_compile.ir.graph import input_ref, node_named, past_dim, placeholders, source_line
from helix_compile.plan.matches import AttentionMatch, Selection, permuted

ROWS = 4  # sequences of the square at the first positions; two of them padded on the left


SQUARE = 512  # its side: all queries of an empty cache against all keys


STRIP, STRIP_ELEMENTS = 64, 2**21  # queries of a strip at most, and queries x keys


LONGEST = 2**24  # tokens; the mask of one query over them takes a few hundred MB to evaluate


@dataclass(frozen=True)
class Subject:
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
        PlanError: a capacity at which no mask can be evaluated, or at which the model's own cache forgets what its mask shows.
    """
    if max_seq_len > LONGEST:
        raise PlanError(
            f"option max_seq_len={max_seq_len}: got more than masks can be evaluated for, expected at most {LONGEST}"
        )
    found: _Reach | None = None
    chosen = [match.selection.indices] if match.selection else []
    for subject in subjects_of(captured, body, match, match.mask, chosen):
        reach = _reach_of(subject, max_seq_len)
        if found is not None and reach != found:
            raise mask_error(subject, f"it is {reach}, that of another layer with the same graph is {found}")
        found = reach
        _check_cache(subject, reach, max_seq_len)
    assert found is not None
    return replace(match, window=found.window, chunk=found.chunk)


def _reach_of(subject: Subject, max_seq_len: int) -> _Reach:
    """The window or chunks of one mask, which is compared with them wherever it is looked at."""
    # an indexer chooses among all keys: with a window too, the comparison finds it
    reach = _Reach() if subject.match.selection else _learned(subject, max_seq_len)
    for mask, T in (*tried_masks(max_seq_len), *_at_the_start_of(reach, max_seq_len)):
        _compare(subject, mask, T, reach)
    return reach


def _check_cache(subject: Subject, reach: _Reach, max_seq_len: int) -> None:
    """Transformers' cache may forget tokens by itself; elsewhere it forgets only what the mask hides too.

    No MatchError: a layer that is kept would get a cache that holds all, as the graphs do.
    """
    layer, config = subject.call.meta["layer"], getattr(subject.captured.model, "config", None)
    if not isinstance(config, PreTrainedConfig):
        return
    caches = DynamicCache(config=config).layers[layer : layer + 1]
    for cache in (x for x in caches if isinstance(x, DynamicSlidingWindowLayer)):
        window = cache.sliding_window
        if window < max_seq_len and not 0 < (reach.window or reach.chunk) <= window:
            raise PlanError(
                f"layer {layer}: transformers' cache ({type(cache).__name__}) forgets tokens behind {window} by itself, while "
                f"the mask is {reach}: what a query sees depends on how the tokens came, call by call, and no graph holds it. "
                f"nearest that works: max_seq_len={window}, or a configuration whose layers do not forget"
            )


def _at_the_start_of(reach: _Reach, max_seq_len: int) -> Iterator[tuple[Tensor, int]]:
    """As tried_masks: where a window, or the first and the second chunk, end beyond the square."""
    starts = [reach.window] if reach.window else [reach.chunk, 2 * reach.chunk] if reach.chunk else []
    for total in dict.fromkeys(min(start + STRIP // 2, max_seq_len) for start in starts):
        if total > SQUARE:
            yield torch.ones(1, total, dtype=torch.int64), min(STRIP, max(1, STRIP_ELEMENTS // total))


def _learned(subject: Subject, max_seq_len: int) -> _Reach:
    """What the first query that does not see all before it says, in a sequence without padding."""
    mask, side = next(tried_masks(max_seq_len))
    square = _allowed(subject, mask, side, {})[-1, 0]
    forgetful = (torch.ones(side, side).tril().bool() & ~square).any(dim=1).nonzero().flatten()
    if len(forgetful):
        query = int(forgetful[0])
        seen = square[query]
    elif max_seq_len > side and _forgets(subject, max_seq_len):
        query = _first_forgetful(subject, side, max_seq_len) - 1
        seen = _allowed(subject, torch.ones(1, query + 1, dtype=torch.int64), 1, {})[0, 0, 0]
    else:
        return _Reach()
    oldest = int(seen.to(torch.int64).argmax())
    if oldest == 1:
        return _Reach(window=query)
    return _Reach(chunk=query) if oldest == query else _Reach()


def _forgets(subject: Subject, total: int) -> bool:
    """True if the last of `total` tokens does not see all before it."""
    return not bool(_allowed(subject, torch.ones(1, total, dtype=torch.int64), 1, {}).all())


def _first_forgetful(subject: Subject, low: int, high: int) -> int:
    """The shortest sequence whose last token does not see all: that of `high` tokens has such a one, of `low` not."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _forgets(subject, middle) else (middle, high)
    return high


def tried_masks(max_seq_len: int) -> Iterator[tuple[Tensor, int]]:
    """Padding masks [B, S + T] that a site is tried with, and T: the whole square at the first positions, then strips."""
    side = min(max_seq_len, SQUARE)
    mask = torch.ones(ROWS, side, dtype=torch.int64)
    mask[0, : min(2, side - 1)] = 0
    mask[1, : side // 3] = 0
    yield mask, side
    total = max_seq_len
    while total > side:
        yield torch.ones(1, total, dtype=torch.int64), min(STRIP, total, max(1, STRIP_ELEMENTS // total))
        total = max(side, total // 2)


def subjects_of(
    captured: CapturedGraph, body: str, match: AttentionMatch, name: str, given: Collection[str] = ()
) -> Iterator[Subject]:
    """One for each set of outer values that layers of this body give to what node `name` is computed from.

    `given` are nodes whose values come from elsewhere.
    """
    graph = captured.bodies[body].graph
    read = ancestors([node_named(graph, name)], until=[node_named(graph, n) for n in given])
    # of hidden states only sizes can be read: who asks for a value is told that there is none
    inputs = enumerate(placeholders(graph))
    read_arguments = [i for i, p in inputs if p in read and input_ref(p).kind != "hidden"]
    seen = set()
    for node in captured.graph.graph.nodes:
        if node.op == "call_module" and node.target == body:
            key = tuple(node.args[i] for i in read_arguments if not _is_past(node.args[i]))
            if key not in seen:
                seen.add(key)
                yield Subject(captured, body, match, node)


def _is_past(node: Any) -> bool:
    """A layer's past, or what an earlier one caches: zeros of its shape stand for it here, whichever layer's it is."""
    return (node.op == "placeholder" and input_ref(node).kind == "past") or source_of(node) is not None


def _compare(subject: Subject, mask: Tensor, T: int, reach: _Reach) -> None:
    """The last T queries against all keys, for a padding mask [B, S + T]; queries that are padding may see anything."""
    total = mask.shape[1]
    places = mask.cumsum(1) - 1  # of tokens: padding in front does not count
    query, key = places[:, None, -T:, None], places[:, None, None]
    seen = torch.arange(total) <= torch.arange(total - T, total)[:, None]
    expected = seen & ~reach.hidden(query, key) & (mask[:, None, None] > 0)
    handed, chosen = handed_indices(subject, mask.shape[0], T, total)
    got = _allowed(subject, mask, T, handed)
    if chosen is not None:
        expected &= chosen
    different = (got != expected) & (mask[:, None, -T:, None] > 0)
    if count := int(different.sum()):
        *_, query_at, key_at = (int(x) for x in different.nonzero()[0])
        on_padding = not bool((different & (mask[:, None, None] > 0)).any())
        guess = (
            "keys of padding are seen: attention_mask is not part of it"
            if on_padding
            else "bidirectional attention, keys that are always or never seen, or a window by columns?"
        )
        raise mask_error(
            subject,
            f"it differs from {reach} + padding at {count:,} of {different.numel():,} places, first for the query at "
            f"{total - T + query_at} and the key at {key_at} of {total:,} ({guess})",
        )


def mask_error(subject: Subject, why: str) -> MatchError:
    node = node_named(subject.captured.bodies[subject.body].graph, subject.match.anchor)
    return MatchError(
        f"layer {subject.call.meta['layer']}: attention at node `{node.name}` ({source_line(node)}) has a mask that Helix "
        f"can't keep: {why}. Expected: every key at a position <= the query's, or the last W of them, or those of the query's "
        "chunk of C, except padding. nearest that works: full causal attention, a sliding window, chunks; "
        'unmatched="keep" leaves such layers as they are, if others match'
    )


def handed_indices(subject: Subject, B: int, T: int, total: int) -> tuple[dict[fx.Node, Any], Tensor | None]:
    """Of a site that attends to chosen keys: random ones in place of those, and which these are [B, 1, T, S + T]."""
    selection = subject.match.selection
    if selection is None:
        return {}, None
    node = node_named(subject.captured.bodies[subject.body].graph, selection.indices)
    # as many as an earlier layer may hand: one that takes some of them alone would be seen
    count = min(selection.top_k, total) if isinstance(selection, Selection) else total
    generator = torch.Generator().manual_seed(0)
    # any indices will do, some twice: the mask must show them and no others
    indices = torch.randint(0, total, (B, T, count), generator=generator)
    chosen = torch.zeros(B, T, total, dtype=torch.bool).scatter_(2, indices, True)
    return {node: indices.to(node.meta["val"].dtype)}, chosen[:, None]


def evaluated(subject: Subject, name: str, mask: Tensor, T: int, handed: dict[fx.Node, Any]) -> Tensor:
    """Value of a node of the body for a 2-D padding mask [B, S + T], given values of some others (`handed`)."""
    B, total = mask.shape
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -T:]
    inputs = {"input_ids": torch.zeros(B, T, dtype=torch.int64), "attention_mask": mask, "position_ids": positions}
    captured = subject.captured
    graph = captured.bodies[subject.body].graph
    outer_args = dict(zip(placeholders(graph), subject.call.args, strict=True))
    sizes = B, T, total - T

    def body_input(node: fx.Node) -> Any:
        if input_ref(node).kind == "shared":
            shape = node.meta["val"].shape
            return torch.zeros(1).expand(B, shape[1], total, shape[3])
        return evaluate(outer_args[node], known, outer_input, given=outer_size)

    def outer_input(node: fx.Node) -> Any:
        kind, name = input_ref(node)
        if kind == "input":
            return inputs[name]
        if kind == "past":
            shape = [*node.meta["val"].shape]
            shape[0], shape[past_dim(node.meta["val"])] = B, total - T
            return torch.zeros(1).expand(shape)
        raise KeyError(name)

    known: dict[fx.Node, Any] = {}
    inside = dict(handed)
    outer_size = _size_reader(captured.graph.graph, *sizes)
    try:
        value: Tensor = evaluate(node_named(graph, name), inside, body_input, given=_size_reader(graph, *sizes))
    except KeyError as missing:
        raise mask_error(
            subject, f"it is computed from {missing} (sparse attention over a top-k of keys?)"
        ) from missing
    except NotRun as stopped:
        raise mask_error(subject, f"it does not run for B={B}, T={T}, S={total - T}: {stopped}") from stopped
    return value


def _allowed(subject: Subject, mask: Tensor, T: int, handed: dict[fx.Node, Any]) -> Tensor:
    """Mask of the site [B, 1 or H, T, S + T], True = visible."""
    value = evaluated(subject, subject.match.mask, mask, T, handed)
    value = value[(None,) * (4 - value.dim())]
    if subject.match.mask_form != "BHTS":
        value = permuted(value, subject.match.mask_form, "BHTS")
    if value.dtype is torch.bool:
        return value
    seen = value > torch.finfo(value.dtype).min / 2
    if bool((value[seen] != 0).any()):
        raise mask_error(subject, "it adds other numbers than 0 to scores of visible keys (a bias by distance?)")
    return seen


def _size_reader(graph: fx.Graph, B: int, T: int, S: int) -> Callable[[fx.Node], int | None]:
    """Numbers for the nodes that are sizes, so that nobody asks for the hidden states they are read off."""
    numbers: dict[Any, int] = {}
    for node in placeholders(graph):
        kind, name = input_ref(node)
        shape = getattr(node.meta["val"], "shape", ())
        dims = {0: B, 1: T} if kind == "hidden" or name == "input_ids" else {}
        if kind == "past":
            dims = {past_dim(node.meta["val"]): S}
        if kind == "shared":
            dims = {past_dim(node.meta["val"]): S + T}
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
