"""The ONNX model of a lowered stage: bodies become functions, called once a layer; the graph around them is the model's.

What a rank holds becomes initializers, its place on the mesh too, so the graphs of all ranks are one text. A cache is an input and,
with what was appended, an output: whatever reads it behind an append takes what that returned.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from onnx import FunctionProto, ModelProto, ValueInfoProto, helper
from torch import Tensor, fx

from helix_compile.errors import ExportError
from helix_compile.export.onnx_aten import RULES
from helix_compile.export.onnx_ops import functions_for
from helix_compile.export.onnx_scope import (
    BODIES,
    COLLECTIVES,
    HELIX,
    IR_VERSION,
    ONNX_DTYPES,
    OPSET,
    Scope,
    Size,
    Two,
    Value,
)
from helix_compile.ir.graph import aten, input_ref, placeholders, source_line
from helix_compile.ir.leaves import leaves_of
from helix_compile.ir.sizes import size_text
from helix_compile.ir.stage import body_of
from helix_compile.layout.degrees import HelixLayout
from helix_compile.plan.helix_plan import HelixPlan

STEP_INPUTS = ("input_ids", "positions", "page_table")
RANK_INPUTS = {f"{axis}_rank": axis for axis in ("kvp", "ep", "world")}
_VIEWS = {
    getattr(aten, name)
    for name in ("view", "slice", "select", "transpose", "unsqueeze", "squeeze", "unflatten", "flatten", "permute")
}


class GraphWriter:
    """One graph of a stage.

    Attributes:
        scope: its nodes so far.
        values: fx node -> its ONNX value.
        written: cache inputs that were appended to -> the name of what is in them now.
    """

    def __init__(self, name: str, layout: HelixLayout, scope: Scope, caches: dict[fx.Node, str]):
        self.name, self.layout, self.scope = name, layout, scope
        self.values: dict[fx.Node, Value] = {}
        self.written: dict[fx.Node, str] = {}
        self._caches = caches
        self._views: dict[tuple[fx.Node, str], str] = {}

    def value(self, x: Any) -> Any:
        """See Writer. A cache, or a view of one, is what it holds now."""
        if not isinstance(x, fx.Node):
            return x
        cache = self._cache_of(x)
        if cache is None:
            return self.values[x]
        now = self.written.get(cache, self._caches[cache])
        if x is cache:
            return now
        if (x, now) not in self._views:
            self._views[x, now] = RULES[x.target](self, x)  # type: ignore[assignment]  # a view is one tensor
        return self._views[x, now]

    def typed(self, x: Any, dtype: torch.dtype) -> str:
        """See Writer."""
        if not isinstance(x, fx.Node):
            return self.scope.constant(x, dtype)
        value = self.value(x)
        if isinstance(value, Size):
            number = self.scope.op("Squeeze", value.name)
            return str(number if dtype is torch.int64 else self.scope.op("Cast", number, to=ONNX_DTYPES[dtype]))
        if isinstance(value, Two) or not isinstance(value, str):
            raise self.refuse(x, "it is not one tensor")
        if x.meta["val"].dtype == dtype:
            return value
        return str(self.scope.op("Cast", value, wanted=f"{x.name}_{str(dtype)[6:]}", to=self.onnx_dtype(x, dtype)))

    def onnx_dtype(self, node: fx.Node, dtype: torch.dtype) -> int:
        """ONNX's number of a dtype."""
        if dtype not in ONNX_DTYPES:
            raise self.refuse(node, f"ONNX export has no dtype {dtype}")
        return ONNX_DTYPES[dtype]

    def refuse(self, node: fx.Node, why: str) -> ExportError:
        """See Writer."""
        where = source_line(node) or "no source line"
        return ExportError(f"format=onnx: {self.name}, node `{node.name}` ({node.target}, {where}): {why}")

    def append_to(self, node: fx.Node, name: str) -> None:
        """See CacheWriter."""
        if node not in self._caches:
            raise self.refuse(node, "it is appended to, and is no cache")
        self.written[node] = name

    def group_size(self, axis: str) -> int:
        """See CacheWriter."""
        return self.layout.size(axis)

    def write(self, graph: fx.Graph) -> Any:
        """Every node; what the graph returns, in its structure."""
        for node in graph.nodes:
            if node.op == "output":
                return fx.map_arg(node.args[0], lambda n: n)
            if node.op == "placeholder" or self._cache_of(node) is not None:
                continue
            if node.op == "call_module":
                self.values[node] = self.call(node)
            elif node.op == "call_function" and node.target in RULES:
                self.values[node] = RULES[node.target](self, node)
            else:
                kernel = getattr(node.target, "namespace", "").startswith(
                    "helix_"
                )  # of one machine: helix_cpp, helix_triton
                works = "compile the model with lower='reference' to export it"
                rule = f"a rule would stand in export/onnx_aten.py ({node.op})"
                raise self.refuse(node, f"no ONNX for it; {works if kernel else rule}")
        raise ExportError(f"format=onnx: {self.name} has no output")

    def call(self, node: fx.Node) -> Value:
        """A call of another graph, which bodies have none of."""
        raise self.refuse(node, "a call of a module inside a body")

    def _cache_of(self, node: fx.Node) -> fx.Node | None:
        """The cache that a node is a view of."""
        while node not in self._caches:
            is_view = node.op == "call_function" and getattr(node.target, "overloadpacket", None) in _VIEWS
            if not is_view or not isinstance(node.args[0], fx.Node):
                return None
            node = node.args[0]
        return node


def names_of(value: str | Two) -> tuple[str, ...]:
    """The tensors that a value is."""
    return (value.first, value.second) if isinstance(value, Two) else (value,)


def _is_complex(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_complex()


@dataclass(frozen=True)
class BodyFunction:
    """A body as a function.

    Attributes:
        proto: its inputs are the body's, its outputs what the body returns and then the caches that it appends to.
        returns: how many of the outputs the body itself returns; 0: it returns one that is no tuple.
        written: places of the inputs that it appends to, in the order of the outputs.
        results: what the outputs are, without values.
    """

    proto: FunctionProto
    returns: int
    written: tuple[int, ...]
    results: tuple[Tensor, ...]


def body_function(body: fx.GraphModule, name: str, layout: HelixLayout) -> BodyFunction:
    """The function of a lowered body."""
    inputs = placeholders(body.graph)
    caches = {node: node.name for node in inputs if input_ref(node).kind == "cache"}
    values = {
        node: Two(f"{node.name}_real", f"{node.name}_imag") if _is_complex(node) else node.name for node in inputs
    }
    names = [name for value in values.values() for name in names_of(value)]
    writer = GraphWriter(name, layout, Scope(names), caches)
    writer.values |= {node: value for node, value in values.items() if node not in caches}
    returned = writer.write(body.graph)
    items = list(returned) if isinstance(returned, (tuple, list)) else [returned]
    outputs = list[str]()
    for value in (*(writer.value(item) for item in items), *writer.written.values()):
        if not isinstance(value, str):
            raise ExportError(f"format=onnx: {name} returns what is not one tensor")
        is_own = value not in names and value not in outputs
        outputs.append(value if is_own else writer.scope.op("Identity", value, wanted="returned"))
    imports = [helper.make_opsetid(domain, 1) for domain in (HELIX, COLLECTIVES)]
    proto = helper.make_function(
        BODIES, name, names, outputs, writer.scope.nodes, [helper.make_opsetid("", OPSET), *imports]
    )
    places = tuple(inputs.index(cache) for cache in writer.written)
    results = tuple(node.meta["val"] for node in (*items, *writer.written))
    return BodyFunction(proto, len(items) if isinstance(returned, (tuple, list)) else 0, places, results)


@dataclass(frozen=True)
class RankModel:
    """What the models of all ranks have in common.

    Attributes:
        model: without weights and coordinates.
        weights: names of the parameters that it reads, in order.
        coordinates: names of the rank's places on the mesh that it reads.
        caches: sites that it reads or appends to, ascending.
        values: of a flat one, (layer, body) -> name of a node of the body -> name of its value.
    """

    model: ModelProto
    weights: tuple[str, ...]
    coordinates: tuple[str, ...]
    caches: tuple[int, ...]
    values: dict[tuple[int, str], dict[str, str]]


class _OuterWriter(GraphWriter):
    """The graph around the layers."""

    def __init__(
        self, stage: fx.GraphModule, plan: HelixPlan, layers: Collection[int] | None, caches: dict[fx.Node, str]
    ):
        names = [*STEP_INPUTS, *RANK_INPUTS, "logits", *caches.values(), *(f"{c}_out" for c in caches.values())]
        super().__init__("outer graph", plan.layout, Scope(names), caches)
        self._stage, self._plan, self._layers = stage, plan, layers
        self._calls: Counter[str] = Counter()
        self.functions: dict[str, BodyFunction] = {}
        self.seen = set[int]()
        self.infos: list[ValueInfoProto] = []

    def call(self, node: fx.Node) -> Value:
        """A layer: a call of its body's function."""
        body = str(node.target)
        layer = self._plan.body(body).layers[self._calls[body]]
        self._calls[body] += 1
        self.seen.add(layer)
        if self._layers is not None and layer not in self._layers:
            return self._skipped(node, body)
        return self._layer(node, body, layer)

    def _layer(self, node: fx.Node, body: str, layer: int) -> Value:
        if body not in self.functions:
            self.functions[body] = body_function(body_of(self._stage, body), body, self.layout)
        function = self.functions[body]
        arguments = [name for x in node.args for name in self._argument(node, x)]
        names = self.scope.op(
            body, *arguments, outputs=len(function.proto.output), domain=BODIES, wanted=f"layer_{layer}"
        )
        names = names if isinstance(names, tuple) else (names,)
        # what crosses a collective has no type that a checker could follow
        self.infos += [_info(name, x) for name, x in zip(names, function.results, strict=True)]
        own = function.returns or 1
        for place, name in zip(function.written, names[own:], strict=True):
            self.append_to(node.args[place], name)
        return names[:own] if function.returns else names[0]

    def _argument(self, node: fx.Node, x: Any) -> tuple[str, ...]:
        value = self.value(x)
        if isinstance(value, int):
            return (self.scope.constant(value, torch.int64),)
        if not isinstance(value, (str, Two)):
            raise self.refuse(node, f"its argument {x} is not in this export (a value of a layer that was left out?)")
        return names_of(value)

    def _skipped(self, node: fx.Node, body: str) -> Value:
        """A layer that is left out: what it is given goes on."""
        graph = body_of(self._stage, body).graph
        place = next(i for i, taken in enumerate(placeholders(graph)) if input_ref(taken).kind == "hidden")
        hidden: str = self.value(node.args[place])
        returned = graph.output_node().args[0]
        many = isinstance(returned, (tuple, list))
        return (hidden, *[None] * (len(returned) - 1)) if many else hidden


class _FlatWriter(_OuterWriter):
    """The same without functions for bodies: what names a value names it wherever it is.

    Attributes:
        layers_written: (layer, body, writer of its nodes).
    """

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.layers_written: list[tuple[int, str, GraphWriter]] = []

    def _layer(self, node: fx.Node, body: str, layer: int) -> Value:
        graph = body_of(self._stage, body).graph
        given = dict(zip(placeholders(graph), node.args, strict=True))
        caches = {taken: self.value(x) for taken, x in given.items() if input_ref(taken).kind == "cache"}
        inner = GraphWriter(f"layer {layer}", self.layout, _LayerScope(self.scope, f"layer_{layer}/"), caches)
        inner.values |= {taken: self.value(x) for taken, x in given.items() if taken not in caches}
        returned = inner.write(graph)
        for taken, name in inner.written.items():
            self.append_to(given[taken], name)
        self.layers_written.append((layer, body, inner))
        items = [inner.value(x) for x in returned] if isinstance(returned, (tuple, list)) else inner.value(returned)
        return tuple(items) if isinstance(items, list) else items


class _LayerScope(Scope):
    """The nodes of a layer among those of all, under names of its own."""

    def __init__(self, scope: Scope, prefix: str):
        super().__init__()
        self.nodes, self._scope, self._prefix = scope.nodes, scope, prefix

    def name(self, wanted: str) -> str:
        """See Scope."""
        return self._scope.name(self._prefix + wanted)


def rank_model(
    lowered: fx.GraphModule,
    plan: HelixPlan,
    caches: list[Tensor],
    pages: int,
    vocab: int,
    layers: Collection[int] | None,
    flat: bool = False,
) -> RankModel:
    """The model of every rank.

    Args:
        lowered: a stage without moves and without kernels.
        plan: it was made by.
        caches: of one rank, for their shapes.
        pages: of a sequence.
        vocab: size of the logits' last dim.
        layers: leave out all others; None: all layers.
        flat: without functions for bodies.

    Raises:
        ExportError: an op without a rule, leaves, caches in FP8 or in rings, a layer that does not exist.
    """
    if leaves := leaves_of(lowered):
        names = ", ".join(leaf.name for leaf in leaves)
        raise ExportError(
            f"format=onnx: {names} stay the user's own modules, whose code is in no graph: not exportable"
        )
    if (stored := plan.options.cache_dtype) != "auto":
        raise ExportError(
            f"format=onnx: caches in FP8 (cache_dtype={stored!r}) are not exported; compile the model with cache_dtype='auto'"
        )
    if plan.rings:
        raise ExportError(
            "format=onnx: window='replicate' keeps the last tokens in rings, whose page tables are no inputs of a rank's model; "
            "compile the model with window='shard'"
        )
    inputs = placeholders(lowered.graph)
    nodes = {input_ref(n).site: n for n in inputs if input_ref(n).kind == "cache"}
    writer = (_FlatWriter if flat else _OuterWriter)(
        lowered, plan, layers, {node: f"cache_{site}" for site, node in nodes.items()}
    )
    for node in inputs:
        kind, name = input_ref(node)
        if kind == "param" or (kind == "input" and name in (*STEP_INPUTS, *RANK_INPUTS)):
            writer.values[node] = name
        elif kind != "cache":
            raise writer.refuse(node, f"an input of kind {kind!r} has no place in an exported model")
    returned = writer.write(lowered.graph)
    if unknown := sorted(set(layers or ()) - writer.seen):
        raise ExportError(f"--layers {unknown}: the model has layers {min(writer.seen)} to {max(writer.seen)}")
    writer.scope.nodes.append(helper.make_node("Identity", [writer.value(returned)], ["logits"], name="logits"))
    sites = tuple(sorted(site for site, node in nodes.items() if node in writer.written))
    for site in sites:
        end = [f"cache_{site}_out"]
        writer.scope.nodes.append(helper.make_node("Identity", [writer.value(nodes[site])], end, name=end[0]))
    read = {name for node in writer.scope.nodes for name in node.input}
    graph = helper.make_graph(
        writer.scope.nodes,
        "step",
        [*_step_inputs(pages), *(_cache_info(f"cache_{s}", caches[s]) for s in sites)],
        [
            helper.make_tensor_value_info("logits", ONNX_DTYPES[_dtype(returned, plan)], ["B", "T", vocab]),
            *(_cache_info(f"cache_{s}_out", caches[s]) for s in sites),
        ],
        value_info=writer.infos,
    )
    bodies = [function.proto for function in writer.functions.values()]
    used = {n.op_type for nodes in (graph.node, *(b.node for b in bodies)) for n in nodes if n.domain == HELIX}
    domains = [helper.make_opsetid(domain, 1) for domain in (HELIX, BODIES, COLLECTIVES)]
    model = helper.make_model(
        graph,
        functions=[*functions_for(used), *bodies],
        opset_imports=[helper.make_opsetid("", OPSET), *domains],
        ir_version=IR_VERSION,
        producer_name="helix_compile",
    )
    weights = tuple(input_ref(n).name for n in inputs if input_ref(n).kind == "param" and input_ref(n).name in read)
    values = {}
    if isinstance(writer, _FlatWriter):
        for layer, body, inner in writer.layers_written:
            named = {n.name: inner.value(n) for n in (*inner.values, *inner.written) if n.op != "output"}
            values[layer, body] = {name: value for name, value in named.items() if isinstance(value, str)}
    return RankModel(model, weights, tuple(name for name in RANK_INPUTS if name in read), sites, values)


def _info(name: str, x: Tensor) -> ValueInfoProto:
    """Dtype and shape of what a layer returns; sizes that are no numbers by their letters."""
    sizes = [int(s) if isinstance(s, int) else size_text(s) for s in x.shape]
    return helper.make_tensor_value_info(name, ONNX_DTYPES[x.dtype], sizes)


def _step_inputs(pages: int) -> list[ValueInfoProto]:
    shapes: dict[str, list[str | int | None]] = {
        "input_ids": ["B", "T"],
        "positions": ["B", "T"],
        "page_table": ["B", pages],
    }
    return [helper.make_tensor_value_info(n, ONNX_DTYPES[torch.int64], shapes[n]) for n in STEP_INPUTS]


def _cache_info(name: str, cache: Tensor) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, ONNX_DTYPES[cache.dtype], list(cache.shape))


def _dtype(returned: fx.Node, plan: HelixPlan) -> torch.dtype:
    value = returned.meta.get("val")
    dtype: torch.dtype = value.dtype if isinstance(value, Tensor) else getattr(torch, plan.dtype)
    return dtype


def fix_sizes(model: ModelProto, sizes: Mapping[str, int]) -> None:
    """Make free sizes of inputs and outputs numbers, in place, by their letters; nodes go by what they are given."""
    for info in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in info.type.tensor_type.shape.dim:
            if dim.dim_param in sizes:
                dim.dim_value = sizes[dim.dim_param]


def nodes_in_order(model: ModelProto) -> list[Any]:
    """Every node of a model, functions of bodies followed where they are called: what a run does, one after the other."""
    functions = {f.name: f for f in model.functions if f.domain == BODIES}
    found: list[Any] = []
    for node in model.graph.node:
        found += functions[node.op_type].node if node.domain == BODIES else [node]
    return found
