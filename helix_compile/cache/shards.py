"""A prefilled cache on its way between engines: whole, or as the shards of a sender with any cp and tokens_per_block.

Shape letters: B sequences, S columns, s columns of one shard, R latent width, r rope width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from helix_compile.cache.rows import of_scale, scale_of
from helix_compile.errors import RuntimeFault
from helix_compile.layout.ledger import positions_on_rank

# who stores token p of a sequence whose prompt has L tokens:
#   global              block p // tokens_per_block, round robin; prompt and decode alike (the rule here)
#   restarts_at_decode  the prompt so, then round robin again from rank 0 with the tokens after it
#                       (TensorRT-LLM's PyTorch executor: decode_block = (iter - 1) // tokens_per_block)
ROTATIONS = ("global", "restarts_at_decode")


class CacheEntries(NamedTuple):
    """A whole cache, left-aligned; `module.import_cache(*entries)` takes it.

    Of an FP8 cache these are its values in the model's dtype; with raw=True they are what lies in it: float8_e4m3fn of its
    scale, or bytes, whole rows as latents and nothing as k_ropes.

    Attributes:
        latents: per cached attention [B, S, R]; 0 behind a row's tokens.
        k_ropes: per cached attention [B, S, r], rotated at absolute positions; of sparse attention [B, S, r + I], with its
            index key; 0 behind a row's tokens.
        lengths: [B] int64.
    """

    latents: list[Tensor]
    k_ropes: list[Tensor]
    lengths: Tensor


@dataclass(frozen=True)
class CacheShard:
    """What one CP rank holds of a batch.

    Attributes:
        cp_rank: its index among the ranks that share the cache by sequence.
        latents: per cached attention [B, s, R].
        k_ropes: per cached attention [B, s, r].
        positions: [B, s] int64, absolute position of each column's token, -1 = no token.
        lengths: [B] int64, tokens of each sequence on all ranks together.
    """

    cp_rank: int
    latents: list[Tensor]
    k_ropes: list[Tensor]
    positions: Tensor
    lengths: Tensor


def positions_of_sender(
    length: int, rank: int, cp: int, tokens_per_block: int, rotation: str, prompt_length: int
) -> Tensor:
    """Absolute positions that a sender's CP rank holds of one sequence, in the order in which it holds them, int64."""
    if rotation == "global":
        return positions_on_rank(length, rank, cp, tokens_per_block)
    prompt = positions_on_rank(prompt_length, rank, cp, tokens_per_block)
    decoded = positions_on_rank(length - prompt_length, rank, cp, tokens_per_block)
    return torch.cat([prompt, prompt_length + decoded])


def shards_of_sender(
    latents: Sequence[list[Tensor]],
    k_ropes: Sequence[list[Tensor]],
    lengths: list[int],
    *,
    tokens_per_block: int,
    rotation: str = "global",
    prompt_lengths: list[int] | None = None,
) -> list[CacheShard]:
    """Name the tokens of a cache that another engine holds in shards; join_shards() puts them together.

    Args:
        latents: latents[cp rank][attention] = [B, s, R]: each row's tokens first, in the sender's own order; s is
            exactly the tokens of the shard's fullest row, so that a wrong rotation or block size can't pass unseen.
        k_ropes: likewise [B, s, r].
        lengths: tokens of each sequence on all ranks together.
        tokens_per_block: the sender's.
        rotation: "global", or "restarts_at_decode" for TensorRT-LLM's executor; then with prompt_lengths.
        prompt_lengths: tokens of each sequence that were the prompt.

    Raises:
        RuntimeFault: what does not fit.
    """
    prompts = _checked_rotation(rotation, lengths, prompt_lengths)
    if isinstance(tokens_per_block, bool) or not isinstance(tokens_per_block, int) or tokens_per_block < 1:
        raise RuntimeFault(f"shards_of_sender: tokens_per_block must be an int >= 1, got {tokens_per_block!r}")
    cp = len(latents)
    if cp == 0 or len(k_ropes) != cp:
        raise RuntimeFault(
            f"shards_of_sender: latents of {cp} ranks and k_ropes of {len(k_ropes)}; expected one list a rank"
        )
    shards = []
    for rank in range(cp):
        held = [
            positions_of_sender(length, rank, cp, tokens_per_block, rotation, prompt)
            for length, prompt in zip(lengths, prompts, strict=True)
        ]
        positions = pad_sequence(held, batch_first=True, padding_value=-1)
        for name, tensors in (("latents", latents[rank]), ("k_ropes", k_ropes[rank])):
            _check_columns(f"shards_of_sender: rank {rank} {name}", tensors, len(lengths), positions.shape[1], rotation)
        shards.append(CacheShard(rank, latents[rank], k_ropes[rank], positions, torch.tensor(lengths)))
    return shards


def _checked_rotation(rotation: str, lengths: list[int], prompts: list[int] | None) -> list[int]:
    """Prompt lengths, one a sequence."""
    if rotation not in ROTATIONS:
        raise RuntimeFault(
            f"shards_of_sender: rotation={rotation!r}; expected one of {', '.join(map(repr, ROTATIONS))}"
        )
    if (rotation == "global") != (prompts is None):
        raise RuntimeFault(
            f"shards_of_sender: rotation={rotation!r} with prompt_lengths={prompts}; expected prompt_lengths for "
            "'restarts_at_decode' and none for 'global', where they have no effect"
        )
    prompts = lengths if prompts is None else prompts
    lists = isinstance(lengths, (list, tuple)) and isinstance(prompts, (list, tuple))
    fits = lists and all(type(n) is int and n >= 0 for n in (*lengths, *prompts)) and 0 < len(lengths) == len(prompts)
    if not fits or any(p > n for p, n in zip(prompts, lengths, strict=True)):
        raise RuntimeFault(
            f"shards_of_sender: lengths {lengths}, prompt_lengths {prompts}; expected two lists of ints, one a sequence, "
            "with 0 <= prompt length <= length"
        )
    return list(prompts)


def _check_columns(what: str, tensors: list[Tensor], rows: int, columns: int, rotation: str) -> None:
    if not isinstance(tensors, (list, tuple)):
        raise RuntimeFault(f"{what}: expected a list of tensors, one an attention, got {type(tensors).__name__}")
    for site, tensor in enumerate(tensors):
        got = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
        if not isinstance(tensor, Tensor) or tensor.dim() != 3 or got[:2] != (rows, columns):
            raise RuntimeFault(
                f"{what}: attention {site}: got {got}, expected [{rows}, {columns}, width]: by rotation={rotation!r} "
                f"the fullest row has {columns} tokens there"
            )


def join_shards(shards: Sequence[CacheShard]) -> CacheEntries:
    """The whole cache of all CP ranks' shards, in order of position.

    Shards that are given twice (ranks that differ in tpa only) must be equal.

    Raises:
        RuntimeFault: shards of different batches, or positions that are missing or held twice.
    """
    first = _distinct(shards)
    B, width = len(first[0].lengths), int(first[0].lengths.max())
    row_positions = []
    for row in range(B):
        positions = torch.cat([s.positions[row] for s in first])
        held = positions[positions >= 0]
        expected = torch.arange(int(first[0].lengths[row]))
        if not torch.equal(held.sort().values, expected):
            missing = sorted(set(expected.tolist()) - set(held.tolist()))
            raise RuntimeFault(
                f"join_shards: sequence {row} of {len(expected)} tokens: {len(held)} tokens in {len(first)} shards, "
                f"{len(missing)} positions missing (first {missing[:3]}); expected each position once: are all cp "
                "ranks' shards here, and is the rotation the sender's?"
            )
        row_positions.append(positions)
    parts = [
        [_scattered([s_parts[i] for s_parts in lists], row_positions, B, width) for i in range(len(lists[0]))]
        for lists in ([s.latents for s in first], [s.k_ropes for s in first])
    ]
    return CacheEntries(parts[0], parts[1], first[0].lengths.clone())


def _scattered(pieces: list[Tensor], row_positions: list[Tensor], B: int, width: int) -> Tensor:
    """[B, width, features] of the shards' [B, s, features]; 0 where there is no token."""
    whole = pieces[0].new_zeros(B, width, pieces[0].shape[2])
    together = torch.cat(pieces, dim=1)
    for row, positions in enumerate(row_positions):
        kept = (positions >= 0).to(together.device)
        whole[row, positions[positions >= 0].to(whole.device)] = together[row, kept]
    scales = {scale_of(piece) for piece in pieces}
    if len(scales) > 1:
        raise RuntimeFault(
            f"join_shards: FP8 values of several cache_scales, {sorted(map(str, scales))}; expected shards of one run"
        )
    return of_scale(whole, *scales)


def _distinct(shards: Sequence[CacheShard]) -> list[CacheShard]:
    """One shard a CP rank, all of one batch."""
    if not shards or not all(isinstance(s, CacheShard) for s in shards):
        raise RuntimeFault("join_shards: expected CacheShards, one a cp rank")
    kept: dict[int, CacheShard] = {}
    for shard in shards:
        other = next(iter(kept.values()), shard)
        shapes, expected = _widths(shard), _widths(other)
        if shapes != expected or not torch.equal(shard.lengths, other.lengths):
            raise RuntimeFault(
                f"join_shards: cp ranks {other.cp_rank} and {shard.cp_rank} hold different batches: lengths "
                f"{other.lengths.tolist()} and {shard.lengths.tolist()}, (width, dtype) {expected} and {shapes}"
            )
        twin = kept.setdefault(shard.cp_rank, shard)
        pairs = zip(
            (*twin.latents, *twin.k_ropes, twin.positions),
            (*shard.latents, *shard.k_ropes, shard.positions),
            strict=True,
        )
        if twin is not shard and not all(_same_bits(a, b) for a, b in pairs):
            raise RuntimeFault(
                f"join_shards: two shards of cp rank {shard.cp_rank} differ; ranks that differ in tpa only hold the "
                "same cache"
            )
    return list(kept.values())


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype is torch.float8_e4m3fn:  # torch has no equal() of these
        a, b = a.view(torch.uint8), b.view(torch.uint8)
    return torch.equal(a, b)


def _widths(shard: CacheShard) -> list[tuple[int, str]]:
    """Width and dtype of every tensor."""
    return [(t.shape[2], str(t.dtype)) for t in (*shard.latents, *shard.k_ropes)]
