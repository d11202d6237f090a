"""HelixOptions: every keyword of helix_compile and key of our own configuration file, frozen and validated.

Nothing is accepted and ignored.
"""

from __future__ import annotations

import functools
import inspect
import logging
import math
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

from helix_compile.config.files import ConfigSection, mapping_of, read_mapping
from helix_compile.config.trtllm import trtllm_fields
from helix_compile.config.vllm import vllm_fields
from helix_compile.errors import HelixError, LayoutError, LoweringUnavailable, PlanError

logger = logging.getLogger(__name__)
P = ParamSpec("P")
R = TypeVar("R")
MAX_COUNT = 2**31 - 1
PAGE_SIZE = 128  # local slots a page: the unit of paging inside a rank, independent of tokens_per_block


@dataclass(frozen=True)
class Option:
    """What there is to say of a field of HelixOptions; checks, command line, schema and docs all read it from here.

    Attributes:
        meaning: one sentence, for help(helix_compile) and docs/configuration.md.
        cli: for --help; of an option with choices, what stands behind them.
        choices: allowed strings, the default first; a field without any is an int >= 1.
        later: choices that this version refuses -> why.
        of_exchange: at cp = 1 nothing is exchanged, so there it can have no effect.
    """

    meaning: str
    cli: str = ""
    choices: tuple[str, ...] = ()
    later: Mapping[str, str] = field(default_factory=dict)
    of_exchange: bool = False

    @property
    def offered(self) -> tuple[str, ...]:
        """The choices that this version takes."""
        return tuple(c for c in self.choices if c not in self.later)

    @property
    def cli_help(self) -> str:
        """What --help says."""
        return ": ".join(filter(None, (" | ".join(self.offered), self.cli)))


def _says(short: str, more: str = "") -> dict[str, Option]:
    return {"option": Option(f"{short}{more}.", short)}


def _choice(choices: tuple[str, ...], meaning: str, cli: str = "", **more: Any) -> Any:
    return field(default=choices[0], metadata={"option": Option(meaning, cli, choices, **more)})


@dataclass(frozen=True, kw_only=True)
class HelixOptions:
    """What the user asked for: one field for each keyword of helix_compile() that a file may hold."""

    cp: int = field(metadata=_says("ranks that share a KV cache by sequence", " (the paper's KVP)"))
    tpa: int = field(
        default=1,
        metadata=_says(
            "attention tensor parallel",
            " over heads (divides the KV heads where there are some); there are N = cp * tpa ranks",
        ),
    )
    ep: int | None = field(
        default=None,
        metadata=_says(
            "expert parallel; default: the largest that divides", " N and the experts; in the FFN tpf = N / ep"
        ),
    )
    tokens_per_block: int = field(default=32, metadata=_says("round-robin unit of the cache", " between ranks"))
    merge: str = _choice(
        ("a2a", "ag_rs"),
        '"a2a" (one packed all-to-all over heads) or "ag_rs" (all-gather of lse, reduce-scatter of o).',
        of_exchange=True,
    )
    q_proj: str = _choice(
        ("replicate", "gather"),
        '"replicate" (each CP rank computes all its heads\' q) or "gather" (each computes its own, then all-gather).',
        of_exchange=True,
    )
    v_up: str = _choice(
        ("auto", "before", "after"),
        'W_UV "before" or "after" the exchange, or "auto" by bytes; grouped-query attention has none.',
        of_exchange=True,
    )
    overlap: str = _choice(
        ("none", "hopb"),
        '"none".',
        later={"hopb": "batch-wise overlap (HOP-B) is not in this version"},
        of_exchange=True,
    )
    lower: str = _choice(
        ("auto", "reference", "triton", "inductor", "tensorrt"),
        '"reference" (torch), "triton" (on a CPU by Triton\'s interpreter) or "auto": Triton on CUDA >= 9.0.',
        later={
            "inductor": "lowering to Inductor is not in this version",
            "tensorrt": "lowering to TensorRT is not in this version",
        },
    )
    max_batch_size: int = field(default=8, metadata=_says("capacity in sequences"))
    max_seq_len: int = field(default=4096, metadata=_says("capacity in tokens a sequence", ", prompt included"))
    unmatched: str = _choice(
        ("error", "keep"),
        'a layer that can\'t be captured or whose attention is not recognised is an "error", or stays as it is ("keep"): '
        "whole on every rank, listed in the report. Some layer must be rewritten.",
        "leave what is not recognised as it is",
    )

    def __post_init__(self) -> None:
        for name, option in OPTIONS.items():
            value = getattr(self, name)
            if name == "ep" and value is None:  # the largest that divides
                continue
            if not option.choices:
                check_count(name, value)
            elif value not in option.choices:
                raise PlanError(
                    f"option {name}={value!r} is unknown; expected one of " + ", ".join(map(repr, option.choices))
                )
            elif value in option.later:
                raise LoweringUnavailable(f"{name}={value!r}: {option.later[value]}; use {name}={option.choices[0]!r}")
            elif self.cp == 1 and option.of_exchange and value != option.choices[0]:
                raise PlanError(
                    f"option {name}={value!r} has no effect at cp=1: one rank holds the whole sequence and nothing is "
                    f"exchanged; drop it or use cp >= 2"
                )
        world_size = self.cp * self.tpa
        if self.ep is not None and world_size % self.ep:
            fits = [e for e in range(1, min(world_size, 4096) + 1) if world_size % e == 0]
            raise LayoutError(
                f"ep={self.ep} does not divide the world of cp*tpa = {self.cp}*{self.tpa} = {world_size} "
                f"ranks; use one of {fits}"
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
        given = own_fields(read_mapping(path), str(path))
        if "cp" not in given:
            raise PlanError(f"{path}: cp: got none, expected an int >= 1; cp has no default")
        return cls._built(given, [], str(path))

    @classmethod
    def from_trtllm(cls, source: Mapping[str, Any] | str | Path) -> HelixOptions:
        """Options that TensorRT-LLM's own (a mapping, or its YAML or JSON file) say, by its rules and defaults.

        Raises:
            HelixError: key path, got and expected; also for what TensorRT-LLM would ignore without a word.
        """
        values, where = mapping_of(source)
        return cls._built(*trtllm_fields(values, where), where)

    @classmethod
    def from_vllm(cls, source: Mapping[str, Any] | str | Path) -> HelixOptions:
        """Options that vLLM's own (a mapping, or its YAML or JSON file) say, by its rules and defaults.

        Raises:
            HelixError: key path, got and expected; also for what vLLM would ignore without a word.
        """
        values, where = mapping_of(source)
        return cls._built(*vllm_fields(values, where), where)

    @classmethod
    def _built(cls, given: dict[str, Any], idle: list[str], where: str) -> HelixOptions:
        if idle:
            logger.info("%s: no effect here: %s", where, ", ".join(idle))
        try:
            return cls(**given)
        except HelixError as error:
            raise type(error)(f"{where}: {error}") from error


OPTIONS: dict[str, Option] = {f.name: f.metadata["option"] for f in fields(HelixOptions)}


def takes_options(compiling: Callable[P, R]) -> Callable[P, R]:
    """A function that is called with a keyword for each field, or with `options` for all; it always gets `options`.

    Its docstring gets a line for each field in place of "{fields of HelixOptions}".
    """
    signature, run = inspect.signature(compiling), cast(Callable[..., R], compiling)

    @functools.wraps(compiling)
    def call(*args: P.args, **keywords: P.kwargs) -> R:
        given = signature.bind(*args, **keywords).arguments
        stated = {name: given.pop(name) for name in OPTIONS if name in given}
        given["options"] = _stated_once(stated, given.get("options"))
        return run(**given)

    lines = [textwrap.fill(f"{n}: {o.meaning}", 120, subsequent_indent="    ") for n, o in OPTIONS.items()]
    call.__doc__ = (call.__doc__ or "").replace(
        "        {fields of HelixOptions}", textwrap.indent("\n".join(lines), " " * 8)
    )
    return call


def _stated_once(stated: dict[str, Any], options: HelixOptions | None) -> HelixOptions:
    if options is None:
        if "cp" not in stated:
            raise PlanError(
                "helix_compile: got neither cp nor options; give cp=N, the ranks that share a KV cache by sequence, "
                "or options=HelixOptions(cp=N, ...)"
            )
        return HelixOptions(**stated)
    if not isinstance(options, HelixOptions):
        raise PlanError(f"helix_compile: options must be a HelixOptions, got {options!r} ({type(options).__name__})")
    if stated:
        changes = ", ".join(f"{name}={value!r}" for name, value in stated.items())
        raise PlanError(
            f"helix_compile: got options and the keywords {', '.join(stated)}, expected one or the other; leave the "
            f"keywords out, or give options=dataclasses.replace(options, {changes})"
        )
    return options


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


def own_fields(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields of HelixOptions that a mapping of ours holds, each checked for its type and choices.

    Raises:
        PlanError: key path, got, expected.
    """
    section = ConfigSection(values, where)
    for name, option in OPTIONS.items():
        if option.choices:
            section.choice(name, option.choices, option.choices[0])
        else:
            section.count(name)
    alias = {name: f"write {ours!r}, our name of it" for name, ours in ALIASES.items()}
    section.finish({}, ELSEWHERE | alias)
    return dict(values)
