"""The planner against what others report: the paper's gains, and where sharding the cache stops being worth it.

    python -m benchmarks.planner

Prints the tables of docs/planner.md. Everything of ours in them is predicted; what others report was measured, or simulated, by them. No
weights are read; a minute or two on a laptop, most of it capturing the two models.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from helix_compile.capture.source import captured_from
from helix_compile.compile import match_model
from helix_compile.config.options import HelixOptions
from helix_compile.models.presets import build_model, preset_config
from helix_compile.predict.accelerators import PRESETS, Accelerator
from helix_compile.predict.costed import CostedModel
from helix_compile.predict.formats import cache_format, weight_format
from helix_compile.predict.search import Goal, Point, Search, batches_of, pareto

LLAMA_405B = {
    "vocab_size": 128256,
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
    "num_key_value_heads": 8,
    "max_position_embeddings": 1 << 20,
}


def costed(model: Any) -> CostedModel:
    """A model on meta, up to its matches."""
    base = HelixOptions(cp=2, max_batch_size=256, max_seq_len=1 << 20)
    return CostedModel(*match_model(captured_from(model, None), base), base)


def deepseek() -> CostedModel:
    """DeepSeek-V3's sizes, which are R1's."""
    return costed(build_model(preset_config("deepseek-v3"), dtype=torch.bfloat16, meta=True))


def llama() -> CostedModel:
    """Llama-405B's sizes."""
    from transformers import LlamaConfig

    return costed(build_model(LlamaConfig(**LLAMA_405B), dtype=torch.bfloat16, meta=True))


# ---- the paper's gains: 64 GPUs, one million tokens, FP4 throughout, batches that are powers of two


@dataclass(frozen=True)
class Gains:
    """Best plans over the best with cp = 1.

    Attributes:
        users: largest ratio of users that are served in a step of the same length.
        throughput: largest ratio of tokens/s a GPU at the same tokens/s a user.
        interactivity: ratio of the most tokens/s a user.
    """

    users: float
    throughput: float
    interactivity: float


def gains(model: CostedModel, **fixed: Any) -> Gains:
    """On gb200-paper; `fixed`: other fixed terms."""
    goal = Goal(
        accelerator=replace(PRESETS["gb200-paper"], **fixed),
        ranks=64,
        context=1_000_000,
        batches=batches_of("1..1024"),
        fewer_ranks=True,
        weights=weight_format("fp4"),
        cache=cache_format("fp4"),
    )
    every = [p for p in Search(model, goal).points() if p.fits]
    plain = [p for p in every if p.candidate.cp == 1]
    of_plain, of_all = pareto(plain), pareto(every)

    def users(points: list[Point], us: float) -> int:
        return max(p.batch for p in points if p.step_us <= us)

    def rate(points: list[Point], least: float) -> float:
        return max((p.tokens_per_s_per_gpu for p in points if p.tokens_per_s_per_user >= least), default=0.0)

    reached = [p for p in of_all if rate(of_plain, p.tokens_per_s_per_user)]
    return Gains(
        max(users(every, p.step_us) / users(plain, p.step_us) for p in plain),
        max(p.tokens_per_s_per_gpu / rate(of_plain, p.tokens_per_s_per_user) for p in reached),
        of_all[0].tokens_per_s_per_user / of_plain[0].tokens_per_s_per_user,
    )


# ---- where others report that it stops being worth it

PCIE = replace(
    PRESETS["b200"],
    name="pcie",
    hbm_tb_s=1.8,
    memory_gb=96,
    link_gb_s=50,
    latency_us={
        "all_to_all_single": ((2, 20.0, 25.0), (8, 30.0, 40.0)),
        "all_gather_into_tensor": ((2, 20.0, 20.0), (8, 40.0, 40.0)),
        "reduce_scatter_tensor": ((2, 20.0, 20.0), (8, 40.0, 40.0)),
        "all_reduce": ((2, 15.0, 15.0), (8, 30.0, 30.0)),
    },
    source="assumed, not measured: a workstation's cards on PCIe",
)


@dataclass(frozen=True)
class Crossover:
    """One reported point: who won, and what the planner says of DeepSeek-V3 there."""

    source: str
    setup: str
    reported: str
    accelerator: Accelerator
    context: int
    batches: tuple[int, ...]
    ranks: int = 8
    cp: int = 8
    weights: str = "fp8"
    cache: str = "fp8"

    def gain(self, model: CostedModel) -> float:
        """Tokens/s a GPU with cp over those with cp = 1, minus 1; each at the best of the batches that fit."""
        goal = Goal(
            accelerator=self.accelerator,
            ranks=self.ranks,
            context=self.context,
            batches=self.batches,
            weights=weight_format(self.weights),
            cache=cache_format(self.cache),
        )
        every = Search(model, goal).points(list(model.choices(self.ranks)))
        best = {
            cp: max(
                p.tokens_per_s_per_gpu for p in every if p.candidate.cp == cp and (p.fits or len(self.batches) == 1)
            )
            for cp in (1, self.cp)
        }
        return best[self.cp] / best[1] - 1

    def predicted(self, model: CostedModel) -> str:
        """Which side the planner says wins."""
        return "cp=1" if self.gain(model) < 0 else f"cp={self.cp}"


def _sglang() -> Iterable[Crossover]:
    setup = "trtllm_mla, DCP8 against TP8"
    for context, batch, winner in (
        (32, 8, "cp=1"),
        (32, 16, "cp=8"),
        (64, 4, "cp=1"),
        (64, 8, "cp=8"),
        (128, 2, "cp=1"),
        (128, 4, "cp=8"),
        (256, 1, "cp=8"),
        (128, 64, "cp=8"),
    ):
        yield Crossover(
            "SGLang #33926", f"{setup}, {context}K, c={batch}", winner, PRESETS["b200"], context << 10, (batch,)
        )


CROSSOVERS = (
    Crossover("TRT-LLM docs", "gains need > 64K at low batch: 32K, B=1", "cp=1", PRESETS["gb200"], 32 << 10, (1,)),
    Crossover("TRT-LLM docs", "64K, B=1", "cp=1", PRESETS["gb200"], 64 << 10, (1,)),
    Crossover("TRT-LLM docs", "1M, B=1", "cp=8", PRESETS["gb200"], 1 << 20, (1,)),
    Crossover("paper, section 5", "4K, B=8", "cp=1", PRESETS["gb200"], 4 << 10, (8,)),
    *_sglang(),
    Crossover(
        "ROCm ATOM #847", "R1, TP8 against TP8 DCP8, 1K in 1K out", "cp=1", PRESETS["h200"], 1536, batches_of("1..512")
    ),
    Crossover("ROCm ATOM #847", "8K in 1K out", "cp=8", PRESETS["h200"], 8704, batches_of("1..512")),
    Crossover("ROCm ATOM #847", "8K in 8K out", "cp=8", PRESETS["h200"], 12288, batches_of("1..512")),
    Crossover("rtx6kpro #25", "8 cards on PCIe, one stream, dcp 2", "cp=1", PCIE, 16 << 10, (1,), cp=2),
    Crossover("rtx6kpro #25", "dcp 8", "cp=1", PCIE, 16 << 10, (1,)),
    Crossover("SGLang #34355", "two cards, dcp 2, decode", "cp=1", PCIE, 16 << 10, (1,), ranks=2, cp=2),
    Crossover("vLLM #50055", "TP8 to DCP8, 120K, c=1", "cp=8", PRESETS["b200"], 120_000, (1,)),
    Crossover(
        "vLLM blog 2026-07-27",
        "NVFP4, 8 B200, all that fits, 64K",
        "cp=8",
        PRESETS["b200"],
        64 << 10,
        batches_of("1..512"),
        weights="nvfp4",
    ),
)


# ---- what overlap="hopb" gains or loses


@dataclass(frozen=True)
class Overlapped:
    """The fastest step of a batch with overlap against the fastest without it."""

    accelerator: str
    context: int
    batch: int
    fixed: float
    gain: float
    layout: str


def overlapped(model: CostedModel, accelerator: Accelerator, context: int, batch: int, formats: str) -> Overlapped:
    """Of plans with cp > 1 on 64 ranks that fit."""
    goal = Goal(
        accelerator=accelerator,
        ranks=64,
        context=context,
        batches=(batch,),
        weights=weight_format("fp4" if formats == "fp4" else "nvfp4"),
        cache=cache_format(formats),
    )
    points = [p for p in Search(model, goal).points() if p.fits and p.candidate.cp > 1]
    best = {
        how: min((p for p in points if p.candidate.overlap == how), key=lambda p: p.step_us) for how in ("none", "hopb")
    }
    own = best["hopb"].candidate
    layout = f"cp={own.cp}, tpa={own.tpa}, {own.merge}" + (f", v_up={own.v_up}" if own.v_up != "auto" else "")
    gain = 1 - best["hopb"].step_us / best["none"].step_us
    return Overlapped(accelerator.name, context, batch, accelerator.fixed_us_per_layer, gain, layout)


OVERLAPPED = [
    (preset, context, batch)
    for preset in ("gb200-paper", "gb200")
    for context, batch in ((1_000_000, 8), (1_000_000, 64), (131_072, 256))
]


def main() -> None:
    """Print the tables."""
    r1, dense = deepseek(), llama()
    print("| figure | the paper | predicted | kind |\n|---|---|---|---|")
    at, bare = (gains(r1), gains(dense)), (gains(r1, fixed_us_per_layer=0.0), gains(dense, fixed_us_per_layer=0.0))
    print(
        f"| users in a step of the same length, R1 | 32x | {at[0].users:.1f}x | predicted; {bare[0].users:.1f}x at 0 us a layer |"
    )
    print(
        f"| tokens/s a GPU at the same tokens/s a user, Llama-405B | 4x | {at[1].throughput:.2f}x | predicted; {bare[1].throughput:.2f}x at 0 us |"
    )
    for name, reported, own, without in (("R1", "1.5x", at[0], bare[0]), ("Llama-405B", "1.13x", at[1], bare[1])):
        print(
            f"| most tokens/s a user, {name} | {reported} | {own.interactivity:.2f}x | calibrated: by 47 us fixed a layer; "
            f"{without.interactivity:.2f}x at 0 us |"
        )
    print("\n| source | set-up | reported faster | predicted faster | by | |\n|---|---|---|---|---|---|")
    for c in CROSSOVERS:
        gain, side = c.gain(r1), c.predicted(r1)
        print(
            f"| {c.source} | {c.setup} | {c.reported} | {side} | {gain:+.0%} | {'' if side == c.reported else 'we disagree'} |"
        )
    print(
        "\n| model | machine | context | batch | overlap gains | at 0 us fixed | fastest with overlap |\n|---|---|---|---|---|---|---|"
    )
    for name, model in (("R1", r1), ("Llama-405B", dense)):
        for preset, context, batch in OVERLAPPED:
            formats, machine = ("fp4" if "paper" in preset else "fp8"), PRESETS[preset]
            own = overlapped(model, machine, context, batch, formats)
            free = overlapped(model, replace(machine, fixed_us_per_layer=0.0), context, batch, formats)
            print(f"| {name} | {preset} | {context:,} | {batch} | {own.gain:+.1%} | {free.gain:+.1%} | {own.layout} |")


if __name__ == "__main__":
    main()
