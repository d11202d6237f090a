"""The pipeline, top to bottom: the only place that states the order of the passes, and why it is this one.

- attention: attention over this rank's part of the cache, one exchange over heads, merge; o_proj still whole
- reshard: o_proj is cut by rows: its input needs no gather, its output one all-reduce
- ffn: dense, shared and routed experts on the same ranks; one all-reduce
- overlap, where asked for: attention and exchange a part of the batch at a time. Behind the other rewrites, which then speak of
  whole sites; before moves become collectives, since the order of its moves is what it makes
- head, where the vocabulary is cut: embedding and output head by rows of it; the layers stay as they are
- collectives, where kernels compute: moves become collectives
- lowered: the same where none do; else each compute op has its kernel, or says why its reference stays. C++ is chosen with the moves
- segments, where Inductor compiles: what lies between two collectives is one call. Made of `lowered`, which stays what is edited,
  typed and verified node by node
- segments, where engines are built: what lies between collectives and helix:: ops, by the same cut
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import fx

from helix_compile.config.options import HelixOptions
from helix_compile.ir.stage import copy_module, graphs_of
from helix_compile.kernels.target import CPP, KernelTarget
from helix_compile.passes.lower.collectives import has_moves, lower_moves, lower_outer_pass, lower_pass, no_moves_left
from helix_compile.passes.lower.fuse_kernels import kernels_pass
from helix_compile.passes.lower.pieces import PiecesPass
from helix_compile.passes.lower.segments import SegmentsPass
from helix_compile.passes.lower.select_kernels import lower_to_cpp_pass
from helix_compile.passes.rewrite.attention import shard_attention_pass
from helix_compile.passes.rewrite.ffn import shard_ffn_pass
from helix_compile.passes.rewrite.outer import rewire_outer_pass, update_calls_pass
from helix_compile.passes.rewrite.overlap import overlap_pass
from helix_compile.passes.rewrite.reshard import reshard_pass
from helix_compile.passes.rewrite.vocabulary import VocabularyPass
from helix_compile.passes.runner import BodyPass, Pass, PassContext
from helix_compile.passes.typing.check_layouts import check_layouts
from helix_compile.plan.matches import LayerMatch

STAGES = ("captured", "attention", "reshard", "ffn", "lowered")
COLLECTIVES = "collectives"  # between ffn and lowered, where kernels compute


def helix_passes(options: HelixOptions, target: KernelTarget | None = None) -> tuple[Pass, ...]:
    """The passes that make the stages; without a target compute ops keep their references."""
    overlap = (OVERLAP,) if options.overlap != "none" else ()
    # between rewrites and lowering: it speaks of moves too, and touches nothing that the others do
    head = (VocabularyPass(),) if options.head == "shard" else ()
    if target is None:
        lowered: tuple[Pass, ...] = (LOWERED,)
    elif target.arch == CPP:  # nothing is fused with what stands around it
        lowered = (replace(LOWERED, rewrite=lower_to_cpp_pass),)
    else:
        lowered = (replace(LOWERED, stage=COLLECTIVES), KERNELS)
    cut: tuple[Pass, ...] = ()
    if options.compiles_segments:
        cut = (SegmentsPass(),)
    elif options.builds_engines:
        cut = (PiecesPass(),)
    return (*REWRITES, *overlap, *head, *lowered, *cut)


def last_of_moves(stages: Iterable[str]) -> str:
    """Of stages the last that speaks of moves, whatever is around the layers."""
    return OVERLAP.stage if OVERLAP.stage in stages else "ffn"


def lowered_copy(stage: fx.GraphModule) -> fx.GraphModule:
    """A runnable copy of an earlier stage: its moves lowered, nothing else changed."""
    copy = copy_module(stage)
    for _, graph in graphs_of(copy):
        if graph is not copy or has_moves(graph):
            lower_moves(graph)
        graph.recompile()
    return copy


def _sites(match: LayerMatch, context: PassContext) -> int:
    return len(match.attentions)


def _ffns(match: LayerMatch, context: PassContext) -> int:
    return len(match.dense_ffns) + len(match.moes)


def _collectives(match: LayerMatch, context: PassContext) -> int:
    return sum(c.parts for c in context.plan.body(match.body).collectives)


def _in_parts(match: LayerMatch, context: PassContext) -> int:
    return sum(site.parts > 1 for site in context.plan.body(match.body).attentions)


def _typed(gm: fx.GraphModule, match: LayerMatch, context: PassContext) -> None:
    check_layouts(gm, plan=context.plan.body(match.body), degrees=context.plan.layout)


def _lowered(gm: fx.GraphModule, match: LayerMatch, context: PassContext) -> None:
    no_moves_left(gm)
    _typed(gm, match, context)


REWRITES = (
    BodyPass("attention", shard_attention_pass, _sites, outer=rewire_outer_pass, promises=_typed),
    # after attention: its gather of heads becomes o_proj columns + one all_reduce
    BodyPass("reshard", reshard_pass, _sites, outer=update_calls_pass, promises=_typed),
    # after reshard: both leave partial sums behind a row-parallel linear, by the same rule
    BodyPass("ffn", shard_ffn_pass, _ffns, outer=update_calls_pass, promises=_typed),
)
# after them: they look for whole sites
OVERLAP = BodyPass("overlap", overlap_pass, _in_parts, promises=_typed)
# last: until here graphs speak of moves, so that golden graphs and diffs stay readable
LOWERED = BodyPass("lowered", lower_pass, _collectives, outer=lower_outer_pass, promises=_lowered)
# moves first: only then does an exchange stand where a kernel may write into its buffer
KERNELS = BodyPass("lowered", kernels_pass, lambda match, context: 1, promises=_lowered)
