"""Entries as a cache holds them, and back: in the model's dtype they are the same, in FP8 they are rounded on the way in.

An entry is [latent | rope part | index key], or [K of all heads | V of all heads]. In FP8 there are also rows as they lie in
the cache: float8_e4m3fn values of both parts (of the cache's own scale), or bytes (layout/cache_bytes.py) of the whole row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from helix_compile.errors import RuntimeFault
from helix_compile.kernels.reference_fp8 import BYTES, FP8, cached_rows, entries_of_rows
from helix_compile.plan.cache_row import CacheRow, StoredRow


def of_scale(rows: Tensor, scale: float | None) -> Tensor:
    """FP8 values that say what they are multiplied by, where that is known: no dtype does, nor does a part of them."""
    if scale is not None:
        rows.cache_scale = scale  # type: ignore[attr-defined] # torch keeps it with the object
    return rows


def scale_of(rows: Tensor) -> float | None:
    """What of_scale() was told."""
    return getattr(rows, "cache_scale", None)


@dataclass(frozen=True)
class RowCodec:
    """What becomes of one cached attention's entries.

    Attributes:
        row: what a token leaves there.
        stored: how a rank's cache holds it.
        dtype: of the model.
        scale: of a cache in fp8_e4m3.
    """

    row: CacheRow
    stored: StoredRow
    dtype: torch.dtype
    scale: Tensor | None = None

    @property
    def raw(self) -> torch.dtype | None:
        """Dtype of what lies in the cache, where that is not the entries themselves."""
        return self.stored.dtype if self.stored.dtype in (BYTES, FP8) else None

    def rows(self, first: Tensor, second: Tensor) -> Tensor:
        """Rows of all heads [n, *] as a cache holds them, of both parts [n, *] of n entries, index keys behind the second.

        Parts that are such rows already are taken as they are.
        """
        if self.raw is None or first.dtype is self.raw:
            return torch.cat([first, second], dim=-1)
        key = None
        if self.row.index:
            second, key = second.split([self.row.second, self.row.index], dim=-1)
            key = key.to(self.dtype)
        whole = first.new_empty((0, *self.stored.tail), dtype=self.stored.dtype)
        return cached_rows(first, second, whole, self.scale, key)

    def entries(self, rows: Tensor) -> Tensor:
        """What a rank's rows [.., *] stand for, in the model's dtype: [.., R + r + I], or [.., K, Dk + Dv]."""
        if self.raw is None:
            return rows
        if rows.dtype is FP8:
            return self._wide(rows)
        body = rows[..., : self.stored.attended]
        if self.scale is not None:
            body = body.view(FP8)
        entries = self._wide(body.flatten(0, -2)).unflatten(0, body.shape[:-1])
        if not self.row.index:
            return entries
        start = self.stored.index_at
        key = rows[..., start : start + self.row.index * self.dtype.itemsize].contiguous().view(self.dtype)
        return torch.cat([entries, key], dim=-1)

    def _wide(self, rows: Tensor) -> Tensor:
        wide = torch.promote_types(self.dtype, torch.float32)
        return entries_of_rows(rows, self.row.first, self.row.second, wide, self.scale).to(self.dtype)

    def widths(self, first: Tensor) -> tuple[int, int]:
        """Of both parts, where the first is this one."""
        return (self.stored.tail[0], 0) if first.dtype is BYTES else self.row.widths

    def check_given(self, site: int, first: Tensor, second: Tensor) -> None:
        """RuntimeFault where parts of a byte a value are not rows of this cache."""
        given = {first.dtype, second.dtype}
        if min(t.itemsize for t in given) > 1:
            return
        if given == {self.raw}:
            theirs, ours = scale_of(first), None if self.scale is None else float(self.scale)
            if theirs is not None and theirs != ours:
                raise RuntimeFault(
                    f"import_cache: attention {site}: FP8 values of cache_scale {theirs:g} for a cache of {ours}, where they would stand "
                    f"for other numbers; give entries (export_cache() without raw), or compile with cache_scale={theirs:g}"
                )
            return
        names = " and ".join(sorted(map(str, given)))
        raise RuntimeFault(
            f"import_cache: attention {site}: parts of {names} for a cache in {self.stored.dtype}; expected both parts as it holds "
            "them, or entries in any wider float (an FP8 value times its scale)"
        )
