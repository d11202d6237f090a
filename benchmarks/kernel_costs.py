"""What a call of a kernel must move and compute at least, and what a card can do: the two sides of a roofline.

Bytes count every input that is needed and every output once; workspaces and repeated reads are the kernel's own affair.
"""

from __future__ import annotations

from dataclasses import dataclass

LSE_BYTES = 4


@dataclass(frozen=True)
class Cost:
    """Of one call."""

    flops: float
    nbytes: float


@dataclass(frozen=True)
class Card:
    """Peak of memory and of dense 16-bit tensor cores, as the vendor states them."""

    bytes_per_s: float
    flops_per_s: float
    source: str


# by torch.cuda.get_device_name(); exact names only, since a PCIe card of the same family has other limits
CARDS = {
    "NVIDIA A100-SXM4-80GB": Card(2.039e12, 312e12, "NVIDIA A100 data sheet, SXM 80 GB"),
    "NVIDIA H100 80GB HBM3": Card(3.35e12, 989e12, "NVIDIA H100 data sheet, SXM, dense"),
    "NVIDIA H200": Card(4.8e12, 989e12, "NVIDIA H200 data sheet, SXM, dense"),
    "NVIDIA B200": Card(8.0e12, 2250e12, "NVIDIA DGX B200 data sheet, an eighth of it, dense"),
}


def mla_decode_cost(B: int, S: int, H: int, R: int, r: int, T: int = 1, item: int = 2) -> Cost:
    """Scores over R + r channels, values over R, of S slots that one KV head of that width shares."""
    flops = B * T * S * (2.0 * H * (R + r) + 2.0 * H * R)
    cache = B * S * (R + r) * item
    rows = B * T * H * ((R + r) * item + R * item + LSE_BYTES)
    return Cost(flops, float(cache + rows))


def gqa_decode_cost(B: int, S: int, H: int, K: int, Dk: int, Dv: int, T: int = 1, item: int = 2) -> Cost:
    """H query heads over the S slots of K KV heads."""
    flops = B * T * S * 2.0 * H * (Dk + Dv)
    cache = B * S * K * (Dk + Dv) * item
    rows = B * T * H * ((Dk + Dv) * item + LSE_BYTES)
    return Cost(flops, float(cache + rows))


def merge_lse_cost(P: int, rows: int, W: int, item: int = 2) -> Cost:
    """P parts of width W and their lse are read, one is written; a multiplication and an addition an element."""
    return Cost(2.0 * P * rows * W, float(P * rows * (W * item + LSE_BYTES) + rows * W * item))


def moe_experts_cost(N: int, choices: int, experts_hit: int, D: int, F: int, item: int = 2) -> Cost:
    """Three matrices [F, D] an expert that some token chose; `choices` pairs of a token and a local expert."""
    weights = experts_hit * 3 * F * D * item
    return Cost(6.0 * choices * F * D, float(weights + 2 * N * D * item))


def fraction_of_limit(cost: Cost, seconds: float, card: Card) -> tuple[float, str]:
    """How near a call came to the limit that binds it, and which one that is."""
    by_memory, by_compute = cost.nbytes / card.bytes_per_s, cost.flops / card.flops_per_s
    return max(by_memory, by_compute) / seconds, "memory" if by_memory >= by_compute else "tensor"
