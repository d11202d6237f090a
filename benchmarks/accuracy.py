"""Scores of the unmodified model and of compiled ones, several ranks and ways of prefill at once: they share its prefill.

    python benchmarks/accuracy.py out/recall [--contexts 1024 4096 16384 65536] [--cp 1 2 4 8] [--prefill helix model handover]
        [--tasks recall needle copy] [--limit 50] [--dtype float32] [--out FOLDER]

`helix-compile eval` is the same for one cp and one prefill. A module of more ranks than the model has heads pads them (pad_heads).
"""

from __future__ import annotations

import argparse
import os
import resource
import time
from pathlib import Path

import torch
from measuring import format_machine

from helix_compile import helix_compile
from helix_compile.capture.source import load_folder
from helix_compile.eval.answers import Answerer, LocalAnswerer
from helix_compile.eval.decoders import PREFILLS, HelixDecoder, ModelDecoder
from helix_compile.eval.evaluation import ORIGINAL, evaluate
from helix_compile.eval.folder import load_tokenizer
from helix_compile.eval.run import Asked, documents_of
from helix_compile.eval.tasks import TASKS


def main() -> None:
    """A row for each task, context and module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--cp", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--prefill", nargs="+", default=["handover"], choices=PREFILLS)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--limit", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, help="folder for scores.json and scores.svg")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    model = load_folder(chosen.folder, getattr(torch, chosen.dtype))[0]
    heads = model.config.num_attention_heads
    original = ModelDecoder(model)
    answerers: dict[str, Answerer] = {ORIGINAL: LocalAnswerer(original)}
    for cp in chosen.cp:
        options = {"max_batch_size": 1, "max_seq_len": max(chosen.contexts), "pad_heads": heads % cp > 0}
        compiled = helix_compile(model, cp=cp, **options)
        for prefill in chosen.prefill:
            sender = None if prefill == "helix" else original
            answerers[f"cp={cp}, {prefill}"] = LocalAnswerer(HelixDecoder(compiled, prefill, sender))
    documents = documents_of(
        Asked(chosen.tasks, chosen.contexts, chosen.limit, chosen.seed), load_tokenizer(chosen.folder)
    )
    begun = time.process_time()
    said = set[str]()

    def progress(what: str, count: int, total: int) -> None:
        if what not in said:
            said.add(what)
            print(f"{time.strftime('%H:%M:%S')} {what}", flush=True)

    evaluation = evaluate(answerers, documents, progress)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    where = f"{format_machine()}; load {os.getloadavg()[0]:.1f}; {time.process_time() - begun:.0f} s of processor, {peak:.1f} GB at most"
    evaluation.facts = {"model": str(chosen.folder), "dtype": chosen.dtype, "seed": chosen.seed, "machine": where}
    print(f"{where}; {chosen.dtype}\n\n{evaluation}")
    if chosen.out:
        chosen.out.mkdir(parents=True, exist_ok=True)
        (chosen.out / "scores.json").write_text(evaluation.to_json() + "\n")
        (chosen.out / "scores.svg").write_text(evaluation.to_svg())


if __name__ == "__main__":
    main()
