"""A program as torch.export gives it -> without changes in place, and without ops that choose between a view and a copy.

run_decompositions({}) does that by tracing twice more, two thirds of what a layer's capture costs. Here each node is
rewritten once, by what its recorded result shows: a result that shares its input's storage was a view, any other a copy.
What no rule below covers goes to run_decompositions, so this decides how long a capture takes and not what is right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from helix_compile.ir.graph import aten

_CONTIGUOUS = {"memory_format": torch.contiguous_format}


class _NoRule(Exception):
    """This node is for run_decompositions."""


def functional(program: ExportedProgram) -> ExportedProgram:
    """`program` with functional ops only, linear and attention kept whole; its graph is replaced where that is enough."""
    try:
        graph = _Rewriter(program.graph).rewritten()
    except _NoRule:
        return program.run_decompositions({})
    results = next(n for n in graph.nodes if n.op == "output").args[0]
    for spec, result in zip(program.graph_signature.output_specs, results, strict=True):
        if isinstance(result, fx.Node):
            spec.arg.name = result.name
    program.graph_module.graph = graph
    return program


def _storages(node: fx.Node) -> Iterator[int]:
    for leaf in pytree.tree_leaves(node.meta.get("val")):
        if isinstance(leaf, Tensor):
            yield leaf.untyped_storage()._cdata


def _same_sizes(left: Any, right: Any) -> bool:
    """Equal as expressions: no guard is asked for."""
    text = lambda sizes: [s.node.expr if isinstance(s, torch.SymInt) else s for s in sizes]  # noqa: E731
    return text(left) == text(right)


class _Rewriter:
    def __init__(self, graph: fx.Graph):
        self.old, self.new = graph, fx.Graph()
        self.env: dict[fx.Node, fx.Node] = {}
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self.sizes: dict[Any, fx.Node] = {}  # expression of a size -> the node that holds it
        self.sharing: dict[int, list[fx.Node]] = {}  # storage -> the nodes so far whose value lies there
        self.whole: dict[int, list[fx.Node]] = {}  # storage -> of those, the ones that are all of it, as it was made

    def rewritten(self) -> fx.Graph:
        for node in self.old.nodes:
            rule = self._rule(node)
            self.env[node] = made = rule(self, node) if rule else self.new.node_copy(node, self.env.__getitem__)
            value = node.meta.get("val")
            if isinstance(value, torch.SymInt):
                self.sizes.setdefault(value.node.expr, made)
            storages = list(_storages(node))
            if len(set(storages)) > 1 and not self._aliased(node):
                continue  # several new tensors: each is its item's
            for storage in set(storages):
                self.sharing.setdefault(storage, []).append(node)
                self.whole.setdefault(storage, [node])
        return self.new

    def _rule(self, node: fx.Node) -> Callable[[_Rewriter, fx.Node], fx.Node] | None:
        """How a node is rewritten; None: it stays."""
        if node.op in ("placeholder", "output"):
            return None
        target = node.target
        if node.op != "call_function":
            raise _NoRule
        if not isinstance(target, torch._ops.OpOverload):
            if getattr(target, "__module__", None) in ("_operator", "math", "torch"):
                return None  # arithmetic of sizes, an item of a list
            raise _NoRule
        if target in _RULES:
            return _RULES[target]
        if target._schema.is_mutable:
            return _Rewriter._in_place
        if target in _OTHERWISE:
            raise _NoRule
        composite = torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), "CompositeImplicitAutograd")
        if composite and self._aliased(node):
            raise _NoRule
        return None

    def _aliased(self, node: fx.Node) -> bool:
        return any(s in self.sharing for s in _storages(node))

    def _call(self, old: fx.Node, target: Any, args: tuple, kwargs: dict[str, Any] | None = None) -> fx.Node:
        """A node of the new graph in the place of `old`, with its value's shape and its source."""
        name = target.overloadpacket.__name__
        made = self.new.create_node("call_function", target, args, kwargs or {}, name=name)
        made.meta = dict(old.meta)
        return made

    def _mapped(self, node: fx.Node) -> tuple[tuple, dict[str, Any]]:
        return fx.node.map_arg(node.args, self.env.__getitem__), fx.node.map_arg(node.kwargs, self.env.__getitem__)

    def _to(self, node: fx.Node) -> fx.Node:
        names = [a.name for a in node.target._schema.arguments]
        given = dict(zip(names, node.args, strict=False)) | node.kwargs
        source = self.env[given.pop("self")]
        if self._aliased(node):
            return source
        kept = {k: given.pop(k) for k in ("dtype", "device") if given.get(k) is not None}
        if not kept or any(v not in (None, False, torch.strided, torch.preserve_format) for v in given.values()):
            raise _NoRule
        return self._call(node, aten._to_copy.default, (source,), kept)

    def _contiguous(self, node: fx.Node) -> fx.Node:
        if len(node.args) > 1 or node.kwargs:
            raise _NoRule
        source = self.env[node.args[0]]
        return source if self._aliased(node) else self._call(node, aten.clone.default, (source,), _CONTIGUOUS)

    def _reshape(self, node: fx.Node) -> fx.Node:
        args, _ = self._mapped(node)
        source, shape = args[0], args[1] if node.target is aten.reshape.default else self._shape(node)
        if self._aliased(node):
            return self._call(node, aten.view.default, (source, shape))
        value = node.args[0].meta["val"]
        copied = self._call(node, aten.clone.default, (source,), _CONTIGUOUS)
        viewed = self._call(node, aten._unsafe_view.default, (copied, shape))
        with value.fake_mode:
            copied.meta["val"] = aten.clone.default(value, **_CONTIGUOUS)
            viewed.meta["val"] = aten._unsafe_view.default(copied.meta["val"], node.meta["val"].shape)
        return viewed

    def _shape(self, node: fx.Node) -> list[Any]:
        """The sizes of a node's value as arguments; one that no node holds is -1."""
        sizes: list[Any] = []
        for size in node.meta["val"].shape:
            sizes.append(self.sizes.get(size.node.expr, -1) if isinstance(size, torch.SymInt) else size)
        if sizes.count(-1) > 1:
            raise _NoRule
        return sizes

    def _chunk(self, node: fx.Node) -> fx.Node:
        source, chunks, *dims = node.args
        dim = dims[0] if dims else node.kwargs.get("dim", 0)
        size = source.meta["val"].shape[dim]
        if isinstance(size, torch.SymInt) or size == 0:
            raise _NoRule
        return self._call(node, aten.split.Tensor, (self.env[source], math.ceil(size / chunks), dim))

    def _in_place(self, node: fx.Node) -> fx.Node:
        """op_(x, ...) is op(x, ...), and x means that from here on. x is all of a tensor that the graph made, or a slice.

        What else lies in that tensor may not be read from here on: it would need to be taken anew.
        """
        twin, changed = _twin(node.target), node.args[0]
        (storage,) = set(_storages(changed))
        whole = self.whole[storage]
        if whole[0].op == "placeholder":
            raise _NoRule  # state that the forward changes: run_decompositions names it
        chain = _slices(changed, whole)
        others = [n for n in self.sharing[storage] if n not in whole]
        if any(self.order[user] > self.order[node] for n in others for user in n.users) or (chain and node.users):
            raise _NoRule
        levels = [self.env[whole[0]]]
        for link in chain:
            taken = self.env[link]
            if taken.args[0] is not levels[-1]:
                taken = self._call(link, link.target, (levels[-1], *self._mapped(link)[0][1:]), dict(link.kwargs))
            levels.append(taken)
        args, kwargs = self._mapped(node)
        result = self._call(node, twin, (levels.pop(), *args[1:]), kwargs)
        result.meta["val"] = _value_of(node, twin, any_stride=bool(chain))
        for link, base in zip(reversed(chain), reversed(levels), strict=True):
            where, _ = self._mapped(link)
            result = self._call(node, aten.slice_scatter.default, (base, result, *where[1:]), dict(link.kwargs))
            result.meta["val"] = link.args[0].meta["val"]
        if not chain:
            whole.append(node)
        for n in whole:
            self.env[n] = result
        return result


def _twin(target: torch._ops.OpOverload) -> torch._ops.OpOverload:
    """The functional op of one that works in place."""
    name = target._schema.name.removeprefix("aten::")
    twin = getattr(getattr(aten, name.removesuffix("_"), None), target._overloadname, None)
    written = [a.name for a in target._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    if target.namespace != "aten" or not name.endswith("_") or twin is None or written != ["self"]:
        raise _NoRule
    if [a.name for a in twin._schema.arguments] != [a.name for a in target._schema.arguments]:
        raise _NoRule
    return twin


def _slices(changed: fx.Node, whole: list[fx.Node]) -> list[fx.Node]:
    """The slices that lead from the whole tensor to `changed`, outermost first."""
    chain: list[fx.Node] = []
    while changed not in whole:
        if changed.target is not aten.slice.Tensor:
            raise _NoRule
        chain.insert(0, changed)
        changed = changed.args[0]
    return chain


def _value_of(node: fx.Node, twin: torch._ops.OpOverload, any_stride: bool) -> Tensor:
    """What the functional op gives; of another dtype, shape or layout than what is changed, it would not stand for it."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    before = args[0]
    with before.fake_mode:
        after = twin(*args, **kwargs)
    if (after.dtype, after.device) != (before.dtype, before.device) or not _same_sizes(after.shape, before.shape):
        raise _NoRule
    if not any_stride and not _same_sizes(after.stride(), before.stride()):
        raise _NoRule
    return after


_RULES: dict[Any, Callable[[_Rewriter, fx.Node], fx.Node]] = {
    aten.to.dtype: _Rewriter._to,
    aten.to.device: _Rewriter._to,
    aten.to.dtype_layout: _Rewriter._to,
    aten.contiguous.default: _Rewriter._contiguous,
    aten.reshape.default: _Rewriter._reshape,
    aten.flatten.using_ints: _Rewriter._reshape,
    aten.chunk.default: _Rewriter._chunk,
}

# what a trace takes away or splits up though its result shares nothing
_OTHERWISE = (
    aten.alias.default,
    aten.detach.default,
    aten.lift_fresh.default,
    aten.lift_fresh_copy.default,
    aten.dropout.default,
    aten.alpha_dropout.default,
    aten.feature_dropout.default,
    aten.feature_alpha_dropout.default,
    aten.batch_norm.default,
    aten.instance_norm.default,
)
