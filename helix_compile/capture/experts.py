"""Which form of transformers' experts runs while a model is looked at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel


@contextmanager
def experts_as(model: PreTrainedModel, implementation: str | None) -> Iterator[None]:
    """Experts in another form while this is open (None: as they are).

    "batched_mm" is the one that runs without values: the fake of grouped_mm takes bf16 of aligned sizes only, eager is a loop over
    the experts that were hit.
    """
    before = getattr(model.config, "_experts_implementation", None)
    if before is None or implementation in (None, before):
        yield
        return
    try:
        model.set_experts_implementation(implementation)
        yield
    finally:
        model.set_experts_implementation(before)
