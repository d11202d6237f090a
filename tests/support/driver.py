"""Run the unmodified model and a compiled one side by side over many steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from helix_compile.verifier.numeric.reference import WidenedIslands

STEPS = (1, 1, 3, 1, 4, 1)


@dataclass
class Reference:
    """The unmodified model with its own cache; padding counts as columns there, never as positions."""

    model: nn.Module
    mask: Tensor | None = None
    cache: DynamicCache = field(init=False)

    def __post_init__(self) -> None:
        self.cache = DynamicCache(config=self.model.config)

    def step(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Logits [B, T, vocab] of new tokens with their mask [B, T]."""
        self.mask = mask if self.mask is None else torch.cat([self.mask, mask], dim=1)
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        with torch.no_grad():
            return self.model(
                input_ids=ids, attention_mask=self.mask, position_ids=positions, past_key_values=self.cache
            ).logits


def left_padded(lengths: list[int]) -> Tensor:
    """Mask [B, max(lengths)] with zeros before each row's tokens."""
    width = max(lengths)
    return torch.tensor([[0] * (width - n) + [1] * n for n in lengths])


def random_ids(model: nn.Module, batch: int, tokens: int) -> Tensor:
    return torch.randint(0, model.config.get_text_config().vocab_size, (batch, tokens))


def deviation(got: Tensor, expected: Tensor, mask: Tensor) -> float:
    """Largest deviation of an unmasked logit over the largest logit."""
    kept = mask.bool()
    if not bool(kept.any()):
        return 0.0
    assert torch.isfinite(got).all()
    return float((got - expected)[kept].abs().max() / expected[kept].abs().max())


def worst_deviation(
    model: nn.Module,
    step: Callable[[Tensor, Tensor], Tensor],
    lengths: list[int],
    steps: tuple[int, ...] = STEPS,
    reference: Reference | None = None,
) -> float:
    """Over a ragged left-padded prompt and the steps after it, fp32 islands widened on both sides.

    `reference`: the model with another cache than its own.
    """
    reference = reference or Reference(model)
    mask = left_padded(lengths)
    worst = 0.0
    for tokens in (mask.shape[1], *steps):
        if tokens != mask.shape[1] or reference.mask is not None:
            mask = torch.ones(len(lengths), tokens, dtype=torch.int64)
        ids = random_ids(model, len(lengths), tokens)
        with WidenedIslands():
            worst = max(worst, deviation(step(ids, mask), reference.step(ids, mask), mask))
    return worst


def prompt_deviation(model: Any, compiled: Any) -> float:
    """Largest deviation of a prompt's logits [2, 9, vocab] from the model as it is now, of the largest; starts a batch."""
    ids = random_ids(model, 2, 9)
    compiled.reset()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    return float((compiled(ids) - expected).abs().max() / expected.abs().max())
