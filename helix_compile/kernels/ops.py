"""Every op, stated once: its reference, whose signature is the schema, and what it makes of fake tensors.

OPS["mla_decode"]            ir/ops.py registers it as helix::mla_decode, with the reference;
                             a kernel file its launcher as helix_triton::mla_decode, with the same schema and fake
OPS["cache_append.norm_rope"]  a form of cache_append, with more arguments behind its own: exists as a kernel only
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from helix_compile.kernels.exchange import CODECS, NATIVE, ExchangeCodec
from helix_compile.kernels.reference import (
    accumulation_dtype,
    apply_sinks_reference,
    best_of_words_reference,
    best_word_reference,
    cache_append_reference,
    embed_rows_reference,
    first_visible_reference,
    gqa_decode_reference,
    heads_of_rank_reference,
    merge_lse_reference,
    mla_decode_reference,
    moe_experts_reference,
    moe_router_reference,
    rescale_by_lse_reference,
    shard_index_reference,
    top_words_reference,
    total_lse_reference,
)
from helix_compile.kernels.reference_fused import (
    cache_append_norm_rope_reference,
    pack_splits_reference,
    rope_heads_reference,
)
from helix_compile.kernels.reference_parts import place_rows_reference, rows_of_part_reference
from helix_compile.kernels.reference_sparse import (
    index_scores_reference,
    kth_candidate_reference,
    mla_decode_slots_reference,
    pack_kth_reference,
    rows_for_owners_reference,
    select_slots_reference,
    topk_candidates_reference,
    unpack_kth_reference,
)


@dataclass(frozen=True)
class Op:
    """One op.

    Attributes:
        name: "mla_decode"; of a form "cache_append.norm_rope".
        function: the torch reference; its typed signature is the op's.
        fake: of the op's arguments, empty tensors such as its results.
        mutates: arguments that it writes.
        views: the schema behind the name where results are views of an argument, which a signature can't say.
        reads_values: the reference looks at values on the host (lengths, chosen experts), so that a CUDA graph can't hold it.
    """

    name: str
    function: Callable[..., Any]
    fake: Callable[..., Any]
    mutates: tuple[str, ...] = ()
    views: str = ""
    reads_values: bool = False

    @property
    def schema(self) -> str:
        """As torch.library takes it."""
        inferred = torch.library.infer_schema(self.function, mutates_args=self.mutates)
        # what an op takes as int is a constant of the graph, never a size that the graph leaves open
        return self.name + (self.views or inferred.replace("SymInt ", "int "))


def _partials(q: Tensor, width: int) -> tuple[Tensor, Tensor]:
    rows = q.shape[:3]
    return q.new_empty((*rows, width)), q.new_empty(rows, dtype=accumulation_dtype(q.dtype))


def _parts(buffer: Tensor, partial_o: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    peers, (B, T, H), width = int(buffer.shape[0]), lse.shape[:3], partial_o.shape[3]
    chunk = (peers, B, T, H // peers)
    return partial_o.new_empty((*chunk, width)), lse.new_empty(chunk)


def _exchange(codec: ExchangeCodec) -> Iterator[Op]:
    views = "(Tensor(a) buffer, Tensor partial_o, Tensor lse) -> (Tensor(a), Tensor(a))" if codec.views else ""
    yield Op(codec.op("pack_heads"), codec.pack, codec.buffer)
    yield Op(codec.op("unpack_heads"), codec.unpack, _parts, views=views)


def _appended(cache: Tensor, page_table: Tensor, slots: Tensor, visible: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.empty_like(visible, memory_format=torch.contiguous_format)


def _top_words(logits: Tensor, first: Tensor, words: int, count: int) -> Tensor:
    return logits.new_empty((*logits.shape[:2], min(count, int(logits.shape[-1])), 2), dtype=torch.float64)


def _rows_of_part(x: Tensor, part: int, parts: int) -> Tensor:
    B = x.shape[0]
    rows = B * (part + 1) // parts - B * part // parts
    return x.new_empty_strided((rows, *x.shape[1:]), x.stride())


def _bits_like(scores: Tensor, shape: tuple[int, ...]) -> Tensor:
    return scores.new_empty(shape, dtype=torch.int64 if scores.dtype.itemsize == 8 else torch.int32)


def _candidates(scores: Tensor, visible: Tensor, rank: Tensor, top_k: int, *_: Any) -> Tensor:
    m = min(top_k, int(scores.shape[-1]))
    return _bits_like(scores, (*visible.shape, m, 2))


def _kth(candidates_P: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    rows, wide = candidates_P.shape[1:3], candidates_P.dtype is torch.int64
    score = candidates_P.new_empty(rows, dtype=torch.float64 if wide else torch.float32)
    return score, candidates_P.new_empty(rows, dtype=torch.int64)


def _selected(
    scores: Tensor, visible: Tensor, kth_score: Tensor, kth_position: Tensor, rank: Tensor, top_k: int, *_: Any
) -> tuple[Tensor, Tensor]:
    m = min(top_k, int(scores.shape[-1]))
    return visible.new_empty((*visible.shape, m), dtype=torch.int32), torch.empty_like(visible)


HELIX_OPS = (
    Op(
        "shard_index",
        shard_index_reference,
        lambda positions, *_: (torch.empty_like(positions), torch.empty_like(positions, dtype=torch.int32)),
    ),
    Op("first_visible", first_visible_reference, lambda positions, *_: torch.empty_like(positions, dtype=torch.int32)),
    Op(
        "heads_of_rank",
        heads_of_rank_reference,
        lambda x, rank, peers: x.new_empty((*x.shape[:2], max(1, x.shape[2] // peers), *x.shape[3:])),
    ),
    Op("embed_rows", embed_rows_reference, lambda ids, rows, _: rows.new_empty((*ids.shape, rows.shape[1]))),
    Op(
        "best_word",
        best_word_reference,
        lambda logits, *_: logits.new_empty((*logits.shape[:2], 1, 2), dtype=torch.float64),
    ),
    Op("top_words", top_words_reference, _top_words),
    Op("best_of_words", best_of_words_reference, lambda candidates: candidates.new_empty((*candidates.shape[:2], 2))),
    Op("cache_append", cache_append_reference, _appended, mutates=("cache",), reads_values=True),
    Op(
        "mla_decode",
        mla_decode_reference,
        lambda q_latent, *_, **__: _partials(q_latent, q_latent.shape[3]),
        reads_values=True,
    ),
    Op(
        "gqa_decode",
        gqa_decode_reference,
        lambda q, k_cache, v_cache, *_, **__: _partials(q, v_cache.shape[3]),
        reads_values=True,
    ),
    Op("merge_lse", merge_lse_reference, lambda partial_o_P, lse_P: partial_o_P.new_empty(partial_o_P.shape[1:])),
    Op("total_lse", total_lse_reference, lambda lse_P: lse_P.new_empty(lse_P.shape[1:])),
    Op("apply_sinks", apply_sinks_reference, lambda o, *_: torch.empty_like(o)),
    Op("rescale_by_lse", rescale_by_lse_reference, lambda partial_o, *_: torch.empty_like(partial_o)),
    Op("moe_experts", moe_experts_reference, lambda x, *_: x.new_empty(x.shape), reads_values=True),
    Op(
        "moe_router",
        moe_router_reference,
        lambda logits, bias, n_group, topk_group, top_k, *_: (
            logits.new_empty((logits.shape[0], top_k), dtype=torch.int64),
            logits.new_empty((logits.shape[0], top_k)),
        ),
    ),
    Op(
        "rope_heads", rope_heads_reference, lambda q_rope, *_: q_rope.new_empty([q_rope.shape[d] for d in (0, 2, 1, 3)])
    ),
    Op(
        "index_scores",
        index_scores_reference,
        lambda q, w, index_cache, page_table, *_: q.new_empty(
            (*q.shape[:2], page_table.shape[1] * index_cache.shape[1]), dtype=accumulation_dtype(q.dtype)
        ),
        reads_values=True,
    ),
    Op("topk_candidates", topk_candidates_reference, _candidates),
    Op("kth_candidate", kth_candidate_reference, _kth),
    Op(
        "rows_for_owners",
        rows_for_owners_reference,
        lambda candidates, peers: candidates.new_empty(
            (peers, -(-candidates.shape[0] * candidates.shape[1] // peers), *candidates.shape[2:])
        ),
    ),
    Op("pack_kth", pack_kth_reference, lambda score, position: _bits_like(score, (score.shape[0], 2))),
    Op(
        "unpack_kth",
        unpack_kth_reference,
        lambda buffer, visible: (
            visible.new_empty(visible.shape, dtype=torch.float64 if buffer.dtype is torch.int64 else torch.float32),
            visible.new_empty(visible.shape, dtype=torch.int64),
        ),
    ),
    Op("select_slots", select_slots_reference, _selected),
    Op(
        "mla_decode_slots",
        mla_decode_slots_reference,
        lambda q_latent, *_, **__: _partials(q_latent, q_latent.shape[3]),
        reads_values=True,
    ),
    *(op for codec in CODECS for op in _exchange(codec)),
    Op("rows_of_part", rows_of_part_reference, _rows_of_part, views="(Tensor(a) x, int part, int parts) -> Tensor(a)"),
    Op("place_rows", place_rows_reference, lambda x, like, *_: x.new_empty((like.shape[0], *x.shape[1:]))),
)


# forms of these with more arguments, of which there are kernels only
FORMS = (
    Op("cache_append.norm_rope", cache_append_norm_rope_reference, _appended, mutates=("cache",)),
    Op("pack_heads.splits", pack_splits_reference, NATIVE.buffer),
)


OPS = {op.name: op for op in (*HELIX_OPS, *FORMS)}
