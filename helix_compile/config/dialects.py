"""Whose configuration is this file: ours, TensorRT-LLM's or vLLM's? Read it by the rules of the one that wrote it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helix_compile.config.files import read_mapping
from helix_compile.config.options import OPTIONS, own_fields
from helix_compile.config.trtllm import MARKERS as TRTLLM_MARKERS
from helix_compile.config.trtllm import trtllm_fields
from helix_compile.config.vllm import MARKERS as VLLM_MARKERS
from helix_compile.config.vllm import vllm_fields
from helix_compile.errors import PlanError

# fields of ours that TensorRT-LLM has too say nothing
_OWN = {*OPTIONS} - {"max_batch_size", "max_seq_len"}


@dataclass(frozen=True)
class ConfigFields:
    """What a file says.

    Attributes:
        dialect: "helix_compile", "TensorRT-LLM" or "vLLM".
        fields: of HelixOptions, as said or implied by the file; the others are not in it.
        without_effect: key paths that were understood and change nothing here.
    """

    dialect: str
    fields: dict[str, Any]
    without_effect: tuple[str, ...] = ()


def fields_of_file(path: str | Path) -> ConfigFields:
    """Read a TOML, YAML or JSON file of any of the three; a key that only one of them has says which.

    Raises:
        PlanError: a file that can't be read, keys of several dialects, or what the dialect's own reader refuses.
    """
    values = read_mapping(path)
    names = {key.replace("-", "_") for key in values if isinstance(key, str)}
    found = {
        dialect: sorted(names & set(markers))
        for dialect, markers in (("helix_compile", _OWN), ("TensorRT-LLM", TRTLLM_MARKERS), ("vLLM", VLLM_MARKERS))
        if names & set(markers)
    }
    if len(found) > 1:
        mixed = "; ".join(f"{', '.join(keys)} of {dialect}" for dialect, keys in found.items())
        raise PlanError(f"{path}: got keys of several dialects, expected one: {mixed}")
    dialect = next(iter(found), "helix_compile")
    if dialect == "helix_compile":
        return ConfigFields(dialect, own_fields(values, str(path)))
    read = trtllm_fields if dialect == "TensorRT-LLM" else vllm_fields
    fields, idle = read(values, str(path))
    return ConfigFields(dialect, fields, tuple(idle))
