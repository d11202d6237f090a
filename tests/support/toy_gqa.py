"""Grouped-query attention in several styles, as the graph of one attention layer; `miss` breaks one condition."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn

from helix_compile.capture.body import normalised_module
from helix_compile.capture.layers import export_functional
from helix_compile.ir.sizes import HINT_B, HINT_S, HINT_T

H, K, DK, DV, D = 12, 4, 10, 14, 36
# rows of one linear that makes q and a gate, by how the toy makes them of it
GATES = {
    "gate from q's linear": H * (DK + DV),
    "gate behind all of q": H * (DK + DV),
    "gate of a row a head": H * (DK + 1),
    "gate heads last": H * (DK + DV),
    "gate of rows of q": H * DV,
    "gate of rows that q reads too": H * (DK + DV - 1),
    "gate and a row for nothing": H * (DK + DV + 1),
    "gate of the token before": H * (DK + DV),
    "gate of a row for some heads": H * DK + 5 * DV + H - 5,
    "gate and more of the input": H * (DK + DV),
    "gate scaled with q": H * (DK + DV),
    "gate by a norm over all rows": H * (DK + DV),
    "gate and v of q's linear": H * (DK + DV) + K * DV,
    "gate read elsewhere": H * (DK + DV),
    "gate's heads in q's place": H * (DK + DV),
}


class ToyGQA(nn.Module):
    """Styles: "repeat", "enable_gqa", "eager", "interleave", "sinks", "sinks behind". Misses: see `_missed` and `_attended`."""

    def __init__(self, style: str, miss: str = ""):
        super().__init__()
        self.style, self.miss = style, miss
        self.q, self.o = nn.Linear(D, H * DK), nn.Linear(H * DV, D, bias=False)
        self.k, self.v = nn.Linear(D, K * DK), nn.Linear(D, K * DV)
        self.qkv = nn.Linear(D, H * DK + K * (DK + DV))
        self.gate, self.q_gate = nn.Linear(D, H * DV), nn.Linear(D, GATES.get(miss, 1))
        self.q_more = nn.Linear(D, H * (DK + 1))
        self.sink = nn.Parameter(torch.randn(H))

    def forward(self, hidden: Tensor, mask: Tensor, past_k: Tensor, past_v: Tensor) -> tuple[Tensor, list[Tensor]]:
        B, T, _ = hidden.shape
        if self.miss == "q and more":
            q = self.q_more(hidden).view(B, T, H, DK + 1)[..., :DK].flatten(2)
            k, v = self.k(hidden), self.v(hidden)
        elif self.miss == "one linear":
            q, k, v = self.qkv(hidden).split([H * DK, K * DK, K * DV], dim=-1)
        else:
            q, k, v = self.q(hidden), self.k(hidden), self.v(hidden)
        q, k, v = (x.view(B, T, -1, w).transpose(1, 2) for x, w in ((q, DK), (k, DK), (v, DV)))
        q = self._missed_q(q)
        if self.miss == "norm over heads":
            k = k / (k.square().mean(dim=(1, 3), keepdim=True) + 1e-5).sqrt()
        new_k, new_v = k, v
        k, v = torch.cat([past_k, k], dim=2), torch.cat([past_v, v], dim=2)
        k, v, mask = self._missed(k, v, mask)
        if self.miss in GATES:
            q, gate, v = self._q_and_gate(hidden, past_v, v)
            q = q.transpose(1, 2)
        out = self._attended(q, k, v, mask).transpose(1, 2)
        if self.miss == "gate's heads change places":
            gate = _swapped(self.gate(hidden).view(B, T, H, DV), 2)
        if self.miss.startswith("gate"):
            out = out * gate.sigmoid()
        if self.miss == "gate read elsewhere":
            return self.o(out.reshape(B, T, H * DV)) + gate.flatten(2).sum(-1, keepdim=True), [new_k, new_v]
        return self.o(out.reshape(B, T, H * DV)), [new_k, new_v]

    def _q_and_gate(self, hidden: Tensor, past_v: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Q [B, T, H, DK], a gate [B, T, H, DV or 1], and V: of one linear."""
        made, miss = self.q_gate(hidden), self.miss
        if miss == "gate behind all of q":
            q, gate = made.split([H * DK, H * DV], dim=-1)
            return q.unflatten(-1, (H, DK)), gate.unflatten(-1, (H, DV)), v
        if miss == "gate heads last":
            q, gate = made.unflatten(-1, (DK + DV, H)).split([DK, DV], dim=2)
            return q.transpose(2, 3), gate.transpose(2, 3), v
        if miss == "gate of a row for some heads":
            q, gate, single = made.split([H * DK, 5 * DV, H - 5], dim=-1)
            gates = [gate.unflatten(-1, (5, DV)), single.unsqueeze(-1).expand(-1, -1, -1, DV)]
            return q.unflatten(-1, (H, DK)), torch.cat(gates, dim=2), v
        if miss == "gate and v of q's linear":
            made, more = made.split([H * (DK + DV), K * DV], dim=-1)
            v = torch.cat([past_v, more.unflatten(-1, (K, DV)).transpose(1, 2)], dim=2)
        if miss == "gate scaled with q":
            made = made * 2.0
        if miss == "gate by a norm over all rows":
            made = made / made.square().mean(-1, keepdim=True)
        heads = made.unflatten(-1, (H, -1))
        if miss == "gate of rows of q":
            return heads[..., :DK], heads, v
        if miss == "gate of rows that q reads too":
            return heads[..., :DK], heads[..., DK - 1 :], v
        q, gate = heads[..., :DK], heads[..., DK : DK + (1 if miss == "gate of a row a head" else DV)]
        if miss == "gate of the token before":
            gate = torch.cat([heads[:, :1], heads[:, :-1]], dim=1)[..., DK:]
        if miss == "gate and more of the input":
            gate = gate + self.gate(hidden).unflatten(-1, (H, DV))
        return (_swapped(q, 2) if miss == "gate's heads in q's place" else q), gate, v

    def _missed_q(self, q: Tensor) -> Tensor:
        if self.miss == "q's heads change places":
            return _swapped(q, 1)
        if self.miss == "next to nothing across heads":
            return q + 1e-6 * q.mean(dim=1, keepdim=True)
        if self.miss == "a weight per head":
            return q * self.sink.view(1, H, 1, 1)
        if self.miss == "heads taken by number":
            return torch.stack([q[:, head] for head in range(H)], dim=1)
        return q

    def _missed(self, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.miss == "other heads":
            k = torch.cat([k[:, 1:], k[:, :1]], dim=1)
        if self.miss == "v from another position":
            v = torch.cat([v[:, :, 1:], v[:, :, :1]], dim=2)
        if self.miss == "k of other channels":
            k = torch.cat([k[..., 1:], k[..., :1]], dim=-1)
        if self.miss == "k scaled":
            k = k * (1.0 + k[..., :1].abs())
        if self.miss == "window by slice":
            k, v, mask = k[:, :, 1:], v[:, :, 1:], mask[..., 1:]
        return k, v, mask

    def _repeated(self, x: Tensor) -> Tensor:
        B, _, S, W = x.shape
        if self.miss == "tiled":
            return x[:, None].expand(-1, H // K, -1, -1, -1).reshape(B, H, S, W)
        if self.style == "interleave":
            return x.repeat_interleave(H // K, dim=1)
        return x[:, :, None].expand(-1, -1, H // K, -1, -1).reshape(B, H, S, W)

    def _attended(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        sdpa = nn.functional.scaled_dot_product_attention
        if self.style == "enable_gqa":
            return sdpa(q, k, v, attn_mask=mask, scale=0.25, enable_gqa=True)
        k, v = self._repeated(k), self._repeated(v)
        if self.style not in ("eager", "sinks", "sinks behind"):
            return sdpa(q, k, v, attn_mask=mask, scale=0.25)
        scores = q @ k.transpose(2, 3) * 0.25
        if self.miss == "score scaled per key":
            scores = scores * (1.0 + k[..., 0].abs()[:, :, None])
        scores = scores + mask
        if self.style == "sinks":
            return self._with_sinks(scores, self.sink.view(1, H, 1, 1)) @ v
        if self.style == "sinks behind":
            return self._scaled(scores.softmax(-1) @ v, scores)
        return scores.softmax(-1) @ v

    def _with_sinks(self, scores: Tensor, sink: Tensor) -> Tensor:
        """Softmax of scores and a logit a head."""
        if self.miss == "sinks of other heads":
            sink = _swapped(sink, 1)
        if self.miss == "sinks from the scores":
            sink = sink * scores[..., :1]
        if self.miss == "sinks scaled":
            sink = sink * 0.5
        both = torch.cat(
            [scores, sink.expand(scores.shape[0], -1, scores.shape[2], 2 if self.miss == "two sinks" else 1)], -1
        )
        if self.miss == "both scaled":
            both = both * 0.5
        if self.miss != "no maximum":
            both = both - both.max(dim=-1, keepdim=True).values
        weights = both.softmax(-1)
        if self.miss == "first key cut off":
            return weights[..., 1:]
        return weights[..., :-2] if self.miss == "two sinks" else weights[..., :-1]

    def _scaled(self, out: Tensor, scores: Tensor) -> Tensor:
        """Attention times what is left of its weights beside sinks."""
        sink = _swapped(self.sink, 0) if self.miss == "sinks of other heads" else self.sink
        lse = torch.logsumexp(scores * 0.5 if self.miss == "lse of other scores" else scores, dim=-1)
        return out * (lse - sink.view(1, H, 1)).float().sigmoid()[..., None].to(out.dtype)


def _swapped(x: Tensor, dim: int) -> Tensor:
    """Heads 1 and 4 change places; heads 0, 6 and 11 alone would not show it."""
    order = [x.narrow(dim, *part) for part in ((0, 1), (4, 1), (2, 2), (1, 1), (5, H - 5))]
    return torch.cat(order, dim=dim)


@cache
def toy_graph(style: str, miss: str = "") -> fx.Graph:
    """The attention exported at the capture hints, which is what matchers look at; names of inputs as in a captured body."""
    torch.manual_seed(0)
    layer = ToyGQA(style, miss).double()
    total = HINT_S + HINT_T
    args: tuple[Any, ...] = (
        torch.randn(HINT_B, HINT_T, D).double(),
        torch.randn(HINT_B, 1, HINT_T, total).double(),
        torch.randn(HINT_B, K, HINT_S, DK).double(),
        torch.randn(HINT_B, K, HINT_S, DV).double(),
    )
    names = [("hidden", "hidden"), ("tensor", "mask"), ("past", "past_latent_0"), ("past", "past_rope_0")]
    return normalised_module(export_functional(layer, args, None)[0], names, prefix="").graph
