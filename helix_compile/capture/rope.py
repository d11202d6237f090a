"""Rotary tables that depend on how long a sequence is: while a model is captured they are a function of the positions.

So the graph makes the choice anew at each step, as a model does that is given the steps of one batch. See models/rotary_tables.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

from torch import nn

from helix_compile.errors import CaptureError
from helix_compile.models.rotary_tables import (
    BY_LENGTH,
    edited_table,
    forward_by_length,
    rope_types,
    unlike_the_modules_own,
)


@contextmanager
def tables_by_position(model: nn.Module) -> Iterator[None]:
    """Rotary modules choose their table without a trace in the model while this is open.

    Raises:
        CaptureError: a module that makes its table in another way than what is known here.
    """
    with ExitStack() as stack:
        for name, module in model.named_modules():
            kinds = rope_types(module).values()
            if not any(kind in BY_LENGTH for kind in kinds):
                continue
            if edited := edited_table(module):
                raise CaptureError(
                    f"capture: `{name}.{edited}` is not the table of the configuration (rope_type {', '.join(sorted(set(kinds)))}): "
                    "someone wrote it; state the frequencies in config.rope_parameters"
                )
            try:
                unlike = unlike_the_modules_own(module)
            except Exception as error:  # any model's own code
                unlike = f"any number ({type(error).__name__}: {error})"
            if unlike:
                raise CaptureError(
                    f"capture: `{name}` ({type(module).__name__}, rope_type {', '.join(sorted(set(kinds)))}) makes its table for "
                    f"a sequence of {unlike} tokens in another way than transformers' own rotary modules, by a branch on "
                    "the data or in place, which no graph holds.\n"
                    "  what works: a table that stays (rope_type 'default', 'linear', 'yarn'), or a rotary module as transformers writes it"
                )
            stack.enter_context(patch.object(module, "forward", forward_by_length(module)))
        yield
