"""Peak memory of compile + steps with four virtual ranks, beyond the loaded model, over the weights' bytes.

    python benchmarks/memory.py [--cp 4] [--layers 4] [--json]

An FFN-heavy model (about 1 GB of fp32 weights). Capture, shards, caches, a 16-token prompt and one decode step count.
The peak is the process's high-water mark (VmHWM), reset when the model is loaded; the model's own forward runs once
before, so that the libraries' one-time buffers are not counted as ours.
"""

from __future__ import annotations

import argparse
import json
import warnings

import torch
from measuring import MB, extra_peak_bytes, format_machine, print_table
from transformers import DeepseekV3Config

from helix_compile import helix_compile
from helix_compile.models.presets import build_model

# FFN widths divide by four ranks; the MoE layers hold most of the weights, the dense layer a sixth.
FFN_HEAVY = {
    "vocab_size": 1000,
    "hidden_size": 1024,
    "intermediate_size": 14336,
    "moe_intermediate_size": 2048,
    "first_k_dense_replace": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "q_lora_rank": None,
    "kv_lora_rank": 128,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
}


def measure(cp: int, layers: int) -> dict[str, float]:
    """Bytes of the weights, and how far compile + a prompt + a step rise above the loaded model."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # torch.export's own pytree
    model = build_model(DeepseekV3Config(**FFN_HEAVY, num_hidden_layers=layers))
    ids = torch.arange(16)[None]
    with torch.no_grad():
        expected = model(ids).logits
    logits = []

    def compile_and_step() -> None:
        compiled = helix_compile(model, cp=cp, max_batch_size=1, max_seq_len=256)
        logits.append(torch.cat([compiled(ids[:, :15]), compiled(ids[:, 15:])], dim=1))

    extra = extra_peak_bytes(compile_and_step)
    deviation = (logits[0] - expected).abs().max() / expected.abs().max()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return {"cp": cp, "weights": weights, "extra": extra, "deviation": float(deviation)}


def main() -> None:
    """Measure and print one row, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cp", type=int, default=4)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    measured = measure(arguments.cp, arguments.layers)
    if arguments.json:
        print(json.dumps(measured))
        return
    print(f"{format_machine()}\n")
    sizes = [f"{measured[k] / MB:.0f} MB" for k in ("weights", "extra")]
    ratio = f"{measured['extra'] / measured['weights']:.2f}x"
    row = [str(arguments.cp), *sizes, ratio, f"{measured['deviation']:.1e}"]
    print_table(["ranks", "weights", "extra peak", "extra / weights", "logits, max relative deviation"], [row])


if __name__ == "__main__":
    main()
