"""Do the ranks hold the parts of the original weights that the plan says, and do the parts make up the whole?

Slices and rank coordinates are computed here again, from the contract (design: attention view
rank = tpa_rank * cp + cp_rank, FFN view rank = ep_rank * tpf + tpf_rank), not by the code that cut them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from helix_compile.layout.degrees import HelixLayout
from helix_compile.layout.placement import Layout, normal_form, parse_layout
from helix_compile.plan.helix_plan import Cut, ParamShard
from helix_compile.verifier.contract import coordinate, places_of
from helix_compile.verifier.report import Finding

ID_ELEMENTS = 5 * 10**7  # larger weights are checked for holes by size alone


def part(whole: Tensor, shard: ParamShard, layout: HelixLayout, rank: int) -> Tensor:
    """What `rank` must hold of a whole weight: ceil(total / parts) wide, zeros behind the end (of each group of heads)."""
    value = _windowed(whole, shard)
    for cut in shard.cuts:
        parts, places = layout.size(cut.axis), _places(value.shape[cut.dim], cut)
        width = (len(places) + parts - 1) // parts
        start = coordinate(cut.axis, rank, layout) * width
        mine = places[start : start + width].to(value.device)
        rows = torch.cat([mine, mine.new_full((width - len(mine),), -1)])
        inside = rows >= 0
        value = value.index_select(cut.dim, rows.clamp(min=0))
        if not bool(inside.all()):
            shape = [width if d == cut.dim else 1 for d in range(value.dim())]
            value = torch.where(inside.view(shape), value, torch.zeros_like(value))
    return value.reshape(shard.shape)


def _places(size: int, cut: Cut) -> Tensor:
    """Which row lies on each place that is cut, -1 where zeros do."""
    if cut.padding is None:
        return torch.arange(size)
    p = cut.padding
    places = places_of(p.groups, p.group, p.padded_groups, p.padded_group)
    return torch.tensor([-1 if row is None else row for row in places])


def _windowed(whole: Tensor, shard: ParamShard) -> Tensor:
    if shard.index is not None:
        whole = whole[torch.tensor(shard.index, device=whole.device)]
    value = whole.reshape(shard.view)
    if shard.window is not None:
        dim, start, length = shard.window
        value = value.narrow(dim, start, length)
    return value


@dataclass
class ParamCheck:
    """Findings, and how each parameter lies over the ranks (by full local name)."""

    findings: list[Finding] = field(default_factory=list)
    layouts: dict[str, Layout] = field(default_factory=dict)


def check_params(
    names: list[str],
    held: Sequence[Mapping[str, Tensor]],
    originals: Mapping[str, Tensor],
    shards: Mapping[str, tuple[str, ParamShard]],
    layout: HelixLayout,
    head_rows: frozenset[str] = frozenset(),
) -> ParamCheck:
    """Compare every parameter of the graph, on every rank, with the original weight.

    Args:
        names: parameters that the graph reads.
        held: per rank, name -> tensor.
        originals: full name -> whole weight.
        shards: local name -> (name of the original, how the plan cuts it).
        head_rows: o_proj weights: two ranks swapped there is a broken rank order.
    """
    check = ParamCheck(_unknown(names, held))
    for name in names:
        source, shard = shards.get(name, (name, None))
        where = f"parameter {name}"
        if source not in originals:
            check.findings.append(Finding("HX203", where, f"no {source} in the original", "the original's weight", 2))
            continue
        odd = {r: p[name] for r, p in enumerate(held) if name in p and not _holds_values(p[name])}
        if odd:
            rank, value = next(iter(odd.items()))
            got = f"rank {rank}: {'a meta tensor' if isinstance(value, Tensor) else type(value).__name__}"
            check.findings.append(Finding("HX203", where, got, "a tensor with values", 2))
            continue
        dtypes = {r: p[name].dtype for r, p in enumerate(held) if name in p}
        wrong = [r for r, dtype in dtypes.items() if dtype != originals[source].dtype]
        if wrong:
            got = f"ranks {wrong}: {dtypes[wrong[0]]}"
            check.findings.append(Finding("HX203", where, got, f"{originals[source].dtype}", 2))
        missing = [r for r, params in enumerate(held) if name not in params]
        if missing:
            check.findings.append(Finding("HX203", where, f"ranks {missing} lack it", "every rank", 2))
            continue
        local, whole = [params[name] for params in held], originals[source]
        check.layouts[name] = {}
        if shard is None:
            check.findings += _replicated(where, local, whole)
        else:
            family = 1 if name in head_rows else 2
            check.findings += _sharded(where, local, whole, shard, layout, family)
            check.layouts[name] = normal_form(parse_layout(shard.layout), layout)
    check.findings += _holes(names, originals, shards)
    return check


def _holds_values(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_meta


def _unknown(names: list[str], held: Sequence[Mapping[str, Tensor]]) -> list[Finding]:
    """What a rank holds and the graph never reads: a misspelled name leaves the old weight in use."""
    extra = [(r, name) for r, params in enumerate(held) for name in sorted(set(params) - set(names))]
    return [
        Finding("HX203", f"parameter {name}", f"rank {rank} holds it", "a name that the graph reads", 2)
        for rank, name in extra
    ]


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


def _replicated(where: str, local: list[Tensor], whole: Tensor) -> list[Finding]:
    wrong = [r for r, value in enumerate(local) if value.shape != whole.shape]
    if wrong:
        got = f"ranks {wrong}: {tuple(local[wrong[0]].shape)}"
        return [Finding("HX203", where, got, f"{tuple(whole.shape)}", 2)]
    first = local[0]
    wrong = [r for r, v in enumerate(local) if v is not first and not _same(v, first)]
    if wrong:
        return [Finding("HX204", where, f"ranks {wrong} differ from rank 0", "the same values", 2)]
    if not _same(first, whole):
        got = f"{_different(first, whole)} of {whole.numel()} values differ"
        return [Finding("HX204", where, got, "the original's values", 2)]
    return []


def _sharded(
    where: str, local: list[Tensor], whole: Tensor, shard: ParamShard, layout: HelixLayout, family: int
) -> list[Finding]:
    wrong = [r for r, value in enumerate(local) if tuple(value.shape) != shard.shape]
    if wrong:
        got = f"ranks {wrong}: {tuple(local[wrong[0]].shape)}"
        return [Finding("HX203", where, got, f"{shard.shape}", 2)]
    expected = [part(whole, shard, layout, r) for r in range(len(local))]
    wrong = [r for r, value in enumerate(local) if not _same(value, expected[r])]
    if not wrong:
        return []
    for rank in wrong:
        other = next((q for q, e in enumerate(expected) if _same(local[rank], e)), None)
        if other is not None:
            got = f"rank {rank} holds the part of rank {other} (wrong on ranks {wrong})"
            return [Finding("HX201", where, got, f"the part of rank {rank}", family)]
    rank = wrong[0]
    count = _different(local[rank], expected[rank])
    got = f"rank {rank}: {count} of {expected[rank].numel()} values differ (wrong on ranks {wrong})"
    return [Finding("HX202", where, got, "the original's values, zeros where the plan pads", 2)]


def _different(a: Tensor, b: Tensor) -> int:
    return int((a != b).sum())


def _holes(
    names: list[str], originals: Mapping[str, Tensor], shards: Mapping[str, tuple[str, ParamShard]]
) -> list[Finding]:
    """The shards of a weight, put together, must be the whole weight, each value once."""
    by_source: dict[str, list[ParamShard]] = {}
    for name in names:
        if name in shards and shards[name][0] in originals:
            by_source.setdefault(shards[name][0], []).append(shards[name][1])
    findings, known = [], {}
    for source, pieces in by_source.items():
        whole = originals[source]
        key = tuple(pieces)
        if key not in known:
            known[key] = _hole(tuple(whole.shape), pieces)
        if known[key]:
            findings.append(Finding("HX202", f"parameter {source}", known[key], "each value once", 2))
    return findings


def _hole(shape: tuple[int, ...], pieces: list[ParamShard]) -> str:
    for piece in pieces:
        if piece.source_shape != shape:
            return f"the plan is made for {piece.source_shape}, the weight is {shape}"
    count = torch.Size(shape).numel()
    if count > ID_ELEMENTS:
        return ""
    ids = torch.arange(count, dtype=torch.int32).view(shape)
    found = torch.cat([_windowed(ids, piece).reshape(-1) for piece in pieces])
    times = torch.bincount(found, minlength=count)
    if bool((times == 1).all()):
        return ""
    return f"{int((times == 0).sum())} values in no shard, {int((times > 1).sum())} in several"
