"""HelixPlan: every decision as frozen data. No fx.Node, no tensor; it prints, diffs and goes to JSON."""

from __future__ import annotations

import json
import reprlib
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import cached_property
from itertools import zip_longest
from typing import Any

from torch._logging import trace_structured

from helix_compile.config.engines import engine_recipe
from helix_compile.config.options import HelixOptions
from helix_compile.errors import PlanError
from helix_compile.layout.degrees import HelixLayout
from helix_compile.layout.heads import HeadPadding, head_padding
from helix_compile.plan.ring import longest_step

PLAN_VERSION = 1


@dataclass(frozen=True)
class Cut:
    """One dim that is cut over an axis. Each part is ceil(total / parts) wide; the last ones are zero-padded.

    `padding` says it of heads between which zeros lie: then their places are what is cut.
    """

    dim: int
    axis: str
    total: int
    padding: HeadPadding | None = None

    def width(self, layout: HelixLayout) -> int:
        """Size of every rank's part, padding included."""
        return -(-(self.padding.places if self.padding else self.total) // layout.size(self.axis))

    def bounds(self, layout: HelixLayout, rank: int) -> tuple[int, int]:
        """[start, stop) of `rank`'s part in the whole, without padding."""
        width = self.width(layout)
        start = layout.index(self.axis, rank) * width
        if self.padding:
            return self.padding.before(start), self.padding.before(start + width)
        return min(start, self.total), min(start + width, self.total)

    def runs(self, layout: HelixLayout, rank: int) -> tuple[tuple[int, int, int], ...]:
        """(start, stop, where it begins in `rank`'s part) of what a part holds in a row; zeros lie between."""
        if self.padding:
            start = layout.index(self.axis, rank) * self.width(layout)
            return self.padding.runs(start, start + self.width(layout))
        start, stop = self.bounds(layout, rank)
        return ((start, stop, 0),) if start < stop else ()

    def share_of_zeros(self, layout: HelixLayout) -> Fraction:
        """How much of all ranks' parts together is padding."""
        return 1 - Fraction(self.total, self.width(layout) * layout.size(self.axis))


@dataclass(frozen=True)
class ParamShard:
    """How one local parameter is cut out of one original parameter.

    The original's rows are gathered by `index` (only where no view can do it), viewed as `view`, narrowed
    to `window` = (dim, start, length), cut by `cuts`, and viewed as `shape`. `layout` says how the result lies.
    Names are relative to the layer.
    """

    name: str
    source: str
    source_shape: tuple[int, ...]
    view: tuple[int, ...]
    cuts: tuple[Cut, ...]
    shape: tuple[int, ...]
    layout: str
    window: tuple[int, int, int] | None = None
    index: tuple[int, ...] | None = None

    def padding(self, layout: HelixLayout, rank: int) -> int:
        """Elements of zeros in `rank`'s shard."""
        real = padded = 1
        for cut in self.cuts:
            start, stop = cut.bounds(layout, rank)
            real, padded = real * (stop - start), padded * cut.width(layout)
        elements = 1
        for size in self.shape:
            elements *= size
        return elements - elements // padded * real


OF_PARTIALS = ("partial_o and lse", "lse", "rescaled partial_o")  # what it calls what they send of partial attention
OF_CANDIDATES = ("top-k candidates", "k-th keys")  # what a plan calls what ranks send of an indexer's best keys


@dataclass(frozen=True)
class Collective:
    """One collective of a body: torch's name, mesh axis, and bytes that leave a rank for each token.

    Its buffer holds the tokens of a step, all sequences together, rounded up to a multiple of `tokens_rounded_to`. Of a site that
    exchanges in `parts` there are as many, each of a part of the sequences; the bytes are those of all together.
    """

    op: str
    axis: str
    what: str
    egress_bytes_per_rank_per_token: Fraction
    tokens_rounded_to: int = 1
    parts: int = 1

    def egress_bytes_per_rank(self, tokens: int) -> Fraction:
        """Bytes that leave a rank in a step of `tokens` tokens (sequences times new tokens of each)."""
        return self.egress_bytes_per_rank_per_token * (-(-tokens // self.tokens_rounded_to) * self.tokens_rounded_to)


@dataclass(frozen=True)
class AttentionPlan:
    """Decisions for one attention site: `v_up`, "none" where there is no W_UV, and what is cut by heads.

    `output_weight` is the parameter whose columns a rank holds for the heads it owns. `kv_heads` are the heads that are
    cached; 0 where all heads share one latent (MLA). Both count the model's own heads, without zero heads. `top_k` are the
    keys that an indexer chooses (0: none does), and `topk_exchange` how ranks agree on them; "" where an earlier layer chose.
    A query at p sees `window` tokens up to itself, or those of its `chunk`; 0: all. `sinks` is the parameter of a logit a head
    that takes part in the softmax. `cache_of` are the layers whose cache it reads, one for each layer of the body; none where each
    caches its own. `ring` are the pages of each sequence in which every rank holds the last tokens, of the KV heads that its own
    query heads read, and attends with these alone, without an exchange; 0: the cache is sharded over kvp. In `parts` of the batch it
    attends and exchanges, so that one part is on its way while the next attends; 1: all sequences at once.
    """

    site: int
    v_up: str
    heads: int
    output_weight: str
    kv_heads: int = 0
    top_k: int = 0
    topk_exchange: str = ""
    window: int = 0
    chunk: int = 0
    sinks: str = ""
    cache_of: tuple[int, ...] = ()
    ring: int = 0
    parts: int = 1

    @property
    def reach(self) -> int:
        """Tokens that a query sees at most; 0: all."""
        return self.window or self.chunk

    def head_ranges(self, layout: HelixLayout) -> tuple[tuple[int, int], ...]:
        """The model's heads [start, stop) that each rank owns after the exchange; none where all it owns are zeros."""
        padding = self.padding(layout)
        owned = padding.places // layout.world_size
        return tuple((padding.before(r * owned), padding.before((r + 1) * owned)) for r in range(layout.world_size))

    def padding(self, layout: HelixLayout) -> HeadPadding:
        """Where the heads lie."""
        return head_padding(self.heads, self.kv_heads, layout)

    def kv_parts(self, layout: HelixLayout) -> int:
        """Parts that the KV heads are cached in; of a ring as many as there are heads, or ranks where these are fewer."""
        if not self.ring:
            return layout.tpa
        return min(layout.world_size, self.kv_heads) or 1

    def kv_part(self, layout: HelixLayout, rank: int) -> int:
        """Which of these parts `rank` caches."""
        return rank * self.kv_parts(layout) // layout.world_size if self.ring else layout.index("tpa", rank)

    def cached_heads(self, layout: HelixLayout) -> int:
        """KV heads that a rank caches, zero heads included; 0 of a latent."""
        return -(-self.kv_heads // self.kv_parts(layout))

    def written(self, layout: HelixLayout, options: HelixOptions) -> dict[str, Any]:
        """As in JSON: what follows from layout and options stands beside the decisions, for readers."""
        places = self.padding(layout).places
        return {
            "site": self.site,
            "kvp": layout.kvp,
            "merge": options.merge,
            "q_proj": options.q_proj,
            "v_up": self.v_up,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "computed_heads": places // (layout.world_size if self.ring else layout.tpa),
            "owned_heads": places // layout.world_size,
            "head_ranges": self.head_ranges(layout),
            "tokens_per_block": options.tokens_per_block,
            "output_weight": self.output_weight,
            "cached_heads": self.cached_heads(layout),
            "top_k": self.top_k,
            "topk_exchange": self.topk_exchange,
            "window": self.window,
            "chunk": self.chunk,
            "sinks": self.sinks,
            "cache_of": self.cache_of,
            "ring": self.ring,
            "parts": self.parts,
        }

    @classmethod
    def read(cls, fields: dict[str, Any], layout: HelixLayout) -> AttentionPlan:
        """The decisions out of what `written` makes of them."""
        heads = fields.get("heads", fields["computed_heads"] * layout.tpa)
        cached = fields.get("kv_heads", fields.get("cached_heads", 0) * layout.tpa)
        later = {name: _tuples(fields.get(name, absent)) for name, absent in _LATER_OF_ATTENTION.items()}
        return cls(fields["site"], fields["v_up"], heads, fields["output_weight"], cached, **later)


@dataclass(frozen=True)
class FFNPlan:
    """One FFN: kind "dense" or "shared", cut over all ranks, or "routed", its `experts` over ep and each over tpf."""

    kind: str
    site: int
    width: int
    experts: int = 0

    @property
    def axes(self) -> tuple[str, ...]:
        """What it is cut over."""
        return ("ep", "tpf") if self.kind == "routed" else ("world",)

    def shard_width(self, layout: HelixLayout) -> int:
        """Width of every rank's part, padding included."""
        return -(-self.width // layout.size(self.axes[-1]))

    def padding(self, layout: HelixLayout) -> tuple[int, ...]:
        """Columns of zeros in each rank's part."""
        cut = Cut(0, self.axes[-1], self.width)
        bounds = (cut.bounds(layout, rank) for rank in range(layout.world_size))
        return tuple(cut.width(layout) - (stop - start) for start, stop in bounds)

    def experts_per_rank(self, layout: HelixLayout) -> int:
        """Experts that a rank of ep holds, those that no token chooses included."""
        return -(-self.experts // layout.ep)

    def experts_of(self, layout: HelixLayout, rank: int) -> tuple[int, int]:
        """The model's experts [start, stop) that `rank` holds."""
        return Cut(0, "ep", self.experts).bounds(layout, rank)

    def written(self, layout: HelixLayout) -> dict[str, Any]:
        """As in JSON; see AttentionPlan.written."""
        return {
            "kind": self.kind,
            "site": self.site,
            "axes": list(self.axes),
            "width": self.width,
            "shard_width": self.shard_width(layout),
            "padding": list(self.padding(layout)),
            "experts": self.experts,
            "experts_per_rank": self.experts_per_rank(layout),
        }

    @classmethod
    def read(cls, fields: dict[str, Any], layout: HelixLayout) -> FFNPlan:
        """The decisions out of what `written` makes of them."""
        experts = fields.get("experts", fields.get("experts_per_rank", 0) * layout.ep)
        return cls(fields["kind"], fields["site"], fields["width"], experts)


@dataclass(frozen=True)
class BodyPlan:
    """Decisions for one body and the layers that it computes."""

    name: str
    layers: tuple[int, ...]
    attentions: tuple[AttentionPlan, ...]
    ffns: tuple[FFNPlan, ...]
    param_shards: tuple[ParamShard, ...]
    collectives: tuple[Collective, ...]

    def shard(self, name: str) -> ParamShard | None:
        """The shard of this local name, or None if the parameter is replicated."""
        return next((s for s in self.param_shards if s.name == name), None)

    @property
    def egress_bytes_per_rank_per_token(self) -> Fraction:
        """Sum over this body's collectives."""
        return sum((c.egress_bytes_per_rank_per_token for c in self.collectives), Fraction(0))

    def egress_bytes_per_rank(self, tokens: int) -> Fraction:
        """Sum over this body's collectives, of a step of `tokens` tokens."""
        return sum((c.egress_bytes_per_rank(tokens) for c in self.collectives), Fraction(0))


@dataclass(frozen=True)
class OuterPlan:
    """Decisions for the graph around the layers: embedding and head, where they are cut. As of a body."""

    param_shards: tuple[ParamShard, ...] = ()
    collectives: tuple[Collective, ...] = ()

    def shard(self, name: str) -> ParamShard | None:
        """The shard of this name, or None if the parameter is replicated."""
        return next((s for s in self.param_shards if s.name == name), None)

    @property
    def egress_bytes_per_rank_per_token(self) -> Fraction:
        """Sum over its collectives."""
        return sum((c.egress_bytes_per_rank_per_token for c in self.collectives), Fraction(0))

    def egress_bytes_per_rank(self, tokens: int) -> Fraction:
        """Sum over its collectives, of a step of `tokens` tokens."""
        return sum((c.egress_bytes_per_rank(tokens) for c in self.collectives), Fraction(0))


@dataclass(frozen=True)
class Decision:
    """One choice: the rule, what went in, what came out."""

    name: str
    rule: str
    inputs: tuple[tuple[str, Any], ...]
    result: Any


@dataclass(frozen=True)
class HelixPlan:
    """The whole plan. Equal plans compare equal; `diff` says where two differ.

    `leaves`: (name, reason) of what stays the user's own module, whole on every rank. `ring_bytes_per_sequence_per_rank`: of caches
    that hold the last tokens alone, whatever a sequence's length; not in `kv_bytes_per_token_per_rank`.
    """

    model: str
    dtype: str
    layout: HelixLayout
    options: HelixOptions
    bodies: tuple[BodyPlan, ...]
    decisions: tuple[Decision, ...]
    not_rewritten: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    kv_bytes_per_token_per_rank: Fraction
    params_bytes_per_rank: int
    leaves: tuple[tuple[str, str], ...] = ()
    outer: OuterPlan = OuterPlan()
    ring_bytes_per_sequence_per_rank: int = 0

    def body(self, name: str) -> BodyPlan:
        """The plan of one body."""
        return next(b for b in self.bodies if b.name == name)

    @property
    def shortest_reach(self) -> int:
        """Tokens that the most forgetful attention sees, its own included; 0 where all see all."""
        sites = [site for body in self.bodies for site in body.attentions]
        return min((site.reach for site in sites if site.reach), default=0)

    @cached_property
    def cached(self) -> tuple[AttentionPlan, ...]:
        """Every cached attention of the model, in the order of the layers."""
        layers = sorted((layer, body) for body in range(len(self.bodies)) for layer in self.bodies[body].layers)
        return tuple(site for _, body in layers for site in self.bodies[body].attentions if not site.cache_of)

    @cached_property
    def rings(self) -> dict[int, int]:
        """Pages of each size of rings -> tokens that a query sees there at most."""
        found: dict[int, int] = {}
        for site in (s for body in self.bodies for s in body.attentions if s.ring):
            found[site.ring] = max(site.reach, found.get(site.ring, 0))
        return found

    @cached_property
    def longest_step(self) -> int:
        """Tokens that one step may append to a sequence."""
        most = self.options.max_seq_len
        return min((longest_step(pages, reach, most) for pages, reach in self.rings.items()), default=most)

    @property
    def egress_bytes_per_rank_per_token(self) -> Fraction:
        """Bytes that leave a rank for each token of a step, all layers and the graph around them together.

        Where a collective rounds tokens up (`Collective.tokens_rounded_to`), of a step that needs no rounding.
        """
        parts = (b.egress_bytes_per_rank_per_token * len(b.layers) for b in self.bodies)
        return sum(parts, self.outer.egress_bytes_per_rank_per_token)

    def egress_bytes_per_rank(self, tokens: int) -> Fraction:
        """Bytes that leave a rank in a step of `tokens` tokens (sequences times new tokens of each), rounding counted."""
        parts = (b.egress_bytes_per_rank(tokens) * len(b.layers) for b in self.bodies)
        return sum(parts, self.outer.egress_bytes_per_rank(tokens))

    @property
    def topk_exchange(self) -> str:
        """How ranks agree on the keys that indexers choose; "" where none does."""
        return next((a.topk_exchange for b in self.bodies for a in b.attentions if a.topk_exchange), "")

    def to_json(self) -> str:
        """JSON text; from_json is its inverse."""
        fields = asdict(self)
        for body, written in zip(self.bodies, fields["bodies"], strict=True):
            written["attentions"] = [a.written(self.layout, self.options) for a in body.attentions]
            written["ffns"] = [f.written(self.layout) for f in body.ffns]
        return json.dumps({"version": PLAN_VERSION, **_plain(fields)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> HelixPlan:
        """Read a plan written by to_json. PlanError names what is missing, unknown or follows from nothing else in it."""
        try:
            fields = json.loads(text)
            version = fields.pop("version")
            if version != PLAN_VERSION:
                raise PlanError(f"plan: version {version!r}, expected {PLAN_VERSION}")
            layout, options = HelixLayout(**fields.pop("layout")), HelixOptions(**fields.pop("options"))
            return cls(
                layout=layout,
                options=options,
                bodies=tuple(_body_from(b, layout, options) for b in fields.pop("bodies")),
                decisions=tuple(Decision(**{**d, "inputs": _tuples(d["inputs"])}) for d in fields.pop("decisions")),
                not_rewritten=_tuples(fields.pop("not_rewritten")),
                notes=tuple(fields.pop("notes")),
                leaves=_tuples(fields.pop("leaves", [])),
                outer=OuterPlan(*_shards_and_collectives(fields.pop("outer", {}))),
                kv_bytes_per_token_per_rank=_fraction(fields.pop("kv_bytes_per_token_per_rank")),
                **fields,
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PlanError(f"plan: not a plan of this version: {type(error).__name__}: {error}") from error

    def to_engine(self, engine: str, model: str = "MODEL") -> str:
        """The command line (vLLM, SGLang) or the YAML (TensorRT-LLM) that asks an engine for this layout.

        A comment a line says what the engine has no argument for; HelixOptions.from_file() reads it back: the same plan.

        Args:
            engine: "vllm", "sglang" or "trtllm".
            model: what the engine is to load.

        Raises:
            PlanError: no such engine.
        """
        return engine_recipe(self.options, self.layout.ep, engine, model)

    def diff(self, other: HelixPlan) -> list[str]:
        """One line per place where `other` differs: path, this value, other value."""
        mine, theirs = json.loads(self.to_json()), json.loads(other.to_json())
        return list(_differences("plan", mine, theirs))

    def decides_otherwise(self, other: HelixPlan) -> list[str]:
        """Those of them that are decisions: layout, options, and of each body its layers, attentions, FFNs and cuts."""
        mine, theirs = json.loads(self.to_json()), json.loads(other.to_json())
        for plan in (mine, theirs):
            kept = {
                "layout": plan["layout"],
                "options": plan["options"],
                "bodies": plan["bodies"],
                "outer": plan["outer"],
            }
            for part in (*kept["bodies"], kept["outer"]):
                part.pop("collectives", None)
            kept["options"].pop("ep")  # the layout has what it came to
            plan.clear()
            plan.update(kept)
        return list(_differences("plan", mine, theirs))


def trace_plan(plan: HelixPlan) -> None:
    """Put the plan into torch's structured trace, where one is written (TORCH_TRACE=dir)."""
    trace_structured(
        "artifact", lambda: {"name": "helix_plan", "encoding": "json"}, payload_fn=plan.to_json, expect_trace_id=False
    )


def number(value: Fraction) -> int | float:
    """An int where the value is one, else a float."""
    return int(value) if value.denominator == 1 else float(value)


def _plain(value: Any) -> Any:
    if isinstance(value, Fraction):
        return number(value)
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def _fraction(value: int | float) -> Fraction:
    """A fraction of ranks is never finer than 1 / 10^6, so the float names it exactly."""
    return Fraction(value).limit_denominator(10**6)


def _body_from(fields: dict[str, Any], layout: HelixLayout, options: HelixOptions) -> BodyPlan:
    tuples = {k: _tuples(v) for k, v in fields.items()}
    attentions = tuple(AttentionPlan.read(a, layout) for a in fields["attentions"])
    ffns = tuple(FFNPlan.read(f, layout) for f in fields["ffns"])
    _check_follows(
        f"{tuples['name']}.attentions", fields["attentions"], [a.written(layout, options) for a in attentions]
    )
    _check_follows(f"{tuples['name']}.ffns", fields["ffns"], [f.written(layout) for f in ffns])
    shards, collectives = _shards_and_collectives(fields)
    return BodyPlan(
        name=tuples["name"],
        layers=tuples["layers"],
        attentions=attentions,
        ffns=ffns,
        param_shards=shards,
        collectives=collectives,
    )


def _shards_and_collectives(fields: dict[str, Any]) -> tuple[tuple[ParamShard, ...], tuple[Collective, ...]]:
    shards, collectives = fields.get("param_shards", []), fields.get("collectives", [])
    return (
        tuple(ParamShard(**{**_fields(s), "cuts": tuple(map(_cut_from, s["cuts"]))}) for s in shards),
        tuple(Collective(**{**c, _EGRESS: _fraction(c[_EGRESS])}) for c in collectives),
    )


def _cut_from(fields: dict[str, Any]) -> Cut:
    padding = fields.get("padding")
    return Cut(**{**fields, "padding": padding and HeadPadding(**padding)})


_LATER_OF_ATTENTION: dict[str, Any] = {
    "top_k": 0,
    "topk_exchange": "",
    "window": 0,
    "chunk": 0,
    "sinks": "",
    "cache_of": [],
    "ring": 0,
    "parts": 1,
}
# not in every plan that was ever written
_LATER = ("cached_heads", "experts_per_rank", "heads", "kv_heads", "experts", *_LATER_OF_ATTENTION)


def _check_follows(where: str, read: list[dict[str, Any]], written: list[dict[str, Any]]) -> None:
    """What is written beside the decisions must be what follows from them."""
    complete = [{**{k: own[k] for k in _LATER if k in own}, **got} for got, own in zip(read, written, strict=True)]
    for line in _differences(where, complete, _plain(written)):
        raise PlanError(f"plan: it contradicts itself (got -> what follows from its layout, options and sizes): {line}")


_EGRESS = "egress_bytes_per_rank_per_token"


def _fields(value: dict[str, Any]) -> dict[str, Any]:
    return {k: _tuples(v) for k, v in value.items()}


def _differences(path: str, a: Any, b: Any) -> Any:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted({*a, *b}):
            yield from _differences(f"{path}.{key}", a.get(key, "absent"), b.get(key, "absent"))
    elif isinstance(a, list) and isinstance(b, list):
        for i, (x, y) in enumerate(zip_longest(a, b, fillvalue="absent")):
            yield from _differences(f"{path}[{i}]", x, y)
    elif a != b:
        yield f"{path}: {reprlib.repr(a)} -> {reprlib.repr(b)}"
