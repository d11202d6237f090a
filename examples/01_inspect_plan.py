"""What would Helix do to the real DeepSeek-V3? No weights, no GPU: the 671 B configuration on the meta device."""

from __future__ import annotations

import torch

from helix_compile import helix_compile
from helix_compile.models.presets import build_model, preset_config


def main(num_layers: int = 61) -> None:
    """Print the report for 8 ranks, and how the plan changes with W_UV before the exchange."""
    config = preset_config("deepseek-v3")
    config.num_hidden_layers = num_layers
    model = build_model(config, dtype=torch.bfloat16, meta=True)
    after = helix_compile(model, cp=8, v_up="after")
    print(after.inspect())
    before = helix_compile(model, cp=8, v_up="before")
    print("\nv_up after -> before:")
    for line in after.plan.diff(before.plan):
        if "egress" in line:
            print(" ", line)


if __name__ == "__main__":
    main()
