"""One decode step of one DeepSeek-V3 layer: the unmodified model (sdpa) against the compiled one, in one run.

    python benchmarks/decode_step.py [--contexts 4096 16384 32768] [--repeats 10] [--lower auto cpp] [--cpu-time]

H=16, R=512, r=64, nope and v 128, hidden 2048, dense FFN 5632, fp32, B=1, T=1, one thread. Both sides start from the
same cache of random latents. Four virtual ranks run one after the other in this process, so cp=4 does all the
ranks' work on one core: real ranks would share it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from measuring import MB, extra_peak_bytes, format_machine, median_ms, print_table
from torch import Tensor, nn
from transformers import DeepseekV3Config
from transformers.cache_utils import DynamicCache

from helix_compile import HelixModule, helix_compile
from helix_compile.models.presets import build_model

GEOMETRY = {
    "vocab_size": 1024,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 1,
    "first_k_dense_replace": 1,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "max_position_embeddings": 65536,
    "attn_implementation": "sdpa",
}
SPARE = 128  # tokens of room behind the context, for the steps that are measured


def main() -> None:
    """Measure every context and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 16384, 32768])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--lower", nargs="+", default=["auto"], help="of the compiled model; cpp: attention in C++")
    parser.add_argument("--cpu-time", action="store_true", help="of this process, where other work takes the cores")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = build_model(DeepseekV3Config(**GEOMETRY))
    print(f"{format_machine()}\n")
    rows = [
        row
        for S in arguments.contexts
        for row in _measure(model, S, arguments.repeats, arguments.lower, arguments.cpu_time)
    ]
    header = ["context", "lower", "unmodified (sdpa)", "cp=1", "cp=4, 4 virtual ranks", "ratio cp=1", "ratio cp=4"]
    print_table([*header, "extra memory unmodified / cp=1 / cp=4", "logits, max relative deviation"], rows)


def _measure(model: nn.Module, S: int, repeats: int, lowers: list[str], cpu_time: bool) -> list[list[str]]:
    generator = torch.Generator().manual_seed(S)
    latent, k_rope = (torch.randn(1, S, width, generator=generator) for width in (512, 64))
    steps: dict[str, Callable[[], Tensor]] = {"unmodified": _unmodified_step(model, latent, k_rope)}
    for lower in lowers:
        for cp in (1, 4):
            steps[f"{lower} cp={cp}"] = _compiled_step(model, cp, lower, latent, k_rope)
    logits = {name: step() for name, step in steps.items()}
    top = logits["unmodified"].abs().max()
    worst = max(float((x - logits["unmodified"]).abs().max() / top) for x in logits.values())
    ms = median_ms(steps, repeats, clock=time.process_time if cpu_time else time.perf_counter)
    memory = {name: f"{extra_peak_bytes(step) / MB:.1f}" for name, step in steps.items()}
    rows = []
    for lower in lowers:
        names = ["unmodified", *(f"{lower} cp={cp}" for cp in (1, 4))]
        times, ratios = [f"{ms[n]:.1f} ms" for n in names], [f"{ms['unmodified'] / ms[n]:.1f}x" for n in names[1:]]
        rows.append([str(S), lower, *times, *ratios, " / ".join(memory[n] for n in names) + " MB", f"{worst:.1e}"])
    return rows


def _unmodified_step(model: nn.Module, latent: Tensor, k_rope: Tensor) -> Callable[[], Tensor]:
    cache = DynamicCache(config=model.config)
    cache.update(latent[:, None], k_rope[:, None], 0)
    token = torch.tensor([[7]])

    def step() -> Tensor:
        with torch.no_grad():
            return model(input_ids=token, past_key_values=cache).logits

    return step


def _compiled_step(model: nn.Module, cp: int, lower: str, latent: Tensor, k_rope: Tensor) -> Callable[[], Tensor]:
    S = latent.shape[1]
    compiled: HelixModule = helix_compile(model, cp=cp, lower=lower, max_batch_size=1, max_seq_len=S + SPARE)
    compiled.import_cache([latent], [k_rope], [S])
    token = torch.tensor([[7]])
    return lambda: compiled(token)


if __name__ == "__main__":
    main()
