"""A step: what it is given is checked before anything is written, a long one is cut into chunks, and the ranks run.

Every refusal names what, got, expected and what to do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, fx
from tqdm import tqdm

from helix_compile.cache.pages import Ledger
from helix_compile.capture.checks import autocast_device
from helix_compile.errors import RuntimeFault
from helix_compile.ir.graph import ring_name, source_line
from helix_compile.layout.integers import plain_ints
from helix_compile.runtime.compiled import CompiledModule
from helix_compile.runtime.prepared import PreparedSteps
from helix_compile.runtime.rank import follow_edits

SCORE_TOKENS = 2**22  # (sequences x tokens x context) of one chunk; bounds what a long step holds at a time
MAX_CHUNK = 512


def run_step(
    module: CompiledModule,
    ledger: Ledger,
    graph: fx.GraphModule,
    params: Sequence[Mapping[str, Tensor]],
    tables: PreparedSteps,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    logits_to_keep: int = 0,
    prepared: bool = True,
    end: str = "",
    outputs: list[Any] | None = None,
) -> Tensor:
    """Append input_ids [B, T] to each sequence's cache; logits [B, T or logits_to_keep, vocab].

    Args:
        module: whose ranks, caches and world run it.
        ledger: lengths and pages of its batch; they go on only when the whole step is done.
        graph: a stage whose moves are lowered.
        params: each rank's parameters of that stage.
        tables: what steps of that stage need, kept from one to the next.
        input_ids: see HelixModule.forward(), as for the next two.
        prepared: run the programs of compiled segments, where there are some; False: node by node.
        end: "best": the shorter end of the graph that gives, in place of logits, the best word of the last column; "topM": the M
            best of each rank, and its own logits.
        outputs: gets what every rank in this process computed in the last chunk.

    Raises:
        RuntimeFault: what a step may not be.
    """
    if module.device.type == "meta":
        raise RuntimeFault("the model is on the meta device: it can be inspected, not run")
    if device := autocast_device():
        raise RuntimeFault(
            f'called inside torch.autocast("{device}"): the graphs hold the dtypes that they were captured with, and would be '
            "computed in others; step outside of it, and helix_compile(model, dtype=...) for another dtype"
        )
    follow_edits(module.plan, module.graph, module.ranks, module.facts)
    host_ids = check_ids(input_ids, module.facts.vocab_size, module.plan.options.max_batch_size)
    B, T = input_ids.shape
    if ledger.batch_size and ledger.batch_size != B:
        raise RuntimeFault(
            f"the batch has {ledger.batch_size} sequences since the first step, got {B}; "
            "call reset() to start another batch, or mask idle rows"
            + (
                " (whose windows or chunks are not full yet: transformers counts columns)"
                if module.plan.shortest_reach
                else ""
            )
        )
    mask = checked_mask(attention_mask, input_ids)
    padded = not bool(mask.all())
    if padded and (mixing := tables.mixing(graph, padding=True)) is not None and "leaf" not in mixing.meta:
        raise RuntimeFault(
            f"node `{mixing.name}` ({source_line(mixing) or 'no source'}) is not shown to treat each token of a call alone: padding "
            "(zeros of attention_mask) would be mixed into the tokens; give sequences of one length, without idle rows"
        )
    if isinstance(logits_to_keep, bool) or not isinstance(logits_to_keep, int) or logits_to_keep < 0:
        raise RuntimeFault(f"logits_to_keep must be an int >= 0 (0: all), got {logits_to_keep!r}")
    first = max(0, T - logits_to_keep) if logits_to_keep else 0
    ledger.check_room(mask.sum(dim=1).tolist())
    if reach := module.plan.shortest_reach:
        ledger.check_columns(mask, reach)
    most = module.plan.longest_step
    ledger.check_held(ledger.lengths, "a step")  # one that was interrupted may have gone further
    chunks = chunks_of(T, B, max(ledger.lengths, default=0) + T, most)
    if len(chunks) > 1 and (mixing := tables.mixing(graph)) is not None:
        if T > most:
            raise RuntimeFault(
                f"a step of {T} tokens: windows that every rank holds by itself take {most} at a time, and node `{mixing.name}` "
                f"({source_line(mixing) or 'no source'}) is not shown to treat each token alone, so a longer step is not cut. "
                f'nearest that works: steps of {most} tokens, or window="shard"'
            )
        chunks = [slice(0, T)]  # what a token gets depends on the call's other tokens: a cut would change it
    past = max(ledger.lengths, default=0) + chunks[-1].start
    check_limits({"B": (B, B), "T": (T - chunks[-1].start, T), "S": (past, past)}, module.facts.limits)
    ledger.clear_tails({rank.rank: rank.cache for rank in module.ranks}, module.plan.layout, module.plan.cached)
    ids = on_device(host_ids, module.device) if input_ids.device.type == "cpu" else input_ids.to(torch.int64)
    shortens = first > 0 and graph is module.graph and module.value_dump is None

    def end_of(c: slice) -> str:
        """Of the columns that are kept no others' logits are computed and gathered; of a chunk without any, one's."""
        kept = max(1, c.stop - max(c.start, first))
        fits = shortens and kept < c.stop - c.start and module.short_end(f"last{kept}") is not None
        return f"last{kept}" if fits else ""

    def run_chunk(c: slice) -> Tensor:
        own = end or end_of(c)
        ended = module.short_end(own) if own else graph
        assert ended is not None  # who asks for an end has seen that there is one
        # on the host: ranks compare it, and a card need not be waited for
        agreed = {
            "input_ids": host_ids[:, c],
            "positions": ledger.positions(mask[:, c]),
            "page_table": ledger.pages_on_host(B),
        }
        step = {
            "input_ids": ids[:, c].contiguous(),  # compiled segments know its strides
            "positions": on_device(agreed["positions"], module.device),
            "page_table": ledger.pages_of(B),
            **{ring_name(f"table_{n}"): table[:B] for n, table in ledger.ring_tables.items()},
        }
        ledger.promise(mask[:, c].sum(dim=1).tolist())
        recorder = None
        if module.value_dump is not None and graph is module.graph:
            caches = [cache for rank in module.ranks for cache in rank.cache]
            recorder = module.value_dump.recorder(graph, caches, mask[:, c], module.world.is_leader)
        with torch.no_grad(), recorder or nullcontext():
            if (
                prepared
                and recorder is None
                and graph is module.graph
                and (programs := module.programs(own)) is not None
            ):
                replays = module.replays
                given = (
                    module.world.run_programs(programs, step, agreed)
                    if replays is None
                    else replays.run(programs, own, step, agreed)
                )
            else:
                inputs = tables.inputs(ended, module.ranks, params, step)
                given = module.world.run(ended, inputs, recorder, agreed)
        if recorder is not None:
            recorder.write()
        ledger.count_padding(mask[:, c])
        ledger.advance(mask[:, c].sum(dim=1).tolist())
        if outputs is not None:
            outputs[:] = given
        return given[0][0] if isinstance(given[0], tuple) else given[0]

    shown = None if module.world.is_leader else True
    bar = tqdm(chunks, desc="step", unit="chunk", disable=shown, delay=2)
    before = list(ledger.lengths), list(ledger.gaps), list(ledger.tails)
    try:
        logits = [run_chunk(c) for c in bar][-1] if end else kept_logits(run_chunk, bar, first, T)
        _check_range(module, logits, mask[:, first:])
        return logits
    except BaseException:  # an interrupt too: what earlier chunks wrote lies behind the lengths
        ledger.lengths, ledger.gaps, ledger.tails = before
        raise


def on_device(host: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host there; a card need not be waited for."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def _check_range(module: CompiledModule, logits: Tensor, mask: Tensor) -> None:
    """In float16 what one rank adds to a sum may be too large though the sum is not; then all that follows is NaN."""
    if module.plan.dtype != "float16" or module.plan.layout.world_size == 1:
        return
    if not bool(logits[mask.to(logits.device, torch.bool)].isfinite().all()):
        raise RuntimeFault(
            "float16: logits that are not finite: a value exceeded 65504, in the model itself or in one rank's part of a sum "
            "(docs/limits.md); the step was not taken. Compile with dtype=torch.bfloat16 or torch.float32"
        )


_WHAT = {"B": "sequences", "T": "new tokens", "S": "cached tokens"}


def check_limits(sizes: Mapping[str, tuple[int, int]], limits: Mapping[str, tuple[int, int]]) -> None:
    """Smallest and largest size of a step against what a saved program was exported for."""
    for letter, (low, high) in limits.items():
        smallest, largest = sizes[letter]
        if smallest < low or largest > high:
            got = largest if largest > high else smallest
            raise RuntimeFault(
                f"the program was exported for {low} <= {letter} <= {high} ({_WHAT[letter]}), got {letter} = {got}: outside of "
                "its Dim's range it is not the model; export it with a wider range, or feed the prompt in pieces"
            )


def _refuse_odd(name: str, tensor: Tensor) -> None:
    """A tensor whose values can't be read one by one."""
    kind = (
        "nested"
        if tensor.is_nested
        else "on meta"
        if tensor.is_meta
        else "sparse"
        if tensor.layout != torch.strided
        else ""
    )
    if kind:
        raise RuntimeFault(f"{name} is {kind}; expected a plain tensor with values")


def check_ids(input_ids: Tensor, vocab_size: int, max_batch_size: int) -> Tensor:
    """input_ids as int64 on the host. Must be [B, T] int, 1 <= B <= max_batch_size, T >= 1, ids in the vocabulary."""
    if not isinstance(input_ids, Tensor):
        raise RuntimeFault(f"input_ids must be a tensor [B, T], got {type(input_ids).__name__}")
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise RuntimeFault(f"input_ids must be int64 or int32, got {input_ids.dtype}")
    _refuse_odd("input_ids", input_ids)
    if input_ids.dim() != 2:
        raise RuntimeFault(f"input_ids must be [B, T], got shape {tuple(input_ids.shape)}")
    B, T = input_ids.shape
    if T == 0 or B == 0:
        raise RuntimeFault(f"a step needs at least one sequence and one token, got [B, T] = {[B, T]}")
    if B > max_batch_size:
        raise RuntimeFault(
            f"{B} sequences > max_batch_size={max_batch_size}; compile with max_batch_size={B} or split the batch"
        )
    host = input_ids.to("cpu", torch.int64)  # from a card once; all that follows reads the copy
    low, high = int(host.min()), int(host.max())
    if low < 0 or high >= vocab_size:
        raise RuntimeFault(f"token ids must be in [0, {vocab_size}), got ids from {low} to {high}")
    return host


def checked_mask(mask: Tensor | None, input_ids: Tensor) -> Tensor:
    """attention_mask as int64 [B, T] on the host; ones where it is None. Zeros between tokens are refused."""
    B, T = input_ids.shape
    if mask is None:
        return torch.ones(B, T, dtype=torch.int64)
    if not isinstance(mask, Tensor) or tuple(mask.shape) != (B, T):
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise RuntimeFault(f"attention_mask must be [B, T] = {(B, T)}, the mask of this step's tokens, got {got}")
    _refuse_odd("attention_mask", mask)
    if mask.is_complex():
        raise RuntimeFault(f"attention_mask must hold 0 and 1 only, got {mask.dtype}")
    host = mask.to("cpu")  # from a card once
    if not bool(((host == 0) | (host == 1)).all()):
        raise RuntimeFault("attention_mask must hold 0 and 1 only")
    host = host.to(torch.int64)
    starts = torch.diff(host, dim=1, prepend=torch.zeros(B, 1, dtype=torch.int64)) == 1
    broken = (starts.sum(dim=1) > 1).nonzero().flatten().tolist()
    if broken:
        raise RuntimeFault(
            f"attention_mask has zeros between tokens in rows {broken}; padding may stand before or after a row's "
            "tokens only"
        )
    return host


def checked_lengths(lengths: int | list[int] | Tensor, present: list[int]) -> list[int]:
    """What truncate() is given, as one int a row of the current batch: 0 <= new <= present."""
    if not present:
        raise RuntimeFault("truncate: there are no sequences yet; run a step or import_cache() first")
    if isinstance(lengths, Tensor):
        if lengths.dim() != 1 or lengths.is_floating_point() or lengths.dtype == torch.bool:
            raise RuntimeFault(
                f"truncate: lengths must be an int or integers [B] = [{len(present)}], got a tensor of shape "
                f"{tuple(lengths.shape)} and {lengths.dtype}"
            )
        _refuse_odd("truncate: lengths", lengths)
        rows = lengths.tolist()
    else:
        rows = plain_ints(lengths if isinstance(lengths, (list, tuple)) else [lengths] * len(present))
    if len(rows) != len(present):
        raise RuntimeFault(
            f"truncate: got {len(rows)} lengths for a batch of {len(present)} sequences; pass one for each, or one int"
        )
    for row, (new, limit) in enumerate(zip(rows, present, strict=True)):
        if isinstance(new, bool) or not isinstance(new, int):
            raise RuntimeFault(
                f"truncate: the length of sequence {row} must be an int, got {new!r} ({type(new).__name__})"
            )
        if not 0 <= new <= limit:
            raise RuntimeFault(
                f"truncate: sequence {row}: got length {new}, expected 0 to {limit}, the tokens that it has; "
                "truncate() only takes tokens back"
            )
    return rows


def checked_rows(rows: object, ledger: Ledger) -> list[int]:
    """`rows` of a reset, which must be a list of row numbers of the current batch."""
    if not isinstance(rows, (list, tuple)):
        raise RuntimeFault(f"reset: rows must be a list of row numbers, got {rows!r} ({type(rows).__name__})")
    plain = plain_ints(rows)
    bad = [r for r in plain if isinstance(r, bool) or not isinstance(r, int) or not 0 <= r < ledger.batch_size]
    if bad:
        raise RuntimeFault(f"reset(rows={list(rows)}): {bad} are not rows of the current batch of {ledger.batch_size}")
    return plain


def chunks_of(T: int, batch_size: int, context: int, most: int = MAX_CHUNK) -> list[slice]:
    """Cut a long step along T so that what is held at a time stays bounded, into chunks of at most `most` tokens."""
    width = max(1, min(MAX_CHUNK, most, SCORE_TOKENS // max(1, batch_size * context)))
    return [slice(t, min(t + width, T)) for t in range(0, T, width)]


def kept_logits(run_chunk: Callable[[slice], Tensor], chunks: Iterable[slice], first: int, T: int) -> Tensor:
    """Run the chunks of a step; logits [B, T - first, vocab] of the columns from `first` on.

    A chunk gives those of all its columns, or of the last ones, all that are kept among them. They are
    copied to their place and dropped: a list and a cat would hold all of them twice.
    """
    kept: Tensor | None = None
    for chunk in chunks:
        logits = run_chunk(chunk)
        start, stop = max(chunk.start, first), max(chunk.stop, first)
        of_chunk = logits[:, logits.shape[1] - (stop - start) :]
        if chunk == slice(0, T):
            return of_chunk
        if kept is None:
            kept = logits.new_empty((logits.shape[0], T - first, logits.shape[2]))
        kept[:, start - first : stop - first] = of_chunk
        del logits
    assert kept is not None  # T >= 1
    return kept
