"""Plan Helix for the real DeepSeek-V3 without any weights: what would be rewritten, and what it costs on the wire."""

from __future__ import annotations

from textwrap import shorten

import torch

from helix_compile import HelixPlan, helix_compile
from helix_compile.models.presets import build_model, preset_config


def main(preset: str = "deepseek-v3") -> tuple[HelixPlan, HelixPlan]:
    """Print two plans and their difference; the default is the 671 B configuration with 61 layers."""
    model = build_model(preset_config(preset), dtype=torch.bfloat16, meta=True)  # shapes only
    a2a = helix_compile(model, cp=4)
    print(a2a.inspect())

    # a plan is frozen data: it goes to JSON and back, and two plans can be compared
    ag_rs = helix_compile(model, cp=4, merge="ag_rs")  # the graph is captured once a model
    assert HelixPlan.from_json(a2a.plan.to_json()) == a2a.plan
    print("\nmerge='ag_rs' instead of 'a2a' changes:")
    for line in a2a.plan.diff(ag_rs.plan):
        print(shorten(line, 110))
    return a2a.plan, ag_rs.plan


if __name__ == "__main__":
    main()
