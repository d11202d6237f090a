"""Find a model's layers, export the graph around them, and record how each layer is called.

While the whole model is exported, each layer's forward is one opaque op (hidden, other tensors, layer index). So the
export costs the same for 4 and for 61 layers, and no name inside a layer matters (capture-and-match, section 4).
"""

from __future__ import annotations

import inspect
import traceback
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import OutputKind
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from helix_compile.capture.checks import explained
from helix_compile.capture.experts import experts_as
from helix_compile.capture.functional import functional
from helix_compile.capture.returned import returned_by
from helix_compile.capture.same_values import Exported, as_exported
from helix_compile.errors import CaptureError, HelixError, MatchError
from helix_compile.ir.cache_argument import CACHE_NAMES, cache_argument, call_with_cache
from helix_compile.ir.graph import past_dim
from helix_compile.ir.leaves import LayerCall, Returned, TensorLike, record_call
from helix_compile.ir.sizes import HINT_B, HINT_S, HINT_T

BATCH, TOKENS, PAST = Dim("batch", min=1), Dim("tokens", min=1), Dim("past", min=2)


@torch.library.custom_op("helix_capture::layer", mutates_args=())
def _layer(hidden: Tensor, others: list[Tensor], index: int) -> Tensor:
    """Stand-in for one layer while the graph around the layers is exported."""
    raise RuntimeError("helix_capture::layer has no implementation: it only marks a layer's place")


@_layer.register_fake
def _(hidden: Tensor, others: list[Tensor], index: int) -> Tensor:
    return torch.empty_like(hidden)


@torch.library.custom_op("helix_capture::layer_result", mutates_args=())
def _layer_result(
    hidden: Tensor, others: list[Tensor], index: int, number: int, shape: list[int], dtype: torch.dtype
) -> Tensor:
    """Stand-in for what a layer returns besides hidden states: its `number`-th tensor."""
    raise RuntimeError("helix_capture::layer_result has no implementation: it only marks a layer's place")


@_layer_result.register_fake
def _(hidden: Tensor, others: list[Tensor], index: int, number: int, shape: list[int], dtype: torch.dtype) -> Tensor:
    return hidden.new_empty(shape, dtype=dtype)


LAYER_OP = torch.ops.helix_capture.layer.default
RESULT_OP = torch.ops.helix_capture.layer_result.default
Calls = dict[int, LayerCall]


class ConcatenatingCache(DynamicCache):
    """A cache of given pasts, two [B, heads, S, width] a site, and behind them [B, S, width] where an indexer's keys are
    cached too: update() and update_indexer() concatenate, keep what is new, write nothing.

    Without pasts it is a probe's: any past as long as `past` and of the right width will do.
    """

    def __init__(self, config: Any, pasts: list[Tensor] | None, past: Tensor):
        super().__init__(config=config)
        # a window is read off the mask: a cache layer that forgets would hide it
        layers: list[Any] = vars(self)["layers"]
        layers[:] = [
            _AllTokens(i, type(x)) if isinstance(x, DynamicSlidingWindowLayer) else x for i, x in enumerate(layers)
        ]
        self.pasts, self.length = None if pasts is None else by_site(pasts), past.shape[2]
        self.new: list[list[Tensor]] = []  # of each site
        self._sites: dict[int, int] = {}  # layer -> its last site
        self._early: dict[int, Tensor] = {}  # layer -> index keys that came before K and V
        for layer in self.layers:
            layer.keys = layer.values = past
            layer.dtype, layer.device = past.dtype, past.device
            layer.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        site = self._sites[layer_idx] = len(self.new)
        self.new.append([key_states, value_states])
        if layer_idx in self._early:
            self.new[site].append(self._early.pop(layer_idx))
        if self.pasts is None:
            keys, values = (t.new_zeros(*t.shape[:2], self.length, t.shape[3]) for t in (key_states, value_states))
        else:
            keys, values = self.pasts[site][:2]
        kept = torch.cat([keys, key_states], dim=2), torch.cat([values, value_states], dim=2)
        if layer_idx < len(self.layers):  # who asks for the length from here on is told the new one
            self.layers[layer_idx].keys, self.layers[layer_idx].values = kept
        return kept

    @property
    def keys_alone(self) -> list[int]:
        """Layers that cached keys of an indexer, and no K and V."""
        return list(self._early)

    def update_indexer(self, indexer_key_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Tensor:
        """Of keys [B, T, width] that an indexer caches beside K and V of its layer: all of them [B, S + T, width]."""
        if any(x is not None for x in (*args, *kwargs.values())) or indexer_key_states.dim() != 3:
            caller = traceback.extract_stack(limit=2)[0]
            raise MatchError(
                f"layer {layer_idx}: sparse attention: at node `update_indexer` ({Path(caller.filename).name}:"
                f"{caller.lineno}) the layer caches more of an indexer than keys [B, T, width] "
                f"(got {list(indexer_key_states.shape)} and {len(args) + len(kwargs)} more).\n"
                "  nearest that works: one key a token, of which a top-k is chosen (deepseek_v32, glm_moe_dsa)"
            )
        site = self._sites.get(layer_idx)
        if site is None:
            site, self._early[layer_idx] = len(self.new), indexer_key_states
        else:
            self.new[site].append(indexer_key_states)
        if self.pasts is None:
            past = indexer_key_states.new_zeros(indexer_key_states.shape[0], self.length, indexer_key_states.shape[2])
        else:
            past = self.pasts[site][2]
        return torch.cat([past, indexer_key_states], dim=1)


class _AllTokens(DynamicLayer):
    """In place of a cache layer that forgets; what only a model's own kind of such a layer can do has no place here."""

    def __init__(self, index: int, kind: type):
        super().__init__()
        self._index, self._kind = index, kind

    def __getattr__(self, name: str) -> Any:
        if name != "_kind" and not hasattr(DynamicSlidingWindowLayer, name) and hasattr(self._kind, name):
            raise MatchError(
                f"layer {self._index}: its cache is a {self._kind.__name__}, which keeps more than K and V of each token "
                f"(`{name}`: keys that are compressed from several tokens, or a state beside them); no ledger of tokens says who "
                "holds those.\n  nearest that works: K and V, or latents, of each token, with an indexer of one key a token "
                "(deepseek_v32) or a window (gpt_oss)"
            )
        raise AttributeError(name)


def by_site(pasts: list[Tensor]) -> list[list[Tensor]]:
    """Pasts of all sites in a row -> those of each: K and V have four dims, index keys behind them three."""
    sites: list[list[Tensor]] = []
    for past in pasts:
        if past.dim() == 4 and (not sites or len(sites[-1]) >= 2):
            sites.append([])
        sites[-1].append(past)
    return sites


def find_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The longest ModuleList whose items take a cache and that is in no other such list, with its dotted name.

    Whether they do is read off their forward; where no list's has an argument for it by annotation or name, the model is run
    on fake tensors, and what is handed its cache takes one.
    """
    lists = [(n, module) for n, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)]
    found = [(n, items) for n, items in lists if cache_argument(type(items[0]).forward) is not None]
    if not found:
        handed = _handed_the_cache(model, lists)
        found = [(n, items) for n, items in lists if n in handed]
    if not found:
        raise CaptureError(
            f"capture: {type(model).__name__} has no list of layers whose forward takes a cache "
            f"({' or '.join(CACHE_NAMES[:2])}, an argument annotated as Cache, or one that the model's call fills with its cache); "
            "expected a transformers causal language model"
        )
    inner = [n for n, _ in found if any(n.startswith(f"{other}.") for other, _ in found)]
    return max((x for x in found if x[0] not in inner), key=lambda item: len(item[1]))


def _handed_the_cache(model: nn.Module, lists: list[tuple[str, nn.ModuleList]]) -> set[str]:
    """Names of the lists with an item that the model calls with its cache."""
    first, handed, config = next(model.parameters(), None), set[str](), getattr(model, "config", None)
    if first is None or not isinstance(config, PretrainedConfig):
        return handed

    def watched(name: str, forward: Any, *args: Any, **kwargs: Any) -> Any:
        if any(value is cache for value in (*args, *kwargs.values())):
            handed.add(name)
        return forward(*args, **kwargs)

    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), ExitStack() as stack:
        for name, items in lists:
            for item in items:
                stack.enter_context(patch.object(item, "forward", partial(watched, name, item.forward)))
        past = first.new_zeros(HINT_B, 1, HINT_S, 1)
        cache = ConcatenatingCache(config.get_text_config(), None, past)
        # what a graph can't hold stops it: the layers before it were called
        with suppress(Exception):
            Around(model, lambda pasts: cache)(*model_inputs(first.device), [past])
    return handed


class Around(nn.Module):
    """The model as a function of tensors only."""

    def __init__(self, model: nn.Module, cache_of: Any):
        super().__init__()
        self.model, self._cache_of = model, cache_of

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, pasts: list[Tensor]) -> Any:
        cache = self._cache_of(pasts)
        out = call_with_cache(
            self.model,
            cache,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=True,
        )
        if not hasattr(out, "logits"):
            raise CaptureError(
                f"capture: {type(self.model).__name__} has no logits: pass the causal language model around it"
            )
        if out.logits.dim() != 3:
            raise CaptureError(f"capture: logits are {tuple(out.logits.shape)}, not three dims")
        if str(out.logits.shape[1]) != str(input_ids.shape[1]):
            raise CaptureError(
                f"capture: the model gives logits of {out.logits.shape[1]} column(s) for {input_ids.shape[1]} tokens; "
                "expected one for each (logits_to_keep of a step chooses among them)"
            )
        return out.logits, [t for pair in cache.new for t in pair]


def export_around(
    model: PreTrainedModel, layers: nn.ModuleList
) -> tuple[ExportedProgram, Exported, Calls, tuple[Returned, ...]]:
    """Export everything around the layers; returns the program, the same as exported, calls of layers, what they return."""
    past = next(model.parameters()).new_zeros(HINT_B, 1, HINT_S, 1, dtype=model.dtype)
    cache_of = lambda pasts: ConcatenatingCache(model.config, None, pasts[0])  # noqa: E731
    returned = (str(inspect.signature(type(x).forward).return_annotation) for x in layers)
    # an annotation may be wrong about a tuple: then what the model around the layer takes decides
    annotated = tuple(Returned("tuple" in text.lower()) for text in returned)
    failures: list[tuple[int, CaptureError]] = []
    forms: Iterable[tuple[Returned, ...]] = chain(
        dict.fromkeys((annotated, (Returned(),) * len(layers), (Returned(True),) * len(layers))),
        _as_they_return(model, layers),
    )
    for form in forms:
        calls: Calls = {}
        try:
            program = _export_layers_as(model, layers, form, calls, cache_of, past)
        except CaptureError as error:
            failures.append((len(calls), error))
            if not calls:
                break
            continue
        better = _seen_in_calls(model, layers, form, calls)
        if better != form:
            form, calls = better, {}
            program = _export_layers_as(model, layers, form, calls, cache_of, past)
        return *program, calls, form
    raise max(failures, key=lambda failure: failure[0])[1]  # what came furthest says most


def _export_layers_as(
    model: PreTrainedModel, layers: nn.ModuleList, form: tuple[Returned, ...], calls: Calls, cache_of: Any, past: Tensor
) -> tuple[ExportedProgram, Exported]:
    with layers_as(layers, partial(recorder, calls, form, made=[])):
        return _export_model(model, cache_of, [past])


def _seen_in_calls(
    model: PreTrainedModel, layers: nn.ModuleList, form: tuple[Returned, ...], calls: Calls
) -> tuple[Returned, ...]:
    """The form with what only the layers' calls tell: a mapping that all are handed, hidden states with streams in front."""
    if any(call.shares for call in calls.values()):  # what is left in it is seen where the layers are run
        form = next(_as_they_return(model, layers), form)
    return tuple(replace(own, streams_first=i in calls and calls[i].has_streams_first) for i, own in enumerate(form))


def step_without_values(model: PreTrainedModel, device: torch.device, B: int, T: int, S: int) -> None:
    """Run one step, its layers in place, on pasts of zeros of a device whose tensors have no values."""
    with experts_as(model, "batched_mm"):
        past = torch.zeros(B, 1, S, 1, dtype=model.dtype, device=device)
        cache = ConcatenatingCache(model.config.get_text_config(), None, past)
        Around(model, lambda pasts: cache)(*model_inputs(device, B, T, S), [past])


def _as_they_return(model: PreTrainedModel, layers: nn.ModuleList) -> Iterator[tuple[Returned, ...]]:
    """What the layers return in the model itself; nothing where it can't be run, or where they return hidden states alone."""
    try:
        found = returned_by(model, layers, partial(step_without_values, model))
    except Exception:  # the errors so far say why
        return
    if any(form.tensors for form in found):
        yield found


def export_whole(model: PreTrainedModel, shapes: list[tuple[int, ...]]) -> ExportedProgram:
    """Export the model in one graph, layers inlined; `shapes` are those of what is cached."""
    device = next(model.parameters()).device
    pasts = [torch.zeros(shape, dtype=model.dtype, device=device) for shape in shapes]
    return _export_model(model, lambda p: ConcatenatingCache(model.config, p, p[0]), pasts)[0]


def model_inputs(
    device: torch.device, B: int = HINT_B, T: int = HINT_T, S: int = HINT_S
) -> tuple[Tensor, Tensor, Tensor]:
    """input_ids [B, T], attention_mask [B, S + T] and position_ids [B, T] of a step."""
    ids = torch.zeros(B, T, dtype=torch.int64, device=device)
    mask = torch.ones(B, S + T, dtype=torch.int64, device=device)
    positions = (torch.arange(T, device=device) + S).expand(B, -1).contiguous()
    return ids, mask, positions


def _export_model(model: nn.Module, cache_of: Any, pasts: list[Tensor]) -> tuple[ExportedProgram, Exported]:
    ids, mask, positions = model_inputs(next(model.parameters()).device)
    shapes = (
        {0: BATCH, 1: TOKENS},
        {0: BATCH, 1: Dim.AUTO},
        {0: BATCH, 1: TOKENS},
        [{0: BATCH, past_dim(past): PAST} for past in pasts],
    )
    with explained(f"{type(model).__name__} can't be exported around its layers"):
        return export_functional(Around(model, cache_of), (ids, mask, positions, pasts), shapes, "model.")


def export_functional(
    module: nn.Module, args: tuple, shapes: Any, prefix: str = ""
) -> tuple[ExportedProgram, Exported]:
    """torch.export, made functional, with linear and attention kept whole; and the graph as torch.export wrote it."""
    # the cache of fake results costs more than it saves where every size is a symbol: a quarter of a capture
    uncached = torch._dynamo.config.patch(fake_tensor_cache_enabled=False)
    with torch.no_grad(), warnings.catch_warnings(), uncached:
        # torch.export walks transformers' registered pytrees and warns about its own deprecation each time
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
        program = torch.export.export(module, args, dynamic_shapes=shapes, strict=False)
        exported = as_exported(program, prefix)
        program = functional(program)
    changed = [s.target for s in program.graph_signature.output_specs if s.kind is not OutputKind.USER_OUTPUT]
    if changed:
        raise CaptureError(
            f"capture: the forward changes {', '.join(map(str, changed))} while it runs (a state of its own besides "
            "the cache); a decode graph may depend on its inputs and weights only"
        )
    return program, exported


@contextmanager
def layers_as(layers: nn.ModuleList, forward_of: Callable[[int], Any]) -> Iterator[None]:
    """Each layer's forward is another one while this is open; put back afterwards.

    A layer's hooks are part of what it computes: they are captured with its body, and kept away from the graph around.
    So are its tensors: torch.export's bookkeeping is quadratic in the number of parameters, used or not.
    """
    before = [(vars(module), dict(vars(module))) for module in layers.modules()]
    try:
        for i, layer in enumerate(layers):
            vars(layer).update(forward=forward_of(i), _forward_pre_hooks=OrderedDict(), _forward_hooks=OrderedDict())
        for own, _ in before:
            own.update(_parameters={}, _buffers={})
        yield
    finally:
        for own, kept in before:
            own.clear()
            own.update(kept)


def recorder(calls: Calls, returned: tuple[Returned, ...], index: int, made: list[Tensor] | None = None) -> Any:
    """A forward of layer `index` that is one opaque op for each result, and writes down how it is called.

    `made` is shared by all layers of a run: what they return besides hidden states.
    """
    made = [] if made is None else made

    def forward(*args: Any, **kwargs: Any) -> Any:
        if index in calls:
            raise CaptureError(
                f"capture: layer {index} is called a second time in one step; a layer has one cache and one call"
            )
        call = calls[index] = record_call(args, kwargs, returned[index])
        call.handed = [t for t in call.others if any(t is x for x in made)]
        hidden, others = call.hidden, call.others
        results = [
            RESULT_OP(hidden, others, index, number, shape, like.dtype)
            for number, (like, shape) in enumerate(result_shapes(call, args, kwargs))
        ]
        made.extend(results)
        return call.as_returned([LAYER_OP(hidden, others, index), *results], args, kwargs)

    return forward


def result_shapes(call: LayerCall, args: tuple, kwargs: dict) -> list[tuple[TensorLike, list[Any]]]:
    """What a layer returns besides hidden states when it is called so, each with its shape."""
    if not call.returned.tensors:
        return []
    cache = next(x for x in (*args, *kwargs.values()) if isinstance(x, ConcatenatingCache))
    sizes = (*call.hidden.shape[:2], cache.length)
    return [(like, like.shape(*sizes)) for like in call.returned.tensors]


def _line_of_model(error: Exception) -> str:
    """file:line of the innermost frame that is neither torch's nor ours."""
    ours = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(ours)]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "an unknown line"


def explain_by_whole_run(model: PreTrainedModel, index: int | None, error: CaptureError) -> HelixError:
    """Why capture failed, by running the whole model on fake tensors, layers in place.

    A layer that runs there and not alone needs what another layer leaves behind.
    """
    device = next(model.parameters()).device
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    begun: list[int] = []
    handles = [
        layer.register_forward_pre_hook(lambda m, args, i=i: begun.append(i))
        for i, layer in enumerate(find_layers(model)[1])
    ]
    try:
        with torch.no_grad(), fake:
            past = torch.zeros(HINT_B, 1, HINT_S, 1, dtype=model.dtype, device=device)
            cache = ConcatenatingCache(model.config.get_text_config(), None, past)
            Around(model, lambda pasts: cache)(*model_inputs(device), [past])
    except HelixError as reason:
        return reason
    except DynamicOutputShapeException as reason:
        if index is None and begun:  # nothing is known of what the layers return
            return MatchError(
                f"layer {begun[-1]}: at {_line_of_model(reason)} the size of a value depends on data ({reason.func}), so that no "
                "graph holds it, and the layer returns more than hidden states, so that it can't stay a leaf (pooled scores "
                "of an indexer?).\n  nearest that works: an indexer with one key a token (deepseek_v32, glm_moe_dsa)"
            )
        return error
    except Exception:  # no more is learnt: the first error stands
        return error
    finally:
        for handle in handles:
            handle.remove()
    if index is None:
        return error
    return MatchError(
        f"layer {index}: can't be captured alone, though the whole model runs: it reads what another layer leaves "
        f"behind (K and V that layers share?).\n  alone: {error}\n"
        "  nearest that works: a model whose layers each cache a latent of their own"
    )
