"""A model's step, costed under every layout: its graph is lowered once for each structure, sizes are scaled (scaling.py).

A structure is what changes nodes: whether ranks exchange, where q is made and W_UV stands, how parts are merged.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import Any, NamedTuple

from torch import fx

from helix_compile.capture.captured import CapturedGraph
from helix_compile.config.options import OPTIONS, PAGE_SIZE, HelixOptions
from helix_compile.errors import HelixError, LayoutError, PlanError
from helix_compile.ir.leaves import leaf_bytes
from helix_compile.ir.stage import body_of
from helix_compile.layout.degrees import HelixLayout
from helix_compile.layout.heads import head_padding
from helix_compile.passes.decide.cache_format import kv_bytes_per_token
from helix_compile.passes.decide.overlap import PARTS
from helix_compile.passes.decide.padding import check_heads
from helix_compile.passes.decide.plan_helix import decide_v_up, plan_helix
from helix_compile.passes.pipeline import LOWERED, REWRITES, helix_passes
from helix_compile.passes.runner import PassContext, run_passes
from helix_compile.plan.cache_row import pages_per_sequence
from helix_compile.plan.matches import AttentionMatch, LayerMatch
from helix_compile.predict.overlap import HOPB
from helix_compile.predict.scaling import ReferenceGraph, counted_in, counted_outside
from helix_compile.predict.terms import ATTENTION, MATMUL, Term

SEARCHED = ("cp", "tpa", "ep", "merge", "q_proj", "v_up", "pad_heads", "overlap")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to lay a model over ranks: what the planner chooses among."""

    cp: int
    tpa: int
    ep: int
    tpf: int
    merge: str = "a2a"
    q_proj: str = "replicate"
    v_up: str = "auto"
    pad_heads: bool = False
    overlap: str = "none"

    @property
    def least_batch(self) -> int:
        """Sequences that it needs: of one there are no two parts."""
        return PARTS if self.overlap == HOPB else 1

    @property
    def layout(self) -> HelixLayout:
        """Its degrees."""
        return HelixLayout(kvp=self.cp, tpa=self.tpa, ep=self.ep, tpf=self.tpf)

    @property
    def ranks(self) -> int:
        """N."""
        return self.cp * self.tpa

    @property
    def structure(self) -> tuple[str, str, str, str] | None:
        """What changes nodes; None where nothing is exchanged."""
        return (self.merge, self.q_proj, self.v_up, self.overlap) if self.cp > 1 else None

    def options(self, base: HelixOptions, **more: Any) -> HelixOptions:
        """As helix_compile takes them."""
        stated = {**base.to_json(), **{name: getattr(self, name) for name in SEARCHED}}
        stated["max_batch_size"] = max(base.max_batch_size, self.least_batch)
        for name, option in OPTIONS.items():  # what has no effect here is refused by HelixOptions
            if (self.cp == 1 and option.of_exchange) or (self.ranks == 1 and option.of_ranks):
                stated[name] = option.choices[0]
        return HelixOptions(**{**stated, **more})


class CostedModel:
    """What every layout of a model costs.

    Args:
        captured: its graphs.
        matches: what was found in them.
        base: options that are not searched: tokens_per_block, head, ...; of its own layout cp > 1, so that all can have an effect.

    Raises:
        HelixError: options whose costs are not known here.
    """

    def __init__(self, captured: CapturedGraph, matches: dict[str, LayerMatch], base: HelixOptions):
        self.captured, self.matches, self.base = captured, matches, base
        if base.window != "shard" and any(a.window or a.chunk for a in self.sites):
            raise HelixError(
                f"plan: window={base.window!r}: caches of the last tokens on every rank are not costed; nearest that works: "
                'window="shard"'
            )
        if base.pp > 1:
            raise HelixError(f"plan: pp={base.pp}: pipeline stages are not costed; nearest that works: pp=1")
        self._structures: dict[Hashable, Structure] = {}
        self._around: dict[int, ReferenceGraph] = {}  # head="shard": ranks -> what is around the bodies
        self._pads: dict[tuple[int, int], bool | None] = {}
        self._paddable: dict[bool, bool] = {}
        self._kv_bytes: dict[Hashable, Fraction] = {}
        self._slots: dict[tuple[int, int], int] = {}
        self._known = Known({}, {})

    @property
    def sites(self) -> list[AttentionMatch]:
        """Every attention of every body."""
        return [a for match in self.matches.values() for a in match.attentions]

    @cached_property
    def experts(self) -> tuple[int, ...]:
        """Routed experts of each kind of layer."""
        return tuple(sorted({m.num_experts for match in self.matches.values() for m in match.moes}))

    @cached_property
    def has_v_up(self) -> bool:
        """Is there a W_UV to place?"""
        return any(a.kind.v_up for a in self.sites)

    def v_up(self, batch: int) -> str:
        """Where helix_compile puts W_UV with v_up="auto"; what a candidate says where there is none."""
        options = HelixOptions(cp=2, max_batch_size=batch)
        return str(decide_v_up(self.sites, self.captured.dtype, options).result) if self.has_v_up else "auto"

    @property
    def layers(self) -> int:
        """Layers of the stage."""
        return len(self.captured.layers)

    def structure(self, candidate: Candidate) -> Structure:
        """The lowered graphs that a candidate's nodes are counted in."""
        key = candidate.structure
        if key not in self._structures:
            self._structures[key] = self._lowered(candidate)
        # rows of a vocabulary are cut, padded and put together by nodes that know how many ranks there are: lowered for each number
        if self.base.head == "shard" and candidate.ranks not in self._around:
            own = Structure(self.captured, self.matches, candidate.options(self.base), {}, self._known)
            self._around[candidate.ranks] = own.around
        return self._structures[key]

    def pads(self, cp: int, tpa: int) -> bool | None:
        """Must heads be padded for cp * tpa ranks? None: they can't be, or tpa can't cut this model."""
        if (cp, tpa) not in self._pads:
            self._pads[cp, tpa] = self._padding(cp, tpa)
        return self._pads[cp, tpa]

    def _padding(self, cp: int, tpa: int) -> bool | None:
        if tpa > 1 and any(a.uncut for a in self.sites):
            return None
        layout = HelixLayout(kvp=cp, tpa=tpa, ep=1, tpf=cp * tpa)
        paddings = [head_padding(a.num_heads, a.cache.heads, layout) for a in self.sites]
        if all(p.places == p.heads for p in paddings):
            return False
        more_kv = any(p.padded_groups > p.groups for p in paddings)
        if more_kv not in self._paddable:  # what stands in the way of zero heads does so for each number of ranks
            try:
                options = Candidate(cp=cp, tpa=tpa, ep=1, tpf=cp * tpa, pad_heads=True).options(self.base)
                check_heads(self.captured, self.matches, layout, options)
                self._paddable[more_kv] = True
            except (LayoutError, PlanError):
                self._paddable[more_kv] = False
        return True if self._paddable[more_kv] else None

    def choices(self, ranks: int, pad_heads: bool = True) -> Iterator[Candidate]:
        """Every legal candidate on so many ranks."""
        degrees = [n for n in range(1, ranks + 1) if ranks % n == 0]
        for cp in degrees:
            tpa = ranks // cp
            padded = self.pads(cp, tpa)
            if padded is None or (padded and not pad_heads):
                continue
            for ep in degrees if self.experts else (1,):
                more = any(e % ep for e in self.experts)
                if more and (not pad_heads or ep > max(self.experts)):
                    continue
                pads = (padded or more) and ranks > 1
                for how in self._exchanges(cp):
                    yield Candidate(cp=cp, tpa=tpa, ep=ep, tpf=ranks // ep, pad_heads=pads, **how)

    def _exchanges(self, cp: int) -> list[dict[str, str]]:
        if cp == 1:
            return [{"v_up": "after" if self.has_v_up else "auto"}]
        gathers = not any(u.what == "q" for a in self.sites for u in a.uncut)
        places = ("before", "after") if self.has_v_up else ("auto",)
        return [
            {"merge": merge, "q_proj": q_proj, "v_up": v_up, "overlap": overlap}
            for overlap in ("none", HOPB)
            for merge in ("a2a", "ag_rs")
            for q_proj in (("replicate", "gather") if gathers else ("replicate",))
            for v_up in places
        ]

    def kv_bytes(self, candidate: Candidate, cache_dtype: str | None = None) -> Fraction:
        """Bytes of a token in the caches of a rank, on average, as a plan says them."""
        key = (candidate.layout, candidate.pad_heads, cache_dtype)
        if key not in self._kv_bytes:
            options = candidate.options(self.base)
            if cache_dtype is not None:
                options = HelixOptions(**{**options.to_json(), "cache_dtype": cache_dtype, "cache_scale": 1.0})
            self._kv_bytes[key] = kv_bytes_per_token(self.captured, self.matches, options, candidate.layout, {})
        return self._kv_bytes[key]

    def slots(self, cp: int, context: int) -> int:
        """Places for tokens of a sequence on a rank: whole pages of the fullest."""
        if (cp, context) not in self._slots:
            options = HelixOptions(cp=cp, tokens_per_block=self.base.tokens_per_block, max_seq_len=context)
            self._slots[cp, context] = pages_per_sequence(options, cp) * PAGE_SIZE
        return self._slots[cp, context]

    def _lowered(self, candidate: Candidate) -> Structure:
        if candidate.overlap != "none":  # as without it, up to the stage where batches are cut
            whole = self.structure(replace(candidate, overlap="none"))
            own = candidate.options(self.base)
            changed = {name: getattr(own, name) for name in ("overlap", "max_batch_size")}
            options = replace(whole.plan.options, **changed)
            return Structure(self.captured, self.matches, options, self._around, self._known, whole.rewritten)
        refusals = []
        for reference in self._references(candidate):
            try:
                options = reference.options(self.base)
                return Structure(self.captured, self.matches, options, self._around, self._known)
            except (LayoutError, PlanError) as error:
                refusals.append(str(error))
        raise HelixError(f"plan: no layout of this structure can be lowered: {refusals[-1]}")

    def _references(self, candidate: Candidate) -> Iterator[Candidate]:
        """Layouts in which every axis cuts something, the plainest first; last the one that is asked for."""
        experts = [2, 1] if self.experts else [1]
        for cp, tpa in [(2, 2), (4, 1)] if candidate.cp > 1 else [(1, 4), (1, 2)]:
            padded = self.pads(cp, tpa)
            if padded is None:
                continue
            for ep in experts:
                ranks, pads = cp * tpa, padded or any(e % ep for e in self.experts)
                yield replace(candidate, cp=cp, tpa=tpa, ep=ep, tpf=ranks // ep, pad_heads=pads)
        yield candidate


class Known(NamedTuple):
    """What was worked out before: terms -> their number, and (expression, batch) -> what it is there."""

    keys: dict[Hashable, int]
    numbers: dict[Hashable, int]


class Structure:
    """Lowered graphs as references.

    Attributes:
        bodies: (layers, graph) of each.
        around: what is around them.
        plan: that they were lowered by.
        rewritten: the last stage that does not depend on overlap.
    """

    def __init__(
        self,
        captured: CapturedGraph,
        matches: dict[str, LayerMatch],
        options: HelixOptions,
        others: Mapping[int, ReferenceGraph],
        known: Known,
        rewritten: fx.GraphModule | None = None,
    ):
        """Plan and lower; compute ops keep their references, which have the nodes of every lowering.

        Args:
            others: ranks -> what stands in the place of `around` there.
            known: what all structures of a model have in common, to which they add.
            rewritten: of a structure with the same options but for overlap.
        """
        self.plan = plan_helix(captured, matches, options)
        passes, last = helix_passes(options), REWRITES[-1].stage
        begin = (last, rewritten) if rewritten is not None else None
        if begin:
            passes = passes[len(REWRITES) :]
        stages = run_passes(passes, PassContext(captured, matches, self.plan), begin=begin, keep=(last, LOWERED.stage))
        stage, self.rewritten = stages[LOWERED.stage], stages[last]
        parts, layout = [], self.plan.layout
        for body in self.plan.bodies:
            kv_heads = {site.site: site.kv_heads for site in body.attentions}
            graph = body_of(stage, body.name).graph
            counted = counted_in(matches[body.name])
            parts.append((len(body.layers), ReferenceGraph(graph, layout, counted, kv_heads, known.numbers)))
        self.bodies = tuple(parts)
        outside = counted_outside(self.plan.outer)
        self.around = ReferenceGraph(stage.graph, layout, outside, {}, known.numbers, formats=False)
        self._others, self._keys = others, known.keys
        self._uncounted = leaf_bytes(captured.graph)  # of modules that stay the user's own
        self._terms: dict[HelixLayout, tuple[Group, ...]] = {}
        self._params: dict[HelixLayout, tuple[int, int]] = {}
        self._buffers: dict[HelixLayout, float] = {}

    def parts(self, layout: HelixLayout) -> tuple[tuple[int, ReferenceGraph], ...]:
        """(layers, graph) of each body, and (1, graph) of what is around them."""
        return (*self.bodies, (1, self._others.get(layout.world_size, self.around)))

    def terms(self, layout: HelixLayout) -> tuple[Group, ...]:
        """Groups of nodes under a layout; equal keys mean equal terms."""
        if layout not in self._terms:
            found = (
                Group(self._key(terms, graph.parts), n, terms, body, graph.parts)
                for body, (n, graph) in enumerate(self.parts(layout))
                for terms in graph.terms(layout)
                if terms
            )
            self._terms[layout] = tuple(found)
        return self._terms[layout]

    def _key(self, terms: tuple[Term, ...], parts: int) -> int:
        own = terms, parts if any(t.chunk for t in terms) else 1
        return self._keys.setdefault(own, len(self._keys))

    def buffer(self, layout: HelixLayout) -> float:
        """Bytes of the largest activation of a sequence, more or less: what a node moves besides weights and cache."""
        if layout not in self._buffers:
            sizes = (t.moved[1] for g in self.terms(layout) for t in g.terms if t.kind in (ATTENTION, MATMUL))
            self._buffers[layout] = max(sizes, default=0.0)
        return self._buffers[layout]

    def params_bytes(self, layout: HelixLayout) -> tuple[int, int]:
        """Bytes of a rank's parameters that a format of weights changes, and of all others."""
        if layout not in self._params:
            both = [(n, graph.params_bytes(layout)) for n, graph in self.parts(layout)]
            weights, others = (sum(n * held[i] for n, held in both) for i in (0, 1))
            self._params[layout] = weights, others + self._uncounted
        return self._params[layout]


class Group(NamedTuple):
    """Nodes of a body that depend on the same of a layout, `layers` times in a step; some of them once for each of `parts`.

    Equal keys, of whatever structure and layout, mean equal terms.
    """

    key: int
    layers: int
    terms: tuple[Term, ...]
    body: int
    parts: int
