"""How (partial_o, lse) travel in the exchange over heads. A codec says it once; who plans, packs, sends or checks asks it.

    pack     partial_o [B, T, H, W], lse [B, T, H] -> buffer [peers, n]: row j is head chunk j, for peer j
    unpack   buffer, row p from peer p -> partial_o_P [P, B, T, h, W], lse_P [P, B, T, h]

Whatever the codec, they are overloads of helix::pack_heads and helix::unpack_heads (`NAME` of codec NAME, the native one
has no name), so what goes by an op's name holds for each: typing rules, finders, checks. A codec without a kernel keeps
its torch reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from helix_compile.config.options import HelixOptions


@dataclass(frozen=True)
class ExchangeCodec:
    """One way to travel.

    Attributes:
        name: overload of the ops; "" for the native one.
        pack: (partial_o, lse, peers) -> buffer.
        unpack: (buffer, partial_o, lse) -> parts; partial_o and lse give shape and dtype only.
        head_bytes: (W, dtype of o, dtype of lse) -> bytes that one head of one token takes in the buffer.
        dtype: (dtype of o, dtype of lse) -> dtype of the buffer.
        noise: share of the largest value that a value of o may lose on the way; 0.0: none, bit for bit.
        views: whether the parts may be views of the buffer.
    """

    name: str
    pack: Callable[..., Tensor]
    unpack: Callable[..., tuple[Tensor, Tensor]]
    head_bytes: Callable[[int, torch.dtype, torch.dtype], int]
    dtype: Callable[[torch.dtype, torch.dtype], torch.dtype]
    noise: float = 0.0
    views: bool = False

    def op(self, base: str) -> str:
        """The name of this codec's op pack_heads or unpack_heads."""
        return f"{base}.{self.name}" if self.name else base

    def buffer(self, partial_o: Tensor, lse: Tensor, peers: int, dtype: torch.dtype | None = None) -> Tensor:
        """What pack leaves for partial_o [B, T, H, *, W] and lse [B, T, H, *], not filled; `dtype`: what o is packed as."""
        o_dtype = dtype or partial_o.dtype
        own = self.dtype(o_dtype, lse.dtype)
        n_bytes = math.prod(lse.shape[:3]) * self.head_bytes(partial_o.shape[-1], o_dtype, lse.dtype)
        return lse.new_empty((peers, n_bytes // own.itemsize // peers), dtype=own)


def pack_heads_reference(partial_o: Tensor, lse: Tensor, peers: int) -> Tensor:
    """One buffer [peers, n] for the exchange over heads; row j is [lse, o] of head chunk j.

    partial_o [B, T, H, *], lse [B, T, H]. Bytes (uint8) where the two dtypes differ. lse comes first: a row of
    16-bit o with an odd count would leave lse misaligned.
    """
    B, T, H = lse.shape
    o_rows = partial_o.view(B, T, peers, H // peers, partial_o.shape[3]).permute(2, 0, 1, 3, 4).reshape(peers, -1)
    lse_rows = lse.view(B, T, peers, H // peers).permute(2, 0, 1, 3).reshape(peers, -1)
    if partial_o.dtype != lse.dtype:
        # a chunk of one head leaves strides that view() to bytes does not take
        o_rows, lse_rows = (x.contiguous().view(torch.uint8) for x in (o_rows, lse_rows))
    return torch.cat([lse_rows, o_rows], dim=1)


def unpack_heads_reference(buffer: Tensor, partial_o: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Read (partial_o_P [P, B, T, h, *], lse_P [P, B, T, h]) out of a buffer that pack_heads laid out.

    partial_o and lse give shape and dtype only (of lse the first three sizes: a kernel may leave one for each split).
    The results are strided views of the buffer where the rows are aligned for lse's dtype, else copies.
    """
    peers = buffer.shape[0]
    B, T, H = lse.shape[:3]
    h, width = H // peers, partial_o.shape[3]
    if not buffer.shape[
        1
    ]:  # a part of a batch without a sequence: bytes in a row of none can't be read as another dtype
        return partial_o.new_empty((peers, B, T, h, width)), lse.new_empty((peers, B, T, h))
    split = B * T * h if buffer.dtype == lse.dtype else B * T * h * lse.dtype.itemsize
    lse_rows, o_rows = buffer[:, :split], buffer[:, split:]
    if buffer.dtype != lse.dtype:
        if buffer.shape[1] % lse.dtype.itemsize:
            # one peer's row counts as contiguous, and still begins where lse is not aligned
            lse_rows, o_rows = (x.clone(memory_format=torch.contiguous_format) for x in (lse_rows, o_rows))
        lse_rows, o_rows = lse_rows.view(lse.dtype), o_rows.view(partial_o.dtype)
    return o_rows.view(peers, B, T, h, width), lse_rows.view(peers, B, T, h)


NATIVE = ExchangeCodec(
    "",
    pack_heads_reference,
    unpack_heads_reference,
    head_bytes=lambda width, o, lse: width * o.itemsize + lse.itemsize,
    dtype=lambda o, lse: o if o == lse else torch.uint8,
    views=True,
)


CODECS = (NATIVE,)


def codec_of(options: HelixOptions) -> ExchangeCodec:
    """What a plan's exchange uses: there is one codec, and no option to choose."""
    return NATIVE
