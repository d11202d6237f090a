"""HelixModule: lowered graphs + each rank's parameters + its cache; forward is one step."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.fx._symbolic_trace import is_fx_symbolic_tracing
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from transformers.cache_utils import DynamicCache

from helix_compile.cache.pages import Ledger
from helix_compile.cache.rows import RowCodec
from helix_compile.cache.shards import CacheEntries, CacheShard
from helix_compile.cache.transfer import entries_to_export, sequences_to_import, shards_to_export
from helix_compile.errors import HelixError, PassError, RuntimeFault
from helix_compile.ir.stage import SEGMENTS, bodies_of, uncut
from helix_compile.passes.lower.pieces import pieces_of
from helix_compile.passes.lower.segments import segments_of
from helix_compile.passes.lower.short_ends import BEST, TOP, gather_of, short_end
from helix_compile.passes.pipeline import STAGES, lowered_copy
from helix_compile.passes.typing.check_layouts import check_layouts
from helix_compile.plan.cache_row import rows_of_rank
from helix_compile.plan.helix_plan import HelixPlan
from helix_compile.runtime.alone import alone
from helix_compile.runtime.cuda_graphs import recorder_for
from helix_compile.runtime.ends import KEPT, ShortEnds
from helix_compile.runtime.inductor import Inductor
from helix_compile.runtime.prepared import PreparedSteps
from helix_compile.runtime.rank import ModelFacts, Rank, clear_leaves, params_of_rank, refuse_leaves
from helix_compile.runtime.replays import ReplayedSteps, replay_facts
from helix_compile.runtime.segments import RankPrograms, SegmentCompiler
from helix_compile.runtime.step import checked_lengths, checked_rows, run_step
from helix_compile.runtime.tensorrt import EngineBuilder, Engines, TorchTensorRT
from helix_compile.runtime.values import ValueDump
from helix_compile.saving.module_folder import load_parts, save_module
from helix_compile.views.explain import NodeExplanation, explain_node
from helix_compile.views.graph_python import stage_diff
from helix_compile.views.inspection import Inspection, inspect_module
from helix_compile.worlds.program import Program
from helix_compile.worlds.world import World

_TRACING = (FakeTensorMode, ProxyTorchDispatchMode, FunctionalTensorMode)
_FIXED = (
    "is refused: the graphs were captured for one dtype and device; "
    "call helix_compile(model, ..., dtype=..., device=...) instead"
)


def _refuse_tracing() -> None:
    """A step reads and moves the ledger on the host: a trace of it would hold one step's numbers, and none has its own."""
    if torch.jit.is_tracing() or torch.compiler.is_exporting():
        raise HelixError(
            "a HelixModule can't be traced or exported (torch.jit.trace, torch.export, torch.onnx.export): its step keeps a "
            "cache and lengths that a trace would freeze; compiled.export(folder) writes ONNX, compiled.graph and its bodies are "
            "the graphs, save() keeps them"
        )
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise HelixError(
            "a HelixModule can't be transformed (torch.func.vmap, grad, jvp, functionalize): its step keeps one cache and reads "
            "token ids on the host; a batch is a dim of input_ids [B, T]"
        )
    if modes := [type(mode).__name__ for mode in _get_current_dispatch_mode_stack() if isinstance(mode, _TRACING)]:
        raise HelixError(
            f"a HelixModule can't be traced or run without values (make_fx, {modes[-1]}): its step reads token ids on the host and "
            "moves its cache; compiled.graph and its bodies are the graphs, run them for shapes alone"
        )
    _refuse_symbolic_trace()


def _refuse_symbolic_trace() -> None:
    if is_fx_symbolic_tracing():
        raise HelixError(
            "a HelixModule can't be traced (torch.fx.symbolic_trace): it holds fx graphs already: compiled.graph and its bodies, "
            "one for each of compiled.stages"
        )


_TURNS = (
    "; let threads take turns, or give each a module of its own: helix_compile(model, ...) again shares the weights"
)


def _alone(method: Callable[..., Any]) -> Callable[..., Any]:
    """One thread at a time: a module has one batch, one ledger and one cache a rank. The thread itself may come again.

    And not traced by Dynamo: under torch.compile(compiled) a step is called as it is.
    """

    @partial(torch.compiler.disable, reason="a HelixModule is compiled already: its step keeps a cache and lengths")
    @wraps(method)
    def run(self: HelixModule, *args: Any, **kwargs: Any) -> Any:
        _refuse_tracing()
        with alone(self._lock, method.__name__, _TURNS):
            return method(self, *args, **kwargs)

    return run


def _infer_layouts(graph: fx.GraphModule, plan: HelixPlan) -> None:
    """Type the bodies of a reloaded graph: dumped values are joined by their layouts, which no file of a module holds."""
    for name, body in bodies_of(graph).items():
        if not any("layout" in node.meta for node in body.graph.nodes):
            with suppress(PassError):  # an edit that has no layout: its values are compared rank by rank
                check_layouts(body, plan=plan.body(name), degrees=plan.layout)


def _uncut(lowered: fx.GraphModule) -> fx.GraphModule:
    return lowered


class HelixModule(nn.Module):
    """A model's decode step, rewritten for Helix parallelism. Made by helix_compile() or load().

    Attributes:
        plan: every decision (frozen).
        stages: stage name -> outer fx.GraphModule, "captured" to "lowered".
        graph: the last stage, which is what runs.
        ranks: what each rank in this process holds.
    """

    stages: dict[str, fx.GraphModule]
    ranks: list[Rank]
    _facts: ModelFacts
    _lock: threading.RLock

    def __init__(
        self,
        plan: HelixPlan,
        stages: dict[str, fx.GraphModule],
        ranks: list[Rank],
        world: World,
        facts: ModelFacts,
        builder: EngineBuilder | None = None,
    ):
        super().__init__()
        self.plan, self.world = plan, world
        # plain attributes: graphs and weights must not appear in parameters(), state_dict() or modules()
        object.__setattr__(self, "stages", stages)
        object.__setattr__(self, "ranks", ranks)
        object.__setattr__(self, "_facts", facts)
        object.__setattr__(self, "_lock", threading.RLock())
        self.device = facts.device
        self._ledger = Ledger(plan.options, plan.layout.kvp, facts.device, plan.rings)
        self._tables = PreparedSteps(plan.layout, facts.device)
        self._ends = ShortEnds(lambda lowered, what: short_end(lowered, what, facts.vocab_size))
        self._end_programs: dict[str, RankPrograms] = {}
        self._value_dump = ValueDump.from_environment(plan)
        if self._value_dump is not None:
            _infer_layouts(self.graph, plan)
        self._segment_compiler: SegmentCompiler = Inductor()
        if plan.options.builds_engines and facts.device.type != "meta":
            self._segment_compiler = Engines(builder or TorchTensorRT(facts.device), plan)
        self._programs, self._replays = self._prepared_steps()
        if self._programs is not None and facts.device.type != "meta":
            self.programs()
        self.train(False)

    @property
    def graph(self) -> fx.GraphModule:
        """The lowered outer graph; its submodules are the bodies. Edit, recompile() it, and the next call sees it."""
        return self.stages[STAGES[-1]]

    @property
    def facts(self) -> ModelFacts:
        """What is known of the original model."""
        return self._facts

    def short_end(self, what: str) -> fx.GraphModule | None:
        """The graph that runs, ended by "last1", "best", ... (passes/lower/short_ends.py); None where its head is whole."""
        return self._ends.graph(self.graph, what) if self.plan.options.head == "shard" else None

    def _prepared_steps(self) -> tuple[RankPrograms | None, ReplayedSteps | None]:
        """What runs a step in place of a walk, if anything does, and what replays it."""
        options = self.plan.options
        recorder = recorder_for(self.device) if options.cuda_graphs and not options.builds_engines else None
        replays = None if recorder is None else ReplayedSteps(recorder, self.world)
        if self._cut is not _uncut:
            if SEGMENTS not in self.stages:  # of a reloaded module
                self.stages[SEGMENTS] = self._cut(self.graph)
            return RankPrograms(self._cut, self._segment_compiler, self.stages, self.plan.layout, self.world), replays
        return (None if replays is None else self._programs_of(self.graph)), replays

    @property
    def _cut(self) -> Callable[[fx.GraphModule], fx.GraphModule]:
        """A lowered stage -> what is run of it."""
        if self.plan.options.builds_engines:
            return pieces_of
        return segments_of if self.plan.options.compiles_segments else _uncut

    @property
    def segment_compiler(self) -> SegmentCompiler:
        """What makes code, or engines, of its segments, where there are some."""
        return self._segment_compiler

    def _programs_of(self, graph: fx.GraphModule) -> RankPrograms:
        """The programs of an outer graph, in segments where these are compiled."""
        stages = {SEGMENTS: self._cut(graph)}
        return RankPrograms(self._cut, self._segment_compiler, stages, self.plan.layout, self.world)

    def programs(self, end: str = "") -> list[Program] | None:
        """What runs a step where segments are compiled or steps replayed, one a rank; made again after an edit. None: graphs are walked.

        Args:
            end: of the graph that short_end() gives; "": of the whole one.

        Raises:
            LoweringError: a segment can't be compiled.
        """
        if self._programs is None:
            return None
        if not end:
            return self._programs.programs(self.graph, self.ranks, self.device)
        graph = self.short_end(end)
        assert graph is not None  # asked for by run_step(), which has it
        if end not in self._end_programs:
            while len(self._end_programs) >= KEPT:
                self._end_programs.pop(next(iter(self._end_programs)))
            self._end_programs[end] = self._programs_of(graph)
        return self._end_programs[end].programs(graph, self.ranks, self.device)

    @property
    def replays(self) -> ReplayedSteps | None:
        """Its recorded steps; None where steps are not recorded (docs/compiled.md)."""
        return self._replays

    @property
    def value_dump(self) -> ValueDump | None:
        """Where its steps write what they compute; None unless HELIX_DUMP_VALUES was set when it was made."""
        return self._value_dump

    @property
    def page_table(self) -> Tensor:
        """[B, pages] int64, the same on every rank; before the first step all max_batch_size rows. Read only."""
        return self._ledger.pages_of(self._ledger.batch_size or self.plan.options.max_batch_size).clone()

    @property
    def lengths(self) -> Tensor:
        """[B] int64: tokens of each sequence on all ranks together; empty before the first step. Read only."""
        return torch.tensor(self._ledger.lengths, dtype=torch.int64, device="cpu")

    @_alone
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, logits_to_keep: int = 0, **unknown: Any
    ) -> Tensor:
        """Append input_ids [B, T] to each sequence's cache; logits [B, T, vocab].

        Args:
            input_ids: int64 or int32.
            attention_mask: [B, T], 1 = token. Zeros may stand before or after a row's tokens; a row of zeros is idle.
            logits_to_keep: return those of the last columns only, 0: all (transformers' name). What a long prompt
                holds is then bounded; all logits of 65,536 tokens and 129,280 words are 34 GB in float32.

        Raises:
            RuntimeFault: what a step may not be; nothing was written then.
        """
        if given := [name for name, value in unknown.items() if value is not None]:
            raise RuntimeFault(
                f"a step takes input_ids, attention_mask and logits_to_keep, got {', '.join(given)}: positions follow from the "
                "tokens that each sequence has, and the cache is the module's own (reset(), truncate(), import_cache())"
            )
        params = [rank.params for rank in self.ranks]
        return run_step(self, self._ledger, self.graph, params, self._tables, input_ids, attention_mask, logits_to_keep)

    @_alone
    def best_words(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor | None:
        """A step as forward(): of its last column the largest logit and its word, [B, 1, 2] float64; no logits are gathered.

        Ties go to the lower id, as torch.argmax has it. None, and no step taken, where the head is whole, or edited.
        """
        if self.short_end(BEST) is None or self._value_dump is not None:
            return None
        params = [rank.params for rank in self.ranks]
        return run_step(self, self._ledger, self.graph, params, self._tables, input_ids, attention_mask, 1, end=BEST)

    @_alone
    def top_words(
        self, input_ids: Tensor, attention_mask: Tensor | None, count: int
    ) -> tuple[Tensor, Callable[[], Tensor]] | None:
        """A step as best_words(), with the `count` largest logits of each rank and their words.

        Returns:
            [B, 1, N, count, 2] float64 (fewer than `count` where a rank has fewer words), and a call that gathers all logits
            [B, 1, vocab] of this step, which every rank makes or none. None as of best_words().
        """
        end, outputs = f"{TOP}{count}", list[Any]()
        if self.short_end(end) is None or self._value_dump is not None:
            return None
        params = [rank.params for rank in self.ranks]
        step = (self, self._ledger, self.graph, params, self._tables, input_ids, attention_mask, 1)
        candidates = run_step(*step, end=end, outputs=outputs)
        N = self.plan.layout.world_size

        def whole() -> Tensor:
            graph = gather_of(outputs[0][1], N, self._facts.vocab_size)
            gathered: Tensor = self.world.run(graph, [[own] for _, own in outputs])[0]
            return gathered

        return candidates.unflatten(2, (N, -1)), whole

    @_alone
    def run_stage(self, name: str, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """A step by an earlier stage ("attention" and later) on the same cache; see forward(). Node by node, but for "segments".

        Earlier stages take their weights from the original model: an edit of ranks[r].params shows in "lowered" only.
        """
        if name == (STAGES[-1] if self._cut is _uncut else SEGMENTS):
            return self(input_ids, attention_mask)
        if name == STAGES[-1]:
            own = [rank.params for rank in self.ranks]
            return run_step(
                self, self._ledger, self.graph, own, self._tables, input_ids, attention_mask, prepared=False
            )
        if name not in (*STAGES[1:], *self.stages) or name == STAGES[0]:
            raise RuntimeFault(f"stage {name!r} can't be run; expected one of {', '.join(STAGES[1:])}")
        if name not in self.stages or not self._facts.originals:
            raise RuntimeFault(
                f"stage {name!r}: a reloaded module holds the weights of {STAGES[-1]!r} only and runs that stage alone"
            )
        stage = self.stages[name]
        params = [params_of_rank(self.plan, stage, self._facts, self.world, r.rank) for r in self.ranks]
        tables = PreparedSteps(self.plan.layout, self.device)
        return run_step(self, self._ledger, lowered_copy(stage), params, tables, input_ids, attention_mask)

    @_alone
    def reset(self, rows: list[int] | None = None) -> None:
        """Empty the cache; with `rows`, only these sequences, and the others go on."""
        rows = None if rows is None else checked_rows(rows, self._ledger)
        self._ledger.empty(rows)
        clear_leaves(self.ranks, rows)

    @_alone
    def import_cache(
        self,
        latents: list[Tensor] | DynamicCache,
        k_ropes: list[Tensor] | None = None,
        lengths: Tensor | list[int] | None = None,
        mask: Tensor | None = None,
        *,
        append: bool = False,
        index_keys: Sequence[Tensor | None] | None = None,
    ) -> None:
        """Start a batch from a cache that was prefilled elsewhere (disaggregated prefill), or append to the batch.

        Args:
            latents: per cached attention [B, S, R], or K of all heads side by side [B, S, K Dk]; or the unmodified model's DynamicCache, then without k_ropes.
            k_ropes: per cached attention [B, S, r], rotated at absolute positions; or V [B, S, K Dv].
            lengths: [B] tokens of each sequence; a DynamicCache's follow from its mask or columns.
            mask: [B, S], 1 = token; drops padding columns. Without it a row's first `lengths` columns are its tokens.
            append: go on after the tokens that are here: tensors are the next chunk of each sequence; a DynamicCache
                holds each sequence from its first token, and what is here already is skipped.
            index_keys: of sparse attention [B, S, I] per cached attention, None where one has no indexer, if k_ropes do
                not hold them already ([B, S, r + I], as export_cache() gives them).

        A cache in FP8 takes entries in any wider float, rounded once, here; or what export_cache(raw=True) gives, bit for bit:
        float8_e4m3fn values of the plan's cache_scale, or rows of bytes (uint8) as latents, without k_ropes.

        Raises:
            RuntimeFault: counts or shapes that do not fit; nothing is written then.
        """
        refuse_leaves(self.ranks, self.graph, "import_cache")
        held = list(self._ledger.lengths) if append else []
        self._ledger.check_held(held, "import_cache")
        codecs, options = self._codecs(), self.plan.options
        entries = sequences_to_import(latents, k_ropes, lengths, mask, codecs, options, held, index_keys)
        held = held or [0] * len(entries[0])
        if not append:
            self.reset()  # an interrupt while writing must not leave lengths that promise the old entries
        layout, sites = self.plan.layout, self.plan.cached
        self._ledger.clear_tails(self._caches(), layout, sites)
        self._ledger.promise([len(tokens) for tokens in entries[0]])
        for rank in self.ranks:
            kvp_rank = layout.index("kvp", rank.rank)
            for cache, kind, site, rows in zip(rank.cache, self._facts.caches, sites, entries, strict=True):
                for row, tokens in enumerate(rows):
                    mine = rows_of_rank(tokens, kind, site.kv_part(layout, rank.rank), site.kv_parts(layout))
                    self._ledger.write_sequence(cache, row, mine, kvp_rank, site, held[row])
        if mask is not None:
            self._ledger.count_padding(mask, whole=isinstance(latents, DynamicCache))
        self._ledger.advance([len(tokens) for tokens in entries[0]])

    @_alone
    def export_cache(self, raw: bool = False) -> CacheEntries:
        """The batch's cache, gathered from the shards: (latents, k_ropes, lengths), which import_cache(*...) takes.

        Args:
            raw: of a cache in FP8 what lies in it, not its values in the model's dtype; see CacheEntries.

        Raises:
            RuntimeFault: no batch, cp ranks that live in other processes (then export_shards()), real ranks that took
                the last step with different inputs, or `raw` without FP8.
        """
        self.world.settle()
        refuse_leaves(self.ranks, self.graph, "export_cache")
        return entries_to_export(self._ledger, self._caches(), self.plan.layout, self._codecs(), self.plan.cached, raw)

    @_alone
    def export_shards(self, raw: bool = False) -> list[CacheShard]:
        """What each CP rank in this process holds, with absolute positions; handover.join_shards() joins them. `raw` as in export_cache()."""
        self.world.settle()
        refuse_leaves(self.ranks, self.graph, "export_shards")
        return shards_to_export(self._ledger, self._caches(), self.plan.layout, self._codecs(), self.plan.cached, raw)

    def _codecs(self) -> list[RowCodec]:
        """How entries become rows of the caches, and back."""
        plan, dtype = self.plan, getattr(torch, self.plan.dtype)
        scales, found = self.ranks[0].scales, []
        for site, (row, place) in enumerate(zip(self._facts.caches, plan.cached, strict=True)):
            stored = row.stored(plan.options.cache_dtype, dtype, place.kv_parts(plan.layout))
            found.append(RowCodec(row, stored, dtype, scales[site] if scales else None))
        return found

    def _caches(self) -> dict[int, list[Tensor]]:
        """Rank -> its caches, for export; RuntimeFault where they have no values."""
        if self.device.type == "meta":
            raise RuntimeFault("export: the model is on the meta device: its cache has no values")
        return {rank.rank: rank.cache for rank in self.ranks}

    @_alone
    def generate(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **options: Any) -> Any:
        """Generate by transformers' own loop; starts with reset(). See generation.py for what is refused."""
        from helix_compile.runtime.generation import generate  # transformers' generation code is slow to import

        return generate(self, input_ids, attention_mask, options)

    def inspect(self, folder: str | Path | None = None) -> Inspection:
        """What was rewritten, what was not and why, bytes per collective; with `folder`, files too (rank 0 writes them)."""
        runs = list(self.stages.values())[-1]
        replays = replay_facts(self.plan.options, self.device, runs, self.world.host_collectives)
        from helix_compile.export.targets import targets_of  # formats are slow to import

        inspection = inspect_module(self.plan, self.stages, replays, [vars(target) for target in targets_of(self)])
        if folder is not None and self.world.is_leader:
            inspection.write(Path(folder))
        return inspection

    def explain_node(self, name: str, body: str | None = None) -> NodeExplanation:
        """Which pass made a node, from which captured nodes and source line, with layouts and shapes; print() it.

        Args:
            name: "linear_4", or with its graph "body_0.linear_4".
            body: "body_0", or "outer" for the graph around the layers.

        Raises:
            HelixError: no such node (close names are listed), or one that several graphs have.
        """
        return explain_node(uncut(self.stages), name, body)

    def stage_diff(self, before: str, after: str) -> str:
        """Unified text diff of two stages, one graph after the other: what the passes between them did.

        Raises:
            HelixError: a stage that this module does not have.
        """
        for name in (before, after):
            if name not in self.stages:
                raise HelixError(f"no stage {name!r}; this module has {', '.join(self.stages)}")
        return stage_diff(self.stages, before, after)

    @_alone
    def save(self, folder: str | Path) -> None:
        """Write plan, graphs and each rank's weights; load() gives a module with bitwise equal results.

        On real ranks every rank calls it, with one folder that all see: each writes its own weights.
        """
        self.world.settle()
        save_module(self, Path(folder))

    @_alone
    def export(
        self,
        folder: str | Path,
        format: str = "onnx",
        layers: Collection[int] | None = None,
        logical: HelixModule | None = None,
        collectives: str = "helix",
        batch: int | None = None,
        tokens: int | None = None,
    ) -> dict[str, Any]:
        """Write what each rank runs for other runtimes (docs/exports.md), all files or none; what is there stays.

        Args:
            folder: gets what each rank runs, its weights, and manifest.json.
            format: "onnx"; "pt2": programs of torch.export, "aoti": the same compiled by AOTInductor, both for load_exported().
            layers: of these alone; None: all.
            logical: of "onnx", the same model at cp=1: plan.onnx is written too, its step with specs that say how the ranks share it.
            collectives: of "onnx", whose nodes they are: "helix" (a runtime defines them), "ort-nccl" (onnxruntime's own, where these do).
            batch, tokens: of "onnx", B and T of every step, for runtimes that want numbers; None: free.

        Returns:
            The manifest.

        Raises:
            ExportError: a format that is not there, what the format can't say, files that would be replaced.
        """
        from helix_compile.export.formats import export_module  # formats are slow to import

        return export_module(self, Path(folder), format, layers, logical, collectives, batch, tokens)

    @staticmethod
    def load(
        folder: str | Path,
        device: str | torch.device | None = None,
        world: Any = "auto",
        builder: EngineBuilder | None = None,
        **unknown: Any,
    ) -> HelixModule:
        """Read what save() wrote, in any world; `device`, `world` and `builder` as in helix_compile().

        Raises:
            HelixError: what is no saved module, or was changed; a keyword of another kind: a module stays as it was saved.
        """
        if unknown:
            raise HelixError(
                f"HelixModule.load takes folder, device, world and builder, got {', '.join(unknown)}: a saved module stays in the dtype and "
                "layout that it was compiled for; helix_compile(model, ...) makes another"
            )
        return HelixModule(*load_parts(Path(folder), device, world), builder)

    @_alone
    def truncate(self, lengths: int | list[int] | Tensor) -> None:
        """Take back the last tokens of each sequence (rejected drafts); what comes next is as if they had never been.

        Nothing is erased: what lies behind a length is not read, and is overwritten by the next tokens. `lengths` are
        the tokens that remain: [B] (a list or an integer tensor), or one int for every sequence.

        Raises:
            RuntimeFault: not 0 <= new <= present length, no batch yet, or (window="replicate") what a window needs then was
                forgotten; no row is changed then.
        """
        refuse_leaves(self.ranks, self.graph, "truncate")
        kept = checked_lengths(lengths, self._ledger.lengths)
        self._ledger.check_held(kept, "truncate")
        self._ledger.lengths = kept
        self._ledger.forget_tails()

    def __deepcopy__(self, memo: Any) -> HelixModule:
        """Refused: a copy would share ranks, world and cache in ways that nobody asked for."""
        raise HelixError(
            "copy.deepcopy of a HelixModule is refused; helix_compile(model, ...) again makes one with a cache of its own on "
            "the same weights, save() and HelixModule.load() one with its own weights"
        )

    def _get_name(self) -> str:
        """The class's name, for repr(); torch.fx asks for it before it looks into a forward."""
        _refuse_symbolic_trace()
        return super()._get_name()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refused: pickle, torch.save and copy.copy end here."""
        raise HelixError(
            "a HelixModule is not pickled (pickle, torch.save, copy.copy): save(folder) writes plan, graphs and weights as "
            "plain data, and HelixModule.load(folder) reads them in any world"
        )

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: the weights are the model's."""
        raise HelixError(
            "HelixModule.load_state_dict is refused: it holds shards of a model's weights, which follow the model: "
            "model.load_state_dict(...), and the next step sees it"
        )

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: graphs are captured for one dtype and device."""
        given = [*map(str, args), *(f"{k}={v}" for k, v in kwargs.items())]
        raise HelixError(f"HelixModule.to({', '.join(given)}) {_FIXED}")

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: where half(), cuda(), to_empty() and the like all end."""
        raise HelixError(f"moving or retyping a HelixModule {_FIXED}")

    def train(self, mode: bool = True) -> HelixModule:
        """Only eval mode exists."""
        if mode:
            raise HelixError("a HelixModule is a decode step: it has no training mode")
        return super().train(False)
