"""torch.compile(model, backend="helix"): registered, so that its absence is said clearly."""

from __future__ import annotations

from typing import Any

from torch import fx
from torch._dynamo.exc import ShortenTraceback

from helix_compile.errors import LoweringUnavailable


class BackendUnavailable(LoweringUnavailable, ShortenTraceback):
    """A LoweringUnavailable that Dynamo hands on as it is, instead of wrapping it in BackendCompilerFailed."""

    def __init__(self, message: str):
        ShortenTraceback.__init__(self, message, first_useful_frame=None)


def helix_backend(gm: fx.GraphModule, example_inputs: list[Any], **options: Any) -> Any:
    """Refuse: the Dynamo front door is not in this version."""
    raise BackendUnavailable(
        'torch.compile(backend="helix") is not in this version; call '
        "helix_compile.helix_compile(model, cp=...)"
    )
