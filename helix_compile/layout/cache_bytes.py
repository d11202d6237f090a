"""How bytes lie in a cached row that is not of one dtype.

    fp8_ds_mla    R e4m3 | a float32 scale for each 128 of them | r bfloat16       656 bytes of R = 512, r = 64, as in vLLM
    index key     behind FP8, in the dtype of the model, from the next multiple of 16 bytes on

Where 128 does not divide R the last block is shorter (vLLM takes R = 512 alone).
"""

from __future__ import annotations

BLOCK = 128  # latent values that share a scale
WORD, ALIGNED = 4, 16  # bytes: of a scale; of what TMA reads


def scales_of(R: int) -> int:
    """Scales of a latent of R values."""
    return -(-R // BLOCK)


def scales_at(R: int) -> int:
    """Byte at which the scales begin."""
    return -(-R // WORD) * WORD


def rope_at(R: int) -> int:
    """Byte at which the rope part begins."""
    return scales_at(R) + WORD * scales_of(R)


def ds_mla_bytes(R: int, r: int) -> int:
    """Bytes of a row of fp8_ds_mla."""
    return -(-(rope_at(R) + 2 * r) // WORD) * WORD


def index_key_at(n_bytes: int) -> int:
    """Byte at which an index key begins behind a row of so many bytes."""
    return -(-n_bytes // ALIGNED) * ALIGNED
