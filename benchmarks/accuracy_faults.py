"""At which length do faults begin to cost answers, and would a served system's acceptance rule have seen them?

    python benchmarks/accuracy_faults.py out/recall [--contexts 512 4096] [--limit 25] [--dtype float32] [--prefill model]

Each fault is put into a module of cp=4, which is asked what the unmodified model is asked: recall, where every fifth fact is said
after the document, token by token. A cell is its score, in brackets where it lies below the original's 95 % interval. Beside it the
verdict of the acceptance rule that is in use (atol 0.1, rtol 0.05, 2 % of the elements may be off; one layer, 512 random keys) on the
same module. That verify() catches the faults of modules is tested with its mutants.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
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
from helix_compile.eval.scoring import Row, ask, row_of
from helix_compile.eval.tasks import make_documents
from helix_compile.ir.stage import graphs_of
from helix_compile.verifier.mutants.graph_mutants import local_position
from helix_compile.verifier.mutants.kernel_mutants import misses_itself, plain_mean
from helix_compile.verifier.mutants.mutant import replace_op
from helix_compile.verifier.mutants.self_test import MAY_FAIL, AcceptanceRule

BLOCK = 32
SOUND, SWAPPED, FOREIGN = "none", "two blocks of a hand-over swapped", "a block of another sequence in a hand-over"


def unwritten(cache: Any, table: Any, slots: Any, visible: Any, latent: Any, k_rope: Any) -> Any:
    """Of a step of one token nothing is written; a prompt is."""
    kept = slots if slots.shape[1] > 1 else torch.full_like(slots, -1)
    return torch.ops.helix.cache_append(cache, table, kept, visible, latent, k_rope)


class SwappedBlock(HelixDecoder):
    """A hand-over of which one block came from elsewhere: the block with the most words that stand once in the document.

    Args:
        other: who prefills another sequence, whose block stands there; None: two blocks of this sequence are swapped.
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
        there = slice(0, BLOCK) if start else slice(BLOCK, 2 * BLOCK)
        foreign = sent
        if self._other is not None:
            common = counts.most_common(1)[0][0]
            self._other.begin([common] * (start + BLOCK))
            foreign, there = sent_entries(self._other.cache, start + BLOCK), here
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


def main() -> None:
    """One row a fault."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--limit", type=int, default=25)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prefill", default="model", choices=("model", "helix"))
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    model = load_folder(chosen.folder, getattr(torch, chosen.dtype))[0]
    sender, tokenizer = ModelDecoder(model), load_tokenizer(chosen.folder)
    options = {"cp": 4, "tokens_per_block": BLOCK, "max_batch_size": 1, "max_seq_len": max(chosen.contexts)}
    decoders: dict[str, Any] = {"unmodified model": sender}
    rule, verdicts = AcceptanceRule(model), {"unmodified model": ""}
    for name, fault in GRAPH_FAULTS.items():
        compiled = broken(model, fault, options)
        decoders[name] = HelixDecoder(compiled, chosen.prefill, sender if chosen.prefill == "model" else None)
        verdicts[name] = judged(compiled, rule)
        if name == SOUND:
            verdicts |= dict.fromkeys((SWAPPED, FOREIGN), "not in the module")
            decoders[SWAPPED] = SwappedBlock(compiled, sender, None)
            decoders[FOREIGN] = SwappedBlock(compiled, sender, ModelDecoder(model))
    cells: dict[str, list[str]] = {name: [] for name in decoders}
    rows = list[Row]()
    for context in chosen.contexts:
        documents = make_documents("recall", tokenizer, context, chosen.limit)
        original, seconds = ask(LocalAnswerer(sender), documents, lambda: None)
        first = row_of("unmodified model", original, seconds)
        for name, decoder in decoders.items():
            if decoder is sender:
                row = first
            else:
                row = row_of(name, *ask(LocalAnswerer(decoder), documents, lambda: None), original)
            rows.append(row)
            outside = row.correct / row.n < first.interval[0]
            cells[name].append(f"({row.correct / row.n:.0%})" if outside else f"{row.correct / row.n:.0%}")
            print(f"{short_count(context)} {name}: {row.correct} of {row.n}, agreement {row.agreement}", flush=True)
    print(f"{format_machine()}; load {os.getloadavg()[0]:.1f}\n")
    header = ["fault", *map(short_count, chosen.contexts), "atol 0.1, rtol 0.05, 2 %"]
    print_table(header, [[name, *cells[name], verdicts[name]] for name in decoders])
    if chosen.json:
        chosen.json.write_text(json.dumps({"rows": [row.to_json() for row in rows], "verdicts": verdicts}, indent=1))


if __name__ == "__main__":
    main()
