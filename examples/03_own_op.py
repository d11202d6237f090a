"""Teach the type checker an op of your own: without a rule it is an error that names it, with one it is checked."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from helix_compile import elementwise, helix_compile, typing_rule, verify
from helix_compile.models.presets import build_model, preset_config


@torch.library.custom_op("example::gated", mutates_args=())
def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up in one op, as a fused kernel would have it."""
    return torch.nn.functional.silu(gate) * up


@gated.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty_like(gate)


def main() -> None:
    """Put the op into a lowered body; verify names it; give it the rule of elementwise ops; verify again."""
    model = build_model(preset_config("tiny"), dtype=torch.float64)
    compiled = helix_compile(model, cp=4)
    body = compiled.graph.get_submodule("body_0")
    assert isinstance(body, fx.GraphModule)
    act = next(n for n in body.graph.nodes if n.target is torch.ops.aten.silu.default)
    product = next(iter(act.users))
    up = next(n for n in product.all_input_nodes if n is not act)
    product.target, product.args = torch.ops.example.gated.default, (act.args[0], up)
    body.graph.erase_node(act)
    body.recompile()

    for finding in verify(compiled, model).findings:
        print(finding)
        assert finding.code == "HX103" and "example.gated" in finding.got

    # each element of the result depends on the same element of both inputs: shards must meet, sums may not enter
    typing_rule(torch.ops.example.gated.default)(elementwise)
    report = verify(compiled, model)
    print("with a rule:", "equivalent" if report.ok else report)
    assert report.ok


if __name__ == "__main__":
    main()
