"""HelixPlan: every decision as frozen data. No fx.Node, no tensor; it prints, diffs and goes to JSON."""

from __future__ import annotations

import json
import reprlib
from dataclasses import asdict, dataclass
from fractions import Fraction
from itertools import zip_longest
from typing import Any

from torch._logging import trace_structured

from helix_compile.config.options import HelixOptions
from helix_compile.errors import PlanError
from helix_compile.layout.degrees import HelixLayout

PLAN_VERSION = 1


@dataclass(frozen=True)
class Cut:
    """One dim that is cut over an axis. Each part is ceil(total / parts) wide; the last ones are zero-padded."""

    dim: int
    axis: str
    total: int

    def width(self, layout: HelixLayout) -> int:
        """Size of every rank's part, padding included."""
        return -(-self.total // layout.size(self.axis))

    def bounds(self, layout: HelixLayout, rank: int) -> tuple[int, int]:
        """[start, stop) of `rank`'s part in the whole, without padding."""
        width = self.width(layout)
        start = min(layout.index(self.axis, rank) * width, self.total)
        return start, min(start + width, self.total)


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


@dataclass(frozen=True)
class Collective:
    """One collective of a body: torch's name, mesh axis, and bytes that leave a rank for each token."""

    op: str
    axis: str
    what: str
    egress_bytes_per_rank_per_token: Fraction


@dataclass(frozen=True)
class AttentionPlan:
    """Decisions for one attention site. head_ranges[rank] are the heads that rank owns after the exchange,
    output_weight the parameter whose rows it holds for them. `cached_heads` are the KV heads that a rank caches; 0 where
    the heads share one latent (MLA). v_up is "none" where there is no W_UV.
    """

    site: int
    kvp: int
    merge: str
    q_proj: str
    v_up: str
    computed_heads: int
    owned_heads: int
    head_ranges: tuple[tuple[int, int], ...]
    tokens_per_block: int
    output_weight: str
    cached_heads: int = 0


@dataclass(frozen=True)
class FFNPlan:
    """Decisions for one FFN: kind "dense", "shared" or "routed"; width of a shard and its padding on each rank."""

    kind: str
    site: int
    axes: tuple[str, ...]
    width: int
    shard_width: int
    padding: tuple[int, ...]
    experts_per_rank: int = 0


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

    `leaves`: (name, reason) of what stays the user's own module, whole on every rank.
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

    def body(self, name: str) -> BodyPlan:
        """The plan of one body."""
        return next(b for b in self.bodies if b.name == name)

    @property
    def egress_bytes_per_rank_per_token(self) -> Fraction:
        """Bytes that leave a rank for each token of a step, all layers together."""
        parts = (b.egress_bytes_per_rank_per_token * len(b.layers) for b in self.bodies)
        return sum(parts, Fraction(0))

    def to_json(self) -> str:
        """JSON text; from_json is its inverse."""
        return json.dumps({"version": PLAN_VERSION, **_plain(asdict(self))}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> HelixPlan:
        """Read a plan written by to_json. PlanError names what is missing or unknown."""
        try:
            fields = json.loads(text)
            version = fields.pop("version")
            if version != PLAN_VERSION:
                raise PlanError(f"plan: version {version!r}, expected {PLAN_VERSION}")
            return cls(
                layout=HelixLayout(**fields.pop("layout")),
                options=HelixOptions(**fields.pop("options")),
                bodies=tuple(_body_from(b) for b in fields.pop("bodies")),
                decisions=tuple(Decision(**{**d, "inputs": _tuples(d["inputs"])}) for d in fields.pop("decisions")),
                not_rewritten=_tuples(fields.pop("not_rewritten")),
                notes=tuple(fields.pop("notes")),
                leaves=_tuples(fields.pop("leaves", [])),
                kv_bytes_per_token_per_rank=_fraction(fields.pop("kv_bytes_per_token_per_rank")),
                **fields,
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PlanError(f"plan: not a plan of this version: {type(error).__name__}: {error}") from error

    def diff(self, other: HelixPlan) -> list[str]:
        """One line per place where `other` differs: path, this value, other value."""
        mine, theirs = json.loads(self.to_json()), json.loads(other.to_json())
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


def _body_from(fields: dict[str, Any]) -> BodyPlan:
    tuples = {k: _tuples(v) for k, v in fields.items()}
    return BodyPlan(
        name=tuples["name"],
        layers=tuples["layers"],
        attentions=tuple(AttentionPlan(**_fields(a)) for a in fields["attentions"]),
        ffns=tuple(FFNPlan(**_fields(f)) for f in fields["ffns"]),
        param_shards=tuple(
            ParamShard(**{**_fields(s), "cuts": tuple(Cut(**c) for c in s["cuts"])}) for s in fields["param_shards"]
        ),
        collectives=tuple(Collective(**{**c, _EGRESS: _fraction(c[_EGRESS])}) for c in fields["collectives"]),
    )


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
