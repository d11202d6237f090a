"""What Dynamo compiled: which model's forward, how it was called, and what each input of the graph is.

A user's `torch.compile(model)` gives a frame of the model's own forward. Its graph's inputs are weights, tensors of the
call, and the tensors of the user's cache; here each gets its role, by the identity of the object and never by a name
of a weight.
"""

from __future__ import annotations

import copy
import inspect
import re
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch._dynamo.output_graph import graph_break_reasons
from torch._dynamo.symbolic_convert import InstructionTranslator
from transformers import PreTrainedModel

from helix_compile.errors import CaptureError
from helix_compile.ir.cache_argument import CACHE_NAMES, cache_argument

CALL_TENSORS = ("input_ids", "attention_mask", "position_ids")
_SUPPORTED = {*CALL_TENSORS, *CACHE_NAMES, "use_cache", "logits_to_keep", "return_dict"}
LENGTHS = ("cumulative_length", "cumulative_length_int")  # where a layer of a cache counts
CAPACITY = "max_cache_len"
_CACHE = re.compile(r".*\.layers\[(\d+)\]\.(\w+(?:\[\d+\])?)$")
_ALONE = "compile the causal language model itself: torch.compile(model, backend='helix', fullgraph=True)"


@dataclass(frozen=True)
class GraphInput:
    """One placeholder of a Dynamo graph.

    Attributes:
        kind: "weight", "call" (input_ids, attention_mask, position_ids), "cache", "count" (an int of the cache), "size"
            (another int) or "constant".
        name: a weight's full name, the argument's name, or the field of the cache ("keys", "cumulative_length").
        layer: of a cache tensor, its layer.
    """

    kind: str
    name: str
    layer: int = -1


@dataclass
class Frame:
    """The call that Dynamo traced.

    Attributes:
        model: the module whose forward it is.
        arguments: how it was called, by the forward's own parameter names.
        inputs: role of each placeholder, in the graph's order.
    """

    model: nn.Module
    arguments: dict[str, Any]
    inputs: list[GraphInput]

    @property
    def cache_name(self) -> str:
        """The argument that takes the cache."""
        return cache_argument(self.model.forward) or CACHE_NAMES[0]

    @property
    def cache(self) -> Any:
        """The cache that it was called with, or None."""
        return self.arguments.get(self.cache_name)


def traced_frame(gm: fx.GraphModule, example_inputs: list[Any]) -> Frame:
    """Read the frame off the translator that is calling the backend just now.

    Raises:
        CaptureError: a graph break, a frame that is no model's forward, or an argument that Helix can't serve.
    """
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is not None and reason.graph_break:
        raise CaptureError(
            f"torch.compile: graph break at {_told(reason)}. Helix needs the whole step in one graph; {_ALONE}"
        )
    output = InstructionTranslator.current_tx().output
    scope = dict(output.local_scope)
    model = scope.get("self")
    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
        what = f"a {type(model).__name__}" if isinstance(model, nn.Module) else "a function"
        # behind a break inside a loop Dynamo gives up the whole frame and comes with its parts: say where it broke
        broke = [f". Dynamo's last graph break was at {_told(r)}" for r in graph_break_reasons[-1:]]
        raise CaptureError(
            f"torch.compile: the compiled frame is that of {what}, not a transformers causal language model; {_ALONE}"
            + "".join(broke)
        )
    arguments = _arguments(model, scope)
    names = {id(tensor): name for name, tensor in reversed(named_weights(model))}
    places = [n for n in gm.graph.nodes if n.op == "placeholder"]
    inputs = [_role(node, value, names, arguments) for node, value in zip(places, example_inputs, strict=True)]
    return Frame(model, arguments, inputs)


def named_weights(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Every parameter and buffer; a tied one under each of its names."""
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


def _told(reason: Any) -> str:
    frames = [f for f in reason.user_stack if f.filename]
    place = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "an unknown place"
    return f"{place} ({' '.join(str(reason.reason).split(chr(10))[0].split())})"


def _arguments(model: nn.Module, scope: dict[str, Any]) -> dict[str, Any]:
    """The call's arguments by name, whether the frame is the forward or a decorator's (*args, **kwargs) around it."""
    signature = inspect.signature(model.forward)
    given = {k: v for k, v in scope.items() if k != "self"}
    if "args" in given and "input_ids" not in given:  # a decorator's frame
        bound = signature.bind(*given["args"], **given["kwargs"]).arguments
    else:
        bound = {k: v for k, v in given.items() if k in signature.parameters}
    flat: dict[str, Any] = {}
    for name, value in bound.items():
        many = signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
        flat.update(value if many else {name: value})
    takes = cache_argument(model.forward)
    flat = {takes if takes is not None and name in CACHE_NAMES else name: value for name, value in flat.items()}
    for name, value in flat.items():
        if value is not None and name not in _SUPPORTED:
            raise CaptureError(
                f"torch.compile: the model is called with {name}=..., which a Helix step can't serve; it takes "
                + ", ".join(sorted(_SUPPORTED))
            )
    keep = flat.get("logits_to_keep", 0)
    if isinstance(keep, bool) or not isinstance(keep, int):
        raise CaptureError(f"torch.compile: logits_to_keep must be an int, got {type(keep).__name__}")
    if not isinstance(flat.get("input_ids"), Tensor):
        raise CaptureError("torch.compile: the model is called without input_ids")
    return flat


def _role(node: fx.Node, value: Any, names: dict[int, str], arguments: dict[str, Any]) -> GraphInput:
    source = getattr(node.meta.get("grapharg"), "source", None)
    found = _CACHE.match(source.name if source is not None else "")
    if not isinstance(value, Tensor):
        if found and found[2] in (*LENGTHS, CAPACITY):
            return GraphInput("count", found[2], int(found[1]))
        return GraphInput("size", node.name)
    if id(value) in names:
        return GraphInput("weight", names[id(value)])
    for name in CALL_TENSORS:
        if arguments.get(name) is value:
            return GraphInput("call", name)
    if found:
        cache = next((arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None), None)
        layers = getattr(cache, "layers", [])
        layer = int(found[1])
        if layer < len(layers) and fields_of(layers[layer]).get(found[2]) is value:
            return GraphInput("cache", found[2], layer)
    return GraphInput("constant", getattr(source, "name", node.name))


@dataclass(frozen=True)
class CacheLayer:
    """How much one layer of the user's cache keeps.

    Attributes:
        window: columns that a layer with a sliding window sees, of which it keeps one less; 0 = it keeps all.
        capacity: columns that a layer of a StaticCache has room for; 0 = it grows.
        length: columns that it counts in an int; None = in a tensor, or by the shape of its keys.
    """

    window: int = 0
    capacity: int = 0
    length: int | None = None


NO_CACHE = CacheLayer()


def layers_of_cache(cache: Any) -> list[CacheLayer]:
    """One for each layer of a transformers cache; [] for None."""
    found = []
    for layer in getattr(cache, "layers", []):
        counts = [n for name in LENGTHS if isinstance(n := getattr(layer, name, None), int)]
        window, capacity = getattr(layer, "sliding_window", 0), getattr(layer, CAPACITY, 0)
        found.append(CacheLayer(window, capacity, counts[0] if counts else None))
    return found


def fields_of(layer: Any) -> dict[str, Tensor]:
    """Field -> tensor of one layer; states of linear attention, which it keeps by number, as "conv_states[0]"."""
    found: dict[str, Tensor] = {}
    for name, value in vars(layer).items():
        numbered = value.items() if isinstance(value, dict) else ()
        found |= {f"{name}[{k}]": v for k, v in numbered if isinstance(v, Tensor)}
        if isinstance(value, Tensor):
            found[name] = value
    return found


def tensors_of_cache(cache: Any) -> dict[tuple[int, str], Tensor]:
    """(layer, field) -> tensor of a transformers cache; {} for None or a cache that is still empty."""
    layers = getattr(cache, "layers", [])
    return {(i, name): t for i, layer in enumerate(layers) for name, t in fields_of(layer).items()}


def copied_cache(cache: Any, tensors: dict[tuple[int, str], Tensor]) -> Any:
    """A copy that can be filled without a trace in `cache`, with other tensors in its fields."""
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in copied.layers:
        vars(layer).update({k: dict(v) for k, v in vars(layer).items() if isinstance(v, dict)})
    for (number, name), tensor in tensors.items():
        field, _, place = name.rstrip("]").partition("[")
        if place:
            getattr(copied.layers[number], field)[int(place)] = tensor
        else:
            setattr(copied.layers[number], field, tensor)
    return copied
