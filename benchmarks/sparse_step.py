"""One decode step of one sparse (DSA) layer of DeepSeek-V3.2: the unmodified model against the compiled one, in one run.

    python benchmarks/sparse_step.py [--contexts 16384 65536 131072] [--repeats 5]

H=16, R=512, r=64, nope and v 128, 64 index heads of 128, index_topk=2048, hidden 2048, dense FFN 5632, fp32, B=1, T=1, one
thread. Both sides start from the same cache of random latents and index keys. Four virtual ranks run one after the other.
"indexer" is the time of the ops that score and choose; what is left of a step should not grow with the context.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from decode_step import GEOMETRY as DENSE
from decode_step import SPARE
from measuring import format_machine, median_ms, print_table
from torch import Tensor, nn
from transformers import DeepseekV32Config
from transformers.cache_utils import DynamicCache

from helix_compile import HelixModule, helix_compile
from helix_compile.models.presets import build_model

GEOMETRY = {
    **DENSE,
    "q_lora_rank": 512,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 2048,
    "max_position_embeddings": 2**18,
}
INDEXER = ("index_scores", "topk_candidates", "kth_candidate", "select_slots")


def main() -> None:
    """Measure every context and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contexts", type=int, nargs="+", default=[16384, 65536, 131072])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = build_model(DeepseekV32Config(**GEOMETRY))
    print(f"{format_machine()}\n")
    rows = [_measure(model, S, arguments.repeats) for S in arguments.contexts]
    header = ["context", "unmodified", "cp=1", "of it indexer", "cp=4, 4 virtual ranks", "of it indexer"]
    print_table([*header, "ratio cp=1", "ratio cp=4", "logits, max relative deviation"], rows)


def _measure(model: nn.Module, S: int, repeats: int) -> list[str]:
    generator = torch.Generator().manual_seed(S)
    latent, k_rope, key = (torch.randn(1, S, width, generator=generator) for width in (512, 64, 128))
    steps: dict[str, Callable[[], Tensor]] = {"unmodified": _unmodified_step(model, latent, k_rope, key)}
    modules = {cp: _compiled(model, cp, latent, k_rope, key) for cp in (1, 4)}
    token = torch.tensor([[7]])
    for cp, module in modules.items():
        steps[f"cp={cp}"] = lambda module=module: module(token)
    logits = {name: step() for name, step in steps.items()}
    top = logits["unmodified"].abs().max()
    worst = max(float((x - logits["unmodified"]).abs().max() / top) for x in logits.values())
    ms = median_ms(steps, repeats)
    indexer = {cp: _indexer_ms(module, token) for cp, module in modules.items()}
    times = [f"{ms['unmodified']:.1f} ms"]
    for cp in modules:
        times += [f"{ms[f'cp={cp}']:.1f} ms", f"{indexer[cp]:.1f} ms"]
    ratios = [f"{ms['unmodified'] / ms[f'cp={cp}']:.1f}x" for cp in modules]
    return [str(S), *times, *ratios, f"{worst:.1e}"]


def _unmodified_step(model: nn.Module, latent: Tensor, k_rope: Tensor, key: Tensor) -> Callable[[], Tensor]:
    cache = DynamicCache(config=model.config)
    cache.update(latent[:, None], k_rope[:, None], 0)
    cache.update_indexer(key, 0)
    token = torch.tensor([[7]])

    def step() -> Tensor:
        with torch.no_grad():
            return model(input_ids=token, past_key_values=cache).logits

    return step


def _compiled(model: nn.Module, cp: int, latent: Tensor, k_rope: Tensor, key: Tensor) -> HelixModule:
    S = latent.shape[1]
    compiled: HelixModule = helix_compile(model, cp=cp, max_batch_size=1, max_seq_len=S + SPARE)
    compiled.import_cache([latent], [k_rope], [S], index_keys=[key])
    return compiled


def _indexer_ms(module: HelixModule, token: Tensor) -> float:
    """Milliseconds that one step spends in the ops of the indexer, on all ranks together."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        module(token)
    events = profile.key_averages()
    return sum(e.cpu_time_total for e in events if e.key.removeprefix("helix::") in INDEXER) / 1e3


if __name__ == "__main__":
    main()
