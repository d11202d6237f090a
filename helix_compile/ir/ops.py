"""The helix:: vocabulary: compute ops (kernels/ops.py says what each is) and the moves between them.

Compute ops keep their name through lowering. Moves (all_to_all_heads, reshard) say *what* is exchanged; passes/lower/collectives.py
turns each into `_c10d_functional` collectives. A move has no eager implementation: no rank alone can run it.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from helix_compile.kernels.exchange import CODECS
from helix_compile.kernels.ops import HELIX_OPS, Op

_LIBRARY = torch.library.Library("helix", "DEF")  # kept alive: dropping it unregisters the ops


_SHARD = re.compile(r"S\((\d+)\)")


def _all_to_all_heads(partial_o: Tensor, lse: Tensor, axis: str, peers: int) -> tuple[Tensor, Tensor]:
    B, T, H, width = partial_o.shape
    chunk = (peers, B, T, H // peers)
    return partial_o.new_empty((*chunk, width)), lse.new_empty(chunk)


def _reshard(x: Tensor, source: str, target: str, size: int) -> Tensor:
    """A shard that is gathered grows `size` times along its dim, a sum that is scattered shrinks so."""
    shape = list(x.shape)
    if shard := _SHARD.search(source):
        shape[int(shard[1])] = shape[int(shard[1])] * size
    elif shard := _SHARD.search(target):
        shape[int(shard[1])] = shape[int(shard[1])] // size
    return x.new_empty(shape)


def _kth_by_owners(candidates: Tensor, visible: Tensor, axis: str, peers: int, top_k: int) -> tuple[Tensor, Tensor]:
    """Each query's k-th key, found by one rank of the axis that gets all ranks' candidates for it, and told to all."""
    dtype = torch.float64 if candidates.dtype is torch.int64 else torch.float32
    return candidates.new_empty(visible.shape, dtype=dtype), candidates.new_empty(visible.shape, dtype=torch.int64)


def _define(op: Op) -> None:
    _LIBRARY.define(op.schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"helix::{op.name}", op.fake, lib=_LIBRARY)


for _op in HELIX_OPS:
    _define(_op)
    _LIBRARY.impl(_op.name, _op.function, "CompositeExplicitAutograd")
for _move in (_all_to_all_heads, _reshard, _kth_by_owners):
    _define(Op(_move.__name__.removeprefix("_"), _move, _move))


helix = torch.ops.helix


def overload(name: str) -> torch._ops.OpOverload:
    """The op of kernels/ops.py that has this name."""
    base, _, form = name.partition(".")
    found: torch._ops.OpOverload = getattr(getattr(helix, base), form or "default")
    return found


MOVES = (helix.all_to_all_heads.default, helix.reshard.default, helix.kth_by_owners.default)


PARTS = (helix.rows_of_part.default, helix.place_rows.default)  # of a batch, where it is exchanged a part at a time


UNPACKS = tuple(overload(codec.op("unpack_heads")) for codec in CODECS)
