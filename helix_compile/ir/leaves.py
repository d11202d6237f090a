"""What can't be captured stays the user's own module: a leaf, whole on every rank, with its own state there.

    layer_i = leaf_i(hidden, state, positions, input_ids, *weights)   a layer without cached latent attention
    experts = leaf_0(layer, hidden, ids, weights)                     a part of a layer that export chokes on

Layers that are the same around their own parts share a body: it is told the number of the layer, and calls that layer's.

A leaf layer is run one sequence at a time, on its tokens only. So padding, idle rows and reset(rows=...) can't touch its
state (linear attention forgets at padding), and T = 1 and T > 1 may take the branches that they take in the model.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from helix_compile.errors import CaptureError, RuntimeFault
from helix_compile.ir.graph import input_ref, inputs_of, placeholders


@dataclass
class LeafState:
    """One rank's state of one leaf layer: sequence -> (tokens it has seen, its cache)."""

    rows: dict[int, tuple[int, Any]] = field(default_factory=dict)

    def clear(self, rows: Iterable[int] | None = None) -> None:
        """Forget these sequences, by default all."""
        for row in list(self.rows) if rows is None else rows:
            self.rows.pop(row, None)


class KeptModule(NamedTuple):
    """A module of the model that a leaf calls.

    Attributes:
        name: its dotted name in the model.
        reason: why it is not captured.
        module: that very object; None before the leaf is bound to a model.
    """

    name: str
    reason: str
    module: nn.Module | None


class Leaf(nn.Module, abc.ABC):
    """What of the user's model stands in a graph as it is.

    Attributes:
        name: what it is called in messages.
        reason: why it is not captured.
    """

    def __init__(self, name: str, reason: str):
        super().__init__()
        self.name, self.reason = name, reason

    @abc.abstractmethod
    def bound(self, model: nn.Module) -> Leaf:
        """The same leaf of `model`: of an export the graphs alone are kept, not the model they were made from."""

    @property
    @abc.abstractmethod
    def kept(self) -> list[KeptModule]:
        """The modules that it calls."""


class LeafPart(Leaf):
    """A child module of the layers of one body, each layer's own; a function of tensors, without a state.

    Attributes:
        names: layer -> dotted name of its child in the model.
        modules_of: layer (as text) -> the child.
    """

    def __init__(
        self,
        name: str,
        reason: str,
        call: Any,
        names: Mapping[int, str],
        modules: Mapping[int, nn.Module] | None = None,
    ):
        super().__init__(name, reason)
        self.call, self.names = call, dict(names)
        self.modules_of = nn.ModuleDict({str(layer): module for layer, module in (modules or {}).items()})

    def bound(self, model: nn.Module) -> LeafPart:
        modules = {layer: model.get_submodule(name) for layer, name in self.names.items()}
        return LeafPart(self.name, self.reason, self.call, self.names, modules)

    @property
    def kept(self) -> list[KeptModule]:
        of = dict(self.modules_of.items())
        return [KeptModule(name, self.reason, of.get(str(layer))) for layer, name in self.names.items()]

    def forward(self, layer: int, hidden: Tensor, *others: Tensor) -> Tensor:
        """Call the module of this layer as the model does."""
        args, kwargs = self.call.rebuild(hidden, list(others), None)
        return self.modules_of[str(layer)](*args, **kwargs)


class LeafLayer(Leaf):
    """A whole layer.

    Attributes:
        call: how the model calls it.
        config: what transformers' cache asks for.
    """

    def __init__(
        self, name: str, reason: str, call: Any, arguments: fx.GraphModule, config: Any, module: nn.Module | None = None
    ):
        super().__init__(name, reason)
        self.module, self.call, self.config = module, call, config
        # in a list: the graph is no part of the user's module
        self._arguments = [arguments]

    @property
    def arguments(self) -> fx.GraphModule:
        """Graph of its other tensors, from input_ids, attention_mask, position_ids, past_shape and weights."""
        return self._arguments[0]

    def bound(self, model: nn.Module) -> LeafLayer:
        module = model.get_submodule(self.name)
        return LeafLayer(self.name, self.reason, self.call, self.arguments, self.config, module)

    @property
    def kept(self) -> list[KeptModule]:
        return [KeptModule(self.name, self.reason, self.module)]

    def forward(
        self, hidden: Tensor, state: LeafState, positions: Tensor, input_ids: Tensor, *weights: Tensor
    ) -> Tensor:
        """Run the layer.

        Args:
            hidden: [B, T, D].
            state: this rank's; written.
            positions: [B, T] absolute, -1 = padding.
            input_ids: [B, T].
            weights: what `arguments` reads.

        Returns:
            [B, T, D], zeros at padding.

        Raises:
            RuntimeFault: the state is not at the step's first position (a step broke off): call reset().
        """
        out = torch.zeros_like(hidden)
        for row, row_positions in enumerate(positions):
            kept = (row_positions >= 0).nonzero().flatten()
            if len(kept):
                start = int(row_positions[kept[0]])
                cache = self._cache(state, row, start)
                others = self._others(row_positions[kept], input_ids[row, kept], start, hidden, weights)
                args, kwargs = self.call.rebuild(hidden[row, kept][None], others, cache)
                assert self.module is not None
                state.rows.pop(row, None)  # the module writes into it: broken off half way it is no state at all
                result = self.module(*args, **kwargs)
                out[row, kept] = result[0][0] if isinstance(result, tuple) else result[0]
                state.rows[row] = (start + len(kept), cache)
        return out

    def _cache(self, state: LeafState, row: int, start: int) -> Any:
        seen, cache = state.rows.get(row, (0, None))
        if start == 0 or cache is None:
            seen, cache = 0, _whole_cache(self.config)
        if seen != start:
            raise RuntimeFault(
                f"leaf {self.name}: sequence {row} has seen {seen} tokens, the step begins at position {start}; "
                "a step broke off or the cache was changed behind the leaf's back: call reset(), or reset(rows=...)"
            )
        return cache

    def _others(
        self, positions: Tensor, ids: Tensor, start: int, hidden: Tensor, weights: tuple[Tensor, ...]
    ) -> list[Tensor]:
        """The layer's other tensors for one sequence, by the graph around the layers."""
        mask = torch.ones(1, start + len(positions), dtype=torch.int64, device=hidden.device)
        given = {
            "input_ids": ids[None],
            "attention_mask": mask,
            "position_ids": positions[None],
            "past_shape": hidden.new_zeros(1, 1, start, 1),
        }
        remaining = iter(weights)
        inputs = [
            next(remaining) if input_ref(node).kind == "param" else given[input_ref(node).name]
            for node in placeholders(self.arguments.graph)
        ]
        return list(self.arguments(*inputs))


def _whole_cache(config: Any) -> Any:
    """A cache that forgets nothing: a window is in the mask, as everywhere in the captured graph."""
    # slow to import, and a graph without leaves runs without it
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    cache = DynamicCache(config=config)
    cache.layers = [DynamicLayer() if isinstance(x, DynamicSlidingWindowLayer) else x for x in cache.layers]
    return cache


def leaves_of(module: fx.GraphModule) -> list[KeptModule]:
    """What the leaves of an outer graph and its bodies call, in order; a module that is called twice in a body, once."""
    found: list[KeptModule] = []
    for _, child in module.named_children():
        if isinstance(child, Leaf):
            found += [kept for kept in child.kept if kept not in found]
        elif isinstance(child, fx.GraphModule):
            found += leaves_of(child)
    return found


def is_leaf_call(module: fx.GraphModule, node: fx.Node) -> bool:
    """True for a call_module of a leaf."""
    return node.op == "call_module" and isinstance(module.get_submodule(str(node.target)), Leaf)


def leaf_states(graph: fx.Graph) -> dict[str, LeafState]:
    """A new state for each leaf layer of an outer graph."""
    return {input_ref(n).name: LeafState() for n in inputs_of(graph, "leaf")}


def leaf_bytes(module: fx.GraphModule) -> int:
    """Bytes of the parameters and buffers that leaves keep."""
    total = 0
    for leaf in leaves_of(module):
        if leaf.module is not None:
            tensors = [*leaf.module.parameters(), *leaf.module.buffers()]
            total += sum(t.numel() * t.itemsize for t in tensors)
    return total


@dataclass(frozen=True)
class Size:
    """A dim as the sum of sizes of a step ("B", "T", "S", "ST"; "" is no size), and at most `most`."""

    letters: str
    most: int | None = None

    def at(self, B: Any, T: Any, S: Any) -> Any:
        """In such a step; sizes may be symbols."""
        sizes = {"B": B, "T": T, "S": S}
        total = sum(sizes[letter] for letter in self.letters)
        if self.most is None or not self.letters:
            return total if self.letters else self.most
        return torch.sym_min(total, self.most)


@dataclass(frozen=True)
class TensorLike:
    """Shape and dtype of a tensor in a step."""

    sizes: tuple[Size, ...]
    dtype: torch.dtype

    def shape(self, B: Any, T: Any, S: Any) -> list[Any]:
        """In such a step."""
        return [size.at(B, T, S) for size in self.sizes]


class Stored(NamedTuple):
    """A tensor that a layer leaves for later ones in a mapping that all of them are handed (K and V that they share).

    Attributes:
        leaf: which of the call's arguments the mapping is.
        key: under which.
        place: of a tuple of tensors; -1 where the tensor stands alone.
        like: what it is.
    """

    leaf: int
    key: Any
    place: int
    like: TensorLike


@dataclass(frozen=True)
class Returned:
    """What a layer gives: hidden states, or a tuple of them and others (None: no tensor), and what it leaves in mappings.

    Attributes:
        streams_first: several hidden states a token lie in front, [streams, B, T, D]; captured they are [B, T, streams, D].
    """

    is_tuple: bool = False
    others: tuple[TensorLike | None, ...] = ()
    stored: tuple[Stored, ...] = ()
    streams_first: bool = False

    def of_model(self, hidden: Tensor) -> Tensor:
        """Hidden states as the model has them, of captured ones."""
        return hidden.movedim(2, 0) if self.streams_first else hidden

    def captured(self, hidden: Tensor) -> Tensor:
        """The inverse."""
        return hidden.movedim(0, 2) if self.streams_first else hidden

    @property
    def tensors(self) -> list[TensorLike]:
        """Those besides hidden states."""
        return [*(x for x in self.others if x is not None), *(x.like for x in self.stored)]


HIDDEN_ALONE = Returned()


@dataclass
class LayerCall:
    """How the model calls one layer: the pytree of its arguments, tensors and the cache marked by place.

    Attributes:
        others: example tensors after `hidden`, FakeTensors with the symbols of the outer export.
        names: readable name of each of them.
        returned: what it gives.
        handed: those of `others` that an earlier layer made.
    """

    hidden: Tensor
    spec: pytree.TreeSpec
    leaves: list[Any]
    others: list[Tensor] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    returned: Returned = field(default_factory=Returned)
    handed: list[Tensor] = field(default_factory=list)

    def results(self, out: Any, args: tuple, kwargs: dict) -> list[Tensor]:
        """Hidden states out of what the layer returned for these arguments, and behind them what else it leaves to be read."""
        found = [self.returned.captured(out[0] if isinstance(out, tuple) else out)]
        if isinstance(out, tuple):
            found += [*(t for like, t in zip(self.returned.others, out[1:], strict=False) if like is not None)]
        if self.returned.stored:
            leaves = [leaf for _, leaf in arguments_of(args, kwargs)[0]]
            values = ((leaves[s.leaf][s.key], s.place) for s in self.returned.stored)
            found += [value if place < 0 else value[place] for value, place in values]
        return found

    def rebuild(self, hidden: Tensor, others: list[Tensor], cache: Any) -> tuple[tuple, dict]:
        """The layer's (args, kwargs) with these tensors in their places."""
        filled = []
        for leaf in self.leaves:
            match leaf:
                case ("hidden",):
                    filled.append(self.returned.of_model(hidden))
                case ("other", int(index)):
                    filled.append(others[index])
                case ("cache",):
                    filled.append(cache)
                case ("mapping", kind, entries):
                    mapping = kind()
                    for key, places, alone in entries:
                        mapping[key] = others[places[0]] if alone else tuple(others[i] for i in places)
                    filled.append(mapping)
                case ("constant", value):
                    filled.append(value)
        args, kwargs = pytree.tree_unflatten(filled, self.spec)
        return args, kwargs

    def as_returned(self, results: list[Tensor], args: tuple, kwargs: dict) -> Any:
        """What the layer returns, given its results(); what it leaves in mappings is put there."""
        rest = iter(results[1:])
        out = tuple(None if like is None else next(rest) for like in self.returned.others)
        if self.returned.stored:
            leaves = [leaf for _, leaf in arguments_of(args, kwargs)[0]]
            entries: dict[tuple[int, Any], list[Tensor]] = {}
            for leaf, key, place, _ in self.returned.stored:
                entries.setdefault((leaf, key), []).append(tensor := next(rest))
                leaves[leaf][key] = tensor if place < 0 else tuple(entries[leaf, key])
        hidden = self.returned.of_model(results[0])
        return (hidden, *out) if self.returned.is_tuple else hidden

    @property
    def has_streams_first(self) -> bool:
        """True if B and T are the second and third dim of hidden states, behind a number."""
        sizes = self.hidden.shape
        return len(sizes) == 4 and [isinstance(n, torch.SymInt) for n in sizes] == [False, True, True, False]

    @property
    def shares(self) -> bool:
        """True if it is handed a mapping in which layers leave tensors for others."""
        return any(leaf[0] == "mapping" for leaf in self.leaves)

    @property
    def masks(self) -> list[Tensor]:
        """What may be a mask: the other tensors that are as wide as the sequence. Layers with different ones are apart."""
        steps = [str(size) for size in self.hidden.shape[:2]]
        given = [t for t in self.others if not any(t is x for x in self.handed)]
        wide = [t for t in given if t.dim() > 1 and isinstance(t.shape[-1], torch.SymInt)]
        return [t for t in wide if str(t.shape[-1]) not in steps]

    def constants(self) -> str:
        """Text of everything but the tensors: part of what makes two layers the same.

        What of a mapping a layer reads shows in its dataflow.
        """
        return f"{self.spec} {[leaf[:2] if leaf[0] == 'mapping' else leaf for leaf in self.leaves]!r}"


def arguments_of(args: tuple, kwargs: dict) -> tuple[list[tuple[Any, Any]], pytree.TreeSpec]:
    """(path, argument) of a layer's call, nested ones too, but a cache and a mapping as one; and how they lie in it."""
    return pytree.tree_flatten_with_path((args, kwargs), is_leaf=_is_cache)


def _is_cache(leaf: Any) -> bool:
    from transformers.cache_utils import DynamicCache  # as above

    return isinstance(leaf, DynamicCache)


def is_mapping(leaf: Any) -> bool:
    """What layers leave tensors in for others. (A plain dict is no leaf: it is taken apart.)"""

    def are_tensors(value: Any) -> bool:
        return isinstance(value, Tensor) or (
            isinstance(value, (tuple, list)) and all(isinstance(t, Tensor) for t in value)
        )

    return isinstance(leaf, MutableMapping) and all(map(are_tensors, leaf.values()))


def _free_name(path: Iterable[Any], taken: list[str]) -> str:
    """A name for the argument at a path that no other has."""
    name = "_".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in path)
    name = name if name.isidentifier() else f"argument_{name}"
    while name in taken:
        name += "_"
    return name


def record_call(args: tuple, kwargs: dict, returned: Returned = HIDDEN_ALONE) -> LayerCall:
    """How a module is called: which of its arguments are tensors, which the cache, which constants."""
    paths, spec = arguments_of(args, kwargs)
    hidden: Tensor | None = None
    leaves: list[tuple[Any, ...]] = []
    others: list[Tensor] = []
    names: list[str] = []
    for path, leaf in paths:
        if isinstance(leaf, Tensor) and hidden is None:
            hidden = returned.captured(leaf)
            leaves.append(("hidden",))
        elif isinstance(leaf, Tensor):
            leaves.append(("other", len(others)))
            others.append(leaf)
            names.append(_free_name(path[1:], names))
        elif _is_cache(leaf):
            leaves.append(("cache",))
        elif is_mapping(leaf):
            entries = []
            for key, value in leaf.items():
                tensors = (value,) if isinstance(value, Tensor) else tuple(value)
                places = tuple(range(len(others), len(others) + len(tensors)))
                entries.append((key, places, isinstance(value, Tensor)))
                others += tensors
                names += [_free_name((*path[1:], key, i), names) for i in range(len(tensors))]
            leaves.append(("mapping", type(leaf), tuple(entries)))
        elif isinstance(leaf, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            where = "".join(str(k) for k in path)
            raise CaptureError(
                f"capture: a layer is called with a number that is made from a size ({where} = {leaf}): a layer is captured "
                "alone and could not know it; read sizes off the tensors inside of the layer"
            )
        else:
            leaves.append(("constant", leaf))
    if hidden is None:
        raise CaptureError("capture: a layer is called without a tensor")
    return LayerCall(hidden, spec, leaves, others, names, returned)
