"""Rotary tables that depend on how long a sequence is.

longrope has two tables and takes the long one for every position of a call once the call holds a position beyond
original_max_position_embeddings. transformers writes the choice into a buffer of the module; while a model is captured the
choice is written into a copy instead, so that the graph makes it anew at each step, as the model does. dynamic recomputes its
table on the host, by a branch on the data: no graph holds that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from helix_compile.errors import CaptureError

_TABLE = "inv_freq"


@contextmanager
def tables_by_position(model: nn.Module) -> Iterator[None]:
    """Rotary modules choose their table without a trace in the model while this is open.

    Raises:
        CaptureError: rope_type "dynamic"; says what would work.
    """
    with ExitStack() as stack:
        for name, module in model.named_modules():
            kind = getattr(module, "rope_type", None)
            kinds = set(kind.values()) if isinstance(kind, dict) else {kind}
            if any(isinstance(k, str) and "dynamic" in k for k in kinds):
                raise CaptureError(
                    f"capture: `{name}` has rope_type 'dynamic' (config.rope_parameters): once a sequence is longer than "
                    f"{getattr(module, 'original_max_seq_len', 'the original length')} its frequencies are computed anew on the host, "
                    "from the length of the longest sequence of the call, which no graph holds.\n"
                    "  what works: a table that stays (rope_type 'default', 'linear', 'yarn'), or 'longrope'"
                )
            if "longrope" in kinds:
                _make_long_table(module)
                stack.enter_context(patch.object(module, "forward", _on_a_copy(module)))
        yield


def _make_long_table(module: nn.Module) -> None:
    """Transformers makes the long table at the first forward; it must be there before anything is traced."""
    tables = [t for t in module._buffers.values() if t is not None]
    if not tables or getattr(module, f"long_{_TABLE}", None) is not None:
        return
    position = torch.zeros(1, 1, dtype=torch.int64, device=tables[0].device)
    with torch.no_grad():
        module(torch.zeros(1, 1, 1, device=tables[0].device), position)


def _on_a_copy(module: nn.Module) -> Any:
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        kept = dict(module._buffers)
        for name, table in kept.items():
            if isinstance(table, Tensor) and name.endswith(_TABLE) and "original" not in name:
                module._buffers[name] = table.clone()
        try:
            return original(*args, **kwargs)
        finally:
            module._buffers.update(kept)

    return forward
