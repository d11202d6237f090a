"""The total order of sparse attention as integers, and the search for its n-th: what the selection kernels share.

    key = order_key(score)      int32, ascending with the score: NaN above all, -0.0 as 0.0
    entry = (position << 32) | bits of the score: a candidate [2] int32 of the ops, read as one int64

Radix search: eight bits a pass, from the top. A pass counts the digits of the keys in [low, high], which then becomes the
range of the digit that holds the n-th. It ends when all keys in the range are wanted, or when they are equal: these are
ties, and the place decides. So ties cost no buffer, and nothing depends on the order in which programs run.
"""

from __future__ import annotations

from functools import cache

import triton
import triton.language as tl

from helix_compile.kernels.reference_sparse import NOWHERE as _NOWHERE
from helix_compile.kernels.target import INTERPRETER, KernelTarget

NOWHERE = tl.constexpr(_NOWHERE)


LOWEST_KEY = tl.constexpr(-(2**31))


HIGHEST_KEY = tl.constexpr(2**31 - 1)


LOW_BITS = tl.constexpr(2**32 - 1)


NAN_BITS = tl.constexpr(0x7FC00000)  # the one NaN that candidates hold


NO_ENTRY = tl.constexpr((_NOWHERE << 32) | 0xFF800000)  # score -inf, position NOWHERE


DIGITS = tl.constexpr(256)  # values of a digit of eight bits


@triton.jit
def order_key(score):  # type: ignore[no-untyped-def] # Triton types its arguments
    """Int32 keys of float32 scores."""
    bits = score.to(tl.int32, bitcast=True)
    bits = tl.where(bits == LOWEST_KEY, 0, bits)  # -0.0
    key = tl.where(bits < 0, bits ^ HIGHEST_KEY, bits)
    return tl.where(score != score, HIGHEST_KEY, key)


@triton.jit
def score_bits(key):  # type: ignore[no-untyped-def] # Triton types its arguments
    """Bits of the score that a key stands for."""
    bits = tl.where(key < 0, key ^ HIGHEST_KEY, key)
    return tl.where(key == HIGHEST_KEY, NAN_BITS, bits)


@triton.jit
def entry_of(key, position):  # type: ignore[no-untyped-def] # Triton types its arguments
    """A candidate as one int64."""
    return (position.to(tl.int64) << 32) | (score_bits(key).to(tl.int64) & LOW_BITS)


@triton.jit
def key_of_entry(entry):  # type: ignore[no-untyped-def] # Triton types its arguments
    """Key of the score of a candidate."""
    return order_key(entry.to(tl.int32).to(tl.float32, bitcast=True))


@triton.jit
def position_of(slot, rank, CP: tl.constexpr, TOKENS_PER_BLOCK: tl.constexpr):  # type: ignore[no-untyped-def] # Triton types its arguments
    """Absolute position of a local slot, int32: layout/ledger.py's position_of_slot."""
    return (slot // TOKENS_PER_BLOCK * CP + rank.to(tl.int32)) * TOKENS_PER_BLOCK + slot % TOKENS_PER_BLOCK


@triton.jit
def count_digits(key, inside, low, high, shift):  # type: ignore[no-untyped-def] # Triton types its arguments
    """How many of the keys that are `inside`, and in [low, high], have each digit at `shift`."""
    inside = inside & (key >= low) & (key <= high)
    digit = tl.where(inside, (key >> shift) - (low >> shift), 0).to(tl.int32)
    return tl.histogram(digit, DIGITS, mask=inside)


@triton.jit
def narrow(counts, low, shift, wanted):  # type: ignore[no-untyped-def] # Triton types its arguments
    """Range of the digit that holds the key which `wanted` are not behind.

    Returns its low and high, how many keys lie in it, and how many of them are wanted.
    """
    digits = tl.arange(0, DIGITS)
    at_least = tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts  # keys of this digit and of higher ones
    digit = tl.max(tl.where(at_least >= wanted, digits, 0), 0)
    matched = tl.sum(tl.where(digits == digit, counts, 0), 0)
    higher = tl.sum(tl.where(digits > digit, counts, 0), 0)
    low = ((low >> shift) + digit) << shift
    one = (low & 0) + 1  # of low's type
    return low, low + ((one << shift) - 1), matched, wanted - higher


@cache
def selection_tile(target: KernelTarget, bits: int = 32) -> tuple[int, int]:
    """Elements of a step of one program, and its warps: 32 bytes of keys a thread, which none of the kernels spills."""
    if target.arch == INTERPRETER:  # short test rows take several steps
        return 32, 4
    return 4096 * 32 // bits, 16


@cache
def parts_for(rows: int, target: KernelTarget) -> int:
    """Programs that may share a row so that all rows fill the card once; Triton's interpreter runs both forms."""
    return 4 if target.arch == INTERPRETER else max(1, target.sm_count // max(rows, 1))
