"""Who owns which token: the one definition of the round-robin ledger.

    block(p) = p // tpb     owner(p) = block(p) % cp     slot(p) = (block(p) // cp) * tpb + p % tpb

`p` is a token's absolute position in its sequence, prompt and decode alike. `slot` counts inside one rank's
shard. Append, attention, import and the verifier all call these functions; nothing else repeats the formula
(helix-algorithm, section 4). Each function takes ints or int64 tensors alike.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

IntOrTensor = TypeVar("IntOrTensor", int, Tensor)


def owner_rank(position: IntOrTensor, cp: int, tokens_per_block: int) -> IntOrTensor:
    """CP rank that stores the token at absolute `position`."""
    return (position // tokens_per_block) % cp


def local_slot(position: IntOrTensor, cp: int, tokens_per_block: int) -> IntOrTensor:
    """Slot of the token at absolute `position` inside its owner's shard."""
    block = position // tokens_per_block
    return (block // cp) * tokens_per_block + position % tokens_per_block


def local_length(length: int | Tensor, rank: int | Tensor, cp: int, tokens_per_block: int) -> Any:
    """Tokens of a sequence of `length` tokens that CP rank `rank` holds (0: an empty shard); a Tensor if either is."""
    turn = tokens_per_block * cp
    full_turns = (length // turn) * tokens_per_block
    rest = length % turn - rank * tokens_per_block
    if isinstance(rest, Tensor):
        return full_turns + rest.clamp(0, tokens_per_block)
    return full_turns + min(max(rest, 0), tokens_per_block)


def position_of_slot(slot: int | Tensor, rank: int | Tensor, cp: int, tokens_per_block: int) -> Any:
    """Absolute position of local slot `slot` of CP rank `rank`; the inverse of owner_rank and local_slot. A Tensor if either is."""
    return ((slot // tokens_per_block) * cp + rank) * tokens_per_block + slot % tokens_per_block


def positions_on_rank(length: int, rank: int, cp: int, tokens_per_block: int) -> Tensor:
    """Absolute positions that `rank` holds of a sequence of `length` tokens, ascending, int64."""
    slots = torch.arange(local_length(length, rank, cp, tokens_per_block))
    return position_of_slot(slots, rank, cp, tokens_per_block)
