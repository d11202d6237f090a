"""What verify() costs: seconds and peak memory for the tiny preset and for two layers of DeepSeek-V3's real widths.

    python benchmarks/verify_cost.py [--real] [--experts 8]

The baseline of the ratio is one step of the unmodified model on 8 tokens in the same process.
"""

from __future__ import annotations

import argparse
import resource
import time

import torch
from transformers import DeepseekV3Config

from helix_compile import helix_compile, verify
from helix_compile.models.presets import build_model, preset_config


def measure(name: str, config: DeepseekV3Config, dtype: torch.dtype) -> None:
    """Compile, verify, print one line."""
    model = build_model(config, dtype=dtype)
    ids = torch.zeros(1, 8, dtype=torch.int64)
    with torch.no_grad():
        model(ids)
        start = time.perf_counter()
        model(ids)
    step = time.perf_counter() - start
    compiled = helix_compile(model, cp=4)
    report = verify(compiled, model)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{name}, {str(dtype).removeprefix('torch.')}, {parameters:,} parameters, cp=4: verify {report.seconds:.1f} s "
        f"({report.seconds / step:.0f} steps of the model on 8 tokens), peak {peak:.1f} GiB, ok={report.ok}"
    )
    for note in report.notes:
        print("  note:", note)
    for finding in report.findings:
        print(finding)


def main() -> None:
    """Parse and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--real", action="store_true", help="two layers of real width too (needs 20 GiB)")
    parser.add_argument("--experts", type=int, default=8, help="routed experts of the real-width layer")
    arguments = parser.parse_args()
    for dtype in (torch.float32, torch.bfloat16):
        measure("tiny", preset_config("tiny"), dtype)
    if arguments.real:
        config = DeepseekV3Config(
            vocab_size=1024,
            num_hidden_layers=2,
            first_k_dense_replace=1,
            n_group=1,
            topk_group=1,
            n_routed_experts=arguments.experts,
            num_experts_per_tok=min(8, arguments.experts),
            max_position_embeddings=163840,
        )
        measure("two layers of real width", config, torch.bfloat16)


if __name__ == "__main__":
    main()
