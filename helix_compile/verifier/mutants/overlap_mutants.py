"""Faults of a batch that is exchanged a part at a time: order, buffers that are still on their way, rows of the wrong part."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, fx

from helix_compile.ir.graph import PART, aten, is_call
from helix_compile.ir.ops import helix
from helix_compile.ir.stage import bodies_of
from helix_compile.module import HelixModule
from helix_compile.verifier.mutants.mutant import A2A, c10d, collectives, helix_nodes, kernel_mutant, mutant, wait_of

HOPB: dict[str, Any] = {**A2A, "overlap": "hopb"}
BEFORE: dict[str, Any] = {**HOPB, "v_up": "before"}

_overlap = partial(mutant, options=HOPB)


def _exchanges(compiled: HelixModule) -> list[fx.Node]:
    return collectives(compiled, c10d.all_to_all_single.default)


@_overlap("what a part's exchange will bring is read before it is waited for", 10, "graph")
def read_too_early(compiled: HelixModule) -> None:
    for start in _exchanges(compiled):
        wait = wait_of(start)
        reader = next(iter(wait.users))
        reader.replace_input_with(wait, start)
        reader.append(wait)


@_overlap("a part is waited for before the next one attends", 10, "graph")
def nothing_overlaps(compiled: HelixModule) -> None:
    for start in _exchanges(compiled):
        start.append(wait_of(start))


@_overlap("a part's buffer is written while it is exchanged", 10, "graph")
def buffer_reused(compiled: HelixModule) -> None:
    for start in [s for s in _exchanges(compiled) if s.meta[PART][1] == 0]:
        with start.graph.inserting_after(start):
            start.graph.call_function(aten.zero_.default, (start.args[0],))


@_overlap("a part is merged out of the buffer of another", 10, "graph")
def merged_of_another(compiled: HelixModule) -> None:
    for unpack in helix_nodes(compiled, "unpack_heads"):
        if unpack.meta[PART][1]:
            first = next(n for n in unpack.graph.nodes if n.target is unpack.target)
            unpack.update_arg(0, first.args[0])


@_overlap("parts are joined in another order", 1, "graph")
def joined_in_reverse(compiled: HelixModule) -> None:
    for body in bodies_of(compiled.graph).values():
        for joined in [n for n in body.graph.nodes if is_call(n, aten.cat.default) and _joins_parts(n)]:
            joined.update_arg(0, joined.args[0][::-1])


def _joins_parts(node: fx.Node) -> bool:
    return all(PART in part.meta for part in node.args[0])


@_overlap("one part is attended to twice, another not at all", 4, "graph")
def part_twice(compiled: HelixModule) -> None:
    for rows in helix_nodes(compiled, "rows_of_part"):
        rows.update_arg(1, 0)


@_overlap("a part attends by the pages of another", 4, "graph")
def pages_of_another(compiled: HelixModule) -> None:
    for decode in helix_nodes(compiled, "mla_decode"):
        first = next(n for n in decode.graph.nodes if n.target is decode.target)
        decode.update_arg(3, first.args[3])


@_overlap("every part attends with all rows", 13, "graph")
def whole_in_each_part(compiled: HelixModule) -> None:
    for decode in helix_nodes(compiled, "mla_decode"):
        _with_all_rows(decode)


def _with_all_rows(decode: fx.Node) -> None:
    """Attention of all rows, of which the part is taken behind it."""
    sources = [a.args[0] if is_call(a, helix.rows_of_part.default) else a for a in decode.args]
    part = decode.meta[PART][1:]
    with decode.graph.inserting_before(decode):
        whole = decode.graph.call_function(decode.target, tuple(sources))
    for item in list(decode.users):
        with decode.graph.inserting_before(item):
            all_rows = decode.graph.call_function(item.target, (whole, item.args[1]))
            mine = decode.graph.call_function(helix.rows_of_part.default, (all_rows, *part))
        item.replace_all_uses_with(mine)
        decode.graph.erase_node(item)
    decode.graph.erase_node(decode)


@kernel_mutant("a part begins one row early", 4, "rows_of_part", HOPB, "graph")
def one_row_early(x: Tensor, part: int, parts: int) -> Tensor:
    B = x.shape[0]
    early = min(1, B * part // parts)
    return x[B * part // parts - early : B * (part + 1) // parts - early]


@kernel_mutant("W_UV meets a part's rows where those of another are", 2, "place_rows", BEFORE, "graph")
def placed_elsewhere(x: Tensor, like: Tensor, part: int, parts: int) -> Tensor:
    placed: Tensor = helix.place_rows(x, like, part, parts)
    return placed.roll(1, 0)
