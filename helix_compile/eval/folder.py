"""What is read of a checkpoint folder beside its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from helix_compile.checkpoint.named import dtype_named
from helix_compile.errors import HelixError


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a checkpoint folder.

    Raises:
        HelixError: there is none, or it can't be read.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        said = " ".join(str(error).split())[:200]
        raise HelixError(
            f"{folder}: no tokenizer can be read ({said}); expected the files that its save_pretrained() writes, such as "
            "tokenizer.json and tokenizer_config.json"
        ) from error


def dtype_asked(name: str | None) -> torch.dtype | None:
    """A dtype by its name; None: the folder's. HelixError for what is none."""
    try:
        return dtype_named(name)
    except ValueError as error:
        raise HelixError(str(error)) from error
