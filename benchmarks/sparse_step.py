"""One decode step of one sparse (DSA) layer of DeepSeek-V3.2: the unmodified model against the compiled one, in one run.

    python benchmarks/sparse_step.py [--contexts 16384 65536 131072] [--repeats 5]

H=16, R=512, r=64, nope and v 128, 64 index heads of 128, index_topk=2048, hidden 2048, dense FFN 5632, fp32, B=1, T=1, one
thread. Both sides start from the same cache of random latents and index keys. Four virtual ranks run one after the other.
"indexer" is the CPU time of the ops that score and choose, on all ranks together, "the rest" that of the same steps without it: it
should not grow with the context. CPU time of the process, so that a busy machine changes neither.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from decode_step import GEOMETRY as DENSE
from decode_step import SPARE
from measuring import format_machine, median_ms, print_table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
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
    header = ["context", "unmodified", "cp=1", "indexer", "the rest", "cp=4, 4 virtual ranks", "indexer", "the rest"]
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
    parts = {cp: _cpu_ms(module, token, repeats) for cp, module in modules.items()}
    times = [f"{ms['unmodified']:.1f} ms"]
    for cp in modules:
        times += [f"{ms[f'cp={cp}']:.1f} ms", *(f"{part:.1f} ms" for part in parts[cp])]
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


class _Indexer(TorchDispatchMode):
    """Adds up the CPU time of the indexer's ops."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        start = time.process_time()
        out = func(*args, **(kwargs or {}))
        if func._schema.name.removeprefix("helix::") in INDEXER:
            self.seconds += time.process_time() - start
        return out


def _cpu_ms(module: HelixModule, token: Tensor, repeats: int) -> tuple[float, float]:
    """Medians of what one step spends in the ops of the indexer and in all others, milliseconds of the process's CPU time."""
    parts = []
    for _ in range(repeats):
        start = time.process_time()
        with _Indexer() as indexer:
            module(token)
        parts.append((indexer.seconds * 1e3, (time.process_time() - start - indexer.seconds) * 1e3))
    return statistics.median(own for own, _ in parts), statistics.median(rest for _, rest in parts)


if __name__ == "__main__":
    main()
