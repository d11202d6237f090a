"""One sequence that goes on token by token, in the unmodified model or in a compiled module: the same four calls."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from helix_compile.cache.file import read_cache, write_cache
from helix_compile.cache.shards import CacheEntries
from helix_compile.errors import HelixError
from helix_compile.ir.cache_argument import call_with_cache
from helix_compile.module import HelixModule

PREFILL_CHUNK = 1024  # tokens of a call of the unmodified model: bounds its mask, which is chunk x context
PREFILLS = ("model", "helix", "handover")


def check_prefill(prefill: str) -> None:
    """HelixError for a name that is none of PREFILLS."""
    if prefill not in PREFILLS:
        raise HelixError(f"prefill: got {prefill!r}, expected {' | '.join(PREFILLS)}")


class Decoder(Protocol):
    """One sequence and its cache."""

    def begin(self, ids: Sequence[int]) -> None:
        """Forget everything; then hold `ids`."""

    def step(self, ids: Sequence[int], keep: int = 1) -> Tensor:
        """Append `ids`, one or more; logits [keep, vocab] of the last ones, on the CPU."""

    def truncate(self, length: int) -> None:
        """Take back what follows the first `length` tokens."""


class ModelDecoder:
    """The unmodified model with transformers' own cache."""

    def __init__(self, model: nn.Module, chunk: int = PREFILL_CHUNK):
        self.model, self._chunk = model, chunk
        self.cache: Any = None
        self._held: list[int] = []
        self.device = next(model.parameters()).device

    def begin(self, ids: Sequence[int]) -> None:
        """As Decoder has it; of what it holds a common beginning is kept: several readers share one prefill."""
        same = next((n for n, (a, b) in enumerate(zip(self._held, ids, strict=False)) if a != b), None)
        same = min(len(self._held), len(ids)) if same is None else same
        if self.cache is None or same < len(ids) // 2:
            self.cache, self._held = DynamicCache(config=self.model.config), []
        else:
            self.truncate(same)
        if len(ids) > len(self._held):
            self.step(ids[len(self._held) :])

    def step(self, ids: Sequence[int], keep: int = 1) -> Tensor:
        """As Decoder has it, in chunks."""
        if self.cache is None:
            self.cache = DynamicCache(config=self.model.config)
        kept: list[Tensor] = []
        for start in range(0, len(ids), self._chunk):
            part = ids[start : start + self._chunk]
            wanted = max(1, min(len(part), start + len(part) - (len(ids) - keep)))
            with torch.no_grad():
                given = torch.tensor([list(part)], device=self.device)
                logits = call_with_cache(self.model, self.cache, input_ids=given, logits_to_keep=wanted).logits
            self._held += part
            kept.append(logits[0])
        return torch.cat(kept)[-keep:].cpu()

    def truncate(self, length: int) -> None:
        """As Decoder has it."""
        if extra := len(self._held) - length:
            self.cache.crop(-extra)  # a positive number means what stays, or is refused, by the version
            del self._held[length:]


class HelixDecoder:
    """A compiled module; what is held at first comes from its own steps, or from the unmodified model's cache.

    Args:
        compiled: with room for one sequence of the longest context.
        prefill: "helix": its own steps; "model": import_cache() of the unmodified model's cache; "handover": the same cache
            through a file of write_cache(), as another process would send it.
        sender: who prefills, where it is not the module.

    Raises:
        HelixError: no such prefill, or no sender for it.
    """

    def __init__(self, compiled: HelixModule, prefill: str = "helix", sender: ModelDecoder | None = None):
        check_prefill(prefill)
        if (sender is None) != (prefill == "helix"):
            raise HelixError(
                f"prefill {prefill!r}: the unmodified model {'has nothing to do' if sender else 'is needed'}"
            )
        self.compiled, self._prefill, self._sender = compiled, prefill, sender

    def begin(self, ids: Sequence[int]) -> None:
        """As Decoder has it."""
        if self._sender is None:
            self.compiled.reset()
            if ids:
                self.step(ids)
            return
        self._sender.begin(ids)
        if self._prefill == "model":
            self.compiled.import_cache(self._sender.cache)
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "cache.safetensors"
            write_cache(path, sent_entries(self._sender.cache, len(ids)))
            self.compiled.import_cache(*read_cache(path))

    def step(self, ids: Sequence[int], keep: int = 1) -> Tensor:
        """As Decoder has it."""
        given = torch.tensor([list(ids)], device=self.compiled.device)
        return self.compiled(given, logits_to_keep=keep)[0].cpu()

    def truncate(self, length: int) -> None:
        """As Decoder has it."""
        self.compiled.truncate(length)


def sent_entries(cache: Any, length: int) -> CacheEntries:
    """What a prefill process sends of transformers' cache of one sequence: heads side by side, [1, S, heads x width]."""
    keys = [layer.keys.transpose(1, 2).flatten(2) for layer in cache.layers]
    values = [layer.values.transpose(1, 2).flatten(2) for layer in cache.layers]
    return CacheEntries(keys, values, torch.tensor([length]))
