"""The paper's roofline (arXiv 2507.07120, appendix A) and its HOP-B formula. Predicted: DRAM reads of one layer and nothing else.

t_KV = batch * 2 * ceil(K / TPA) * Hsz * (S / KVP) * bytes / bandwidth
t_W  = (2 * H * (Q / TPA) * Hsz + 2 * H * ceil(K / TPA) * Hsz + 3 * H * F / TPF) * bytes / bandwidth     H = Q * Hsz
"""

from __future__ import annotations

from helix_compile.errors import LayoutError


def kv_read_us(
    batch: int,
    kv_heads: int,
    head_dim: int,
    context: int,
    bytes_per_value: float,
    bandwidth_gb_s: float,
    tpa: int = 1,
    kvp: int = 1,
) -> float:
    """Microseconds in which one rank reads K and V of `batch` sequences of `context` tokens, one layer.

    Of MLA, whose one latent row stands for K and V: kv_heads=1, head_dim=(R + r) / 2, tpa=1.

    Raises:
        LayoutError: a size that is not positive.
    """
    _positive(batch=batch, kv_heads=kv_heads, head_dim=head_dim, context=context, tpa=tpa, kvp=kvp)
    _positive(bytes_per_value=bytes_per_value, bandwidth_gb_s=bandwidth_gb_s)
    values = batch * 2 * -(-kv_heads // tpa) * head_dim * context / kvp
    return _microseconds(values * bytes_per_value, bandwidth_gb_s)


def weight_read_us(
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    ffn: int,
    bytes_per_value: float,
    bandwidth_gb_s: float,
    tpa: int = 1,
    tpf: int = 1,
) -> float:
    """Microseconds in which one rank reads its weights of one dense layer; the hidden size is q_heads * head_dim.

    As in the appendix o_proj stays on TPA, so that more KVP ranks do not cut it.

    Raises:
        LayoutError: a size that is not positive.
    """
    _positive(q_heads=q_heads, kv_heads=kv_heads, head_dim=head_dim, ffn=ffn, tpa=tpa, tpf=tpf)
    _positive(bytes_per_value=bytes_per_value, bandwidth_gb_s=bandwidth_gb_s)
    hidden = q_heads * head_dim
    attention = 2 * hidden * (q_heads / tpa) * head_dim + 2 * hidden * -(-kv_heads // tpa) * head_dim
    return _microseconds((attention + 3 * hidden * ffn / tpf) * bytes_per_value, bandwidth_gb_s)


def hopb_time(batch: int, compute: float, exchange: float, overlap: bool) -> float:
    """Time of `batch` sequences of which each computes and then exchanges, in the unit of `compute` and `exchange`.

    With `overlap` (HOP-B) a sequence exchanges while the next one computes (section 2.1.3); without it they take turns.

    Raises:
        LayoutError: batch < 1, or a time below 0.
    """
    _positive(batch=batch)
    if compute < 0 or exchange < 0:
        raise LayoutError(f"hopb_time: times >= 0 expected, got compute={compute}, exchange={exchange}")
    if not overlap:
        return batch * (compute + exchange)
    return compute + (batch - 1) * max(compute, exchange) + exchange


def _microseconds(nbytes: float, gb_s: float) -> float:
    return nbytes / (gb_s * 1e3)


def _positive(**sizes: float) -> None:
    for name, size in sizes.items():
        if size <= 0:
            raise LayoutError(f"roofline: {name} > 0 expected, got {size}")
