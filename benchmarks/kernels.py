"""Kernels on a CUDA device: time, TFLOP/s, GB/s and the fraction of the card's limit, next to torch and other libraries.

    python benchmarks/kernels.py [--op mla_decode ...] [--batch 1 8 64] [--tokens 4096 1048576] [--json]

DeepSeek-V3's widths in bf16: mla_decode with 128 heads, merge_lse of 8 peers, moe_experts with 32 of 256 experts (ep = 8);
gqa_decode with 64 query heads on 8 KV heads of width 128. --tokens are those of one sequence on one rank. Every call is
captured in a CUDA graph and replayed; several sets of inputs take turns, so that the second-level cache holds none of
them. What does not fit the memory is left out and named. The output of each provider is compared with torch's.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from dataclasses import dataclass
from typing import Any

import torch
from kernel_costs import CARDS, fraction_of_limit

OPS = ("mla_decode", "gqa_decode", "merge_lse", "moe_experts")
BATCHES = (1, 4, 16, 64)
TOKENS = (4096, 16384, 65536, 262144, 1048576)
MAX_SETS = 64
# what a provider may raise where it does not take a shape, a card or a version; it is printed, the others go on
REFUSALS = (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError, AssertionError, ImportError)


@dataclass(frozen=True)
class Row:
    """One provider on one shape; `failure` instead of figures where it could not run."""

    op: str
    B: int
    S: int
    provider: str
    us: float | None = None
    tflops: float | None = None
    gbytes: float | None = None
    fraction: float | None = None
    limit: str = ""
    ratio: float | None = None
    deviation: float | None = None
    failure: str = ""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--batch", nargs="+", type=_positive, default=list(BATCHES), metavar="B")
    parser.add_argument("--tokens", nargs="+", type=_positive, default=list(TOKENS), metavar="S")
    parser.add_argument("--rep", type=_positive, default=50, help="milliseconds a figure is measured over")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return number


def input_sets(nbytes: float, cache_bytes: int, free_bytes: float) -> int:
    """Sets of inputs that together are four times the second-level cache; 0 where one does not fit the memory.

    Half of the free memory is left to workspaces and to what the baseline makes.
    """
    fitting = int(free_bytes * 0.5 // max(nbytes, 1))
    return min(fitting, MAX_SETS, 1 + int(4 * cache_bytes // max(nbytes, 1)))


def measure(subject: Any, rep: int) -> list[Row]:
    """All providers on one shape."""
    from triton.testing import do_bench_cudagraph

    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    key = (subject.op, subject.B, subject.S)
    sets = input_sets(subject.cost.nbytes, device.L2_cache_size, torch.cuda.mem_get_info()[0])
    if sets == 0:
        return [Row(*key, "all", failure=f"{subject.cost.nbytes / 2**30:.1f} GiB do not fit")]
    made = [subject.make() for _ in range(sets)]
    outputs: dict[str, torch.Tensor] = {}
    seconds: dict[str, float] = {}
    failures: dict[str, str] = {}
    for provider in made[0]:
        calls = [providers[provider] for providers in made]
        try:
            outputs[provider] = calls[0]().float()
            ms = do_bench_cudagraph(lambda calls=calls: [call() for call in calls], rep=rep, return_mode="median")
            seconds[provider] = ms / 1e3 / sets
        except REFUSALS as refusal:
            failures[provider] = f"{type(refusal).__name__}: {str(refusal).splitlines()[0][:120]}"
    baseline = next(name for name in made[0] if name.startswith("torch"))
    rows = [_row(subject, provider, seconds, outputs, baseline, device.name) for provider in seconds]
    return rows + [Row(*key, name, failure=failure) for name, failure in failures.items()]


def _row(
    subject: Any, provider: str, seconds: dict[str, float], outputs: dict[str, torch.Tensor], baseline: str, card: str
) -> Row:
    took, cost = seconds[provider], subject.cost
    fraction, limit = fraction_of_limit(cost, took, CARDS[card]) if card in CARDS else (None, "unknown")
    ratio, deviation = None, None
    if baseline in seconds:
        expected = outputs[baseline]
        ratio = seconds[baseline] / took
        difference = outputs[provider].view_as(expected) - expected
        deviation = float(difference.abs().max() / expected.abs().max())
    return Row(
        subject.op,
        subject.B,
        subject.S,
        provider,
        took * 1e6,
        cost.flops / took / 1e12,
        cost.nbytes / took / 1e9,
        fraction,
        limit,
        ratio,
        deviation,
    )


def describe_card(name: str) -> str:
    """The limits that fractions are of, with their source; or that there are none."""
    if name not in CARDS:
        return f"{name}: its limits are not in benchmarks/kernel_costs.py, so only absolute figures are given"
    card = CARDS[name]
    return (
        f"{name}: limits {card.bytes_per_s / 1e12:g} TB/s and {card.flops_per_s / 1e12:g} TFLOP/s (dense 16-bit; "
        f"{card.source})"
    )


def _cells(row: Row) -> list[str]:
    def shown(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    if row.failure:
        return [row.op, str(row.B), str(row.S), row.provider, row.failure, *["-"] * 5]
    fraction = "-" if row.fraction is None else f"{row.fraction:.0%} of {row.limit}"
    return [
        row.op,
        str(row.B),
        str(row.S),
        row.provider,
        shown(row.us, ".1f"),
        shown(row.tflops, ".1f"),
        shown(row.gbytes, ".0f"),
        fraction,
        shown(row.ratio, ".2f"),
        shown(row.deviation, ".1e"),
    ]


def main() -> int:
    """Measure and print a table, or JSON; 2 where there is no CUDA device."""
    arguments = parse()
    if not torch.cuda.is_available():
        print(
            "benchmarks/kernels.py measures on a CUDA device and torch finds none here; nothing was measured.",
            file=sys.stderr,
        )
        return 2
    import triton
    from kernel_calls import subjects
    from measuring import print_table

    name = torch.cuda.get_device_name()
    machine = {
        "card": name,
        "limits": describe_card(name),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "command": "python " + " ".join(sys.argv),
    }
    rows: list[Row] = []
    for op in arguments.op:
        for subject in subjects(op, arguments.batch, arguments.tokens):
            rows += measure(subject, arguments.rep)
            gc.collect()  # the closures of one shape hold its inputs
            torch.cuda.empty_cache()
    if arguments.json:
        print(json.dumps({**machine, "rows": [vars(row) for row in rows]}))
        return 0
    print("\n".join(f"{key}: {value}" for key, value in machine.items()))
    header = ["op", "B", "tokens", "provider", "us", "TFLOP/s", "GB/s", "of the limit", "times torch", "deviation"]
    print_table(header, [_cells(row) for row in rows])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
