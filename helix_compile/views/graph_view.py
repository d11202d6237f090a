"""What a picture shows of a body: one model in plain data. Every view draws from it; none reads a graph itself.

    fx.Graph -> nodes (key ops, runs of small ops, inputs, output) + edges (with the views that lie on them)

build_view.py makes it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class ValueView:
    """One value: shape such as "[B,T,72]", dtype, axis -> placement text, bytes on one rank."""

    shape: str
    dtype: str
    layout: dict[str, str]
    bytes: str

    @property
    def layout_text(self) -> str:
        """Such as "world:S(2)"; R when replicated over every axis."""
        return ", ".join(f"{a}:{p}" for a, p in sorted(self.layout.items())) or "R"

    @property
    def form(self) -> str:
        """What a picture colours by: partial, per-rank, sharded or replicated."""
        placements = set(self.layout.values()) - {"R"}
        if any(p.startswith("P") for p in placements):
            return "partial"
        if "L" in placements:
            return "per-rank"
        return "sharded" if placements else "replicated"


@dataclass(frozen=True)
class InputView:
    """A parameter or step input that a node reads: its name and its local value."""

    name: str
    value: ValueView


@dataclass(frozen=True)
class NodeView:
    """One box of a picture.

    Attributes:
        name: the fx name of the op, or of the last op of a run.
        kind: "input", "cache", "op", "run", "helix", "collective" or "output".
        op: the op's qualified name; of a run, its ops in order.
        title, subtitle: what a reader sees first.
        cluster: submodule of the layer that the node belongs to.
        module: whole path of the module.
        stage: the pass that made the node, or "captured".
        origin: captured nodes that it comes from.
        source: file:line of the user's model.
        outputs: the values that leave it.
        params, step_inputs: what it reads besides edges.
        members: (fx name, op) of a run.
        egress: bytes that leave a rank for each token, of a collective whose place in the plan is known.
    """

    name: str
    kind: str
    op: str
    title: str
    subtitle: str
    cluster: str
    module: str
    stage: str
    origin: tuple[str, ...]
    source: str
    outputs: tuple[ValueView, ...]
    params: tuple[InputView, ...] = ()
    step_inputs: tuple[InputView, ...] = ()
    members: tuple[tuple[str, str], ...] = ()
    egress: float | None = None


@dataclass(frozen=True)
class EdgeView:
    """A value on its way: names of both nodes, the values that arrive, the ops folded into the edge."""

    source: str
    target: str
    values: tuple[ValueView, ...]
    folded: tuple[str, ...]

    @property
    def label(self) -> str:
        """The shapes that arrive."""
        return ", ".join(dict.fromkeys(v.shape for v in self.values))

    @property
    def form(self) -> str:
        """The form of what arrives; the first one that is not replicated counts."""
        return next((v.form for v in self.values if v.form != "replicated"), "replicated")


@dataclass(frozen=True)
class GraphView:
    """A body as boxes in topological order, and edges."""

    name: str
    nodes: tuple[NodeView, ...]
    edges: tuple[EdgeView, ...]

    def node(self, name: str) -> NodeView:
        """The node of this name; KeyError if there is none."""
        for node in self.nodes:
            if node.name == name:
                return node
        raise KeyError(f"no node named {name!r} in the view of {self.name}")

    def to_json(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)
