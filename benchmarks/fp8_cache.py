"""What a cache in FP8 loses: logits and the most likely tokens against the same plan with a cache in the model's dtype.

    python benchmarks/fp8_cache.py [--batch 4] [--prompt 128] [--steps 32]

DeepSeek-V3's cache (R=512, r=64), H=16, hidden 1024, 4 layers, dense FFN 2048, random weights, float32, cp=2. Every module gets the same
prompt and then, token by token, what the unrounded one finds most likely.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from measuring import print_table
from torch import Tensor
from transformers import DeepseekV3Config

from helix_compile import helix_compile
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
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--steps", type=int, default=32)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = build_model(DeepseekV3Config(**SIZES), dtype=torch.float32)
    with torch.no_grad():  # random weights leave attention flat: then nothing that is cached matters
        for name, weight in model.named_parameters():
            if "q_b_proj" in name or "kv_b_proj" in name:
                weight.mul_(4.0)
    ids = torch.randint(0, SIZES["vocab_size"], (arguments.batch, arguments.prompt))
    exact, tokens, entries = _run(model, ids, arguments.steps, None)
    largest = [max(float(x.abs().max()) for x in parts) for parts in zip(*entries, strict=True)]
    fitted = tuple(value / 448 for value in largest)
    formats: dict[str, dict[str, Any]] = {
        "fp8_e4m3, scale 1": {"cache_dtype": "fp8_e4m3"},
        "fp8_e4m3, a layer's largest / 448": {"cache_dtype": "fp8_e4m3", "cache_scale": fitted},
        "fp8_ds_mla": {"cache_dtype": "fp8_ds_mla"},
    }
    rows = []
    for name, plan in formats.items():
        got, _, _ = _run(model, ids, arguments.steps, tokens, **plan)
        per_token = plan_bytes(model, plan)
        loss = float((got - exact).norm() / exact.norm())
        agreed = float((got.argmax(-1) == exact.argmax(-1)).double().mean())
        rows.append([name, f"{per_token}", f"{loss:.2e}", f"{agreed:.1%}"])
    print(f"torch {torch.__version__}, batch {arguments.batch}, prompt {arguments.prompt}, {arguments.steps} steps\n")
    print_table(["cache", "bytes a token and layer", "rel-RMSE of logits", "same most likely token"], rows)
    return 0


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
    decided = {d.name: dict(d.inputs) for d in helix_compile(model, cp=1, **plan, max_seq_len=8).plan.decisions}
    return int(decided["cache_dtype"]["bytes_per_token"]) // int(SIZES["num_hidden_layers"])


if __name__ == "__main__":
    sys.exit(main())
