"""One compiled model under torch.compile: a HelixModule, and the user's cache that is fed to it step by step."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, fx, nn

from helix_compile.capture.body import OpTrace, without_values
from helix_compile.capture.checks import check_surroundings
from helix_compile.capture.layers import Around, ConcatenatingCache, model_inputs
from helix_compile.capture.structure import structure_key
from helix_compile.compile import helix_compile
from helix_compile.dynamo.check import GraphOutput, compared_outputs
from helix_compile.dynamo.frame import CAPACITY, LENGTHS, Frame, layers_of_cache
from helix_compile.dynamo.user_state import (
    INDEX_KEYS,
    LATENTS,
    STATES,
    Key,
    ModelState,
    UserCache,
    check_countable,
    stand_in,
)
from helix_compile.errors import RuntimeFault
from helix_compile.ir.dataflow import follow
from helix_compile.ir.graph import aten, input_named, is_call
from helix_compile.ir.sizes import HINT_B, HINT_S
from helix_compile.module import HelixModule
from helix_compile.runtime.step import check_ids, checked_mask

_ROTATION = (aten.cos.default, aten.sin.default, aten.polar.default)


class Session:
    """What all Dynamo graphs of one `torch.compile(model, backend="helix")` share.

    Attributes:
        module: the rewritten model; made at the first call.
    """

    def __init__(self, options: dict[str, Any]):
        self.options = options
        self.cache = UserCache()
        self._module: HelixModule | None = None
        self._structure: tuple = ()
        self.state = ModelState()
        self._rotary = False

    @property
    def is_compiled(self) -> bool:
        """True after the first call."""
        return self._module is not None

    @property
    def module(self) -> HelixModule:
        """The rewritten model.

        Raises:
            RuntimeFault: it was not called yet.
        """
        if self._module is None:
            raise RuntimeFault("the compiled model was not called yet")
        return self._module

    def compile(self, model: nn.Module) -> None:
        """Rewrite the model, once for all graphs.

        Raises:
            CaptureError: under autocast, which would not be in the rewritten graph.
            RuntimeFault: another graph came because the model itself was changed.
        """
        with torch.inference_mode(False), torch.no_grad():
            check_surroundings()
            if self._module is None:
                self._module = helix_compile(model, **self.options)
                self._rotary = _positions_rotate_only(self._module)
                self.state.remember_hooks(model)
                self._structure = structure_key(model), _dataflow(model)
            else:
                self.check_unchanged(model)

    def check_unchanged(self, model: nn.Module) -> None:
        """Raise RuntimeFault where the model is not what it was when it was rewritten."""
        if self._module is not None and (structure_key(model), _dataflow(model)) != self._structure:
            raise RuntimeFault(
                "the model (a constant, a hook, a method or its configuration) was changed since it was compiled; "
                "call torch._dynamo.reset() and torch.compile it again"
            )

    def step(
        self,
        ids: Tensor,
        mask: Tensor | None,
        positions: Tensor | None,
        past: dict[Key, Tensor],
        columns: int,
        capacity: int,
    ) -> Tensor:
        """Logits [B, T, vocab] of a step; the whole step is checked before anything is written.

        Args:
            ids: [B, T].
            mask: [B, S + T], 1 = token, or None.
            positions: [B or 1, T], or None: S, S + 1, ... as transformers counts, padding included.
            past: tensors of the user's cache on entry.
            columns: S, how many it has by its own account; 0 starts a batch.
            capacity: columns that it has room for; 0 = it grows.
        """
        module = self.module
        check_ids(ids, module.facts.vocab_size, module.plan.options.max_batch_size)
        B, T = ids.shape
        S = columns
        check_countable(past)
        if S:
            self.cache.check(past, S)
        if capacity and S + T > capacity:
            raise RuntimeFault(
                f"the StaticCache has room for max_cache_len={capacity} columns, {S} are in it and the step brings {T}; "
                "make it larger, or start over with a new one"
            )
        cache = self.cache if S else UserCache(shifts=[None] * B)
        if S and len(cache.shifts) != B:
            raise RuntimeFault(f"the cache holds {len(cache.shifts)} sequences, got {B}")
        whole = _whole_mask(mask, cache, B, S, T)
        new = whole[:, S:].to(torch.int64)
        checked_mask(new, ids)
        shifts = self._shifts(cache, positions, whole, S, T)
        rows = whole.sum(dim=1).tolist()
        limit = module.plan.options.max_seq_len
        if max(rows) > limit:
            raise RuntimeFault(
                f"sequence {rows.index(max(rows))} would have {max(rows)} tokens > max_seq_len={limit}; compile with "
                'options={"max_seq_len": ...}'
            )
        if not S:
            self.cache = UserCache()  # what is half written can't be gone on with
            module.reset()
        logits = module(ids, new)
        cache.mask, cache.shifts = whole, shifts
        self.cache = cache
        return logits

    def _shifts(self, cache: UserCache, positions: Tensor | None, whole: Tensor, S: int, T: int) -> list[int | None]:
        """Per row, how far the user's positions are from the place among the row's tokens: it must never change."""
        counted = torch.arange(S, S + T) if positions is None else positions.to("cpu", torch.int64)
        if counted.dim() > 2 or counted.shape[-1] != T:
            raise RuntimeFault(f"position_ids must be [B, T] = [*, {T}], got {list(counted.shape)}")
        places = whole.to(torch.int64).cumsum(dim=1)[:, S:] - 1
        apart = counted.expand(whole.shape[0], T) - places
        shifts = list(cache.shifts)
        for row, (values, tokens) in enumerate(zip(apart, whole[:, S:], strict=True)):
            found: set[int] = set(values[tokens].tolist())
            if (before := shifts[row]) is not None:
                found.add(before)
            if len(found) > 1:
                raise RuntimeFault(
                    f"row {row}: the positions jump against the tokens (by {sorted(found)}): a gap in attention_mask, "
                    "or position_ids that do not count up; Helix keeps a row's tokens one after another"
                )
            if found and found != {0} and not self._rotary:
                raise RuntimeFault(
                    f"row {row}: its first token stands at position {sorted(found)[0]}, and this model uses positions "
                    "for more than rotation; pass position_ids that start at 0 at each row's first token"
                )
            shifts[row] = found.pop() if found else None
        return shifts


def _dataflow(model: Any) -> str:
    """A digest of every op and number of the model's forward, at one size; "" where it can't be run without values.

    It sees what no structure shows: a number in an object that code looks up, a global, a closure.
    """

    def run(trace: OpTrace, device: torch.device) -> None:
        past = torch.zeros(HINT_B, 1, HINT_S, 1, dtype=model.dtype, device=device)
        inputs = model_inputs(device)
        trace.name_inputs([*inputs, past])
        with trace:
            Around(model, lambda pasts: ConcatenatingCache(model.config, None, pasts[0]))(*inputs, [past])

    try:
        with torch.inference_mode(False), torch.no_grad():  # whatever the caller's mode: its ops are others
            lines = without_values(type(model).__name__, model, run).lines
    except Exception:  # a part that branches on data: structure alone tells
        return ""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


class CompiledGraph:
    """What Dynamo calls instead of its graph; compares it with the model's forward at the first call."""

    def __init__(self, gm: fx.GraphModule, frame: Frame, session: Session):
        self.session = session
        self._inputs = frame.inputs
        self._keep = frame.arguments.get("logits_to_keep", 0)
        layers = layers_of_cache(frame.cache)
        # what Dynamo does not pass on it guards on: the same in every call of this graph
        self._lengths = {i: x.length for i, x in enumerate(layers) if x.length is not None}
        self._first: tuple[fx.GraphModule, Frame] | None = (gm, frame)
        self._outputs: list[GraphOutput] = []

    def __call__(self, *args: Any) -> list[Any]:
        """Outputs of the Dynamo graph, in its order."""
        roles = list(zip(self._inputs, args, strict=True))
        weights = {r.name: a for r, a in roles if r.kind == "weight"}
        if self._first is not None:
            # after model.compile() the model's own call goes through Dynamo, which would give up on what traces it here
            with torch.compiler.set_stance("force_eager"):
                # a number that was changed is an input of Dynamo's next graph, which says less
                self.session.check_unchanged(self._first[1].model)
                self._outputs = compared_outputs(*self._first, args)
                self.session.compile(self._first[1].model)
            self.session.state.remember_weights(weights)
            self._first = None  # the user's cache and model must not be held from here
        self.session.state.check(weights)
        call = {r.name: a for r, a in roles if r.kind == "call"}
        past = {(r.layer, r.name): a for r, a in roles if r.kind == "cache"}
        ids = call["input_ids"]
        counts = {(r.layer, r.name): a for r, a in roles if r.kind == "count"}
        rooms = {layer: a for (layer, name), a in counts.items() if name == CAPACITY}
        lengths = {layer: a for (layer, name), a in counts.items() if name in LENGTHS}
        logits = self.session.step(
            ids,
            call.get("attention_mask"),
            call.get("position_ids"),
            past,
            columns_of(past, {**self._lengths, **lengths}),
            self._capacity(past, rooms),
        )
        cache = self.session.cache
        results = [self._result(o, logits, ids.shape[0], cache.columns, rooms) for o in self._outputs]
        made = {(o.layer, o.field): r for o, r in zip(self._outputs, results, strict=True) if isinstance(r, Tensor)}
        for (_, name), tensor in past.items():
            if name == "cumulative_length":
                tensor.fill_(cache.columns)
        cache.hold({**past, **made})
        return results

    def _capacity(self, past: dict[Key, Tensor], rooms: dict[int, int]) -> int:
        """Columns that fit in every layer of a StaticCache, whether its tensors come with the call or are made in it."""
        if not any(name == "cumulative_length" for _, name in past):
            return 0
        found = [t.shape[2] for (_, name), t in past.items() if name in LATENTS]
        found += [_room(o, rooms) for o in self._outputs if o.field in LATENTS]
        return min(found)

    def _result(self, output: GraphOutput, logits: Tensor, B: int, columns: int, rooms: dict[int, int]) -> Tensor | int:
        if output.kind == "length":
            return columns
        if output.kind == "logits":
            return logits[:, -self._keep :] if self._keep else logits
        if output.field.startswith(STATES):
            # models write it in place, and Dynamo traces that before we are asked: a view of one number can't be written
            return stand_in((B, *output.shape[1:]), output.dtype, logits.device).contiguous()
        if output.field == INDEX_KEYS:
            shape = (B, _room(output, rooms) or columns, output.shape[2])
            return stand_in(shape, output.dtype, logits.device)
        if output.field not in LATENTS:
            number = columns if output.field == "cumulative_length" else output.room.window
            return torch.tensor(number, dtype=output.dtype, device=logits.device)
        kept = min(columns, output.room.window - 1) if output.room.window else columns
        _, heads, _, width = output.shape
        return stand_in((B, heads, _room(output, rooms) or kept, width), output.dtype, logits.device)


def _room(output: GraphOutput, rooms: dict[int, int]) -> int:
    """Capacity of an output's layer in this call: Dynamo takes caches of other capacities to the same graph."""
    return rooms.get(output.layer, output.room.capacity)


def columns_of(past: dict[Key, Tensor], lengths: dict[int, int]) -> int:
    """S, as the user's cache tells it.

    Args:
        past: its tensors. A StaticCache counts in one of them, a DynamicCache by their shape.
        lengths: layer -> what it counts in an int; with a sliding window it keeps fewer columns than it has seen.
    """
    counted = {int(t) for (_, name), t in past.items() if name in LENGTHS} | set(lengths.values())
    told = {*lengths, *(layer for layer, name in past if name in LENGTHS)}
    for (layer, name), tensor in past.items():
        if name in LATENTS and layer not in told:
            counted.add(tensor.shape[2] if tensor.dim() == 4 else 0)
    if len(counted) > 1:
        raise RuntimeFault(
            f"the cache's layers have different lengths {sorted(counted)}: it was edited; to start over pass a new cache"
        )
    return counted.pop() if counted else 0


def _whole_mask(mask: Tensor | None, cache: UserCache, B: int, S: int, T: int) -> Tensor:
    """[B, S + T] bool on the host; what it says of earlier columns must be what it said then."""
    before = torch.ones(B, 0, dtype=torch.bool) if cache.mask is None else cache.mask
    if mask is None:
        whole = torch.ones(B, S + T, dtype=torch.bool)
    elif mask.dim() != 2 or mask.shape[0] != B or mask.shape[1] < S + T:
        raise RuntimeFault(
            f"attention_mask must be [B, S + T] = {[B, S + T]} (past and new columns, 1 = token), got "
            f"{list(mask.shape)}"
        )
    else:
        whole = mask[:, : S + T].to("cpu") != 0
    changed = (whole[:, :S] != before).any(dim=1).nonzero().flatten().tolist()
    if changed:
        raise RuntimeFault(
            f"attention_mask says something else of the first {S} columns than in earlier steps, in rows {changed}"
            + (" (it is missing now)" if mask is None else "")
            + "; the cache holds what was a token then"
        )
    return whole


def _positions_rotate_only(module: HelixModule) -> bool:
    """True if positions reach the layers through cos and sin alone: then a shift of a whole row changes nothing."""
    graph = module.stages["attention"].graph
    start = input_named(graph, "input", "positions")
    clamped = [n for n in start.users if is_call(n, aten.clamp.default)]
    reached = follow(clamped, lambda n: [u for u in n.users if not is_call(u, *_ROTATION)])
    return not any(n.op in ("call_module", "output") for n in reached)
