"""What a step costs outside of kernels and collectives, per layer: walked node by node, and with compiled segments, in one run.

    python benchmarks/step_overhead.py [--repeats 50] [--hidden 2048 --layers 2 --context 16384] [--cpp]
    torchrun --nproc-per-node 4 benchmarks/step_overhead.py          the same over gloo: a rank a process

Operators are ATen's, helix's, collectives and their waits, and Inductor's own kernels, which are made to report themselves to
torch.profiler; what lies outside of them is a profiled step less its operators (median). A profiler slows what is around
operators, so read the ratio; step and CPU are of steps without it. A layer's share is what a model of twice the layers takes
more, over the layers that it has more; "once" is what is left of a step: checks, positions, the head. The ways take turns. B=1,
T=1, four ranks, one thread; the context grows by a token a step. Processes meet before each step, outside of what is timed. CPU
is that of this process (all ranks, or one): where processes wait for one another in collectives, and for a core, it is what a
rank does itself. --cpp: attention is one C++ op, both ways (lower="cpp" and "cpp+inductor"); without it, it is Python that calls
torch's ops, which are most of a step. Compile seconds are cold with an empty TORCHINDUCTOR_CACHE_DIR, and warm in the next run
with the same.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from measuring import format_machine, print_table
from torch._inductor import config
from torch.autograd.profiler import _set_is_profiler_enabled
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from helix_compile import HelixModule, helix_compile
from helix_compile.models.presets import build_model, preset_config

TOKEN = torch.tensor([[7]])
STEP = "a whole step"
TURN = 5  # steps that are profiled together
Case = tuple[str, int]  # how it runs, how many times as deep


def main() -> None:
    """One row a way of running."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--hidden", type=int, default=0, help="a wider model than the tiny preset")
    parser.add_argument("--layers", type=int, default=2, help="of the wider model")
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--cpp", action="store_true", help="attention in C++")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ranks = int(os.environ.get("WORLD_SIZE", "4"))
    modules: dict[Case, HelixModule] = {}
    seconds: dict[str, float] = {}
    with config.patch({"cpp.enable_kernel_profile": True}):
        for depth in (1, 2):
            model, layers = _model(arguments.hidden, arguments.layers, depth)
            ways = ("cpp", "cpp+inductor") if arguments.cpp else ("reference", "inductor")
            for name, lower in zip(("node by node", "compiled"), ways, strict=True):
                started = time.perf_counter()
                modules[name, depth] = _filled(model, arguments.context, lower, ranks)
                seconds.setdefault(name, time.perf_counter() - started)
    wall, cpu = (_medians(modules, arguments.repeats, clock) for clock in (time.perf_counter, time.process_time))
    inside, outside = _profiled(modules, arguments.repeats)
    if dist.is_initialized() and dist.get_rank():
        return
    layers //= 2
    a_layer = {name: (outside[name, 2] - outside[name, 1]) / layers for name in seconds}
    rows = [
        [
            name,
            *(f"{of[name, 1]:.2f}" for of in (wall, cpu, inside)),
            f"{a_layer[name] * 1e3:.0f}",
            f"{(outside[name, 1] - layers * a_layer[name]) * 1e3:.0f}",
            f"{seconds[name]:.0f}",
        ]
        for name in seconds
    ]
    print(f"{format_machine()}; load {os.getloadavg()[0]:.1f}")
    world = f"{ranks} processes, gloo" if dist.is_initialized() else f"{ranks} virtual ranks"
    shape = f"hidden {model.config.hidden_size}, {layers} layers, {world}, context {arguments.context}"
    head = ["step ms", "CPU ms", "inside operators ms", "outside us, a layer", "outside us, once", "compile s"]
    print_table([shape, *head], rows)
    step, own = ({name: of[name, 1] for name in seconds} for of in (wall, cpu))
    print(f"compiled / node by node: step {_ratio(step):.2f}, CPU of this process {_ratio(own):.2f}")
    print(f"outside of operators, a layer: {1 / _ratio(a_layer):.1f} times less")


def _ratio(of: dict[str, float]) -> float:
    slow, fast = of.values()
    return fast / slow


def _model(hidden: int, layers: int, depth: int) -> tuple[Any, int]:
    """The model, with `depth` times its layers of each kind, and how many these are."""
    if not hidden:
        config = preset_config("tiny")
        config.num_hidden_layers *= depth
        config.first_k_dense_replace *= depth
        return build_model(config), config.num_hidden_layers
    layers *= depth
    sizes = {"num_attention_heads": 16, "num_key_value_heads": 16, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
    sizes |= {
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "q_lora_rank": None,
        "vocab_size": 1024,
        "n_routed_experts": 8,
    }
    sizes |= {"hidden_size": hidden, "intermediate_size": 2 * hidden, "moe_intermediate_size": hidden // 4}
    sizes |= {"num_hidden_layers": layers, "first_k_dense_replace": depth, "n_group": 1, "topk_group": 1}
    torch.manual_seed(0)
    return DeepseekV3ForCausalLM(DeepseekV3Config(**sizes, num_experts_per_tok=2)).eval(), layers


def _filled(model: Any, context: int, lower: str, ranks: int) -> HelixModule:
    """With one sequence of `context` random latents."""
    compiled = helix_compile(model, cp=ranks, lower=lower, max_batch_size=1, max_seq_len=context + 1024)
    layers, R, r = (getattr(model.config, k) for k in ("num_hidden_layers", "kv_lora_rank", "qk_rope_head_dim"))
    random = torch.Generator().manual_seed(0)
    latents, k_ropes = ([torch.randn(1, context, w, generator=random) for _ in range(layers)] for w in (R, r))
    compiled.import_cache(latents, k_ropes, [context])
    return compiled


def _medians(modules: dict[Case, HelixModule], repeats: int, clock: Callable[[], float]) -> dict[Case, float]:
    """Milliseconds of a step by a clock; the modules take turns, after two steps each that are not counted."""
    times: dict[Case, list[float]] = {case: [] for case in modules}
    for _ in range(repeats + 2):
        for case, module in modules.items():
            _meet()
            started = clock()
            module(TOKEN)
            times[case].append((clock() - started) * 1e3)
    return {case: statistics.median(values[2:]) for case, values in times.items()}


def _meet() -> None:
    """Wait for the other processes."""
    if dist.is_initialized():
        dist.barrier()


def _profiled(modules: dict[Case, HelixModule], repeats: int) -> tuple[dict[Case, float], dict[Case, float]]:
    """Median milliseconds of a step inside and outside of operators."""
    inside: dict[Case, list[float]] = {case: [] for case in modules}
    outside: dict[Case, list[float]] = {case: [] for case in modules}
    for _ in range(0, repeats, TURN):
        for case, module in modules.items():
            with profile(activities=[ProfilerActivity.CPU]) as profiler:
                # or torch puts ranges of its own around compiled code, which cost more than calling it
                _set_is_profiler_enabled(False)
                for _ in range(TURN):
                    _meet()
                    with record_function(STEP):
                        module(TOKEN)
            steps = [event for event in profiler.events() if event.name == STEP]
            own = [_inside(step) / 1e3 for step in steps]
            inside[case] += own
            outside[case] += [step.cpu_time_total / 1e3 - ms for step, ms in zip(steps, own, strict=True)]
    return tuple({case: statistics.median(of[case]) for case in modules} for of in (inside, outside))


def _inside(event: Any) -> float:
    """Microseconds in operators below an event; a range of Python code, whose name is words, is none."""
    own = 0.0 if " " in event.name else event.self_cpu_time_total
    return own + sum(map(_inside, event.cpu_children))


if __name__ == "__main__":
    main()
