"""HelixOptions: every keyword of helix_compile, frozen and validated. Nothing is accepted and ignored.

Our own configuration file: the fields of HelixOptions under their own names.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from helix_compile.config.files import ConfigSection, mapping_of, read_mapping
from helix_compile.config.trtllm import trtllm_fields
from helix_compile.config.vllm import vllm_fields
from helix_compile.errors import HelixError, LayoutError, LoweringUnavailable, PlanError

logger = logging.getLogger(__name__)


COUNTS = ("cp", "tpa", "ep", "tokens_per_block", "max_batch_size", "max_seq_len")  # ints >= 1


CHOICES: dict[str, tuple[str, ...]] = {
    "merge": ("a2a", "ag_rs"),
    "q_proj": ("replicate", "gather"),
    "v_up": ("auto", "before", "after"),
    "overlap": ("none", "hopb"),
    "unmatched": ("error", "keep"),
    "lower": ("auto", "reference", "triton", "inductor", "tensorrt"),
}


LATER = {
    ("overlap", "hopb"): "batch-wise overlap (HOP-B) is not in this version",
    ("lower", "inductor"): "lowering to Inductor is not in this version",
    ("lower", "tensorrt"): "lowering to TensorRT is not in this version",
}


MAX_COUNT = 2**31 - 1


WITHOUT_EFFECT_AT_CP1 = ("merge", "q_proj", "v_up", "overlap")


PAGE_SIZE = 128  # local slots a page: the unit of paging inside a rank, independent of tokens_per_block


@dataclass(frozen=True, kw_only=True)
class HelixOptions:
    """What the user asked for; see helix_compile() for the meaning of each field."""

    cp: int
    tpa: int = 1
    ep: int | None = None
    tokens_per_block: int = 32
    merge: str = "a2a"
    q_proj: str = "replicate"
    v_up: str = "auto"
    overlap: str = "none"
    lower: str = "auto"
    max_batch_size: int = 8
    max_seq_len: int = 4096
    unmatched: str = "error"

    def __post_init__(self) -> None:
        for name in ("cp", "tpa", "tokens_per_block", "max_batch_size", "max_seq_len"):
            check_count(name, getattr(self, name))
        if self.ep is not None:
            check_count("ep", self.ep)
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise PlanError(
                    f"option {name}={getattr(self, name)!r} is unknown; expected one of "
                    + ", ".join(map(repr, allowed))
                )
        for (name, value), reason in LATER.items():
            if getattr(self, name) == value:
                raise LoweringUnavailable(f"{name}={value!r}: {reason}; use {name}={CHOICES[name][0]!r}")
        world_size = self.cp * self.tpa
        if self.ep is not None and world_size % self.ep:
            fits = [e for e in range(1, min(world_size, 4096) + 1) if world_size % e == 0]
            raise LayoutError(
                f"ep={self.ep} does not divide the world of cp*tpa = {self.cp}*{self.tpa} = {world_size} "
                f"ranks; use one of {fits}"
            )
        if self.cp == 1:
            self._refuse_without_effect()

    def _refuse_without_effect(self) -> None:
        """At cp = 1 nothing is exchanged, so the options of the exchange can have no effect."""
        for name in WITHOUT_EFFECT_AT_CP1:
            if getattr(self, name) != CHOICES[name][0]:
                raise PlanError(
                    f"option {name}={getattr(self, name)!r} has no effect at cp=1: one rank holds the whole "
                    f"sequence and nothing is exchanged; drop it or use cp >= 2"
                )

    def to_json(self) -> dict[str, Any]:
        """Plain dict, as in plan.json."""
        return asdict(self)

    @classmethod
    def from_file(cls, path: str | Path) -> HelixOptions:
        """Options of our own TOML, YAML or JSON file, whose keys are the fields' names (docs/configuration.md).

        Raises:
            HelixError: the file, key path, got and expected.
        """
        fields = checked_own_fields(read_mapping(path), str(path))
        if "cp" not in fields:
            raise PlanError(f"{path}: cp: got none, expected an int >= 1; cp has no default")
        return cls._built(fields, str(path))

    @classmethod
    def from_trtllm(cls, source: Mapping[str, Any] | str | Path) -> HelixOptions:
        """Options that TensorRT-LLM's own (a mapping, or its YAML or JSON file) say, by its rules and defaults.

        Raises:
            HelixError: key path, got and expected; also for what TensorRT-LLM would ignore without a word.
        """
        values, where = mapping_of(source)
        return cls._built_by_engine(*trtllm_fields(values, where), where)

    @classmethod
    def from_vllm(cls, source: Mapping[str, Any] | str | Path) -> HelixOptions:
        """Options that vLLM's own (a mapping, or its YAML or JSON file) say, by its rules and defaults.

        Raises:
            HelixError: key path, got and expected; also for what vLLM would ignore without a word.
        """
        values, where = mapping_of(source)
        return cls._built_by_engine(*vllm_fields(values, where), where)

    @classmethod
    def _built_by_engine(cls, fields: dict[str, Any], idle: list[str], where: str) -> HelixOptions:
        if idle:
            logger.info("%s: no effect here: %s", where, ", ".join(idle))
        return cls._built(fields, where)

    @classmethod
    def _built(cls, fields: dict[str, Any], where: str) -> HelixOptions:
        try:
            return cls(**fields)
        except HelixError as error:
            raise type(error)(f"{where}: {error}") from error


def checked_own_fields(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields of HelixOptions that a mapping of ours holds; PlanError names key path, got and expected."""
    return own_fields(values, where, COUNTS, CHOICES)


def check_count(name: str, value: Any) -> None:
    """Raise LayoutError unless `value` is a real int >= 1 that the int32 of `visible` can hold."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise LayoutError(f"{name} must be an int >= 1, got {value!r} ({type(value).__name__})")
    if value > MAX_COUNT:
        raise LayoutError(f"{name} must be at most {MAX_COUNT:,} (local slots are int32), got {value:,}")


def default_ep(world_size: int, num_experts: int) -> int:
    """The largest ep that divides both the ranks and the experts (design, section 3)."""
    return math.gcd(world_size, num_experts) if num_experts else 1


ELSEWHERE = {
    name: f"it is no option of a file; give it beside the file, as {name}= or on the command line"
    for name in ("model", "world", "device", "dtype")
}


# what other engines call a field of ours
ALIASES = {
    "context_parallel_size": "cp",
    "decode_context_parallel_size": "cp",
    "kvp": "cp",
    "tensor_parallel_size": "tpa",
    "moe_expert_parallel_size": "ep",
    "cp_kv_cache_interleave_size": "tokens_per_block",
    "dcp_comm_backend": "merge",
}


def own_fields(
    values: Mapping[str, Any], where: str, counts: tuple[str, ...], choices: Mapping[str, tuple[str, ...]]
) -> dict[str, Any]:
    """The fields that are written, each checked for its type and choices.

    Args:
        counts: names of the fields that are ints >= 1.
        choices: name -> allowed strings.

    Raises:
        PlanError: key path, got, expected.
    """
    section = ConfigSection(values, where)
    for name in counts:
        section.count(name)
    for name, allowed in choices.items():
        section.choice(name, allowed, allowed[0])
    alias = {name: f"write {ours!r}, our name of it" for name, ours in ALIASES.items()}
    section.finish({}, ELSEWHERE | alias)
    return dict(values)
