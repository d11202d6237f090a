"""torch.compile(model, backend="helix"): registered, so that its absence is said clearly."""

from __future__ import annotations

from typing import Any

from torch import fx

from helix_compile.errors import LoweringUnavailable


def helix_backend(gm: fx.GraphModule, example_inputs: list[Any], **options: Any) -> Any:
    """Refuse: the Dynamo front door is not in this version."""
    raise LoweringUnavailable(
        'torch.compile(backend="helix") is not in this version; call helix_compile.helix_compile(model, cp=...)'
    )
