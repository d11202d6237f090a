"""What one rank of a world of any size holds, computes and exchanges: `helix-compile inspect MODEL --cp 64 --rank 37`.

The rank is compiled as itself on torch's "fake" process group: no peers, no values, right shapes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from helix_compile.config.options import PAGE_SIZE
from helix_compile.errors import LayoutError
from helix_compile.layout.degrees import AXES, HelixMesh
from helix_compile.layout.ledger import local_length
from helix_compile.plan.helix_plan import BodyPlan, HelixPlan
from helix_compile.runtime.rank import Rank


@dataclass(frozen=True)
class RankShare:
    """print() it, or read `.facts` (what --json prints)."""

    facts: dict[str, Any]

    def __str__(self) -> str:
        return "\n".join(_lines(self.facts))

    def to_json(self) -> str:
        """The facts as one JSON document."""
        return json.dumps(self.facts, indent=1)


@contextmanager
def fake_group(rank: int, world_size: int) -> Iterator[Any]:
    """Torch's default group, of the "fake" backend, while this is open.

    Raises:
        LayoutError: no such rank, or a group exists already.
    """
    if not 0 <= rank < world_size:
        raise LayoutError(f"rank {rank} does not exist: cp*tpa = {world_size} ranks, 0 to {world_size - 1}")
    if dist.is_initialized():
        raise LayoutError("a process group exists already; a rank can be inspected without one only")
    dist.init_process_group("fake", store=dist.HashStore(), rank=rank, world_size=world_size)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def share_of_rank(plan: HelixPlan, held: Rank, mesh: HelixMesh) -> RankShare:
    """The share of one rank."""
    layout, rank, options = plan.layout, held.rank, plan.options
    kvp_rank = layout.index("kvp", rank)
    return RankShare(
        {
            "model": plan.model,
            "rank": rank,
            "world_size": layout.world_size,
            "coordinates": {axis: layout.index(axis, rank) for axis in AXES if axis != "world"},
            "groups": {axis: list(mesh.members(axis, rank)) for axis in AXES},
            "cache": {
                "blocks": f"b with b % {layout.kvp} == {kvp_rank}",
                "tokens_per_block": options.tokens_per_block,
                "tokens_of_a_full_sequence": local_length(
                    options.max_seq_len, kvp_rank, layout.kvp, options.tokens_per_block
                ),
                "last_tokens": [n * PAGE_SIZE for n in plan.rings],
                "bytes": sum(c.numel() * c.itemsize for c in held.cache),
            },
            "params_bytes": sum(t.numel() * t.itemsize for t in held.params.values()),
            "bodies": [_body(plan, body, rank) for body in plan.bodies],
        }
    )


def _body(plan: HelixPlan, body: BodyPlan, rank: int) -> dict[str, Any]:
    layout = plan.layout
    routed = [f for f in body.ffns if f.kind == "routed"]
    return {
        "body": body.name,
        "layers": list(body.layers),
        "heads": [list(a.head_ranges(layout)[rank]) for a in body.attentions],
        "experts": [list(f.experts_of(layout, rank)) for f in routed],
        "exchanges": [
            {
                "op": c.op,
                "axis": c.axis,
                "what": c.what,
                "bytes_sent_per_token": float(c.egress_bytes_per_rank_per_token),
            }
            for c in body.collectives
        ],
        "shards": [
            {
                "name": s.name,
                "source": s.source,
                "shape": list(s.shape),
                "cuts": [
                    {"dim": c.dim, "axis": c.axis, "rows": list(c.bounds(layout, rank)), "of": c.total} for c in s.cuts
                ],
                "padding": s.padding(layout, rank),
            }
            for s in body.param_shards
        ],
    }


def _last(tokens: list[int]) -> str:
    """Of windows that every rank holds by itself."""
    return f"of windows the last {', '.join(f'{n:,}' for n in tokens)}; " if tokens else ""


def _lines(facts: dict[str, Any]) -> Iterator[str]:
    where = ", ".join(f"{axis}={index}" for axis, index in facts["coordinates"].items())
    yield f"{facts['model']}: rank {facts['rank']} of {facts['world_size']}: {where}"
    for axis, members in facts["groups"].items():
        yield f"group {axis}: {_ranks(members)}"
    cache = facts["cache"]
    yield (
        f"cache: blocks {cache['blocks']} of {cache['tokens_per_block']} tokens; {cache['tokens_of_a_full_sequence']:,} "
        f"tokens of a full sequence; {_last(cache['last_tokens'])}{cache['bytes']:,} bytes"
    )
    yield f"parameters: {facts['params_bytes']:,} bytes"
    for body in facts["bodies"]:
        layers = body["layers"]
        experts = "".join(f", {_span('expert', *e)}" for e in body["experts"])
        heads = ", ".join(_span("head", *h) for h in body["heads"])
        yield f"{body['body']} ({len(layers)} layers from {layers[0]}): {heads}{experts}"
        for x in body["exchanges"]:
            yield f"  {x['op']} over {x['axis']}, {x['what']}: {x['bytes_sent_per_token']:,.1f} bytes a token"
        for s in body["shards"]:
            cuts = "; ".join(f"dim {c['dim']}: {_span('', *c['rows'])} of {c['of']}" for c in s["cuts"])
            padding = f", {s['padding']} zeros" if s["padding"] else ""
            yield f"  {s['name']} {s['shape']}: {cuts or 'whole'}{padding}"


def _span(what: str, start: int, stop: int) -> str:
    if start == stop:
        return f"no {what} of the model" if what else "none"
    return f"{what}s {start} to {stop - 1}" if what else f"{start} to {stop - 1}"


def _ranks(members: list[int]) -> str:
    step = members[1] - members[0] if len(members) > 1 else 1
    if len(members) > 8 and members == list(range(members[0], members[-1] + 1, step)):
        return f"{members[0]}, {members[1]}, ... {members[-1]} ({len(members)} ranks)"
    return ", ".join(map(str, members))
