"""Verify a rewritten model, then break one rank's weights and see what is said, and where."""

from __future__ import annotations

import torch

from helix_compile import helix_compile, verify
from helix_compile.models.presets import build_model, preset_config


def main() -> None:
    """A clean module is equivalent; two swapped shards of one down projection are found, followed to layer and node."""
    model = build_model(preset_config("tiny"), dtype=torch.float64)
    compiled = helix_compile(model, cp=4, tokens_per_block=4)
    report = verify(compiled, model)
    print(report)
    assert report.ok

    name = "model.layers.1.mlp.down_proj.weight"
    first, second = compiled.ranks[0].params, compiled.ranks[1].params
    first[name], second[name] = second[name], first[name]
    report = verify(compiled, model)
    print()
    for finding in report.findings:
        print(finding)
    assert {f.code for f in report.findings} >= {"HX201", "HX401"}
    assert any("layer 1" in f.where for f in report.findings if f.check == "numeric")


if __name__ == "__main__":
    main()
