"""Two runs, value by value: the first that differs beyond the tolerance of its dtype, on which rank, and how it grows.

Runs of one plan hold the same on the same rank: every value is compared rank by rank. Runs of unlike plans are compared
by what means the same: values of captured nodes, joined over the ranks, attention outputs, layer outputs, logits.
What replicas of one run have must be equal in either case.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.distributed.tensor.placement_types import Shard

from helix_compile.errors import HelixError
from helix_compile.ir.stage import OUTER
from helix_compile.layout.degrees import HelixLayout, HelixMesh
from helix_compile.plan.helix_plan import HelixPlan
from helix_compile.runtime.values import ATTENTION_OUTPUT, LAYER_OUTPUT, LOGITS, PARAMETER, ValueEntry, layer_name
from helix_compile.verifier.bisect.replay import alike
from helix_compile.verifier.compare.dumps import Dump, Key, Step, Value
from helix_compile.verifier.compare.engine import EngineFolder, as_shaped
from helix_compile.verifier.compare.whole import (
    DTYPE,
    SHAPE,
    Deviation,
    Places,
    Whole,
    deviation,
    fitted,
    layout_of,
    own,
    wholes,
)
from helix_compile.verifier.contract import head_places

# how far the largest deviation may be, over the largest element: what other orders of summing leave after many layers;
# logits of two layers in bfloat16 were 8e-3 apart between cp=2 and cp=4
TOLERANCE = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 2e-2, "float16": 5e-3}
FIGURE_NOISE = 1e-6
OUTER_SITE = HelixMesh(HelixLayout(kvp=1, tpa=1, ep=1, tpf=1))

Run = Dump | EngineFolder


@dataclass(frozen=True)
class Difference:
    """A value of two runs (or of two ranks of one) that is not the same.

    Attributes:
        ranks: who has it; () where parts of several ranks were added up.
        run: "A" or "B" where copies in that run contradict each other and the other run's do not, else "".
        off: over the largest element; inf where a value is not finite, or has another shape.
        what, at, values: see Deviation; of A and B.
        narrowest: the dtype on its path that the tolerance is of; "" where another was asked for, or none is allowed.
        reads: what the node is computed from, each with whether that differs too ("" where it was not compared).
    """

    step: int
    place: str
    node: str
    role: str
    op: str
    source: str
    shape: tuple[int, ...]
    ranks: tuple[int, ...]
    run: str
    off: float
    tolerance: float
    what: str
    at: tuple[int, ...]
    values: tuple[float, float]
    narrowest: str = ""
    reads: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class LayerDeviation:
    """How far an attention output, a layer's output or the logits are off in a step, and on which ranks most."""

    step: int
    place: str
    role: str
    off: float
    tolerance: float
    ranks: tuple[int, ...]


@dataclass
class RunsCompared:
    """What was found.

    Attributes:
        first: the first computed value that differs, in the order of computation.
        parameters: weights that differ; those of one plan must be bitwise equal.
        contradictions: the first value of each run on whose replicas its ranks do not agree.
        growth: by step, layers in order.
        only: values that one of the runs has alone: nodes of one plan, outputs of layers of two.
        lacking: values that some ranks of a run have and others lack, with these.
        compared: values.
        by_rank: rank by rank, or by meaning.
    """

    by_rank: bool
    first: Difference | None = None
    parameters: list[Difference] = field(default_factory=list)
    contradictions: list[Difference] = field(default_factory=list)
    growth: list[LayerDeviation] = field(default_factory=list)
    only: dict[str, list[str]] = field(default_factory=lambda: {"A": [], "B": []})
    lacking: dict[str, list[str]] = field(default_factory=lambda: {"A": [], "B": []})
    compared: int = 0
    steps: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        """Nothing differs beyond its tolerance, and nothing is in one run alone or not on all of its ranks."""
        alone = [*self.only.values(), *self.lacking.values()]
        return not (self.first or self.parameters or self.contradictions or any(alone))


def compare_runs(a: Run, b: Run, tolerance: float | None = None) -> RunsCompared:
    """Step by step, value by value.

    Args:
        tolerance: in place of that of the dtype, for floating-point values.

    Raises:
        HelixError: runs that have no step in common, or were given other tokens.
    """
    same_plan = isinstance(a, Dump) and isinstance(b, Dump) and alike(a.plan, b.plan)
    found = RunsCompared(same_plan)
    if a.numbers != b.numbers:
        found.notes.append(f"A has steps {a.numbers}, B {b.numbers}: those of both are compared")
    for first, second in _together(a, b):
        if None not in (first.mask, second.mask) and not torch.equal(first.mask, second.mask):  # type: ignore[arg-type]
            raise HelixError(
                f"compare: step {first.number}: A has tokens {_tokens(first.mask)}, B {_tokens(second.mask)}: the runs were not "
                "given the same batch (the mask differs)"
            )
        found.by_rank = same_plan and _kernels(first) == _kernels(second)
        pair = _StepPair(a, b, first, second, tolerance, found)
        pair.who_lacks()
        pair.by_rank() if found.by_rank else pair.by_meaning()
        found.steps += 1
    if not found.steps or not found.compared:
        raise HelixError(f"compare: nothing of A and B can be compared: A has steps {a.numbers}, B {b.numbers}")
    found.notes += [*a.notes, *b.notes]
    return found


def _together(a: Run, b: Run) -> Iterator[tuple[Step, Step]]:
    """The steps of the same number."""
    common = set(a.numbers) & set(b.numbers)
    yield from zip(*((s for s in run.steps() if s.number in common) for run in (a, b)), strict=True)


def _tokens(mask: Tensor | None) -> str:
    assert mask is not None
    return f"{list(mask.shape)} ({int(mask.sum())} not padding)"


@dataclass
class _StepPair:
    """One step of both runs."""

    a: Run
    b: Run
    first: Step
    second: Step
    asked: float | None
    found: RunsCompared
    verdicts: dict[Key, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.limits = [_limits(step, run) for step, run in ((self.first, self.a), (self.second, self.b))]

    @property
    def mask(self) -> Tensor | None:
        return self.first.mask if self.first.mask is not None else self.second.mask

    def by_rank(self) -> None:
        """The same rank of both, node by node."""
        assert isinstance(self.a, Dump)
        mesh = HelixMesh(self.a.plan.layout)
        sides = (self.first.ranks, self.second.ranks)
        here, there = ({key for rank in side for key in rank} for side in sides)
        for name, keys in (("A", here - there), ("B", there - here)):
            self._alone(name, [f"{k.place}.{k.name}" for k in sorted(keys)])
        for key in _ordered(self.first.ranks):
            mine, theirs = ([rank.get(key) for rank in side] for side in sides)
            pairs = [(r, x, y) for r, (x, y) in enumerate(zip(mine, theirs, strict=True)) if x and y]
            if not pairs or _is_transport(pairs[0][1].entry):
                continue
            limit = self._tolerance(key, key)
            found = [(_of_pair(x, y, r, self._mask_of(x.entry)), r) for r, x, y in pairs if not _same(x, y)]
            self._count(key, (pairs[0][1].entry, pairs[0][2].entry), [(d, (r,)) for d, r in found], limit)
            for name, run, values in (("A", self.first, mine), ("B", self.second, theirs)):
                self._contradiction(name, run, key, [v for v in values if v is not None], mesh)

    def who_lacks(self) -> None:
        """Ranks of a run without a value that others of it have: what they computed was not compared."""
        for name, run in (("A", self.first), ("B", self.second)):
            known = self.found.lacking[name]
            for key in _ordered(run.ranks):
                ranks = tuple(r for r, rank in enumerate(run.ranks) if key not in rank)
                text = f"{key.place}.{key.name} (step {run.number}, {'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))})"
                known += [text] if ranks else []

    def _alone(self, name: str, texts: list[str]) -> None:
        known = self.found.only[name]
        known += [text for text in texts if text not in known]

    def _outputs_of_one(self, here: dict[tuple[str, ...], Key], there: dict[tuple[str, ...], Key]) -> None:
        """Outputs of a layer that both plans have, of attention or of the whole, are in both runs."""
        if not (isinstance(self.a, Dump) and isinstance(self.b, Dump)):
            return  # another engine's folder holds what it was asked for
        mine, theirs = (
            {OUTER, *(layer_name(i) for b in run.plan.bodies for i in b.layers)} for run in (self.a, self.b)
        )
        places = mine & theirs
        for name, own_of, others in (("A", here, there), ("B", there, here)):
            alone = [m for m in own_of if m not in others and m[0] == "role" and m[1] in places]
            self._alone(name, [f"{m[1]}.{m[2]}" for m in alone])

    def by_meaning(self) -> None:
        """What means the same in both, joined over the ranks."""
        meshes = [HelixMesh(run.plan.layout) if isinstance(run, Dump) else OUTER_SITE for run in (self.a, self.b)]
        padded = [_padded(run.plan) if isinstance(run, Dump) else [] for run in (self.a, self.b)]
        here, there = _meanings(self.first), _meanings(self.second)
        self._outputs_of_one(here, there)
        ordered = here if isinstance(self.a, Dump) else there
        for meaning in ordered:
            if meaning not in here or meaning not in there:
                continue
            key = here[meaning] if isinstance(self.a, Dump) else there[meaning]
            sides = ((self.first, here[meaning]), (self.second, there[meaning]))
            if not all(k in rank for run, k in sides for rank in run.ranks):
                continue  # who_lacks() says it
            values = self._fitting([[rank[k] for rank in run.ranks] for run, k in sides])
            entry = values[0][0].entry
            limit = self._tolerance(here[meaning], there[meaning])
            for name, run, side, mesh in zip("AB", (self.first, self.second), values, meshes, strict=True):
                self._contradiction(name, run, key, side, mesh)
            if _same_parts(*values):  # though the rest of the layouts is not: a rank has what the same rank has
                parts = [
                    (_apart(own(x, r), own(y, r), self._mask_of(entry)), (r,))
                    for r, (x, y) in enumerate(zip(*values, strict=True))
                ]
                self._count(key, (entry, values[1][0].entry), parts, limit)
                continue
            copies = [wholes(v, mesh) for v, mesh in zip(values, meshes, strict=True)]
            if not all(copies):
                continue
            usual = [_usual(c, limit, self._mask_of(entry)) for c in copies]
            apart = []
            for whole in copies[1]:
                pair = fitted(usual[0], whole, padded, zeros=entry.role == PARAMETER)
                if pair is None and not entry.role:
                    continue  # captured nodes whose shapes do not meet are not the same
                off = Deviation(math.inf, SHAPE) if pair is None else _apart(*pair, self._mask_of(entry))
                apart.append((off, whole.owner(off.at)))
            self._count(key, (entry, values[1][0].entry), apart, limit)

    def _fitting(self, values: list[list[Value]]) -> list[list[Value]]:
        """Another engine's tensor in the shape of the dump's."""
        for i, other in ((0, 1), (1, 0)):
            if values[i][0].tensor is not None:
                entry = values[i][0].entry
                shaped = as_shaped(values[i][0], tuple(values[other][0].entry.shape), self.mask)
                if shaped is None:
                    wanted = values[other][0].entry.shape
                    raise HelixError(
                        f"compare: step {self.first.number}: {entry.place}.{entry.role} of {'AB'[i]} is {entry.shape}, "
                        f"of {'AB'[other]} {wanted}: expected that, [B * T, D], or its tokens without padding"
                    )
                values[i] = [shaped]
        return values

    def _mask_of(self, entry: ValueEntry) -> Tensor | None:
        return None if entry.role == PARAMETER else self.mask

    def _tolerance(self, mine: Key, theirs: Key) -> float:
        """Of the coarser dtype; integers must be equal."""
        known = [limits.get(key, 0.0) for limits, key in zip(self.limits, (mine, theirs), strict=True)]
        if 0.0 in known:
            return 0.0
        return self.asked if self.asked is not None else max(known)

    def _count(
        self,
        key: Key,
        entries: tuple[ValueEntry, ValueEntry],
        apart: Sequence[tuple[Deviation, tuple[int, ...]]],
        limit: float,
    ) -> None:
        """One value was compared: where it stands, and whether it is the first that is off."""
        found, entry = self.found, entries[0]
        parameter = entry.role == PARAMETER
        found.compared += 1
        over = [(d, ranks) for d, ranks in apart if d.off > (_parameter_limit(d) if parameter else limit)]
        worst, whose = max(over or apart, key=lambda x: x[0].off, default=(Deviation(0.0), ()))
        ranks = tuple(sorted({r for _, who in over for r in who})) or (whose if worst.off else ())
        self.verdicts[key] = "differs" if over else "agrees"
        if entry.role and not parameter:
            found.growth.append(LayerDeviation(self.first.number, key.place, entry.role, worst.off, limit, ranks))
        if not over or (found.first is not None and not parameter):
            return
        difference = self._difference(key, entries, worst, limit, ranks, "")
        if parameter:
            found.parameters.append(difference)
        else:
            found.first = difference

    def _difference(
        self,
        key: Key,
        entries: tuple[ValueEntry, ValueEntry],
        apart: Deviation,
        limit: float,
        ranks: tuple[int, ...],
        run: str,
    ) -> Difference:
        entry = entries[0]
        read = dict.fromkeys(name for e in entries for name in e.reads)
        return Difference(
            step=self.first.number,
            place=key.place,
            node=key.name,
            role=entry.role,
            op=entry.op,
            source=entry.source,
            shape=tuple(entry.shape),
            ranks=ranks,
            run=run,
            off=apart.off,
            tolerance=_parameter_limit(apart) if entry.role == PARAMETER else limit,
            what=apart.what,
            at=apart.at,
            values=apart.values,
            narrowest=self._narrowest(entry, limit),
            reads=tuple((n, self._verdict(Key(key.place, n))) for n in read),
        )

    def _narrowest(self, entry: ValueEntry, limit: float) -> str:
        if self.asked is not None or entry.role == PARAMETER:
            return ""
        return next((dtype for dtype, known in TOLERANCE.items() if known == limit), "")

    def _verdict(self, key: Key) -> str:
        """Of what a node reads."""
        if key in self.verdicts:
            return self.verdicts[key]
        here, there = (any(key in rank for rank in run.ranks) for run in (self.first, self.second))
        return "" if here == there else "is in A alone" if here else "is in B alone"

    def _contradiction(self, name: str, run: Step, key: Key, values: list[Value], mesh: HelixMesh) -> None:
        """Replicas of one run that are not equal, or parts of one value in unlike dtypes; the first is kept."""
        if len(run.ranks) == 1 or len(values) < len(run.ranks) or any(c.run == name for c in self.found.contradictions):
            return
        entry = values[0].entry
        usual_dtype = max((v.entry.dtype for v in values), key=[v.entry.dtype for v in values].count)
        if odd := tuple(r for r, v in enumerate(values) if v.entry.dtype != usual_dtype):
            self.found.contradictions.append(
                self._difference(key, (entry, entry), Deviation(math.inf, DTYPE), 0.0, odd, name)
            )
            return
        if layout_of(entry.layout) != {} or all(_same(v, values[0]) for v in values[1:]):
            return
        limit = self.limits["AB".index(name)].get(key, 0.0)
        if limit and self.asked is not None:
            limit = self.asked
        copies = wholes(values, mesh)
        if not copies:
            return
        usual = _usual(copies, limit, self._mask_of(entry))
        apart = [(_apart(usual, copy, self._mask_of(entry)), copy.ranks[0]) for copy in copies]
        over = [(d, rank) for d, rank in apart if d.off > (_parameter_limit(d) if entry.role == PARAMETER else limit)]
        if over:
            worst = max(over, key=lambda x: x[0].off)[0]
            ranks = tuple(rank for _, rank in over)
            self.found.contradictions.append(self._difference(key, (entry, entry), worst, limit, ranks, name))


def _padded(plan: HelixPlan) -> list[Places]:
    """How heads lie, and KV heads, of each kind of site that has zero heads."""
    sites = [a for body in plan.bodies for a in body.attentions]
    found = {tuple(head_places(a.heads, a.kv_heads, plan.layout)) for a in sites}
    # a KV head lies as the only query head of its group would
    tpa = replace(plan.layout, kvp=1, ep=1, tpf=plan.layout.tpa)
    found |= {tuple(head_places(a.kv_heads, a.kv_heads, tpa)) for a in sites if a.kv_heads}
    return sorted((p for p in found if None in p), key=len)


def _parameter_limit(apart: Deviation) -> float:
    """Weights are equal or not; but the norm of equal ones depends on how their parts lie in memory."""
    return FIGURE_NOISE if apart.what == "norm" else 0.0


def _kernels(step: Step) -> set[str]:
    """What computes the ops of ours: kernels fuse several, so their nodes are others."""
    ops = {value.entry.op for value in step.ranks[0].values()}
    return {op for op in ops if op.startswith("helix")}


def _limits(step: Step, run: Run) -> dict[Key, float]:
    """Tolerance of each floating-point value: of the coarsest dtype that it was computed through.

    In a layer that is the coarsest so far, since each value comes from the hidden states; around the layers it follows
    what a value reads.
    """
    floor = TOLERANCE.get(run.plan.dtype, 0.0) if isinstance(run, Dump) else 0.0
    layers: dict[str, float] = {}
    behind = 0.0  # the layers that came before
    limits: dict[Key, float] = {}
    exact: set[Key] = set()
    for key, value in step.ranks[0].items():
        entry = value.entry
        own = TOLERANCE.get(entry.dtype, 0.0)
        own = max(own, TOLERANCE.get(entry.through, 0.0)) if own else own
        if entry.role == PARAMETER or not own:
            limits[key] = own
            exact.add(key)
        elif entry.place == OUTER:
            read = [Key(OUTER, name) for name in entry.reads]
            limits[key] = max([own, *(limits.get(k, behind) for k in read if k not in exact)])
        else:
            limits[key] = layers[key.place] = max(own, floor, behind, layers.get(key.place, 0.0))
            if entry.role == LAYER_OUTPUT:
                behind = max(behind, limits[key])
    return limits


def _ordered(ranks: list[dict[Key, Value]]) -> list[Key]:
    """Every rank's nodes, in the order of rank 0."""
    return list(dict.fromkeys(key for rank in ranks for key in rank))


def _same(x: Value, y: Value) -> bool:
    """Bitwise, as far as it was written: the quick answer for most values."""
    mine, theirs = x.entry, y.entry
    figures = (mine.norm, mine.largest, mine.nonfinite) == (theirs.norm, theirs.largest, theirs.nonfinite)
    return (
        figures
        and mine.shape == theirs.shape
        and mine.dtype == theirs.dtype
        and x.elements.dtype == y.elements.dtype
        and torch.equal(x.elements, y.elements)
    )


def _same_parts(mine: list[Value], theirs: list[Value]) -> bool:
    """Cut over all ranks in both, which is by rank in every layout, and in parts of one shape."""
    entries = mine[0].entry, theirs[0].entry
    layouts = [layout_of(e.layout) for e in entries]
    cut = layouts[0] is not None and list(layouts[0]) == ["world"] and type(layouts[0]["world"]) is Shard
    return cut and layouts[0] == layouts[1] and entries[0].shape == entries[1].shape and len(mine) == len(theirs)


def _apart(a: Whole, b: Whole, mask: Tensor | None) -> Deviation:
    return deviation(a, b, mask) if a.shape == b.shape else Deviation(math.inf, SHAPE)


def _of_pair(x: Value, y: Value, rank: int, mask: Tensor | None) -> Deviation:
    """Of what one rank has in both runs of one plan, whose dtypes are the same."""
    if x.entry.dtype != y.entry.dtype:
        return Deviation(math.inf, DTYPE)
    return _apart(own(x, rank), own(y, rank), mask)


def _usual(copies: list[Whole], limit: float, mask: Tensor | None) -> Whole:
    """What most ranks have."""
    unlike = [c for c in copies[1:] if _apart(copies[0], c, mask).off > limit]
    return unlike[0] if len(unlike) * 2 > len(copies) else copies[0]


def _is_transport(entry: ValueEntry) -> bool:
    """A buffer of an exchange: what is in it is compared where it is unpacked, and what pads it is nobody's."""
    return entry.layout == "world:R" or ".pack_heads" in entry.op


def _meanings(step: Step) -> dict[tuple[str, ...], Key]:
    """What a value means, apart from any layout -> where it is, in the order of rank 0.

    A captured node has its value behind the sum over ranks and the bias, which stand for it: the last node of its shape
    with it as the only origin.
    """
    values = step.ranks[0]
    last: dict[tuple[str, ...], Key] = {}
    for key, value in values.items():
        entry = value.entry
        if len(entry.origin) == 1:
            last[(key.place, entry.origin[0], str(entry.shape))] = key
    found: dict[tuple[str, ...], Key] = {}
    for key, value in values.items():
        entry = value.entry
        if entry.role in (ATTENTION_OUTPUT, LAYER_OUTPUT, LOGITS) or entry.role.startswith(f"{ATTENTION_OUTPUT}_"):
            found[("role", key.place, entry.role)] = key
        elif entry.role == PARAMETER or (key.place == OUTER and not entry.op and entry.layout == "R"):
            if "table" not in key.name:  # as long as the shards of a layout
                found[("input", key.place, key.name)] = key
        elif entry.captured and entry.origin == [key.name] and TOLERANCE.get(entry.dtype) is not None:
            behind = last[(key.place, key.name, str(entry.shape))]
            if values[behind].entry.role:
                continue  # an attention output is compared as that
            found[("node", key.place, key.name, entry.op, entry.source)] = behind
    return found
