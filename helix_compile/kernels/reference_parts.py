"""Rows of one part of a batch that is attended to and exchanged a part at a time (overlap="hopb"). The spec.

Of B sequences part i of n holds rows [B * i // n, B * (i + 1) // n): every row once, in order, whatever B; a batch of fewer rows than
parts leaves parts without any.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rows_of_part_reference(x: Tensor, part: int, parts: int) -> Tensor:
    """Those rows of x [B, *]: a view [b, *].

    Args:
        x: of all sequences.
        part: which, from 0.
        parts: how many there are.
    """
    B = x.shape[0]
    return x[B * part // parts : B * (part + 1) // parts]


def place_rows_reference(x: Tensor, like: Tensor, part: int, parts: int) -> Tensor:
    """X [b, *], the rows of a part, where they are among all: [B, *], zeros in the rows of other parts.

    A product with a weight then has as many rows as that of the whole batch: the bits of a row may hang on how many there are.

    Args:
        x: rows of the part.
        like: [B, *], whose first size alone is read.
        part, parts: as in rows_of_part.
    """
    B, row = like.shape[0], x.shape[1:]
    before, behind = B * part // parts, B - B * (part + 1) // parts
    return torch.cat([x.new_zeros((before, *row)), x, x.new_zeros((behind, *row))])
