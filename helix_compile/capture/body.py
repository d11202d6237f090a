"""One layer -> one body graph, and the signature by which equal layers share a body.

A body's placeholders, in this order: hidden, the layer's other tensors, what it caches (past), its parameters. Each
carries meta["input"] = [kind, name]; a parameter's name is relative to its layer.
Matchers get one shape of graph: no asserts, B and T read from one place, no dead code.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from helix_compile.capture.checks import explained
from helix_compile.capture.choices import drop_idle_guards
from helix_compile.capture.layers import BATCH, PAST, TOKENS, ConcatenatingCache, export_functional
from helix_compile.capture.results import result_of
from helix_compile.capture.same_values import EXPORTED
from helix_compile.capture.structure import on_meta, tensors_of
from helix_compile.errors import CaptureError, MatchError
from helix_compile.ir.graph import PARTS, InputRef, aten, past_dim, set_input, source_line
from helix_compile.ir.leaves import LayerCall
from helix_compile.ir.shapes import trust_shapes
from helix_compile.ir.sizes import HINT_B, HINT_S, HINT_T, hint_of
from helix_compile.ir.stage import copy_graph

CONSTANTS = "constants"  # of a captured graph module's meta: name of a placeholder -> tensor


def example_like(fake: Tensor, device: torch.device) -> Tensor:
    """A small real tensor of `fake`'s hinted shape."""
    shape = [hint_of(s) for s in fake.shape]
    return torch.zeros(shape, dtype=fake.dtype, device=device)


class CachedSite(NamedTuple):
    """What one attention site caches: two tensors [B, heads, T, width], and [B, T, index_width] where an indexer has keys."""

    k_heads: int
    k_width: int
    v_heads: int
    v_width: int
    index_width: int = 0

    @classmethod
    def of(cls, new: list[Tensor]) -> CachedSite:
        """By what a step leaves."""
        k, v, *index = new
        return cls(k.shape[1], k.shape[3], v.shape[1], v.shape[3], *(x.shape[2] for x in index))

    def shapes(self, B: int, S: int) -> list[tuple[int, ...]]:
        """Of what is cached of B sequences of S tokens, in the order of PARTS."""
        index = [(B, S, self.index_width)] if self.index_width else []
        return [(B, self.k_heads, S, self.k_width), (B, self.v_heads, S, self.v_width), *index]


class _Body(nn.Module):
    def __init__(self, layer: nn.Module, call: LayerCall, config: Any):
        super().__init__()
        self.layer, self._call, self._config = layer, call, config

    def forward(self, hidden: Tensor, others: list[Tensor], pasts: list[Tensor]) -> Any:
        cache = ConcatenatingCache(self._config, pasts, pasts[0] if pasts else hidden)
        args, kwargs = self._call.rebuild(hidden, others, cache)
        out, *results = self._call.results(self.layer(*args, **kwargs), args, kwargs)
        return out, [t for new in cache.new for t in new], results


class NoValue(RuntimeError):
    """A constant on meta: two of them can't be told apart there."""


class OpTrace(TorchDispatchMode):
    """Writes down every aten op: where each input comes from, shapes, constants by value, parameters by name.

    `mode`: the fake mode that is open below; None: everything is on meta.
    """

    def __init__(self, names: dict[int, str], mode: FakeTensorMode | None):
        super().__init__()
        self.names, self._mode = names, mode
        self.lines: list[str] = []
        self.paused = False  # what another trace writes down
        self._made: list[Tensor] = []  # held, or the id of one that is gone would be given to another

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        fresh = func is torch.ops.aten.lift_fresh.default  # torch.tensor(...) in a forward: made anew in every call
        self.lines.append(f"{func.name()}{self._shown(args, fresh)}{self._shown(kwargs, fresh)}")
        out = result_of(func, args, kwargs, self._mode)
        for leaf in (out,) if isinstance(out, Tensor) else pytree.tree_leaves(out):
            if isinstance(leaf, Tensor) and id(leaf) not in self.names:
                self.names[id(leaf)] = f"%{len(self._made)} "
                self._made.append(leaf)
        return out

    def name_inputs(self, tensors: list[Tensor], what: str = "input") -> None:
        """Call them by their numbers."""
        self._made += tensors
        self.names |= {id(t): f"{what} {i} " for i, t in enumerate(tensors)}

    def _shown(self, value: Any, fresh: bool) -> str:
        """An argument with what is inside of it; pytree takes twice the time of the whole trace."""
        if isinstance(value, Tensor):
            return self.text(value, fresh)
        if isinstance(value, (tuple, list)):
            return f"[{','.join([self._shown(v, fresh) for v in value])}]"
        if isinstance(value, dict):
            return f"{{{','.join([f'{k}:{self._shown(v, fresh)}' for k, v in value.items()])}}}"
        return repr(value)

    def text(self, leaf: Any, fresh: bool = False) -> str:
        """A tensor by who made it; one that nobody made is a constant, and goes by its value, and itself if it stays."""
        if not isinstance(leaf, Tensor):
            return repr(leaf)
        name = self.names.get(id(leaf))
        if name is None and not isinstance(leaf, FakeTensor):
            if leaf.is_meta:
                raise NoValue("a tensor that nobody made")
            with unset_fake_temporarily():
                stored: Any = leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            name = hashlib.sha256(stored).hexdigest() + ("" if fresh else f" {id(leaf)}")
        return f"{name}{tuple(leaf.shape)}{leaf.dtype}"


def without_values(what: str, module: nn.Module, run: Callable[[OpTrace, torch.device], None]) -> OpTrace:
    """A trace of a module that is run on meta, or where it can't be (it makes tensors on its own device) on fake tensors.

    Args:
        what: said where it can't be run at all.
        module: whose tensors are told by name.
        run: runs the module, writes the trace.

    Raises:
        CaptureError: neither can be done; says why.
    """
    try:
        with torch.no_grad(), on_meta(module):
            trace = OpTrace({id(t): n for n, t in tensors_of(module).items()}, None)
            run(trace, torch.device("meta"))
            return trace
    except Exception:  # told by the run on fake tensors, if it is the module's own
        pass
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with explained(what), torch.no_grad(), fake:
        trace = OpTrace({id(t): n for n, t in tensors_of(module).items()}, fake)
        run(trace, next(module.parameters()).device)
        return trace


def sites_of(layer: nn.Module, cached: list[list[Tensor]]) -> list[CachedSite]:
    """By what a step of a layer leaves in the cache.

    Raises:
        CaptureError: tensors that are no keys, values or index keys.
    """
    bad = [tuple(t.shape) for new in cached for t in new[:2] if t.dim() != 4]
    bad += [tuple(t.shape) for new in cached for t in new[3:]]
    if bad:
        raise CaptureError(
            f"capture: {type(layer).__name__} caches tensors of shape {bad[0]}; expected [B, heads, T, width]"
        )
    return [CachedSite.of(new) for new in cached]


def reads_handed(call: LayerCall, lines: Iterable[str]) -> bool:
    """Does a layer read what one before it made, by the lines of its trace?"""
    handed = [f"input {i + 1} (" for i, t in enumerate(call.others) if any(t is x for x in call.handed)]
    return any(name in line for line in lines for name in handed)


def check_index_keys(layer: nn.Module, cache: ConcatenatingCache) -> None:
    """Raise MatchError where keys of an indexer were cached, and no K and V."""
    if cache.keys_alone:
        raise MatchError(
            f"layer {cache.keys_alone[0]}: sparse attention: {type(layer).__name__} caches keys of an indexer and no K and V of its "
            "own (it attends to another layer's?).\n  nearest that works: a layer that shares K and V shares the choice of keys too"
        )


def probe_layer(layer: nn.Module, call: LayerCall, config: Any) -> tuple[str, list[CachedSite], bool]:
    """Run `layer` once without values: its signature, what each attention site caches, does it read what a layer before it made?

    The signature is the whole dataflow: every aten op with its constants and where its inputs come from, what is
    returned and what is cached. So two layers share a body only if they compute the same function of their parameters;
    each is run with its own number and everything else that is its own. (A layer that can't be run so is a CaptureError.)
    """
    results: list[Tensor] = []
    cache: Any = None

    def run(trace: Any, device: torch.device) -> None:
        nonlocal results, cache
        with trace:
            hidden = example_like(call.hidden, device)
            others = [example_like(t, device) for t in call.others]
            trace.name_inputs([hidden, *others])
            cache = ConcatenatingCache(config, None, hidden.new_zeros(HINT_B, 1, HINT_S, 1))
            args, kwargs = call.rebuild(hidden, others, cache)
            results = call.results(layer(*args, **kwargs), args, kwargs)

    trace = without_values(f"{type(layer).__name__} can't be traced", layer, run)
    check_index_keys(layer, cache)
    sites = sites_of(layer, cache.new)
    ends = [trace.text(t) for t in (*results, *(t for new in cache.new for t in new))]
    text = "\n".join([call.constants(), str(sites), *trace.lines, *ends])
    return hashlib.sha256(text.encode()).hexdigest(), sites, reads_handed(call, trace.lines)


def capture_body(layer: nn.Module, call: LayerCall, config: Any, cached: list[CachedSite]) -> fx.GraphModule:
    """Export one layer, dynamic in B, T and S."""
    device = next(layer.parameters()).device
    batch, tokens = call.hidden.shape[:2]
    hidden = example_like(call.hidden, device)
    others = [example_like(t, device) for t in call.others]
    pasts = [
        torch.zeros(shape, dtype=call.hidden.dtype, device=device)
        for site in cached
        for shape in site.shapes(HINT_B, HINT_S)
    ]
    shapes = (
        {0: BATCH, 1: TOKENS},
        [_dims(t, batch, tokens) for t in call.others],
        [{0: BATCH, past_dim(past): PAST} for past in pasts],
    )
    sizes = f"(B={HINT_B}, T={HINT_T}, S={HINT_S})"
    with explained(f"torch.export failed on {type(layer).__name__} {sizes}"):
        program, exported = export_functional(_Body(layer, call, config), (hidden, others, pasts), shapes, "layer.")
    names = ["hidden", *call.names]
    names += [InputRef.past(p, i).name for i, site in enumerate(cached) for p in PARTS[: len(site.shapes(1, 1))]]
    kinds = ["hidden"] + ["tensor"] * len(others) + ["past"] * len(pasts)
    body = normalised_module(program, list(zip(kinds, names, strict=True)), prefix="layer.")
    body.meta[EXPORTED] = exported
    return body


def _dims(fake: Tensor, batch: Any, tokens: Any) -> dict[int, Any]:
    dims: dict[int, Any] = {}
    for dim, size in enumerate(fake.shape):
        if isinstance(size, torch.SymInt):
            same = [d for s, d in ((batch, BATCH), (tokens, TOKENS)) if s.node.expr == size.node.expr]
            dims[dim] = same[0] if same else Dim.AUTO
    return dims


def normalised_module(program: ExportedProgram, inputs: list[tuple[str, str]], prefix: str) -> fx.GraphModule:
    """Graph of `program`, activations before parameters, named, canonical; unused placeholders dropped.

    `inputs` gives (kind, name) of the user inputs in order; the first one is [B, T, ...] and anchors B and T.
    Tensors that are neither parameters nor buffers are parameters of the graph too; meta[CONSTANTS] holds them by name.
    """
    mapping: dict[fx.Node, fx.Node] = {}
    graph = copy_graph(program.graph, mapping)
    by_name = {n.name: mapping[n] for n in program.graph.nodes if n.op == "placeholder"}
    user, lifted, constants = [], [], dict[str, Tensor]()
    for spec in program.graph_signature.input_specs:
        node = by_name[spec.arg.name]
        if spec.kind == InputKind.USER_INPUT:
            user.append(node)
        else:
            name = str(spec.target).removeprefix(prefix)
            if spec.kind == InputKind.CONSTANT_TENSOR:
                constants[name] = program.constants[str(spec.target)]
            set_input(node, InputRef("param", name))
            lifted.append((node, name.replace(".", "_")))
    for node, (kind, name) in zip(user, inputs, strict=True):
        set_input(node, InputRef(kind, name))
    named = [(n, name) for n, (_, name) in zip(user, inputs, strict=True)]
    _reorder(graph, [*named, *lifted])
    drop_idle_guards(graph)
    canonicalize(graph, user[0])
    for node in [n for n in graph.nodes if n.op == "placeholder" and not n.users]:
        if node is not user[0]:
            graph.erase_node(node)
    for node in graph.nodes:
        if node.op == "get_attr":
            raise CaptureError(
                f"capture: node `{node.name}` reads the constant {node.target!r}, which is neither a parameter "
                "nor a buffer of the model"
            )
    trust_shapes(graph)
    module = fx.GraphModule(nn.Module(), graph)
    module.meta[CONSTANTS] = constants
    return module


def _reorder(graph: fx.Graph, named: list[tuple[fx.Node, str]]) -> None:
    """Put placeholders into the given order under the given names."""
    names: set[str] = set()
    first = next(iter(graph.nodes))
    for node, name in named:
        unique = name
        while unique in names:
            unique += "_"
        names.add(unique)
        first.prepend(node) if node is not first else None
        node.name = node.target = unique
    previous = named[0][0]
    for node, _ in named[1:]:
        previous.append(node)
        previous = node


_CHECKS = (
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten.sym_constrain_range_for_size.default,
    aten._assert_async.msg,
)


def _refuse_random(node: fx.Node) -> None:
    """Ranks that compute the same value would draw another one each, and no reference could tell what is right."""
    if not isinstance(node.target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in node.target.tags:
        return
    arguments = node.target._schema.arguments
    values = {a.name: a.default_value for a in arguments}
    values |= dict(zip((a.name for a in arguments), node.args, strict=False)) | node.kwargs
    share, on = values.get("dropout_p", values.get("p")), values.get("train", values.get("training"))
    if share != 0 and on is not False:
        raise CaptureError(
            f"capture: node `{node.name}` ({source_line(node) or 'no source'}) is random ({node.target}): a dropout that is on, "
            "or noise; a decode graph may depend on its inputs and weights only"
        )


def canonicalize(graph: fx.Graph, anchor: fx.Node) -> None:
    """Edit `graph` in place: strip checks, read B and T from `anchor` [B, T, ...] only, drop dead code.

    torch.export takes B from the mask, T from the positions or S from the past, whatever it saw first. Those
    inputs go away in the rewrite, so every size that equals B or T is re-pointed to `anchor` (same symbol).
    """
    for node in list(graph.nodes):
        _refuse_random(node)
        if node.target in _CHECKS:
            graph.erase_node(node)
    batch, tokens = anchor.meta["val"].shape[:2]
    last_input = [n for n in graph.nodes if n.op == "placeholder"][-1]
    sizes = []
    with graph.inserting_after(last_input):
        for dim, size in ((1, tokens), (0, batch)):
            node = graph.call_function(aten.sym_size.int, (anchor, dim))
            node.meta["val"] = size
            sizes.append(node)
    for node in list(graph.nodes):
        if node.target is aten.sym_size.int and node not in sizes:
            for size in sizes:
                if node.meta["val"].node.expr == size.meta["val"].node.expr:
                    node.replace_all_uses_with(size)
    graph.eliminate_dead_code()
    graph.lint()
