"""What the virtual world costs: four ranks in one process against the sum of the work that they do.

    python benchmarks/virtual_world.py [--repeats 30]

The sum of the work is the lowered graph run straight through for each rank in turn (generated code, every collective
replaced by a local stand-in of the same result shape). A stand-in sums nothing, so later routers may choose other experts
than in a real step. A whole step also checks its inputs, keeps the ledger, moves the
collectives' data and counts bytes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from measuring import format_machine, median_ms, print_table
from torch import Tensor, fx
from transformers import DeepseekV3Config

from helix_compile import HelixModule, helix_compile
from helix_compile.ir.stage import copy_module
from helix_compile.models.presets import PRESETS, build_model

RANKS = 4
WIDE = {
    "vocab_size": 1024,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "n_group": 1,
    "topk_group": 1,
}
MODELS = {"tiny preset (hidden 128, 4 layers)": PRESETS["tiny"], "hidden 2048, dense + MoE layer": WIDE}


def main() -> None:
    """Measure a model whose ops are tiny (all overhead) and one whose ops are not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=30)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    print(f"{format_machine()}\n")
    header = ["model", "context", "4 virtual ranks (cp=4)", "4 graphs, straight", "one rank (cp=1)"]
    rows = [[name, str(S), *_measure(config, S, repeats)] for name, config in MODELS.items() for S in (64, 2048)]
    print_table([*header, "4 ranks / straight", "4 ranks / (4 x cp=1)"], rows)


def _measure(config: dict, S: int, repeats: int) -> list[str]:
    model = build_model(DeepseekV3Config(**config))
    modules = {n: _filled_module(model, n, S) for n in (1, RANKS)}
    token = torch.tensor([[7]])
    names = ["four", "straight", "one"]
    functions = [lambda: modules[RANKS](token), _straight(modules[RANKS]), lambda: modules[1](token)]
    ms = median_ms(dict(zip(names, functions, strict=True)), repeats)
    ratios = [f"{ms['four'] / work:.2f}" for work in (ms["straight"], RANKS * ms["one"])]
    return [*(f"{ms[name]:.2f} ms" for name in names), *ratios]


def _filled_module(model: torch.nn.Module, cp: int, S: int) -> HelixModule:
    compiled = helix_compile(model, cp=cp, max_batch_size=1, max_seq_len=S + 256)
    layers, R, r = (getattr(model.config, k) for k in ("num_hidden_layers", "kv_lora_rank", "qk_rope_head_dim"))
    latents, k_ropes = ([torch.randn(1, S, width) for _ in range(layers)] for width in (R, r))
    compiled.import_cache(latents, k_ropes, [S])
    return compiled


def _straight(compiled: HelixModule) -> Callable[[], list[Tensor]]:
    """Every rank's step as plain generated code. It writes over the same slot every time."""
    graph = copy_module(compiled.graph)
    for module in (graph, *graph.children()):
        assert isinstance(module, fx.GraphModule)
        for node in module.graph.nodes:
            node.target = _STAND_INS.get(node.target, node.target)
        module.recompile()
    inputs = [_inputs_of(graph, compiled, rank) for rank in range(RANKS)]

    def run() -> list[Tensor]:
        with torch.no_grad():
            return [graph(*values) for values in inputs]

    return run


def _inputs_of(graph: fx.GraphModule, compiled: HelixModule, number: int) -> list[Tensor]:
    layout, rank = compiled.plan.layout, compiled.ranks[number]
    step = {
        "input_ids": torch.tensor([[7]]),
        "positions": compiled.lengths[:, None],
        "page_table": compiled.page_table,
        "kvp_rank": torch.tensor(layout.index("kvp", number)),
        "ep_rank": torch.tensor(layout.index("ep", number)),
    }
    inputs = []
    for kind, name in (n.meta["input"] for n in graph.graph.nodes if n.op == "placeholder"):
        if kind == "param":
            inputs.append(rank.params[name])
        elif kind == "cache":
            inputs.append(rank.cache[int(name.removeprefix("cache_"))])
        else:
            inputs.append(step[name])
    return inputs


_c10d = torch.ops._c10d_functional
_STAND_INS: dict[object, Callable] = {
    _c10d.all_reduce.default: lambda x, op, axis: x.clone(),
    _c10d.all_to_all_single.default: lambda x, output_splits, input_splits, axis: x.clone(),
    _c10d.all_gather_into_tensor.default: lambda x, size, axis: torch.cat([x] * size),
    _c10d.reduce_scatter_tensor.default: lambda x, op, size, axis: x.chunk(size)[0].clone(),
    _c10d.wait_tensor.default: lambda x: x,
}


if __name__ == "__main__":
    main()
