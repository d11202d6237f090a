"""What a step costs outside of kernels and collectives, per layer: walked node by node, and with compiled segments, in one run.

    python benchmarks/step_overhead.py [--repeats 50] [--hidden 2048 --layers 2 --context 16384]
    torchrun --nproc-per-node 4 benchmarks/step_overhead.py          the same over gloo: a rank a process

Operators are ATen's, helix's, collectives and their waits, and Inductor's own kernels, which are made to report themselves to
torch.profiler. What lies outside of them is told in two ways, for a profiler slows what is around operators: "profiled", in steps
that are profiled, the step less its operators (median); "difference", the wall time of steps that are not (median, the two taking
turns) less the operators' of those that are. B=1, T=1, four ranks, one thread. Processes meet before each step, outside of what is
timed. CPU is that of this process (all ranks, or one): where processes wait for one another in collectives, and for a core, it is
what a rank does itself. Compile seconds are cold with an empty TORCHINDUCTOR_CACHE_DIR, and warm in the next run with the same.
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
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from helix_compile import HelixModule, helix_compile
from helix_compile.models.presets import build_model, preset_config

TOKEN = torch.tensor([[7]])
STEP = "a whole step"


def main() -> None:
    """One row a way of running."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--hidden", type=int, default=0, help="a wider model than the tiny preset")
    parser.add_argument("--layers", type=int, default=2, help="of the wider model")
    parser.add_argument("--context", type=int, default=64)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, layers = _model(arguments.hidden, arguments.layers)
    ranks = int(os.environ.get("WORLD_SIZE", "4"))
    modules, seconds = {}, {}
    with config.patch({"cpp.enable_kernel_profile": True}):
        for name, lower in (("node by node", "reference"), ("compiled", "inductor")):
            started = time.perf_counter()
            modules[name] = _filled(model, arguments.context, lower, ranks)
            seconds[name] = time.perf_counter() - started
    wall, cpu = (_medians(modules, arguments.repeats, clock) for clock in (time.perf_counter, time.process_time))
    profiled = {name: _profiled(module, arguments.repeats) for name, module in modules.items()}
    if dist.is_initialized() and dist.get_rank():
        return
    alone = {name: outside / layers for name, (_, outside) in profiled.items()}
    apart = {name: (wall[name] - inside) / layers for name, (inside, _) in profiled.items()}
    rows = [
        [
            name,
            *(f"{ms:.2f}" for ms in (wall[name], cpu[name], profiled[name][0])),
            *(f"{ms * 1e3:.0f}" for ms in (alone[name], apart[name])),
            f"{seconds[name]:.0f}",
        ]
        for name in wall
    ]
    print(f"{format_machine()}; load {os.getloadavg()[0]:.1f}")
    world = f"{ranks} processes, gloo" if dist.is_initialized() else f"{ranks} virtual ranks"
    shape = f"hidden {model.config.hidden_size}, {layers} layers, {world}, context {arguments.context}"
    outside = "outside us/layer"
    head = ["step ms", "CPU ms", "inside operators ms", f"{outside}, profiled", f"{outside}, difference", "compile s"]
    print_table([shape, *head], rows)
    print(f"compiled / node by node: step {_ratio(wall):.2f}, CPU of this process {_ratio(cpu):.2f}")
    print(f"outside of operators, profiled: {1 / _ratio(alone):.1f} times less")


def _ratio(of: dict[str, float]) -> float:
    slow, fast = of.values()
    return fast / slow


def _model(hidden: int, layers: int) -> tuple[Any, int]:
    if not hidden:
        model = build_model(preset_config("tiny"))
        return model, model.config.num_hidden_layers
    sizes = {"num_attention_heads": 16, "num_key_value_heads": 16, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
    sizes |= {
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "q_lora_rank": None,
        "vocab_size": 1024,
        "n_routed_experts": 8,
    }
    sizes |= {"hidden_size": hidden, "intermediate_size": 2 * hidden, "moe_intermediate_size": hidden // 4}
    sizes |= {"num_hidden_layers": layers, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
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


def _medians(modules: dict[str, HelixModule], repeats: int, clock: Callable[[], float]) -> dict[str, float]:
    """Milliseconds of a step by a clock; the modules take turns, after two steps each that are not counted."""
    times: dict[str, list[float]] = {name: [] for name in modules}
    for _ in range(repeats + 2):
        for name, module in modules.items():
            length = _meet(module)
            started = clock()
            module(TOKEN)
            times[name].append((clock() - started) * 1e3)
            module.truncate(length)
    return {name: statistics.median(values[2:]) for name, values in times.items()}


def _meet(module: HelixModule) -> int:
    """Wait for the other processes; the tokens that there are."""
    if dist.is_initialized():
        dist.barrier()
    return int(module.lengths[0])


def _profiled(module: HelixModule, repeats: int) -> tuple[float, float]:
    """Median milliseconds of a step inside and outside of operators."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(repeats):
            length = _meet(module)
            with record_function(STEP):
                module(TOKEN)
            module.truncate(length)
    steps = [event for event in profiler.events() if event.name == STEP]
    inside = [_inside(step) / 1e3 for step in steps]
    outside = [step.cpu_time_total / 1e3 - own for step, own in zip(steps, inside, strict=True)]
    return statistics.median(inside), statistics.median(outside)


def _inside(event: Any) -> float:
    """Microseconds in operators below an event; a range of Python code, whose name is words, is none."""
    own = 0.0 if " " in event.name else event.self_cpu_time_total
    return own + sum(map(_inside, event.cpu_children))


if __name__ == "__main__":
    main()
