"""What a step costs outside of kernels and collectives, per layer: walked node by node, and with compiled segments, in one run.

    python benchmarks/step_overhead.py [--repeats 50] [--hidden 2048 --layers 2 --context 16384]
    torchrun --nproc-per-node 4 benchmarks/step_overhead.py          the same over gloo

Wall time of a step (median, the two taking turns) less the time that torch.profiler counts inside operators: ATen's, helix's,
collectives, and Inductor's own kernels, which are made to report themselves. B=1, T=1, four ranks, one thread. The time inside
operators is measured in steps of their own, since a profiler slows what is around them. CPU is that of this process (all ranks, or
one): where processes wait for one another in collectives, and for a core, it is what a rank does itself.
"""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

import torch
import torch.distributed as dist
from measuring import format_machine, median_ms, print_table
from torch._inductor import config
from torch.profiler import ProfilerActivity, profile
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from helix_compile import HelixModule, helix_compile
from helix_compile.models.presets import build_model, preset_config

RANKS = 4
TOKEN = torch.tensor([[7]])


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
    modules, seconds = {}, {}
    with config.patch({"cpp.enable_kernel_profile": True}):
        for name, lower in (("node by node", "reference"), ("compiled", "inductor")):
            started = time.perf_counter()
            modules[name] = _filled(model, arguments.context, lower)
            seconds[name] = time.perf_counter() - started
    for module in modules.values():
        module(TOKEN)
    steps: dict[str, Any] = {name: (lambda module=module: _step(module)) for name, module in modules.items()}
    wall = median_ms(steps, arguments.repeats)
    cpu = median_ms(steps, arguments.repeats, clock=time.process_time)
    inside = {name: _inside_ms(step, arguments.repeats) for name, step in steps.items()}
    if dist.is_initialized() and dist.get_rank():
        return
    outside = {name: (wall[name] - inside[name]) / layers for name in wall}
    rows = [
        [name, *(f"{ms[name]:.2f}" for ms in (wall, cpu, inside)), f"{outside[name] * 1e3:.0f}", f"{seconds[name]:.0f}"]
        for name in wall
    ]
    print(f"{format_machine()}; load {os.getloadavg()[0]:.1f}")
    world = f"{RANKS} processes, gloo" if dist.is_initialized() else f"{RANKS} virtual ranks"
    shape = f"hidden {model.config.hidden_size}, {layers} layers, {world}, context {arguments.context}"
    print_table([shape, "step ms", "CPU ms", "inside operators ms", "outside us/layer", "compile s"], rows)
    (whole, less), (slow, fast) = wall.values(), outside.values()
    print(f"step: compiled / node by node = {less / whole:.2f}; outside operators: {slow / fast:.1f} times less")
    print(f"CPU of this process: compiled / node by node = {cpu['compiled'] / cpu['node by node']:.2f}")


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


def _filled(model: Any, context: int, lower: str) -> HelixModule:
    """With one sequence of `context` random latents."""
    compiled = helix_compile(model, cp=RANKS, lower=lower, max_batch_size=1, max_seq_len=context + 1024)
    layers, R, r = (getattr(model.config, k) for k in ("num_hidden_layers", "kv_lora_rank", "qk_rope_head_dim"))
    random = torch.Generator().manual_seed(0)
    latents, k_ropes = ([torch.randn(1, context, w, generator=random) for _ in range(layers)] for w in (R, r))
    compiled.import_cache(latents, k_ropes, [context])
    return compiled


def _step(module: HelixModule) -> None:
    if dist.is_initialized():
        dist.barrier()
    length = int(module.lengths[0])
    module(TOKEN)
    module.truncate(length)


def _inside_ms(step: Any, repeats: int) -> float:
    """Milliseconds of a step that are spent inside operators."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(repeats):
            step()
    return sum(event.self_cpu_time_total for event in profiled.key_averages()) / repeats / 1e3


if __name__ == "__main__":
    main()
