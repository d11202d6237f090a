"""Latent attention written as other people might, in the place of the attention of a one-layer model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.support.families import fresh_family

H, R, NOPE, ROPE, V, D = 12, 20, 10, 6, 14, 72


class ToyMLA(nn.Module):
    """Every style of expanding a cached latent; `miss` breaks one condition of the rewrite.

    Args:
        style: "cat", "heads_last", "fused_a", "eager", "separate", "stacked_bmm", "einsum".
        miss: "", "rope_per_head", "v_elsewhere", "scaled_keys", "sinks".
    """

    def __init__(self, style: str, miss: str = "", layer: int = 0):
        super().__init__()
        self.style, self.miss, self.layer = style, miss, layer
        linear = lambda i, o: nn.Linear(i, o, bias=False)  # noqa: E731
        self.a = linear(D, 28 + R + ROPE)
        self.q = linear(28, H * (NOPE + ROPE))
        self.kv = linear(R, H * (NOPE + V))
        self.k_only, self.v_only = linear(R, H * NOPE), linear(R, H * V)
        self.uk = nn.Parameter(torch.randn(H, R, NOPE))
        self.uv = nn.Parameter(torch.randn(H, R, V))
        self.k_heads, self.v_side = linear(ROPE, H * ROPE), linear(ROPE, H * V)
        self.sink = nn.Parameter(torch.randn(H))
        self.o = linear(H * V, D)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor,
        past_key_values: Any,
        position_embeddings: tuple[Tensor, Tensor],
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        B, T, _ = hidden_states.shape
        q_a, latent, k_rope = self._compressed(hidden_states).split([28, R, ROPE], dim=-1)
        cos, sin = (t[:, None, :, :ROPE] for t in position_embeddings)
        q = self.q(q_a).view(B, T, H, NOPE + ROPE).transpose(1, 2)
        q = torch.cat([q[..., :NOPE], _rotated(q[..., NOPE:], cos, sin)], dim=-1)
        k_rope = _rotated(k_rope[:, None], cos, sin)
        latent, k_rope = past_key_values.update(latent[:, None], k_rope, self.layer)
        k_nope, v = self._expanded(latent[:, 0])
        rope = k_rope.expand(-1, H, -1, -1)
        if self.miss == "rope_per_head":
            rope = self.k_heads(k_rope[:, 0]).view(B, -1, H, ROPE).transpose(1, 2)
        if self.miss == "v_elsewhere":
            v = self.v_side(k_rope[:, 0]).view(B, -1, H, V).transpose(1, 2)
        k = torch.cat([k_nope, rope], dim=-1)
        out = self._attended(q, k, v, attention_mask).transpose(1, 2)
        return self.o(out.reshape(B, T, H * V)), None

    def _compressed(self, hidden: Tensor) -> Tensor:
        if self.style == "fused_a":
            return self.a(hidden)
        parts = self.a.weight.split([28, R, ROPE])
        return torch.cat([nn.functional.linear(hidden, w) for w in parts], dim=-1)

    def _expanded(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """(k_nope [B, H, S, NOPE], v [B, H, S, V]) of latent [B, S, R]."""
        B = latent.shape[0]
        if self.style == "separate":
            k, v = self.k_only(latent), self.v_only(latent)
            return k.view(B, -1, H, NOPE).transpose(1, 2), v.view(B, -1, H, V).transpose(1, 2)
        if self.style == "stacked_bmm":
            by_head = latent[:, None].expand(-1, H, -1, -1)
            return by_head @ self.uk, by_head @ self.uv
        if self.style == "einsum":
            return (torch.einsum("bsr,hrd->bhsd", latent, w) for w in (self.uk, self.uv))  # type: ignore[return-value]
        both = self.kv(latent)
        if self.style == "heads_last":  # all k_nope first, then all v, heads innermost
            k, v = both.split([H * NOPE, H * V], dim=-1)
            k, v = k.view(B, -1, NOPE, H), v.view(B, -1, V, H)
            return k.permute(0, 3, 1, 2), v.permute(0, 3, 1, 2)
        k, v = both.view(B, -1, H, NOPE + V).transpose(1, 2).split([NOPE, V], dim=-1)
        return k, v

    def _attended(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        if self.style != "eager" and self.miss not in ("scaled_keys", "sinks"):
            return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.25)
        scores = q @ k.transpose(2, 3) * 0.25
        if self.miss == "scaled_keys":
            scores = scores * (1.0 + k.shape[2] / (1.0 + k[..., 0].abs()[:, :, None]))
        if mask.dtype is torch.bool:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(
                ~mask, torch.finfo(q.dtype).min
            )
        scores = scores + mask
        if self.miss == "sinks":
            sink = self.sink.view(1, H, 1, 1).expand(q.shape[0], -1, q.shape[2], 1)
            return torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1] @ v
        return scores.softmax(-1) @ v


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    one, two = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-two, one], dim=-1) * sin


def toy_model(style: str, miss: str = "", layers: int = 1) -> Any:
    """A dense model whose last layer has this attention, fp64."""
    model: Any = fresh_family("youtu", num_hidden_layers=layers)
    torch.manual_seed(3)
    toy = ToyMLA(style, miss, layers - 1).to(torch.float64).eval()
    model.model.layers[layers - 1].self_attn = toy
    return model
