"""mla_decode on a CPU: C++ (lower="cpp") against the reference's two matmuls, torch's sdpa and Inductor's code, in one run.

    python benchmarks/cpu_attention.py [--threads 1] [--repeats 9] [--others]

R=512, r=64, full shards of pages in a row. With one thread the process's CPU time counts, so that other work on the machine does
not; with more, wall time does. All take turns, medians. `--others`: also sdpa on the latents as keys and values, and the two matmuls
and softmax of one sequence compiled by Inductor (one dtype, few shapes: it compiles).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from measuring import format_machine, print_table
from torch.nn.functional import pad, scaled_dot_product_attention

from helix_compile.kernels.cpp.mla_decode import mla_decode_cpp
from helix_compile.kernels.reference import mla_decode_reference

R, ROPE, PAGE, SCALE = 512, 64, 128, 192**-0.5
SHAPES = [(B, H, T, S) for B in (1, 8) for H in (16, 128) for T in (1, 4) for S in (1024, 16384, 65536)]
MOST = 2**21  # rows x slots of a case: above it a case takes seconds


def main() -> None:
    """One row a shape and dtype."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--others", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = time.process_time if arguments.threads == 1 else time.perf_counter
    rows = []
    for dtype in (torch.float32,) if arguments.others else (torch.float32, torch.bfloat16, torch.float64):
        for shape in SHAPES:
            if shape[0] * shape[1] * shape[2] * shape[3] <= MOST and not (arguments.others and shape[2] > 1):
                rows.append(_row(dtype, shape, arguments.repeats, arguments.others, clock))
    print(f"{format_machine()}; {'CPU' if arguments.threads == 1 else 'wall'} time, median of {arguments.repeats}")
    others = ["sdpa", "Inductor"] if arguments.others else []
    print_table(
        ["dtype", "B", "H", "T", "S", "reference ms", "C++ ms", *(f"{o} ms" for o in others), "reference / C++"], rows
    )


def _row(
    dtype: torch.dtype, shape: tuple[int, ...], repeats: int, others: bool, clock: Callable[[], float]
) -> list[str]:
    B, _, _, S = shape
    arguments = _arguments(dtype, *shape)
    runs: dict[str, Callable[[], Any]] = {
        "reference": lambda: mla_decode_reference(*arguments),
        "cpp": lambda: mla_decode_cpp(*arguments),
    }
    if others:
        kv, q = arguments[2].view(B, S, R + ROPE), torch.cat(arguments[:2], dim=-1)
        runs |= {"sdpa": lambda: _sdpa(q, kv), "inductor": lambda: [_two_matmuls(q[b, 0], kv[b]) for b in range(B)]}
    (wanted, _), (got, _) = runs["reference"](), runs["cpp"]()
    assert (got - wanted).abs().max() <= {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float64: 1e-12}[dtype]
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(repeats + 1):
        for name, run in runs.items():
            start = clock()
            run()
            if number:
                taken[name].append((clock() - start) * 1e3)
    ms = {name: statistics.median(times) for name, times in taken.items()}
    numbers = [*map(str, shape), *(f"{t:.2f}" for t in ms.values())]
    return [str(dtype).removeprefix("torch."), *numbers, f"{ms['reference'] / ms['cpp']:.2f}"]


def _arguments(dtype: torch.dtype, B: int, H: int, T: int, S: int) -> tuple[Any, ...]:
    draw = torch.Generator().manual_seed(0)
    cache = torch.randn(B * S // PAGE, PAGE, R + ROPE, generator=draw).to(dtype)
    table = torch.arange(len(cache)).view(B, -1)
    visible = (S - torch.arange(T - 1, -1, -1)).expand(B, T).int().contiguous()
    q = torch.randn(B, T, H, R + ROPE, generator=draw).to(dtype)
    return q[..., :R].contiguous(), q[..., R:].contiguous(), cache, table, visible, SCALE


def _sdpa(q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
    """Keys and values of one width, as its CPU kernel wants them."""
    values = pad(kv[..., :R], (0, ROPE))
    shape = (-1, q.shape[2], -1, -1)
    return scaled_dot_product_attention(
        q.transpose(1, 2), *(x[:, None].expand(shape) for x in (kv, values)), scale=SCALE
    )


@torch.compile(dynamic=True)
def _two_matmuls(q: torch.Tensor, kv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scores = (q @ kv.T) * SCALE
    return torch.softmax(scores, dim=-1) @ kv[:, :R], torch.logsumexp(scores, dim=-1)


if __name__ == "__main__":
    main()
