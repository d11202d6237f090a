"""What a matcher found in one body: node names and sizes, no decision.

Names are fx.Node.name, which Graph.graph_copy keeps, so one match serves every stage. Index tables say which row or
channel is which; they are read off the graph, not assumed (capture-and-match, section 5).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from helix_compile.layout.degrees import HelixLayout
from helix_compile.layout.heads import HeadPadding
from helix_compile.plan.cache_row import CacheRow
from helix_compile.plan.helix_plan import Cut, ParamShard

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


def picked(rows: Table, total: int) -> tuple[tuple[int, ...], tuple[int, int, int] | None, tuple[int, ...] | None]:
    """(view, window, index) that pick rows[h][d] out of `total`: a view where those of a head lie in a row."""
    H, width = len(rows), len(rows[0])
    start, stride = rows[0][0], total // H
    if total % H == 0 and all(
        tuple(row) == tuple(range(h * stride + start, h * stride + start + width)) for h, row in enumerate(rows)
    ):
        return (H, stride), (1, start, width), None
    return (H, width), None, tuple(r for row in rows for r in row)


@dataclass(frozen=True)
class HeadRows:
    """A parameter [heads * width, *tail] whose rows [h * width, (h + 1) * width) are head h's.

    Where it has rows of something else too, rows[h] are head h's of its `total`, and `role` says what they make.
    """

    param: str
    heads: int
    width: int
    tail: tuple[int, ...] = ()
    is_bias: bool = False
    role: str = ""
    rows: Table = ()
    total: int = 0

    @property
    def name(self) -> str:
        """What a rank's part is called: parts of two roles may lie in one parameter."""
        return f"{self.param}.{self.role}" if self.role else self.param

    def shard(self, axis: str, layout: HelixLayout, padding: HeadPadding | None = None) -> ParamShard:
        """Its heads, cut over `axis`; `padding` says where zero heads lie between them."""
        H, window, index = self.heads, None, None
        view: tuple[int, ...] = (H, self.width)
        if self.rows:
            view, window, index = picked(self.rows, self.total)
        cut = Cut(0, axis, H, padding)
        return ParamShard(
            self.name,
            self.param,
            (self.total or H * self.width, *self.tail),
            (*view, *self.tail),
            (cut,),
            (cut.width(layout) * self.width, *self.tail),
            f"{axis}:S(0)",
            window,
            index,
        )


@dataclass(frozen=True)
class LinearPart:
    """A value that holds channels [start, stop) of each head that a linear makes, its dims in the order of `form`.

    Any order of "BTHC", or "BT(HC)".
    """

    node: str
    form: str
    start: int
    stop: int


@dataclass(frozen=True)
class HeadLinear:
    """A linear whose rows [h * width, (h + 1) * width) make head h.

    `views` are views on the way from it that write the head count as a number. Where one linear makes q and a gate, each
    is a linear of its `role`: of rows[h] alone (of `total`), in place of `parts`, where the two have come apart.
    """

    node: str
    weight: str
    bias: str | None
    heads: int
    width: int
    input_size: int
    views: tuple[str, ...] = ()
    role: str = ""
    rows: Table = ()
    total: int = 0
    parts: tuple[LinearPart, ...] = ()

    @property
    def params(self) -> tuple[HeadRows, ...]:
        """Its weight, and its bias where it has one."""
        weight = HeadRows(self.weight, self.heads, self.width, (self.input_size,), False, *self._own)
        return (weight, HeadRows(self.bias, self.heads, self.width, (), True, *self._own)) if self.bias else (weight,)

    @property
    def _own(self) -> tuple[str, Table, int]:
        return self.role, self.rows, self.total


@dataclass(frozen=True)
class GateMatch:
    """A gate between attention and o_proj: product = attention * value, both in `form` ("BTHV", "BHTV" or "BT(HV)").

    `linear` is where it comes from (it may make q too), None where one gate serves all heads. `cast`: the product is wider
    than attention, and is cast back.
    """

    product: str
    value: str
    form: str
    linear: HeadLinear | None = None
    cast: bool = False


@dataclass(frozen=True)
class UpWeight:
    """W_UK or W_UV [H, D, R] in a parameter: element (h, d, r) is number at[h][d] + r * step of it, counted row by row.

    `order` says how its dims lie there: "hdr" (rows of a linear, or stacked [H, D, R]), "hrd" (stacked [H, R, D]) or
    "rhd" ([R, H * D]); a rank holds its part in the same order. `role` is "w_uk" or "w_uv", `product` the node of the
    product with it (one linear may make both).
    """

    param: str
    shape: tuple[int, ...]
    at: Table
    step: int
    order: str
    role: str
    product: str
    is_bias: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """What a rank's part is called: two of them may lie in one parameter."""
        return f"{self.param}.{self.role}"

    @cached_property
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

    def shard(self, axis: str, layout: HelixLayout, padding: HeadPadding | None = None) -> ParamShard:
        """Its heads, cut over `axis`; `padding` says where zero heads lie between them."""
        view, window, index = self._picked()
        H, dim = len(self.at), self.order.index("h")
        cut, kept = Cut(dim, axis, H, padding), list(view)
        if window is not None:
            kept[window[0]] = window[2]
        kept[dim] = cut.width(layout)
        return ParamShard(
            self.name, self.param, self.shape, view, (cut,), tuple(kept), f"{axis}:S({dim})", window, index
        )

    def _picked(self) -> tuple[tuple[int, ...], tuple[int, int, int] | None, tuple[int, ...] | None]:
        """(view, window, index) that pick it out of its parameter; a view where rows of a head are in a row."""
        if self.order != "hdr":
            return *self.view(), None
        view, window, index = picked(self.rows, math.prod(self.shape[:-1]))
        return (*view, self.shape[-1]), window, index


class AttentionKind(Protocol):
    """What is asked of a kind of attention. How it is rewritten is in passes/rewrite, one file a kind."""

    @property
    def cache(self) -> CacheRow:
        """What a token leaves in the cache."""

    @property
    def v_head_dim(self) -> int:
        """Channels of one head of the output."""

    @property
    def query(self) -> tuple[str, int]:
        """What the query of one head is called, and its channels, as it meets the cache."""

    @property
    def partial_width(self) -> int:
        """Channels of one head of what a rank's attention over its shard returns."""

    @property
    def v_up(self) -> UpWeight | None:
        """W_UV, where V must still be made of that."""
        return None

    @property
    def linears(self) -> tuple[HeadLinear, ...]:
        """Linears besides q's, cut over tpa by KV heads."""
        return ()

    @property
    def weights(self) -> tuple[tuple[str, HeadRows | UpWeight], ...]:
        """Other parameters that are cut by heads, and with what: "q", "kv" or "v_up"."""
        return ()

    @property
    def reads(self) -> tuple[str, ...]:
        """Nodes that it reads besides q, the mask and the cache."""
        return ()


@dataclass(frozen=True)
class Latent(AttentionKind):
    """MLA: a latent [B, 1, T, R] and a rope part [B, 1, T, r] are cached, shared by all heads.

    `w_uk`, `w_uv` say where these weights are; `q_nope[d]`, `q_rope[j]` are channels of q, or of `q_rope_value` (in
    `q_rope_form`) where the rope part of q is a value of its own.
    """

    kv_lora_rank: int
    w_uk: UpWeight
    w_uv: UpWeight
    q_nope: tuple[int, ...]
    q_rope: tuple[int, ...]
    q_rope_value: str = ""
    q_rope_form: str = "BHTC"

    @property
    def cache(self) -> CacheRow:
        return CacheRow(self.kv_lora_rank, len(self.q_rope))

    @property
    def v_head_dim(self) -> int:
        return len(self.w_uv.at[0])

    @property
    def query(self) -> tuple[str, int]:
        return "absorbed q", self.kv_lora_rank + len(self.q_rope)

    @property
    def partial_width(self) -> int:
        return self.kv_lora_rank

    @property
    def v_up(self) -> UpWeight:
        return self.w_uv

    @property
    def weights(self) -> tuple[tuple[str, HeadRows | UpWeight], ...]:
        return ("q", self.w_uk), ("v_up", self.w_uv)

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.q_rope_value,) if self.q_rope_value else ()


@dataclass(frozen=True)
class Grouped(AttentionKind):
    """K [B, K, T, Dk] and V [B, K, T, Dv] are cached; query head j reads KV head j // (num_heads / kv_heads).

    `kv_linears` make K and V; there are none where an earlier layer has cached them.
    """

    kv_heads: int
    k_width: int
    v_width: int
    kv_linears: tuple[HeadLinear, ...]

    @property
    def cache(self) -> CacheRow:
        return CacheRow(self.k_width, self.v_width, self.kv_heads)

    @property
    def v_head_dim(self) -> int:
        return self.v_width

    @property
    def query(self) -> tuple[str, int]:
        return "q", self.k_width

    @property
    def partial_width(self) -> int:
        return self.v_width

    @property
    def linears(self) -> tuple[HeadLinear, ...]:
        return self.kv_linears


FIRST_VISIBLE = "first_visible"


def first_visible_input(window: int, chunk: int) -> str:
    """What a body calls the first visible slots of a window or of chunks; "" where nothing is forgotten."""
    if not window and not chunk:
        return ""
    return f"{FIRST_VISIBLE}_{f'window_{window}' if window else f'chunk_{chunk}'}"


def reach_of_input(name: str) -> tuple[int, int]:
    """(window, chunk) of first_visible_input()'s name."""
    kind, _, number = name.rpartition(f"{FIRST_VISIBLE}_")[2].partition("_")
    return (int(number), 0) if kind == "window" else (0, int(number))


@dataclass(frozen=True)
class Selection:
    """Which cached tokens a query sees: the top_k of them by the sum over index heads of w * relu(scale * q . key).

    Attributes:
        top_k: how many; all that are visible where they are fewer.
        heads: index heads J.
        width: channels I of an index key, which is cached, one head.
        query: node of q, its dims as `query_form` says ("BTJI").
        weights: node of w, its dims as `weights_form` says ("BTJ", 1 for a dim of one).
        scale: of the products.
        new: node of the keys of the new tokens [B, T, I].
        past: placeholder of those before.
        indices: node of the indices that were chosen [B, T, k], which the layer may hand to later ones.
        score_dtype: of the scores, float32 or wider.
    """

    top_k: int
    heads: int
    width: int
    query: str
    query_form: str
    weights: str
    weights_form: str
    scale: float
    new: str
    past: str
    indices: str
    score_dtype: torch.dtype


@dataclass(frozen=True)
class HandedSelection:
    """The query sees the top_k keys that an earlier layer chose; `indices` is the input that brings them."""

    indices: str
    top_k: int = 0


@dataclass(frozen=True)
class AttentionMatch:
    """One attention site, whatever its kind.

    Node names: `anchor` (attention output [B, H, T, V]), `q` [B, H, T, Dk], `o_proj` (a linear), `new` and `past` (the
    parts of what is cached, in the order of PARTS, of the new tokens and of those before), `mask`. Parameters are names relative to the layer.
    `scale` multiplies the scores. Input column h * V + v of o_proj reads channel v of head h.

    A site that reads what an earlier layer caches has no `new` and `past`, but `shared`: the inputs that bring both in one. `row`
    is what that layer caches of a token.

    Forms are orders of dims where the model has another one: of the anchor, of q, of the scores that the mask is added
    to (for sdpa, all heads before tokens).

    A query at p sees keys in (p - window, p], or in [p // chunk * chunk, p]; 0: all up to itself. `sinks`: one logit a head
    that takes part in the softmax.
    """

    kind: AttentionKind
    anchor: str
    q: str
    q_proj: HeadLinear
    o_proj: str
    new: tuple[str, ...]
    past: tuple[str, ...]
    mask: str
    o_weight: str
    o_bias: str | None
    scale: float
    hidden_size: int
    gate: GateMatch | None = None
    uncut: tuple[Uncut, ...] = ()
    form: str = "BHTV"
    q_form: str = "BHTC"
    mask_form: str = "BHTS"
    selection: Selection | HandedSelection | None = None
    window: int = 0
    chunk: int = 0
    sinks: HeadRows | None = None
    shared: tuple[str, ...] = ()
    row: CacheRow | None = None

    @property
    def first_visible(self) -> str:
        """Name of the step's input that says which slot is the first a query sees; "" where it is slot 0."""
        return first_visible_input(self.window, self.chunk)

    @property
    def num_heads(self) -> int:
        """Query heads."""
        return self.q_proj.heads

    @property
    def q_head_dim(self) -> int:
        """Channels of one query head, as the model makes it."""
        return self.q_proj.width

    @property
    def v_head_dim(self) -> int:
        """Channels of one head of the output."""
        return self.kind.v_head_dim

    @property
    def cache(self) -> CacheRow:
        """What a token leaves in the cache, be it an earlier layer's."""
        own = self.selection
        if self.row is not None:
            return self.row
        return replace(self.kind.cache, index=own.width) if isinstance(own, Selection) else self.kind.cache

    @property
    def cuts_query(self) -> bool:
        """Can q be made of some heads alone?"""
        return all(uncut.what != "q" for uncut in self.uncut)

    @property
    def reads(self) -> tuple[str, ...]:
        """Nodes that are read once it is rewritten, besides o_proj's own."""
        own = self.selection
        chooses = (own.query, own.weights) if isinstance(own, Selection) else ()
        gate = (self.gate.value,) if self.gate else ()
        return self.q, *self.new, *self.kind.reads, *chooses, *gate

    @property
    def cuts(self) -> tuple[tuple[str, HeadRows | UpWeight], ...]:
        """What is cut by heads before attention, and with what: "q", "kv" or "v_up"."""
        of_kv = (("kv", param) for linear in self.kind.linears for param in linear.params)
        return *(("q", param) for param in self.q_proj.params), *of_kv, *self.kind.weights

    @property
    def cut_weights(self) -> tuple[str, ...]:
        """Weights that this site cuts."""
        return *dict.fromkeys(part.param for _, part in self.cuts if not part.is_bias), self.o_weight


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
class VocabularyMatch:
    """The two ends of the model, in the outer graph.

    Attributes:
        embedding, linear: nodes that look tokens up, and that make the logits.
        rows, weight: their parameters, [V, D] each; one name where it is one parameter.
        bias: of the linear, [V], or "".
        embedding_shape, weight_shape: of the parameters.
    """

    embedding: str
    rows: str
    embedding_shape: tuple[int, ...]
    linear: str
    weight: str
    weight_shape: tuple[int, ...]
    bias: str = ""


@dataclass(frozen=True)
class LayerMatch:
    """Everything found in one body. A normal layer has one attention and one FFN; a whole graph has them all."""

    body: str
    attentions: tuple[AttentionMatch, ...]
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
