"""What a matcher found in one body: node names and sizes, no decision.

Names are fx.Node.name, which Graph.graph_copy keeps, so one match serves every stage. Index tables say which row or
channel is which; they are read off the graph, not assumed (capture-and-match, section 5).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from helix_compile.plan.cache_row import CacheRow

Table = tuple[tuple[int, ...], ...]


def permuted(value: Tensor, form: str, wanted: str) -> Tensor:
    """A value whose dims lie in the order `form`, in the order `wanted`."""
    return value.permute([form.index(letter) for letter in wanted])


@dataclass(frozen=True)
class MatchFailure:
    """Why a candidate is not a site: the reason, the node it stopped at, and how many checks it had passed."""

    reason: str
    node: str
    where: str = ""
    depth: int = 0


@dataclass(frozen=True)
class Uncut:
    """Why q, K or V (`what`) can't be cut by heads, and the node and line that stand in the way. It works where it is whole."""

    what: str
    reason: str
    node: str
    where: str = ""


@dataclass(frozen=True)
class GateMatch:
    """A gate between attention and o_proj: product = attention * value, both in `form` ("BTHV", "BHTV" or "BT(HV)").

    `weight` and `bias` belong to the linear it comes from, whose rows [h * width, (h + 1) * width) make head h; None
    where one gate serves all heads. `head_views` are views on the way that write the head count.
    """

    product: str
    value: str
    form: str
    weight: str | None = None
    bias: str | None = None
    width: int = 0
    input_size: int = 0
    head_views: tuple[str, ...] = ()


@dataclass(frozen=True)
class UpWeight:
    """W_UK or W_UV [H, D, R] in a parameter: element (h, d, r) is number at[h][d] + r * step of it, counted row by row.

    `order` says how its dims lie there: "hdr" (rows of a linear, or stacked [H, D, R]), "hrd" (stacked [H, R, D]) or
    "rhd" ([R, H * D]); a rank holds its part in the same order.
    """

    param: str
    shape: tuple[int, ...]
    at: Table
    step: int
    order: str

    @property
    def rows(self) -> Table:
        """[h][d] -> row of the parameter as [-1, R]; for order "hdr"."""
        width = self.shape[-1]
        return tuple(tuple(first // width for first in head) for head in self.at)

    def of(self, whole: Tensor) -> Tensor:
        """[H, D, R] out of the parameter."""
        if self.order == "hdr":
            return whole.reshape(-1, self.shape[-1])[torch.tensor(self.rows, device=whole.device)]
        view, window = self.view()
        part = whole.reshape(view).narrow(*window)
        return part.permute([self.order.index(letter) for letter in "hdr"])

    def view(self) -> tuple[tuple[int, ...], tuple[int, int, int]]:
        """(view, window) of the parameter that hold it, for "hrd" and "rhd"."""
        H, D, numel = len(self.at), len(self.at[0]), torch.Size(self.shape).numel()
        window = (2, self.at[0][0], D)
        if self.order == "hrd":
            return (H, numel // (H * self.step), self.step), window
        return (numel // self.step, H, self.step // H), window


@dataclass(frozen=True)
class AttentionMatch:
    """One MLA site.

    Node names: `anchor` (attention output [B, H, T, V]), `q` [B, H, T, Dn + r], `q_proj` and `o_proj` (linears),
    `v_up` and `k_up` (the products with W_UV and W_UK: one linear where it makes both), `latent` [B, 1, T, R] and
    `k_rope` [B, 1, T, r] (new tokens), `mask`. Parameters are names relative to the layer. `scale` multiplies the scores.

    Tables: `w_uk`, `w_uv` say where these weights are; `q_nope[d]`, `q_rope[j]` are channels of q, or of
    `q_rope_value` where the rope part of q is a value of its own. Input column h * V + v of o_proj reads channel v of
    head h. `head_views` are views between q_proj and q that write the head count as a number.

    Forms are orders of dims where the model has another one: of the anchor, of q, of `q_rope_value`, of the scores
    that the mask is added to (for sdpa, all heads before tokens).
    """

    anchor: str
    q: str
    q_proj: str
    v_up: str
    k_up: str
    o_proj: str
    latent: str
    k_rope: str
    mask: str
    past_latent: str
    past_rope: str
    q_weight: str
    q_bias: str | None
    w_uk: UpWeight
    w_uv: UpWeight
    o_weight: str
    o_bias: str | None
    scale: float
    num_heads: int
    kv_lora_rank: int
    qk_rope_head_dim: int
    qk_nope_head_dim: int
    v_head_dim: int
    hidden_size: int
    q_input_size: int
    q_nope: tuple[int, ...]
    q_rope: tuple[int, ...]
    head_views: tuple[str, ...] = ()
    gate: GateMatch | None = None
    uncut: tuple[Uncut, ...] = ()
    q_rope_value: str = ""
    form: str = "BHTV"
    q_form: str = "BHTC"
    q_rope_form: str = "BHTC"
    mask_form: str = "BHTS"

    @property
    def q_head_dim(self) -> int:
        """Channels of one query head."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def cache(self) -> CacheRow:
        """What a token leaves in the cache."""
        return CacheRow(self.kv_lora_rank, self.qk_rope_head_dim)

    @property
    def new(self) -> tuple[str, str]:
        """Nodes of what the new tokens add to the cache."""
        return self.latent, self.k_rope

    @property
    def past(self) -> tuple[str, str]:
        """Placeholders of what is cached."""
        return self.past_latent, self.past_rope

    @property
    def cut_weights(self) -> tuple[str, ...]:
        """Weights that this site cuts."""
        return self.q_weight, *dict.fromkeys((self.w_uk.param, self.w_uv.param)), self.o_weight

    @property
    def cut_biases(self) -> tuple[str | None, ...]:
        """Biases that this site cuts."""
        return (self.q_bias,)


@dataclass(frozen=True)
class GqaMatch:
    """One grouped-query site: K and V are cached as they are; query head j reads KV head j // (num_heads / kv_heads).

    Node names: `anchor` (attention output [B, H, T, Dv]), `q` [B, H, T, Dk], `q_proj`, `k_proj`, `v_proj` and `o_proj`
    (linears), `k` [B, K, T, Dk] and `v` [B, K, T, Dv] (new tokens, as they are cached), `past_k` and `past_v`, `mask`.
    Parameters are names relative to the layer. Rows [h * D, (h + 1) * D) of q_proj, k_proj and v_proj make head h.
    `head_views`, `k_views`, `v_views` are views on the way from each linear that write the head count as a number.
    """

    anchor: str
    q: str
    q_proj: str
    k_proj: str
    v_proj: str
    o_proj: str
    k: str
    v: str
    past_k: str
    past_v: str
    mask: str
    q_weight: str
    q_bias: str | None
    k_weight: str
    k_bias: str | None
    v_weight: str
    v_bias: str | None
    o_weight: str
    o_bias: str | None
    scale: float
    num_heads: int
    kv_heads: int
    q_head_dim: int
    v_head_dim: int
    hidden_size: int
    q_input_size: int
    k_input_size: int
    v_input_size: int
    head_views: tuple[str, ...] = ()
    k_views: tuple[str, ...] = ()
    v_views: tuple[str, ...] = ()
    gate: GateMatch | None = None
    uncut: tuple[Uncut, ...] = ()
    form: str = "BHTV"  # of the anchor, and of the scores: the only ones that are matched
    mask_form: str = "BHTS"

    @property
    def cache(self) -> CacheRow:
        """What a token leaves in the cache."""
        return CacheRow(self.q_head_dim, self.v_head_dim, self.kv_heads)

    @property
    def new(self) -> tuple[str, str]:
        """Nodes of what the new tokens add to the cache."""
        return self.k, self.v

    @property
    def past(self) -> tuple[str, str]:
        """Placeholders of what is cached."""
        return self.past_k, self.past_v

    @property
    def cut_weights(self) -> tuple[str, ...]:
        """Weights that this site cuts."""
        return self.q_weight, self.k_weight, self.v_weight, self.o_weight

    @property
    def cut_biases(self) -> tuple[str | None, ...]:
        """Biases that this site cuts."""
        return self.q_bias, self.k_bias, self.v_bias


Site = AttentionMatch | GqaMatch


@dataclass(frozen=True)
class DenseFFNMatch:
    """down(act(gate(x)) * up(x)): a dense FFN or a shared expert. Names of linears and of their parameters."""

    gate: str
    up: str
    product: str
    down: str
    gate_weight: str
    gate_bias: str | None
    up_weight: str
    up_bias: str | None
    down_weight: str
    down_bias: str | None
    width: int
    input_size: int
    hidden_size: int


@dataclass(frozen=True)
class MoEMatch:
    """Routed experts: `x` [N, D], `expert_ids` [N, k], `weights` [N, k] -> `output` [N, D].

    `shared` is the down linear of the shared expert that is added to them, `seam` the node behind which the sum
    over ranks goes: that addition, or the routed output itself.
    """

    x: str
    expert_ids: str
    weights: str
    output: str
    gate_up: str
    down: str
    form: str
    num_experts: int
    top_k: int
    width: int
    hidden_size: int
    seam: str
    shared: str | None


@dataclass(frozen=True)
class LayerMatch:
    """Everything found in one body. A normal layer has one attention and one FFN; a whole graph has them all."""

    body: str
    attentions: tuple[Site, ...]
    dense_ffns: tuple[DenseFFNMatch, ...]
    moes: tuple[MoEMatch, ...]

    def roles(self) -> dict[str, int]:
        """How many of each role were found, for reports."""
        shared = sum(m.shared is not None for m in self.moes)
        counts = {
            "attention": len(self.attentions),
            "dense_ffn": len(self.dense_ffns) - shared,
            "shared_expert": shared,
            "routed_experts": len(self.moes),
        }
        return {role: count for role, count in counts.items() if count}
