"""One decode step of one full-width DeepSeek-V3 layer on a card: the unmodified model (sdpa) against the compiled one.

    python benchmarks/card_step.py [--contexts 4096 16384 65536] [--batch 8] [--repeats 20]

H=128, R=512, r=64, nope and v 128, hidden 7168, dense FFN 18432, bfloat16, T=1. All start from the same cache of random
latents. Rank 0 of cp=4 is what one of four cards would compute of a step (its shard is a quarter of the context), without
the exchange: the four virtual ranks run one after the other on this card, and their time is divided by four. Each is measured with
cuda_graphs=False, launched node by node, and with steps replayed from CUDA graphs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from measuring import print_table
from torch import Tensor, nn
from transformers import DeepseekV3Config
from transformers.cache_utils import DynamicCache

from helix_compile import helix_compile
from helix_compile.models.presets import build_model, preset_config

SPARE = 256  # tokens of room behind the context, for the steps that are measured
COLUMNS = ("cp=1, launched", "cp=4 share, launched", "cp=1", "cp=4 share")


def main() -> int:
    """One row a context; 2 where there is no CUDA device."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 16384, 65536])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            "benchmarks/card_step.py measures on a CUDA device and torch finds none here; nothing was measured.",
            file=sys.stderr,
        )
        return 2
    config: Any = preset_config("deepseek-v3")
    config = DeepseekV3Config(
        **{**config.to_dict(), "num_hidden_layers": 1, "first_k_dense_replace": 1, "vocab_size": 1024}
    )
    config._attn_implementation = "sdpa"
    model = build_model(config, dtype=torch.bfloat16).to("cuda")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, batch {arguments.batch}\n")
    rows = [_measure(model, S, arguments.batch, arguments.repeats) for S in arguments.contexts]
    print_table(["context", "unmodified (sdpa)", *COLUMNS, *(f"ratio {c}" for c in COLUMNS[2:]), "deviation"], rows)
    return 0


def _measure(model: nn.Module, S: int, B: int, repeats: int) -> list[str]:
    draw = torch.Generator("cuda").manual_seed(S)
    latent, k_rope = (torch.randn(B, S, w, generator=draw, device="cuda", dtype=torch.bfloat16) for w in (512, 64))
    cache = DynamicCache(config=model.config)
    cache.update(latent[:, None].clone(), k_rope[:, None].clone(), 0)
    token = torch.full((B, 1), 7, device="cuda")
    steps: dict[str, Callable[[], Tensor]] = {
        "unmodified": lambda: model(input_ids=token, past_key_values=cache).logits
    }
    for name in COLUMNS:
        cp, graphs = int(name[3]), "launched" not in name
        compiled = helix_compile(model, cp=cp, max_batch_size=B, max_seq_len=S + SPARE, cuda_graphs=graphs)
        compiled.import_cache([latent], [k_rope], [S] * B)
        steps[name] = lambda compiled=compiled: compiled(token)
    with torch.no_grad():
        logits = {name: step().float() for name, step in steps.items()}
        ms = {name: _median_ms(step, repeats) for name, step in steps.items()}
    for name in COLUMNS:
        ms[name] /= int(name[3])  # the virtual ranks take turns
    top = logits["unmodified"].abs().max()
    worst = max(float((x - logits["unmodified"]).abs().max() / top) for x in logits.values())
    ratios = [f"{ms['unmodified'] / ms[name]:.1f}x" for name in COLUMNS[2:]]
    return [str(S), *(f"{t:.2f} ms" for t in ms.values()), *ratios, f"{worst:.1e}"]


def _median_ms(step: Callable[[], Tensor], repeats: int) -> float:
    """From an idle card to the end of the step's last kernel, launches included. The first steps warm up, and record."""
    taken = []
    for _ in range(repeats + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        step()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end))
    return statistics.median(taken[2:])


if __name__ == "__main__":
    raise SystemExit(main())
