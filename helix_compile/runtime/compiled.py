"""What a compiled module is to what runs on top of it (generation, saving): its data, and the calls of a step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from helix_compile.plan.helix_plan import HelixPlan
from helix_compile.runtime.rank import ModelFacts, Rank
from helix_compile.runtime.values import ValueDump
from helix_compile.worlds.world import World


class CompiledModule(Protocol):
    """A HelixModule, seen from below: who generates or saves need not know the facade."""

    @property
    def plan(self) -> HelixPlan: ...
    @property
    def stages(self) -> Mapping[str, fx.GraphModule]: ...
    @property
    def graph(self) -> fx.GraphModule: ...
    @property
    def ranks(self) -> list[Rank]: ...
    @property
    def world(self) -> World: ...
    @property
    def facts(self) -> ModelFacts: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def lengths(self) -> Tensor: ...
    @property
    def value_dump(self) -> ValueDump | None: ...
    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None, logits_to_keep: int = 0) -> Any: ...
    def reset(self, rows: list[int] | None = None) -> None: ...
    def truncate(self, lengths: int | list[int] | Tensor) -> None: ...
