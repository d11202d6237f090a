"""Peak memory of a long prompt in one step: chunks inside keep it bounded.

    python benchmarks/prefill_memory.py [--cp 4] [--tokens 65536] [--resident 0] [--json]

One DeepSeek-V3 layer, H=16, R=512, r=64, nope and v 128, hidden 2048, dense FFN 5632, fp32, B=1, one thread. The cache
is allocated before; the peak is how far resident memory rises above that during the step, which returns the last
column's logits (logits_to_keep=1). `--resident N`: the first N tokens are random latents that import_cache() has laid
out, and the step appends the rest: the same widest chunks and the same peak for a part of the time.
"""

from __future__ import annotations

import argparse
import json
import time

import torch
from decode_step import GEOMETRY
from measuring import MB, extra_peak_bytes, format_machine, print_table
from transformers import DeepseekV3Config

from helix_compile import helix_compile
from helix_compile.models.presets import build_model
from helix_compile.runtime import step as step_inputs


def measure(cp: int, tokens: int, resident: int) -> dict[str, float]:
    """Bytes of the cache, peak bytes above it, and seconds of a step that ends at `tokens` tokens."""
    compiled = helix_compile(build_model(DeepseekV3Config(**GEOMETRY)), cp=cp, max_batch_size=1, max_seq_len=tokens)
    generator = torch.Generator().manual_seed(0)
    # the libraries' one-time buffers are not counted, and every page of the cache is resident
    compiled(torch.zeros(1, 8, dtype=torch.int64))
    compiled.reset()
    for rank in compiled.ranks:
        for cache in rank.cache:
            cache.zero_()
    if resident:
        latents, k_ropes = ([torch.randn(1, resident, width, generator=generator)] for width in (512, 64))
        compiled.import_cache(latents, k_ropes, [resident])
        del latents, k_ropes
    ids = torch.randint(0, 1024, (1, tokens - resident), generator=generator)
    finite = []
    start = time.perf_counter()
    extra = extra_peak_bytes(lambda: finite.append(bool(compiled(ids, logits_to_keep=1).isfinite().all())))
    seconds = time.perf_counter() - start
    assert finite == [True] and compiled.lengths.tolist() == [tokens]
    cache_bytes = sum(c.nbytes for rank in compiled.ranks for c in rank.cache)
    chunks = step_inputs.chunks_of(tokens - resident, 1, tokens)
    return {
        "cp": cp,
        "tokens": tokens,
        "resident": resident,
        "chunk": chunks[0].stop,
        "cache": cache_bytes,
        "extra": extra,
        "seconds": seconds,
    }


def main() -> None:
    """Measure one prompt and print a row, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cp", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--resident", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    measured = measure(arguments.cp, arguments.tokens, arguments.resident)
    if arguments.json:
        print(json.dumps(measured))
        return
    print(f"{format_machine()}\n")
    row = [
        str(arguments.cp),
        f"{arguments.tokens:,}",
        f"{arguments.resident:,}",
        str(measured["chunk"]),
        *(f"{measured[k] / MB:.0f} MB" for k in ("cache", "extra")),
        f"{measured['seconds']:.0f} s",
    ]
    print_table(["cp", "tokens", "of them resident", "tokens of a chunk", "cache", "peak above it", "time"], [row])


if __name__ == "__main__":
    main()
