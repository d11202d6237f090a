"""Rotary positions: angles of a position, default and YaRN (arXiv 2309.00071), and the rotation."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DeepseekV3Config


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """YaRN's correction for a context that is `factor` times longer than trained."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


class RotaryEmbedding(nn.Module):
    """cos and sin of position * frequency, r / 2 of each; YaRN where the configuration says so.

    Raises:
        ValueError: another rope_type.
    """

    def __init__(self, config: DeepseekV3Config):
        super().__init__()
        rope, width = config.rope_parameters, config.qk_rope_head_dim
        if rope["rope_type"] not in ("default", "yarn"):
            raise ValueError(f"rope_type {rope['rope_type']!r} is not known here; expected 'default' or 'yarn'")
        powers = rope["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
        frequencies, self.scale = 1.0 / powers, 1.0
        if rope["rope_type"] == "yarn":
            frequencies, self.scale = self._yarn(rope, powers)
        self.inv_freq = nn.Buffer(frequencies, persistent=False)

    @staticmethod
    def _yarn(rope: dict[str, Any], powers: Tensor) -> tuple[Tensor, float]:
        """Slow frequencies are divided by `factor`, fast ones stay, with a ramp between."""
        factor, width = rope["factor"], 2 * len(powers)
        trained = rope["original_max_position_embeddings"]

        def channel(turns: float) -> float:
            """The channel that makes so many turns over the trained length."""
            log_base = 2 * math.log(rope["rope_theta"])
            return width * math.log(trained / (turns * 2 * math.pi)) / log_base

        low, high = channel(rope.get("beta_fast") or 32), channel(rope.get("beta_slow") or 1)
        if rope.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        high += 0.001 if low == high else 0
        ramp = (torch.arange(len(powers), dtype=torch.float32) - low) / (high - low)
        kept = 1 - ramp.clamp(0, 1)
        scale = rope.get("attention_factor")
        if scale is None:
            both = rope.get("mscale") and rope.get("mscale_all_dim")
            scale = yarn_mscale(factor, rope["mscale"] if both else 1.0)
            scale /= yarn_mscale(factor, rope["mscale_all_dim"]) if both else 1.0
        return 1.0 / (factor * powers) * (1 - kept) + 1.0 / powers * kept, scale

    def forward(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Positions [B, T] -> cos and sin [B, T, r / 2] in `dtype`."""
        angles = position_ids[..., None].float() * self.inv_freq.to(torch.float32)
        return (angles.cos() * self.scale).to(dtype), (angles.sin() * self.scale).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate the pairs of x [B, H, T, r]: (0, 1), (2, 3), ... if interleaved, else (0, r/2), (1, r/2 + 1), ..."""
    cos, sin = cos[:, None], sin[:, None]
    one, two = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    return torch.cat([one * cos - two * sin, two * cos + one * sin], dim=-1)
