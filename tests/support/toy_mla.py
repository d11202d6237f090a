"""Latent attention written as other people might, in the place of the attention of a one-layer model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.support.families import fresh_family

H, R, NOPE, ROPE, V, D = 12, 20, 10, 6, 14, 72


SINKS = {"sinks": 1, "two_sinks": 2}  # columns of a head; one of them is no miss


class ToyMLA(nn.Module):
    """Every style of expanding a cached latent; `miss` breaks one condition of the rewrite.

    Args:
        style: "cat", "heads_last", "fused_a", "eager", "separate", "stacked_bmm", "einsum", "stacked_hdr" (W [H, D, R]),
            "flat" (W [R, H * D]), "chain" (DeepSeek's own scores, heads behind tokens), "absorbed" (its own absorbed
            form), "absorbed_stacked" (the same with parameters of their own, [H, R, D] and [H, D, R]), "split" (one score
            product over K's nope part and one over the shared rope part), "split_einsum", "no_rope" (a rope part without
            channels is cached).
        miss: "", "rope_per_head", "v_elsewhere", "scaled_keys", "two_sinks", "softmax_axis", "v_uncached", "v_heads"
            (W_UV of the heads in another order), "shifted" (V from the latent of another position), "bias" (a penalty
            by distance is added to the mask), "cache_out", "length_out", "mask_out" (the result reads the cache, how much
            there is, or the mask besides), "one_scaled" (one of the two score products is scaled), "mixed_parts" (the
            products part K elsewhere than between nope and rope), "fill_mask", "where_mask" (the mask is no sum).
        gate: "", or how one linear makes q and a gate: "by head" (a head's rows of either), "behind q" (the gate's rows behind
            all of q's), "one row" (a row a head).
    """

    def __init__(self, style: str, miss: str = "", layer: int = 0, gate: str = ""):
        super().__init__()
        self.style, self.miss, self.layer, self.gate = style, miss, layer, gate
        linear = lambda i, o: nn.Linear(i, o, bias=False)  # noqa: E731
        self.a = linear(D, 28 + R + ROPE)
        self.q = linear(28, H * (NOPE + ROPE))
        self.kv = linear(R, H * (NOPE + V))
        self.k_only, self.v_only = linear(R, H * NOPE), linear(R, H * V)
        self.uk = nn.Parameter(torch.randn(H, R, NOPE))
        self.uv = nn.Parameter(torch.randn(H, R, V))
        self.uk_rows, self.uv_rows = (nn.Parameter(w.transpose(1, 2).clone()) for w in (self.uk, self.uv))
        self.uk_flat, self.uv_flat = (nn.Parameter(w.transpose(0, 1).flatten(1).clone()) for w in (self.uk, self.uv))
        self.k_heads, self.v_side = linear(ROPE, H * ROPE), linear(ROPE, H * V)
        self.sink = nn.Parameter(torch.randn(H))
        self.o = linear(H * V, D)
        self.q_gate = nn.Linear(28, H * (NOPE + ROPE + (1 if gate == "one row" else V)))
        self.q_nope = linear(28, H * NOPE)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor,
        past_key_values: Any,
        position_embeddings: tuple[Tensor, Tensor],
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        B, T, _ = hidden_states.shape
        if self.miss == "bias":
            S = attention_mask.shape[-1]
            attention_mask = attention_mask + torch.arange(S, dtype=torch.float64) * 0.01
        q_a, latent, k_rope = self._compressed(hidden_states).split([28, R, ROPE], dim=-1)
        cos, sin = (t[:, None, :, :ROPE] for t in position_embeddings)
        q, gate = self._q_and_gate(q_a)
        q = q.transpose(1, 2)
        q = torch.cat([q[..., :NOPE], rotated(q[..., NOPE:], cos, sin)], dim=-1)
        k_rope = rotated(k_rope[:, None], cos, sin)
        if self.style == "no_rope":
            q, k_rope = self.q_nope(q_a).view(B, T, H, NOPE).transpose(1, 2), k_rope[..., :0]
        latent, k_rope = past_key_values.update(latent[:, None], k_rope, self.layer)
        if self.style in ("chain", "absorbed", "absorbed_stacked"):
            attend = self._chain if self.style == "chain" else self._absorbed
            q_nope, q_rope = q.transpose(1, 2).split([NOPE, ROPE], dim=-1)
            out = attend(q_nope, q_rope, latent[:, 0], k_rope[:, 0], attention_mask)
            return self.o(out.flatten(2)), None
        k_nope, v = self._expanded(latent[:, 0])
        rope = k_rope.expand(-1, H, -1, -1)
        if self.miss == "rope_per_head":
            rope = self.k_heads(k_rope[:, 0]).view(B, -1, H, ROPE).transpose(1, 2)
        v = self._other_v(v.transpose(1, 2), latent[:, 0], k_rope[:, 0]).transpose(1, 2)
        k = torch.cat([k_nope, rope], dim=-1)
        if self.style.startswith("split"):
            shared = rope if self.miss == "rope_per_head" else k_rope
            scores = self._two_products(q, k_nope, shared, k)
            out = self._weighted(scores, k, v, attention_mask).transpose(1, 2)
        else:
            out = self._attended(q, k, v, attention_mask).transpose(1, 2)
        if gate is not None:
            out = out * gate.sigmoid()
        return self._more(self.o(out.reshape(B, T, H * V)), latent, attention_mask), None

    def _q_and_gate(self, q_a: Tensor) -> tuple[Tensor, Tensor | None]:
        """Q [B, T, H, NOPE + ROPE], and a gate [B, T, H, V or 1]."""
        C = NOPE + ROPE
        if not self.gate:
            return self.q(q_a).unflatten(-1, (H, C)), None
        made = self.q_gate(q_a)
        if self.gate == "behind q":
            q, gate = made.split([H * C, H * V], dim=-1)
            return q.unflatten(-1, (H, C)), gate.unflatten(-1, (H, V))
        made = made.unflatten(-1, (H, -1))
        return made[..., :C], made[..., C:]

    def _more(self, out: Tensor, latent: Tensor, mask: Tensor) -> Tensor:
        if self.miss == "cache_out":
            return out + latent[:, 0].transpose(1, 2)[:, :1].sum(-1, keepdim=True)
        if self.miss == "length_out":
            return out + 1.0 / latent.shape[2]
        return out + mask.sum(-1)[:, 0, :, None] if self.miss == "mask_out" else out

    def _other_v(self, v: Tensor, latent: Tensor, k_rope: Tensor) -> Tensor:
        """V [B, S, H, V], or what a near-miss has in its place."""
        B = v.shape[0]
        if self.miss == "v_elsewhere":
            return self.v_side(k_rope).view(B, -1, H, V)
        if self.miss == "v_uncached":
            return self.v_only(latent * 2.0).view(B, -1, H, V)
        if self.miss == "shifted":
            return self.v_only(torch.cat([latent[:, 1:], latent[:, :1]], dim=1)).view(B, -1, H, V)
        return v

    def _chain(self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, mask: Tensor) -> Tensor:
        """DeepSeek's official scores: every value [B, T or S, H, *]."""
        k_nope, v = (t.transpose(1, 2) for t in self._expanded(latent))
        rope = k_rope.unsqueeze(2).expand(-1, -1, H, -1)
        if self.miss == "rope_per_head":
            rope = self.k_heads(k_rope).view(k_rope.shape[0], -1, H, ROPE)
        v = self._other_v(v, latent, k_rope)
        q, k = torch.cat([q_nope, q_rope], dim=-1), torch.cat([k_nope, rope], dim=-1)
        scores = torch.einsum("bshd,bthd->bsht", q, k) * 0.25
        return torch.einsum("bsht,bthd->bshd", self._weights(scores, latent, mask), v)

    def _absorbed(self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, mask: Tensor) -> Tensor:
        """DeepSeek's official absorbed form: W_UK on q, W_UV on what attention over the latent returns."""
        w = self.kv.weight.view(H, NOPE + V, R)
        uk, uv, uv_letters = w[:, :NOPE], w[:, -V:], "hdc"
        if self.style == "absorbed_stacked":
            uk, uv, uv_letters = self.uk_rows, self.uv, "hcd"
        if self.miss == "v_heads":
            uv = uv.flip(0)
        q_latent = torch.einsum("bshd,hdc->bshc", q_nope, uk)
        by_rope = torch.einsum("bshr,btr->bsht", q_rope, k_rope)
        if self.miss == "rope_per_head":
            rope = self.k_heads(k_rope).view(k_rope.shape[0], -1, H, ROPE)
            by_rope = torch.einsum("bshr,bthr->bsht", q_rope, rope)
        scores = (torch.einsum("bshc,btc->bsht", q_latent, latent) + by_rope) * 0.25
        values = {
            "v_uncached": latent * 2.0,
            "v_elsewhere": k_rope @ self.v_side.weight[:R].T,
            "shifted": torch.cat([latent[:, 1:], latent[:, :1]], dim=1),
        }.get(self.miss, latent)
        x = torch.einsum("bsht,btc->bshc", self._weights(scores, latent, mask), values)
        return torch.einsum(f"bshc,{uv_letters}->bshd", x, uv)

    def _weights(self, scores: Tensor, latent: Tensor, mask: Tensor) -> Tensor:
        """Softmax of scores [B, T, H, S]."""
        if self.miss == "scaled_keys":
            scores = scores * (1.0 + latent[..., 0].abs())[:, None, None]
        if mask.dtype is torch.bool:
            mask = torch.zeros_like(mask, dtype=scores.dtype).masked_fill(~mask, torch.finfo(scores.dtype).min)
        scores = scores + mask.transpose(1, 2)
        if self.miss in SINKS:
            sink = self.sink.view(1, 1, H, 1).expand(scores.shape[0], scores.shape[1], -1, SINKS[self.miss])
            return torch.cat([scores, sink], dim=-1).softmax(-1)[..., : -SINKS[self.miss]]
        return scores.softmax(2 if self.miss == "softmax_axis" else -1)

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
        if self.style == "stacked_hdr":
            return (torch.einsum("bsc,hdc->bhsd", latent, w) for w in (self.uk_rows, self.uv_rows))  # type: ignore[return-value]
        if self.style == "flat":
            k, v = latent @ self.uk_flat, latent @ self.uv_flat
            return k.view(B, -1, H, NOPE).transpose(1, 2), v.view(B, -1, H, V).transpose(1, 2)
        if self.style == "einsum":
            return (torch.einsum("bsr,hrd->bhsd", latent, w) for w in (self.uk, self.uv))  # type: ignore[return-value]
        both = self.kv(latent)
        if self.style == "heads_last":  # all k_nope first, then all v, heads innermost
            k, v = both.split([H * NOPE, H * V], dim=-1)
            k, v = k.view(B, -1, NOPE, H), v.view(B, -1, V, H)
            return k.permute(0, 3, 1, 2), v.permute(0, 3, 1, 2)
        k, v = both.view(B, -1, H, NOPE + V).transpose(1, 2).split([NOPE, V], dim=-1)
        return k, v

    def _two_products(self, q: Tensor, k_nope: Tensor, k_rope: Tensor, k: Tensor) -> Tensor:
        """Scores [B, H, T, S] of k_nope [B, H, S, NOPE] and k_rope [B, 1, S, ROPE]."""
        if self.style == "split_einsum":
            nope = torch.einsum("bhtd,bhsd->bhts", q[..., :NOPE], k_nope)
            return (nope + torch.einsum("bhtr,bsr->bhts", q[..., NOPE:], k_rope[:, 0])) * 0.25
        cut = NOPE - 2 if self.miss == "mixed_parts" else NOPE
        if self.miss == "mixed_parts":
            k_nope, k_rope = k[..., :cut], k[..., cut:]
        by_rope = q[..., cut:] @ k_rope.transpose(2, 3)
        if self.miss == "one_scaled":
            by_rope = by_rope * 0.5
        return (q[..., :cut] @ k_nope.transpose(2, 3) + by_rope) * 0.25

    def _attended(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        spelled = ("scaled_keys", *SINKS, "softmax_axis", "fill_mask", "where_mask")
        if self.style != "eager" and self.miss not in spelled:
            return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.25)
        return self._weighted(q @ k.transpose(2, 3) * 0.25, k, v, mask)

    def _weighted(self, scores: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """V by the softmax of scores [B, H, T, S]."""
        if self.miss == "scaled_keys":
            scores = scores * (1.0 + k.shape[2] / (1.0 + k[..., 0].abs()[:, :, None]))
        if self.miss == "fill_mask":
            return scores.masked_fill(~mask, -1e30).softmax(-1) @ v
        if self.miss == "where_mask":
            return torch.where(mask, scores, -1e30).softmax(-1) @ v
        if mask.dtype is torch.bool:
            mask = torch.zeros_like(mask, dtype=v.dtype).masked_fill(~mask, torch.finfo(v.dtype).min)
        scores = scores + mask
        if self.miss in SINKS:
            sink = self.sink.view(1, H, 1, 1).expand(scores.shape[0], -1, scores.shape[2], SINKS[self.miss])
            return torch.cat([scores, sink], dim=-1).softmax(-1)[..., : -SINKS[self.miss]] @ v
        weights = scores.softmax(1 if self.miss == "softmax_axis" else -1)
        if self.style == "split_einsum":
            return torch.einsum("bhts,bhsd->bhtd", weights, v)
        return weights @ v


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    one, two = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-two, one], dim=-1) * sin


def toy_layers(*toys: tuple[str, str]) -> Any:
    """A dense model, fp64, with one (style, miss) a layer: one capture for them all."""
    model: Any = fresh_family("youtu", num_hidden_layers=len(toys))
    torch.manual_seed(3)
    for layer, (style, miss) in enumerate(toys):
        toy = ToyMLA(style, miss, layer).to(torch.float64).eval()
        model.model.layers[layer].self_attn = toy
    return model


def toy_model(style: str, miss: str = "", layers: int = 1, gate: str = "") -> Any:
    """A dense model whose last layer has this attention, fp64."""
    model: Any = fresh_family("youtu", num_hidden_layers=layers)
    torch.manual_seed(3)
    toy = ToyMLA(style, miss, layers - 1, gate).to(torch.float64).eval()
    model.model.layers[layers - 1].self_attn = toy
    return model
