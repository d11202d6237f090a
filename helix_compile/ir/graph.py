"""The few graph lookups and edits that every pass shares."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed._functional_collectives  # registers torch.ops._c10d_functional
from torch import fx

aten, c10d = torch.ops.aten, torch.ops._c10d_functional


# frames of torch and of this package are not lines of the user's model
_NOT_THE_USERS = (f"{Path(torch.__file__).parent}/", f"{Path(__file__).parents[1]}/", "torch/fx/")


def node_named(graph: fx.Graph, name: str) -> fx.Node:
    """The node of this name; KeyError if there is none."""
    for node in graph.nodes:
        if node.name == name:
            return node
    raise KeyError(f"no node named {name!r} in the graph")


def placeholders(graph: fx.Graph) -> list[fx.Node]:
    """The graph's inputs in order."""
    return [n for n in graph.nodes if n.op == "placeholder"]


# the parts of a cached attention; where K and V are cached, K goes by the first name and V by the second. The last one
# is there where an indexer chooses among the cached tokens
PARTS = ("latent", "rope", "index")


def past_dim(past: Any) -> int:
    """The dim of S: K and V are cached as [B, heads, S, width], index keys as [B, S, width]."""
    return past.dim() - 2


PART = "part"  # meta of a node that is of one part of the batch: [site, part, parts]
_RING = "ring_"


def ring_name(name: str) -> str:
    """What an input is called where it is of caches of the last tokens, which every rank holds by itself."""
    return f"{_RING}{name}"


class InputRef(NamedTuple):
    """What a graph's input is: meta["input"] of its placeholder, read.

    Attributes:
        kind: "param", "past", "cache", "scale" (of a cache in FP8), "step" or "leaf"; in an outer graph "input", in a body "hidden", "tensor",
            "shared" (what an earlier layer caches, past and new) or "written" (what is visible once that layer has appended), "chosen"
            (slots that an earlier layer chose) and "layer" (the number of the layer that calls it, where parts of its own are called).
            "" is no input.
        name: of a parameter its full name, relative to the layer in a body; of a past or cache its site is in it.
    """

    kind: str
    name: str

    @classmethod
    def cache(cls, site: int, ring: bool = False) -> InputRef:
        """The cache of a site; `ring`: of the last tokens, whole on every rank."""
        return cls("cache", ring_name(f"cache_{site}") if ring else f"cache_{site}")

    @classmethod
    def scale(cls, site: int) -> InputRef:
        """What the FP8 values of a site's cache are times."""
        return cls("scale", f"cache_scale_{site}")

    @classmethod
    def past(cls, part: str, site: int) -> InputRef:
        """One of the PARTS of what a site has cached, in a captured graph."""
        return cls("past", f"past_{part}_{site}")

    @classmethod
    def shared(cls, part: int, site: int) -> InputRef:
        """The same of an earlier layer, that a site of this one reads; with what is new."""
        return cls("shared", f"shared_{PARTS[part]}_{site}")

    @classmethod
    def written(cls, site: int, ring: bool = False) -> InputRef:
        """What is visible of an earlier layer's cache, that a site of this one reads, once it is appended to."""
        return cls("written", ring_name(f"written_{site}") if ring else f"written_{site}")

    @property
    def site(self) -> int:
        """Number of the cached attention that a past, a cache, its scale or what is shared belongs to."""
        return int(self.name.rpartition("_")[2])

    @property
    def ring(self) -> bool:
        """Is it of a cache of the last tokens, which every rank holds by itself?"""
        return self.name.startswith(_RING)

    @property
    def part(self) -> int:
        """Of a past, or of what is shared: its place in PARTS."""
        return PARTS.index(self.name.split("_")[1])


NO_INPUT = InputRef("", "")
LAYER_NUMBER = InputRef("layer", "layer")
ATTENTION_MASK, POSITION_IDS = InputRef("input", "attention_mask"), InputRef("input", "position_ids")


def input_ref(node: Any) -> InputRef:
    """What input a node is; NO_INPUT for anything but a placeholder."""
    return InputRef(*node.meta["input"]) if isinstance(node, fx.Node) and "input" in node.meta else NO_INPUT


def set_input(node: fx.Node, ref: InputRef) -> None:
    """Say what input a placeholder is; plain data, as saved graphs hold it."""
    node.meta["input"] = [*ref]


def inputs_of(graph: fx.Graph, *kinds: str) -> list[fx.Node]:
    """The placeholders of these kinds, in order."""
    return [n for n in placeholders(graph) if input_ref(n).kind in kinds]


def input_named(graph: fx.Graph, kind: str, name: str) -> fx.Node:
    """The placeholder of this kind and name; KeyError if there is none."""
    for node in placeholders(graph):  # thousands, of which no InputRef is made
        if (*node.meta.get("input", ()),) == (kind, name):
            return node
    raise KeyError(f"no input {kind} {name!r} in the graph")


class Inputs:
    """The placeholders of a graph by what they are, for one who adds many: looking through all for each is quadratic."""

    def __init__(self, graph: fx.Graph):
        self._graph = graph
        self._known = {input_ref(node): node for node in reversed(placeholders(graph))}
        self._last = placeholders(graph)[-1]

    def add(self, kind: str, name: str, val: Any = None) -> fx.Node:
        """A new placeholder behind the last one (or the one that is there already)."""
        ref = InputRef(kind, name)
        if ref not in self._known:
            with self._graph.inserting_after(self._last):
                self._last = self._known[ref] = self._graph.placeholder(name.replace(".", "_"))
            self._last.meta = {"input": [kind, name], "val": val}
        return self._known[ref]


class InputTable:
    """What each input of a graph is, for one who asks before every step: read again where the inputs changed.

    Attributes:
        refs: in the order of the placeholders.
    """

    def __init__(self) -> None:
        self.refs: tuple[InputRef, ...] = ()
        self._read: list[tuple[str, ...]] | None = None

    def read(self, graph: fx.Graph) -> bool:
        """True if they are not what they were at the last call, or there was none."""
        now = [tuple(node.meta.get("input", NO_INPUT)) for node in placeholders(graph)]
        if now == self._read:
            return False
        self._read, self.refs = now, tuple(InputRef(*ref) for ref in now)
        return True


def add_input(graph: fx.Graph, kind: str, name: str, val: Any = None) -> fx.Node:
    """A new placeholder behind the last one (or the one that is there already)."""
    return Inputs(graph).add(kind, name, val)


def calls(graph: fx.Graph, *targets: Callable) -> list[fx.Node]:
    """All call_function nodes with one of these targets."""
    return [n for n in graph.nodes if n.op == "call_function" and n.target in targets]


def is_call(node: Any, *targets: Callable) -> bool:
    """True for a call_function node with one of these targets."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def helix_op(node: Any) -> str:
    """mla_decode for a call of helix::mla_decode or of a provider's op that stands for it; else ""."""
    if not isinstance(node, fx.Node) or not isinstance(node.target, torch._ops.OpOverload):
        return ""
    provider, name = node.target._schema.name.split("::")
    return name if provider.startswith("helix") else ""


def all_rows(node: Any) -> Any:
    """A value of all sequences, of which `node` takes the rows of a part; any other value is itself."""
    while helix_op(node) == "rows_of_part":
        node = node.args[0]
    return node


def is_param(node: Any) -> bool:
    """True for a placeholder that is a parameter or buffer."""
    return input_ref(node).kind == "param"


def getitems(graph: fx.Graph, node: fx.Node, *names: str) -> list[fx.Node]:
    """One named getitem node for each output of a multi-output node."""
    return [named(graph, name, operator.getitem, node, i) for i, name in enumerate(names)]


def named(graph: fx.Graph, name: str, target: Callable, *args: Any, **keywords: Any) -> fx.Node:
    """A call_function node under a name that a reader of the graph understands."""
    return graph.create_node("call_function", target, args, keywords, name=name)


def erase_unused(graph: fx.Graph, keep: Iterable[fx.Node] = ()) -> None:
    """Drop every node without users, attention ops included (fx keeps ops tagged as seeded), and dead inputs."""
    kept = set(keep)
    for node in reversed(list(graph.nodes)):
        if node.op != "output" and not node.users and node not in kept:
            graph.erase_node(node)


def source_line(node: fx.Node) -> str:
    """file:line of the user's model that made the node, or ""."""
    trace = node.meta.get("stack_trace") or ""
    for file, line in reversed(re.findall(r'File "([^"]+)", line (\d+)', trace)):
        if not file.startswith(_NOT_THE_USERS):
            return f"{Path(file).name}:{line}"
    return ""
