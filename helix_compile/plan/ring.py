"""The ring in which a rank holds the last tokens of each sequence, for attention with a window or chunks: pages that wrap.

    slot(p) = p     page(p) = p // PAGE_SIZE, in page(p) % pages of the sequence's own     table[row, j] = row's page j % pages

A step appends T tokens, and its first query still sees `reach - 1` before them: their pages must be different ones. So much
is always left to be taken back, too: as many tokens as a step may have.
"""

from __future__ import annotations

import torch
from torch import Tensor

from helix_compile.config.options import PAGE_SIZE

MOST_SLACK = 4  # pages: prompts of wide windows are run in steps of up to about 512 tokens


def ring_pages(reach: int, max_seq_len: int) -> int:
    """Pages of a ring for queries that see `reach` tokens, their own included; no more than the capacity needs."""
    window = -(-reach // PAGE_SIZE)
    slack = min(max(window // 4, 1), MOST_SLACK)
    return min(window + 1 + slack, pages_of(max_seq_len))


def pages_of(tokens: int) -> int:
    """Pages that so many tokens of a sequence take, all in a row."""
    return max(1, -(-tokens // PAGE_SIZE))


def longest_step(pages: int, reach: int, max_seq_len: int) -> int:
    """Tokens that one step may append to a sequence: the first query's window and the last token on different pages."""
    return max_seq_len if pages >= pages_of(max_seq_len) else (pages - 1) * PAGE_SIZE + 2 - reach


def first_held(deepest: int, pages: int) -> int:
    """The first position that a ring still holds once tokens up to `deepest` have been written."""
    return max(0, -(-deepest // PAGE_SIZE) - pages) * PAGE_SIZE


def ring_table(rows: int, pages: int, max_seq_len: int) -> Tensor:
    """[rows, pages of max_seq_len tokens] int64 on the host: the page of each page of a sequence."""
    return torch.arange(rows)[:, None] * pages + torch.arange(pages_of(max_seq_len)) % pages
