"""What a cache in FP8 loses: logits and the most likely tokens against the same plan with a cache in the model's dtype.

    python benchmarks/fp8_cache.py [--batch 4] [--prompt 128] [--steps 32]
    python benchmarks/fp8_cache.py tests/data/recall [--context 4096] [--limit 50]

DeepSeek-V3's cache (R=512, r=64), H=16, hidden 1024, 4 layers, dense FFN 2048, random weights, float32, cp=2. Every module gets the same
prompt and then, token by token, what the unrounded one finds most likely.

Of a FOLDER with a tokenizer: the model in it, asked for facts of long documents (docs/accuracy.md). Every module steps through the document,
and the logits are those of each question's last word, where the answer is due, and of the answer's words but the last.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from measuring import print_table
from torch import Tensor
from transformers import DeepseekV3Config

from helix_compile import helix_compile
from helix_compile.capture.source import load_folder
from helix_compile.eval.decoders import HelixDecoder
from helix_compile.eval.folder import load_tokenizer
from helix_compile.eval.tasks import Document, make_documents
from helix_compile.models.presets import TINY, build_model

SIZES: dict[str, Any] = {
    **TINY,
    "vocab_size": 4096,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": 256,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
}


def main() -> int:
    """One row a format."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--limit", type=int, default=50)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if arguments.folder is not None:
        _print_answers(arguments.folder, arguments.context, arguments.limit)
    else:
        _print_random(arguments.batch, arguments.prompt, arguments.steps)
    return 0


def _print_random(batch: int, prompt: int, steps: int) -> None:
    model = build_model(DeepseekV3Config(**SIZES), dtype=torch.float32)
    with torch.no_grad():  # random weights leave attention flat: then nothing that is cached matters
        for name, weight in model.named_parameters():
            if "q_b_proj" in name or "kv_b_proj" in name:
                weight.mul_(4.0)
    ids = torch.randint(0, SIZES["vocab_size"], (batch, prompt))
    exact, tokens, entries = _run(model, ids, steps, None)
    rows = []
    for name, plan in formats_for(entries).items():
        got, _, _ = _run(model, ids, steps, tokens, **plan)
        rows.append([name, f"{plan_bytes(model, plan)}", *_losses(got, exact)])
    print(f"torch {torch.__version__}, batch {batch}, prompt {prompt}, {steps} steps\n")
    print_table(["cache", "bytes a token and layer", "rel-RMSE of logits", "same most likely token"], rows)


def _print_answers(folder: Path, context: int, limit: int) -> None:
    model, _ = load_folder(folder, torch.float32)
    documents = make_documents("recall", load_tokenizer(folder), context, limit)
    exact, entries, right = _answers(model, documents)
    rows = [["as the model", f"{plan_bytes(model, {})}", "", "", f"{right} of {limit}"]]
    for name, plan in formats_for(entries).items():
        got, _, right = _answers(model, documents, **plan)
        rows.append([name, f"{plan_bytes(model, plan)}", *_losses(got, exact), f"{right} of {limit}"])
    print(f"torch {torch.__version__}, {folder}, recall, context {context}, {len(exact)} tokens of answers\n")
    print_table(["cache", "bytes a token and layer", "rel-RMSE of logits", "same most likely token", "right"], rows)


def formats_for(entries: tuple[list[Tensor], list[Tensor]]) -> dict[str, dict[str, Any]]:
    """What is compared; `entries` of the unrounded cache say how large a scale must be for none to be clamped."""
    largest = [max(float(x.abs().max()) for x in parts) for parts in zip(*entries, strict=True)]
    return {
        "fp8_e4m3, scale 1": {"cache_dtype": "fp8_e4m3"},
        "fp8_e4m3, a layer's largest / 448": {
            "cache_dtype": "fp8_e4m3",
            "cache_scale": tuple(value / 448 for value in largest),
        },
        "fp8_ds_mla": {"cache_dtype": "fp8_ds_mla"},
    }


def _losses(got: Tensor, exact: Tensor) -> tuple[str, str]:
    loss = float((got - exact).norm() / exact.norm())
    agreed = float((got.argmax(-1) == exact.argmax(-1)).double().mean())
    return f"{loss:.2e}", f"{agreed:.1%}"


def _answers(model: Any, documents: list[Document], **plan: Any) -> tuple[Tensor, Any, int]:
    """(logits [n, vocab] wherever a word of an answer is due, entries of the first document, questions answered right)."""
    compiled = helix_compile(model, cp=2, max_batch_size=1, max_seq_len=documents[0].context, **plan)
    decoder, logits, entries, right = HelixDecoder(compiled), list[Tensor](), None, 0
    for document in documents:
        decoder.begin(document.ids)
        if entries is None:
            entries = compiled.export_cache()[:2]
        for question in document.questions:
            for token in question.told:
                decoder.step([token])
            said = decoder.step([*question.cue, *question.answer[:-1]], keep=len(question.answer))
            logits.append(said)
            right += said.argmax(-1).tolist() == [*question.answer]
            decoder.truncate(len(document.ids))
    return torch.cat(logits), entries, right


def _run(model: Any, ids: Tensor, steps: int, tokens: Tensor | None, **plan: Any) -> tuple[Tensor, Tensor, Any]:
    """(logits [B, steps, vocab] of the last prompt token and the steps, the tokens fed, entries of the prompt)."""
    compiled = helix_compile(model, cp=2, max_batch_size=len(ids), max_seq_len=ids.shape[1] + steps, **plan)
    logits, fed = [compiled(ids, logits_to_keep=1)], []
    entries = compiled.export_cache()[:2]
    for step in range(steps - 1):
        fed.append(logits[-1].argmax(-1) if tokens is None else tokens[:, step : step + 1])
        logits.append(compiled(fed[-1]))
    return torch.cat(logits, dim=1), torch.cat(fed, dim=1), entries


def plan_bytes(model: Any, plan: dict[str, Any]) -> int:
    """Bytes that a token takes in one layer's cache."""
    compiled = helix_compile(model, cp=1, **plan, max_seq_len=8)
    cache = compiled.ranks[0].cache[0]
    return cache.shape[-1] * cache.element_size()


if __name__ == "__main__":
    sys.exit(main())
