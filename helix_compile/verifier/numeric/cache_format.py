"""What an FP8 cache makes of an entry, written apart from the runtime: tables of e4m3, byte offsets, and who may be rounded where.

A value that lies at a tie of its rounding goes either way by the noise of what it was computed from. So the original is given
the entries that the ranks hold, where these are as near as the rule's own to the original's values, and the rule's elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from helix_compile.plan.cache_row import CacheRow

_CODES = torch.arange(127)
_EXPONENTS, _MANTISSAS = _CODES // 8, (_CODES % 8).double() / 8
# the values of e4m3 that are not negative, by their codes: 127 is NaN
VALUES = torch.where(_EXPONENTS == 0, _MANTISSAS * 2.0**-6, (1 + _MANTISSAS) * torch.exp2(_EXPONENTS.double() - 7))
_MIDDLES = (VALUES[1:] + VALUES[:-1]) / 2
NAN = 0x7F
EITHER_WAY = 4  # an entry may be so many times its noise farther from the original's than the rule's own


def to_codes(x: Tensor) -> Tensor:
    """Codes of e4m3 [.., uint8] of float64 values: the nearest, of two the even one, +-448 beyond these."""
    size = x.abs()
    code = torch.searchsorted(_MIDDLES, size.contiguous())
    at_tie = size == _MIDDLES[code.clamp(max=125)]
    code = torch.where(at_tie & (code % 2 == 1), code + 1, code).clamp(max=126)
    return torch.where(x.isnan(), NAN, code + 128 * torch.signbit(x)).to(torch.uint8)


def of_codes(codes: Tensor) -> Tensor:
    """Float64 values of codes."""
    size = torch.cat([VALUES, VALUES.new_tensor([torch.nan])])[(codes & 0x7F).long()]
    return torch.where(codes >= 128, -size, size)


def _bfloat16(x: Tensor) -> Tensor:
    """Float64 to bfloat16, to nearest even, once."""
    bits = x.contiguous().view(torch.int64)
    kept = (bits + (2**44 - 1) + ((bits >> 45) & 1)) >> 45 << 45
    return kept.view(torch.float64).to(torch.bfloat16)


@dataclass(frozen=True)
class CacheFormat:
    """How the caches of a module hold entries.

    Attributes:
        name: cache_dtype of its plan.
        rows: what a token leaves in each cached attention.
        scales: of fp8_e4m3, by its options, one for each.
        dtype: of the model.
    """

    name: str
    rows: Sequence[CacheRow]
    scales: Sequence[float]
    dtype: torch.dtype

    @staticmethod
    def of(compiled: Any) -> CacheFormat:
        """That of a module, by its plan."""
        options, rows = compiled.plan.options, compiled.facts.caches
        scales = options.cache_scale if isinstance(options.cache_scale, tuple) else (options.cache_scale,) * len(rows)
        return CacheFormat(options.cache_dtype, rows, scales, getattr(torch, compiled.plan.dtype))

    def cut(self, site: int) -> CacheFormat:
        """The format of what attention reads of one site, without its index key."""
        return replace(self, rows=[replace(self.rows[site], index=0)], scales=[self.scales[site]])

    @property
    def rounds(self) -> bool:
        """Entries are not cached as they are."""
        return self.name != "auto"

    def empty(self, site: int, slots: tuple[int, int], parts: int) -> Tensor:
        """A cache [pages, page size, *] of a site in which everything is NaN; its KV heads are one of so many parts."""
        row = self.rows[site]
        if not self.rounds:
            return torch.full((*slots, *row.tail(parts)), torch.nan, dtype=self.dtype)
        if row.index or self.name == "fp8_ds_mla":
            return torch.full((*slots, self._bytes(row)), 0xFF, dtype=torch.uint8)
        return torch.full((*slots, *row.tail(parts)), 0xFF, dtype=torch.uint8).view(torch.float8_e4m3fn)

    def encode(self, site: int, entries: Tensor) -> Tensor:
        """A rank's rows of a site [n, *] as its cache holds them, by the rule; arithmetic in float32 or the wider dtype of entries."""
        row = self.rows[site]
        if not self.rounds:
            return entries.to(self.dtype)
        wide = entries.to(torch.promote_types(entries.dtype, torch.float32))
        if self.name == "fp8_e4m3":
            own = wide[..., : wide.shape[-1] - row.index] / self._scale(site).to(wide)
            parts = [to_codes(own.double())]
        else:
            parts = self._ds_mla(wide[..., : row.first], wide[..., row.first : row.first + row.second])
        if row.index:
            parts.append(_zeros(parts, -sum(p.shape[-1] for p in parts) % 16))
            parts.append(entries[..., -row.index :].to(self.dtype).contiguous().view(torch.uint8))
            parts.append(_zeros(parts, -sum(p.shape[-1] for p in parts) % 16))
        rows = torch.cat(parts, dim=-1)
        return rows if row.index or self.name == "fp8_ds_mla" else rows.view(torch.float8_e4m3fn)

    def decode(self, site: int, rows: Tensor) -> Tensor:
        """What a rank's rows [n, *] stand for; float64 of FP8, else as they are."""
        row = self.rows[site]
        if not self.rounds:
            return rows
        codes, width = rows.view(torch.uint8), row.first + row.second
        if self.name == "fp8_e4m3":
            stop = codes.shape[-1] if row.heads else width
            parts = [of_codes(codes[..., :stop]) * self._scale(site).double()]
        else:
            start = -(-row.first // 4) * 4
            scales = -(-row.first // 128)
            stop = start + 4 * scales + 2 * row.second
            scale = codes[..., start : start + 4 * scales].contiguous().view(torch.float32).double()
            latent = of_codes(codes[..., : row.first]) * scale.repeat_interleave(128, dim=-1)[..., : row.first]
            rope = codes[..., stop - 2 * row.second : stop].contiguous().view(torch.bfloat16).double()
            parts, stop = [latent, rope], -(-stop // 4) * 4
        if row.index:
            at = -(-stop // 16) * 16
            key = codes[..., at : at + row.index * self.dtype.itemsize].contiguous()
            parts.append(key.view(self.dtype).double())
        return torch.cat(parts, dim=-1)

    def rounded(self, site: int, entries: Tensor) -> Tensor:
        """What whole entries [.., first + second] of a site become in its cache, in float64. K and V may stand side by side."""
        if not self.rounds:
            return entries.double()
        flat = entries.flatten(0, -2)
        return self.decode(site, self.encode(site, flat)).view(entries.shape)

    def followed(self, site: int, exact: Tensor, held: Tensor, noise: Tensor | float) -> tuple[Tensor, Tensor]:
        """(what the original is given for its exact entries [.., *] in float64, where the ranks' held ones are no rounding of these).

        `noise` is what the ranks' own values may be off by.
        """
        rule = self.rounded(site, exact)
        fits = (held - exact).abs() <= (rule - exact).abs() + EITHER_WAY * noise
        return torch.where(fits, held, rule), ~fits

    def _scale(self, site: int) -> Tensor:
        return torch.tensor(self.scales[site], dtype=torch.float32)

    def _bytes(self, row: CacheRow) -> int:
        own = row.first + row.second
        if self.name == "fp8_ds_mla":
            own = -(-(-(-row.first // 4) * 4 + 4 * -(-row.first // 128) + 2 * row.second) // 4) * 4
        return -(-(-(-own // 16) * 16 + row.index * self.dtype.itemsize) // 16) * 16 if row.index else own

    def _ds_mla(self, latent: Tensor, rope: Tensor) -> list[Tensor]:
        """Bytes of the latent, its scales and the rope part, with what fills up to words."""
        codes, scales = [], []
        for block in latent.split(128, dim=-1):
            scale = (block.abs().amax(-1, keepdim=True) / 448).to(torch.float32).clamp(min=1e-12)
            codes.append(to_codes((block / scale.to(block)).double()))
            scales.append(scale)
        codes.append(_zeros(codes, -latent.shape[-1] % 4))
        parts = [*codes, torch.cat(scales, -1).view(torch.uint8), _bfloat16(rope.double()).view(torch.uint8)]
        return [*parts, _zeros(parts, -2 * rope.shape[-1] % 4)]


def _zeros(parts: list[Tensor], count: int) -> Tensor:
    return parts[0].new_zeros((*parts[0].shape[:-1], count), dtype=torch.uint8)
