"""At which length do faults begin to cost answers, and would a served system's acceptance rule have seen them?

    python benchmarks/accuracy_faults.py out/recall [--contexts 512 1024 2048 4096 8192 16384] [--documents 10] [--questions 5]
        [--dtype float32] [--prefill model] [--json FILE]

Each fault is put into a module of cp=4, which is asked what the unmodified model is asked: recall, where every fifth fact is said
after the document, token by token. There are few questions in a document, as there are in a prompt. A cell is the score with its 95 %
interval; bold where that lies below the original's: there the fault shows. Beside it the verdict of the acceptance rule that is in
use (atol 0.1, rtol 0.05, 2 % of the elements may be off; one layer, 512 random keys) on the same module; of a block that came
from elsewhere, on the sound module with such a block among its keys; and, to tell what such a verdict is worth, with all of its
keys from elsewhere. That verify() catches the faults of modules is tested with its mutants.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from measuring import format_machine, print_table

from helix_compile import CacheEntries, HelixModule, helix_compile
from helix_compile.capture.source import load_folder
from helix_compile.eval.answers import LocalAnswerer
from helix_compile.eval.decoders import HelixDecoder, ModelDecoder, sent_entries
from helix_compile.eval.folder import load_tokenizer
from helix_compile.eval.heat_map import short_count
from helix_compile.eval.scoring import Answered, Row, ask, row_of
from helix_compile.eval.tasks import make_documents
from helix_compile.ir.stage import graphs_of
from helix_compile.verifier.mutants.graph_mutants import local_position
from helix_compile.verifier.mutants.kernel_mutants import misses_itself, plain_mean
from helix_compile.verifier.mutants.mutant import replace_op
from helix_compile.verifier.mutants.self_test import MAY_FAIL, AcceptanceRule

BLOCK = 32
ORIGINAL, SOUND = "unmodified model", "none"
FOREIGN = "a block of another sequence in a hand-over"
SWAPPED = "two blocks of a hand-over in each other's place"


def unwritten(cache: Any, table: Any, slots: Any, visible: Any, latent: Any, k_rope: Any) -> Any:
    """Of a step of one token nothing is written; a prompt is."""
    kept = slots if slots.shape[1] > 1 else torch.full_like(slots, -1)
    return torch.ops.helix.cache_append(cache, table, kept, visible, latent, k_rope)


class ForeignBlock(HelixDecoder):
    """A hand-over of which one block came from elsewhere: the block with the most words that stand once in the document.

    Args:
        other: holds another sequence, whose block at the same positions stands there; None: another block of this sequence does,
            and this one stands in its place.
    """

    def __init__(self, compiled: HelixModule, sender: ModelDecoder, other: ModelDecoder | None):
        super().__init__(compiled, "model", sender)
        self._other = other

    def begin(self, ids: Sequence[int]) -> None:
        """As Decoder has it, with the fault."""
        assert self._sender is not None
        self._sender.begin(ids)
        entries = sent_entries(self._sender.cache, len(ids))
        # views of the sender's cache, from which others go on
        sent = CacheEntries([t.clone() for t in entries.latents], [t.clone() for t in entries.k_ropes], entries.lengths)
        counts = Counter(ids)
        rare = [
            sum(counts[token] == 1 for token in ids[start : start + BLOCK])
            for start in range(0, len(ids) - BLOCK, BLOCK)
        ]
        here = slice(start := rare.index(max(rare)) * BLOCK, start + BLOCK)
        if self._other is None:
            there, foreign = slice(0, BLOCK) if start else slice(BLOCK, 2 * BLOCK), sent
        else:
            there, foreign = here, sent_entries(self._other.cache, len(ids))
        for own, theirs in zip((*sent.latents, *sent.k_ropes), (*foreign.latents, *foreign.k_ropes), strict=True):
            before = own[:, here].clone()
            own[:, here] = theirs[:, there]
            if self._other is None:
                own[:, there] = before
        self.compiled.import_cache(*sent)


Fault = Callable[[HelixModule], None]
GRAPH_FAULTS: dict[str, Fault] = {
    SOUND: lambda compiled: None,
    "plain mean of the ranks' parts": lambda compiled: replace_op(compiled, "merge_lse", plain_mean),
    "RoPE by the local position": local_position,
    "the new token is not seen by itself": lambda compiled: replace_op(compiled, "shard_index", misses_itself),
    "the new token is not kept": lambda compiled: replace_op(compiled, "cache_append", unwritten),
}


def broken(model: Any, fault: Fault, options: dict[str, Any]) -> HelixModule:
    """The model, compiled, with a fault in it."""
    compiled = helix_compile(model, **options)
    fault(compiled)
    for _, gm in graphs_of(compiled.graph):
        gm.recompile()
    return compiled


def judged(compiled: HelixModule, rule: AcceptanceRule) -> str:
    """What the acceptance rule says."""
    off = rule.share_off(compiled)
    return "does not run" if off is None else f"{off:.1%} off: {'passes' if off <= MAY_FAIL else 'caught'}"


def judged_with(compiled: HelixModule, rule: AcceptanceRule, foreign: slice | None) -> str:
    """What it says of a sound module that holds other keys in some slots, drawn as large as its own; None: two blocks in each other's place."""
    generator, sound = torch.Generator().manual_seed(1), rule.cases
    here, there = foreign or slice(2 * BLOCK, 3 * BLOCK), slice(0, BLOCK)

    def broken_past(parts: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        # tokens are dimension 2 of what the original caches
        changed = [part.clone() for part in parts]
        for part, own in zip(changed, parts, strict=True):
            if foreign:
                drawn = torch.randn(own[:, :, here].shape, generator=generator).to(own.dtype)
                part[:, :, here] = drawn * own.std(dim=2, keepdim=True) + own.mean(dim=2, keepdim=True)
            else:
                part[:, :, here], part[:, :, there] = own[:, :, there], own[:, :, here]
        return tuple(changed)

    rule.cases = {
        layer: (replace(given, pasts=tuple(broken_past(past) for past in given.pasts)), expected)
        for layer, (given, expected) in sound.items()
    }
    try:
        return judged(compiled, rule)
    finally:
        rule.cases = sound


def cell(row: Row, original: Row) -> str:
    """Its score and interval; bold: below the original's."""
    text = f"{row.correct / row.n:.0%} ({row.interval[0]:.0%} to {row.interval[1]:.0%})"
    return f"**{text}**" if row.interval[1] < original.interval[0] else text


def rows_at(
    context: int, decoders: dict[str, Any], other: ModelDecoder, tokenizer: Any, documents: int, questions: int
) -> list[Row]:
    """A row of each decoder; the first is the original. Document by document: all go on from one prefill."""
    answered: dict[str, list[Answered]] = {name: [] for name in decoders}
    seconds = dict.fromkeys(decoders, 0.0)
    (foreign,) = make_documents("recall", tokenizer, context, questions, seed=documents)
    other.begin(foreign.ids)
    for seed in range(documents):
        asked = make_documents("recall", tokenizer, context, questions, seed)
        for name, decoder in decoders.items():
            given, took = ask(LocalAnswerer(decoder), asked, lambda: None)
            answered[name] += given
            seconds[name] += took
    first = next(iter(decoders))
    return [
        row_of(name, answered[name], seconds[name], None if name == first else answered[first]) for name in decoders
    ]


def main() -> None:
    """One row a fault."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--documents", type=int, default=10, help="at a length")
    parser.add_argument("--questions", type=int, default=5, help="in a document")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prefill", default="model", choices=("model", "helix"))
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    if (shortest := min(chosen.contexts)) < 4 * BLOCK:
        parser.error(f"--contexts: got {shortest}, expected {4 * BLOCK} or more: each of four ranks holds a block")
    torch.set_num_threads(1)
    model = load_folder(chosen.folder, getattr(torch, chosen.dtype))[0]
    sender, other, tokenizer = ModelDecoder(model), ModelDecoder(model), load_tokenizer(chosen.folder)
    options = {"cp": 4, "tokens_per_block": BLOCK, "max_batch_size": 1, "max_seq_len": max(chosen.contexts)}
    decoders: dict[str, Any] = {ORIGINAL: sender}
    rule, verdicts = AcceptanceRule(model), {ORIGINAL: ""}
    for name, fault in GRAPH_FAULTS.items():
        compiled = broken(model, fault, options)
        decoders[name] = HelixDecoder(compiled, chosen.prefill, sender if chosen.prefill == "model" else None)
        verdicts[name] = judged(compiled, rule)
        if name == SOUND:
            decoders[FOREIGN] = ForeignBlock(compiled, sender, other)
            decoders[SWAPPED] = ForeignBlock(compiled, sender, None)
            verdicts[FOREIGN] = judged_with(compiled, rule, slice(2 * BLOCK, 3 * BLOCK))
            verdicts[SWAPPED] = judged_with(compiled, rule, None)
            blind = judged_with(compiled, rule, slice(None))
    cells: dict[str, list[str]] = {name: [] for name in decoders}
    rows = list[Row]()
    for context in chosen.contexts:
        found = rows_at(context, decoders, other, tokenizer, chosen.documents, chosen.questions)
        rows += found
        for row in found:
            cells[row.model].append(cell(row, found[0]))
            print(
                f"{short_count(context)} {row.model}: {row.correct} of {row.n}, agreement {row.agreement}", flush=True
            )
    print(f"{format_machine()}; load {os.getloadavg()[0]:.1f}; {time.process_time():.0f} s of processor\n")
    header = ["fault", *map(short_count, chosen.contexts), "atol 0.1, rtol 0.05, 2 %"]
    print_table(header, [[name, *cells[name], verdicts[name]] for name in decoders])
    print(f"the rule on a sound module of whose keys all came from elsewhere: {blind}")
    if chosen.json:
        verdicts["all keys from elsewhere"] = blind
        chosen.json.write_text(json.dumps({"rows": [row.to_json() for row in rows], "verdicts": verdicts}, indent=1))


if __name__ == "__main__":
    main()
