"""The truth: a deep fp64 copy of the original, run as it is, and its captured graph, node by node; both with widened islands.

DeepSeek-V3 computes norms and the router in float32 whatever its dtype. In float64 these islands swallow small faults
(a clean module then shows a deviation of exactly 0) and turn noise of 1e-15 into one float32 ulp of 1e-8 at random
(capture-and-match, sections 10 and 11). Run both sides with the islands widened instead.

The eager copy decides. The graph only says *where* a deviation starts, and is the reference for one layer alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from transformers.cache_utils import DynamicCache

from helix_compile.capture.source import converted_copy
from helix_compile.ir.cache_argument import call_with_cache
from helix_compile.ir.graph import erase_unused, input_named, inputs_of, node_named, placeholders
from helix_compile.ir.leaves import Leaf
from helix_compile.ir.stage import body_of, copy_module
from helix_compile.models.rotary_tables import by_length, forget_lengths
from helix_compile.plan.matches import LayerMatch
from helix_compile.verifier.numeric.indexers import Indexers, SiteChoice
from helix_compile.verifier.numeric.routing import Choices, RecordTopK
from helix_compile.verifier.report import OriginalFails

_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.matmul.default)  # of one dtype alone


class WidenedIslands(TorchDispatchMode):
    """While open, a cast of a float64 tensor to float32 is a copy in float64. Use it around both sides.

    Args:
        captured_dtype: evaluate a graph that was captured in this dtype on float64 tensors: casts to it and new tensors
            in it are float64 too.
    """

    def __init__(self, captured_dtype: torch.dtype = torch.float64):
        super().__init__()
        self.captured_dtype = captured_dtype

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func`, but for the casts."""
        kwargs = dict(kwargs or {})
        target = kwargs.get("dtype")
        cast = func is torch.ops.aten._to_copy.default and target in (torch.float32, self.captured_dtype)
        if cast and args[0].dtype is torch.float64:
            return args[0].clone()
        if target is self.captured_dtype:  # not float32: position tables stay as they are
            kwargs["dtype"] = torch.float64
        if func in _PRODUCTS and any(x.dtype is torch.float64 for x in args if isinstance(x, Tensor)):
            # positions in float32 times frequencies that were widened (rotary tables of transformers 5.17)
            args = [x.double() if isinstance(x, Tensor) and x.dtype is torch.float32 else x for x in args]
        return func(*args, **kwargs)


CHUNK_TOKENS = 256  # long steps are cut so that scores [B, H, T, S] stay small
Edits = Mapping[str, Callable[[Tensor], Tensor]]


@contextmanager
def blaming_the_original(what: str) -> Iterator[None]:
    """What is raised inside is raised again as OriginalFails, which names `what` ran."""
    try:
        yield
    except Exception as error:
        text = str(error).splitlines()
        raise OriginalFails(f"{what} raised {type(error).__name__}: {text[0] if text else ''}") from error


def wide_copy(model: Any) -> Any:
    """A deep copy in fp64 with sdpa attention, where the model has it (with sinks it would lose them); `model` is left alone.

    Experts run one by one ("eager"): fp64 has no grouped matmul, and batched_mm gathers three matrices a choice, which
    at real widths is more than the model itself.
    """
    twin: Any = converted_copy(model, torch.float64).eval()
    if getattr(twin, "_supports_sdpa", True):
        twin.config._attn_implementation = "sdpa"
    if getattr(twin.config, "_experts_implementation", None) is not None:
        twin.set_experts_implementation("eager")
    return twin


def apply_edits(tensors: dict[str, Tensor], edits: Edits) -> None:
    """Change weights in place. Each edit commutes with every cut, so a faulty shard stays faulty."""
    with torch.no_grad():
        for name, edit in edits.items():
            if name in tensors:
                tensors[name].copy_(edit(tensors[name]))


def edited(params: Mapping[str, Tensor], edits: Edits) -> dict[str, Tensor]:
    """The same for what a rank holds, on copies: a wrong shard stays wrong."""
    return {n: edits[n](t.clone().cpu()).to(t) if n in edits else t for n, t in params.items()}


@dataclass
class EagerReference:
    """The copy with its own DynamicCache. Padding is a column there and never a position.

    Attributes:
        cached: (layer, keys, values, the mask so far) -> what is cached in their place; None: they are.
        leaves: names of modules whose top-ks are not looked at: the module under test runs them as they are.
        selections: what the indexers would have chosen in the last step.
    """

    follows: ClassVar[bool] = True
    model: Any
    leaves: Sequence[str] = ()
    cached: Callable[[int, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    mask: Tensor | None = None
    selections: list[SiteChoice] = field(default_factory=list)
    cache: Any = field(init=False)
    recorder: RecordTopK | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.cache = DynamicCache(config=self.model.config)
        update, cached = self.cache.update, self.cached
        if cached is not None:

            def updated(keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> Any:
                assert self.mask is not None
                with _disable_current_modes():  # casts to float32 are meant as such here
                    keys, values = cached(layer, keys, values, self.mask)
                return update(keys, values, layer, *args, **kwargs)

            self.cache.update = updated
        append = getattr(self.cache, "update_indexer", None)
        if append is None:  # transformers 5.17
            return

        def appended(*args: Any, **kwargs: Any) -> Tensor:
            keys: Tensor = append(*args, **kwargs)
            if self.recorder is not None and self.recorder.indexers is not None and not self.recorder.paused:
                self.recorder.indexers.arm()
            return keys

        self.cache.update_indexer = appended

    def step(self, ids: Tensor, mask: Tensor, choices: Choices | None = None, told: Sequence[Tensor] = ()) -> Tensor:
        """Logits [B, T, vocab] of ids [B, T] with mask [B, T].

        Args:
            choices: every router's top-k goes there.
            told: keys [B, T, n] by position that each indexer takes, in order; none: its own choice.
        """
        logits, recorded, chosen, start = [], [], [], 0
        length = max(ids.shape[1], 1) if by_length(self.model) else CHUNK_TOKENS
        for part, kept in zip(ids.split(length, 1), mask.split(length, 1), strict=True):
            self.mask = kept if self.mask is None else torch.cat([self.mask, kept], dim=1)
            longest, stop = int(self.mask.sum(dim=1).max()), start + part.shape[1]
            recorded.append(Choices())
            chosen.append(Indexers(self.mask, [keys[:, start:stop, :longest] for keys in told]))
            with self._recording(RecordTopK(recorded[-1], chosen[-1])):
                logits.append(self._chunk_logits(part))
            start = stop
        if choices is not None:
            choices.join(recorded, len(ids))
        assert self.mask is not None
        whole = Indexers(self.mask)
        whole.join(chosen)
        self.selections = whole.choices
        return torch.cat(logits, dim=1)

    @contextmanager
    def _recording(self, recorder: RecordTopK) -> Iterator[None]:
        """The recorder looks at top-ks, but for those inside of leaves."""

        def pause(paused: bool) -> None:
            recorder.paused = paused

        self.recorder, hooks = recorder, []
        for leaf in map(self.model.get_submodule, self.leaves):
            hooks.append(leaf.register_forward_pre_hook(lambda *_: pause(True)))
            hooks.append(leaf.register_forward_hook(lambda *_: pause(False)))
        try:
            with recorder:
                yield
        finally:
            self.recorder = None
            for hook in hooks:
                hook.remove()

    def _chunk_logits(self, ids: Tensor) -> Tensor:
        assert self.mask is not None
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        device = next(self.model.parameters()).device
        forget_lengths(self.model)  # of the batches before
        what = f"the original model, run by itself in {self.model.dtype}".replace("torch.", "")
        with blaming_the_original(what), torch.no_grad(), WidenedIslands():
            out = call_with_cache(
                self.model,
                self.cache,
                input_ids=ids.to(device),
                attention_mask=self.mask.to(device),
                position_ids=positions.to(device),
            )
        return out.logits


Record = Callable[[str, fx.Node, Any], None]
INDEXER = "indexer"  # meta of a captured graph's top-k that chooses keys


class RecordingInterpreter(fx.Interpreter):
    """Runs a graph, its layers node by node, and calls record(path, node, value) after each node."""

    def __init__(
        self,
        module: fx.GraphModule,
        record: Record,
        path: str = "",
        indexers: Indexers | None = None,
        given: Mapping[str, Tensor] | None = None,
    ):
        super().__init__(module)
        self.record, self.path, self.calling, self.indexers = record, path, "", indexers
        self.given = given or {}  # node -> what is taken in place of its value

    def run_node(self, n: fx.Node) -> Any:
        """Run and record."""
        self.calling = n.name
        if self.indexers is not None and INDEXER in n.meta:
            self.indexers.arm()
        value = super().run_node(n)
        self.record(self.path, n, value)
        return self.given[n.name].to(value) if n.name in self.given else value

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Go into the layer instead of calling it."""
        body = self.module.get_submodule(str(target))
        if isinstance(body, Leaf):
            return super().call_module(target, args, kwargs)
        inner = RecordingInterpreter(body, self.record, f"{self.path}{self.calling}.", self.indexers)
        hidden, *others = inner.run(*args, **kwargs)
        cached = len(
            inputs_of(body.graph, "past")
        )  # what it caches is one value of the call, what it hands on are others
        return hidden, others[:cached], *others[cached:]


def with_textbook_experts(graph: fx.GraphModule, matches: Mapping[str, LayerMatch]) -> fx.GraphModule:
    """A copy of a captured graph whose routed experts are computed expert by expert.

    fp64 has no grouped matmul, and this is written apart from the op's reference. Names of nodes are kept.
    """
    copy = copy_module(graph)
    for name, match in matches.items():
        body = body_of(copy, name)
        for moe in match.moes:
            output = node_named(body.graph, moe.output)
            reads = [node_named(body.graph, n) for n in (moe.x, moe.expert_ids, moe.weights)]
            reads += [input_named(body.graph, "param", n) for n in (moe.gate_up, moe.down)]
            output.target, output.args, output.kwargs = _experts, tuple(reads), {}
        erase_unused(body.graph, keep=placeholders(body.graph))
        body.recompile()
    return copy


def _experts(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """X [.., D], ids and weights [.., k], gate_up [E, 2F, D], down [E, D, F] -> [N, D]."""
    tokens = x.reshape(-1, x.shape[-1])
    ids, weights = ids.reshape(len(tokens), -1), weights.reshape(len(tokens), -1)
    out = torch.zeros_like(tokens)
    for expert in torch.unique(ids).tolist():
        chosen = (ids == expert).any(dim=1)
        share = (weights * (ids == expert)).sum(dim=1)[chosen, None]
        gate, up = nn.functional.linear(tokens[chosen], gate_up[expert]).chunk(2, dim=-1)
        out[chosen] += nn.functional.linear(nn.functional.silu(gate) * up, down[expert]) * share
    return out
