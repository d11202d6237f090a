"""HelixOptions: every keyword of helix_compile and key of our own configuration file, frozen and validated.

Nothing is accepted and ignored.
"""

from __future__ import annotations

import functools
import inspect
import logging
import math
import reprlib
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import InitVar, asdict, dataclass, field, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

from helix_compile.config.files import ConfigSection, nearest, read_source
from helix_compile.config.reading import OURS, is_plan, read_recipe
from helix_compile.config.recipe import ConfigFields, Recipe
from helix_compile.errors import HelixError, KeywordError, LayoutError, PlanError

logger = logging.getLogger(__name__)
P = ParamSpec("P")
R = TypeVar("R")
MAX_COUNT = 2**31 - 1
NO_RECIPE = Recipe()
FP8_E4M3, FP8_DS_MLA = "fp8_e4m3", "fp8_ds_mla"
LEAST, MOST = 2.0**-100, 2.0**100  # scales that float32 holds, and their values too
PAGE_SIZE = 128  # local slots a page: the unit of paging inside a rank, independent of tokens_per_block


@dataclass(frozen=True)
class Option:
    """What there is to say of a field of HelixOptions; checks, command line, schema and docs all read it from here.

    Attributes:
        meaning: one sentence, for help(helix_compile) and docs/configuration.md.
        cli: for --help; of an option with choices, what stands behind them.
        choices: allowed strings, the default first; a field without any is an int >= 1, or True or False.
        flag: True or False.
        of_exchange: at cp = 1 nothing is exchanged, so there it can have no effect.
        of_stages: at pp = 1 there is one stage, so there it can have no effect.
        of_ranks: a world of one rank has nobody to ask, so there it can have no effect.
        least: of an int.
        numbers: a number > 0, or several.
    """

    meaning: str
    cli: str = ""
    choices: tuple[str, ...] = ()
    of_exchange: bool = False
    of_stages: bool = False
    of_ranks: bool = False
    least: int = 1
    flag: bool = False
    numbers: bool = False

    @property
    def cli_help(self) -> str:
        """What --help says."""
        return ": ".join(filter(None, (" | ".join(self.choices), self.cli)))


def _says(short: str, more_: str = "", **more: Any) -> dict[str, Option]:
    return {"option": Option(f"{short}{more_}.", short, **more)}


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
    topk_exchange: str = _choice(
        ("auto", "gather", "owner"),
        'sparse attention: every rank gets all candidates ("gather", one collective), or each query has one rank that gets '
        'them and says which is the k-th ("owner", two collectives, fewer bytes), or "auto" by bytes and rounds.',
        "how ranks agree on the keys that an indexer chooses",
        of_exchange=True,
    )
    window: str = _choice(
        ("shard", "replicate", "auto"),
        'sliding windows and chunks: their cache is sharded as any ("shard"), or every rank holds the last tokens of the KV heads '
        'that its own query heads read, and nothing is exchanged ("replicate"); "auto": so where the window lies on fewer blocks '
        "than there are CP ranks and the cache becomes no larger.",
        "where the cache of a sliding window lies",
        of_exchange=True,
    )
    overlap: str = _choice(
        ("none", "hopb"),
        '"none" (all sequences attend, then exchange), or "hopb" (HOP-B, of the paper: a part of the batch at a time, so that one part\'s '
        "exchange is on its way while the next part attends; the same bits).",
        "what runs while partial attention is exchanged",
        of_exchange=True,
    )
    lower: str = _choice(
        ("auto", "reference", "triton", "cpp", "inductor", "triton+inductor", "cpp+inductor", "tensorrt"),
        '"reference" (torch), "triton" (on a CPU by Triton\'s interpreter), "cpp" (attention to latents in C++, on a CPU), "inductor" '
        '(what lies between two collectives is compiled by Inductor and is one call), "triton+inductor", "cpp+inductor" (both), "tensorrt" '
        '(what lies between collectives and ops of ours is an engine of TensorRT; never run on a card yet), the rest as "auto", or '
        '"auto": Triton on CUDA >= 9.0, else reference.',
    )
    max_batch_size: int = field(default=8, metadata=_says("capacity in sequences"))
    max_seq_len: int = field(default=4096, metadata=_says("capacity in tokens a sequence", ", prompt included"))
    cache_dtype: str = _choice(
        ("auto", FP8_E4M3, FP8_DS_MLA),
        'the cache in the model\'s dtype ("auto"), in FP8 of one scale ("fp8_e4m3"), or, of latents, in FP8 with a scale '
        'for each 128 of them and the rope part in bfloat16 ("fp8_ds_mla", 656 bytes a token of 512 + 64).',
        "what the cache is in",
    )
    cache_scale: float | tuple[float, ...] = field(
        default=1.0,
        metadata=_says(
            "what the values of a cache in fp8_e4m3 are divided by",
            ", rounded to float32: one number, or one for each cached attention",
            numbers=True,
        ),
    )
    unmatched: str = _choice(
        ("error", "keep"),
        'a layer that can\'t be captured or whose attention is not recognised is an "error", or stays as it is ("keep"): '
        "whole on every rank, listed in the report. Some layer must be rewritten.",
        "leave what is not recognised as it is",
    )
    pad_heads: bool = field(
        default=False,
        metadata=_says(
            "heads that do not divide over the ranks, and experts over ep, are padded with zeros",
            " instead of refused; exact, what it costs is in the plan",
            flag=True,
        ),
    )
    pp: int = field(
        default=1,
        metadata=_says(
            "pipeline stages", ", of which one is planned, for a model on the meta device; each has cp * tpa ranks"
        ),
    )
    stage: int = field(
        default=0, metadata=_says("which of the pp stages is planned", ", from 0", of_stages=True, least=0)
    )
    pp_split: str = _choice(
        ("first", "middle", "last"),
        'of layers that pp does not divide, one more is on the "first" stages (TensorRT-LLM), on those before the last '
        '("middle", vLLM), or on the "last" ones (SGLang).',
        "which stages have one layer more",
        of_stages=True,
    )
    head: str = _choice(
        ("replicate", "shard"),
        'token embedding and output head whole on every rank ("replicate"), or cut by rows of the vocabulary over all ranks '
        '("shard"): one all-reduce of the embeddings and one all-gather of the logits a step.',
        "the embedding and the output head",
        of_ranks=True,
    )
    check: str = _choice(
        ("deferred", "every", "off"),
        "whether ranks of their own process were given the same ids, lengths and mask is compared when the next step begins "
        '("deferred": no step waits for it), before each step ("every"), or never ("off"); the virtual world has one input.',
        "when real ranks compare what they were given for a step",
        of_ranks=True,
    )
    cuda_graphs: bool = field(
        default=True,
        metadata=_says(
            "steps of up to 32 tokens a sequence are recorded in CUDA graphs and replayed",
            ", on a card (elsewhere, and where False, they are launched); what can't be recorded is called between them "
            "(docs/compiled.md)",
            flag=True,
        ),
    )
    recipe: InitVar[Recipe] = NO_RECIPE  # where the options come from: not an option, and no part of equality

    def __new__(cls, *args: Any, **keywords: Any) -> HelixOptions:
        """Before dataclass's own __init__, which has no words for a keyword that it does not know."""
        check_keywords("HelixOptions", keywords, [*OPTIONS, "recipe"])
        return super().__new__(cls)

    def __post_init__(self, recipe: Recipe) -> None:
        object.__setattr__(self, "recipe", recipe)
        for name, option in OPTIONS.items():
            value = getattr(self, name)
            if name == "ep" and value is None:  # the largest that divides
                continue
            if option.flag:
                if not isinstance(value, bool):
                    raise PlanError(f"option {name}={value!r} ({type(value).__name__}); expected True or False")
            elif option.numbers:
                object.__setattr__(self, name, checked_numbers(name, value))
            elif not option.choices:
                check_count(name, value, option.least)
            elif value not in option.choices:
                raise PlanError(
                    f"option {name}={value!r} is unknown; expected one of " + ", ".join(map(repr, option.choices))
                )
            elif self.cp == 1 and option.of_exchange and value != option.choices[0]:
                raise PlanError(
                    f"option {name}={value!r} has no effect at cp=1: one rank holds the whole sequence and nothing is "
                    f"exchanged; drop it or use cp >= 2"
                )
            if self.pp == 1 and option.of_stages and value != getattr(type(self), name):
                raise PlanError(
                    f"option {name}={value!r} has no effect at pp=1: there is one stage; drop it or use pp >= 2"
                )
            if self.cp * self.tpa == 1 and option.of_ranks and value != getattr(type(self), name):
                raise PlanError(
                    f"option {name}={value!r} has no effect at cp*tpa = 1: there is one rank; drop it or use more ranks"
                )
        if self.cache_dtype != FP8_E4M3 and self.cache_scale != type(self).cache_scale:
            raise PlanError(
                f"option cache_scale={self.cache_scale!r} has no effect at cache_dtype={self.cache_dtype!r}, which has no scale "
                f"that is given; drop it or use cache_dtype={FP8_E4M3!r}"
            )
        if self.stage >= self.pp:
            raise LayoutError(
                f"stage={self.stage} is none of the pp={self.pp} stages; choose one of 0 to {self.pp - 1}"
            )
        world_size = self.cp * self.tpa
        if self.pad_heads and world_size == 1:
            raise PlanError(
                "option pad_heads=True has no effect at cp*tpa = 1: one rank has all heads and experts; drop it or use more ranks"
            )
        if self.ep is not None and world_size % self.ep:
            fits = [e for e in range(1, min(world_size, 4096) + 1) if world_size % e == 0]
            raise LayoutError(
                f"ep={self.ep} does not divide the world of cp*tpa = {self.cp}*{self.tpa} = {world_size} "
                f"ranks; use one of {fits}"
            )

    @property
    def compiles_segments(self) -> bool:
        """Are segments compiled by Inductor?"""
        return "inductor" in self.lower

    @property
    def builds_engines(self) -> bool:
        """Are pieces engines of TensorRT?"""
        return self.lower == "tensorrt"

    def notes_of_plan(self, kv_bytes: Fraction, itemsize: int, dtype: str) -> tuple[str, ...]:
        """What the recipe that they come from wants to be noted; the cache of the plan has these bytes a token and rank."""
        recipe: Recipe = vars(self)["recipe"]
        recipe.check_dtype(dtype)
        return recipe.said(kv_bytes, itemsize, dtype)

    def to_json(self) -> dict[str, Any]:
        """Plain dict, as in plan.json."""
        return asdict(self)

    @classmethod
    def from_file(cls, path: Mapping[str, Any] | str | Path, lenient: bool = False) -> HelixOptions:
        """Options of a file or the text of a command: ours, or a recipe of TensorRT-LLM, vLLM or SGLang.

        Whose it is shows by its keys, or by the program that it starts (docs/configuration.md).

        Args:
            path: a TOML, YAML, JSON or text file, the text of a command, or a mapping.
            lenient: keys that nobody knows, and what a plan can't hold (a cache in FP8, drafts), are left out with a note
                in the plan, in place of an error.

        Raises:
            HelixError: the file, key path, got and expected.
        """
        return cls._read(path, None, lenient)

    @classmethod
    def from_trtllm(cls, source: Mapping[str, Any] | str | Path, lenient: bool = False) -> HelixOptions:
        """Options that TensorRT-LLM's own (a mapping, or its YAML or JSON file) say, by its rules and defaults.

        Of a file of disaggregated serving the generation servers are read. `lenient` as in from_file().

        Raises:
            HelixError: key path, got and expected; also for what TensorRT-LLM would ignore without a word.
        """
        return cls._read(source, "TensorRT-LLM", lenient)

    @classmethod
    def from_vllm(cls, source: Mapping[str, Any] | str | Path, lenient: bool = False) -> HelixOptions:
        """Options that vLLM's own (a mapping, its YAML or JSON file, or a command line) say, by its rules and defaults.

        `lenient` as in from_file().

        Raises:
            HelixError: key path, got and expected; also for what vLLM would ignore without a word.
        """
        return cls._read(source, "vLLM", lenient)

    @classmethod
    def from_sglang(cls, source: Mapping[str, Any] | str | Path, lenient: bool = False) -> HelixOptions:
        """Options that SGLang's own (a mapping, its YAML or JSON file, or a command line) say, by its rules and defaults.

        `lenient` as in from_file().

        Raises:
            HelixError: key path, got and expected; also for what SGLang would ignore without a word.
        """
        return cls._read(source, "SGLang", lenient)

    @classmethod
    def _read(cls, source: Any, engine: str | None, lenient: bool) -> HelixOptions:
        read = read_recipe(source, own_fields, OWN_NAMES, engine, lenient)
        if read.dialect == OURS and "cp" not in read.fields:
            raise PlanError(f"{read.where}: cp: got none, expected an int >= 1; cp has no default")
        return cls.of_fields(read)

    @classmethod
    def of_fields(cls, read: ConfigFields) -> HelixOptions:
        """Options of what a file says.

        Raises:
            HelixError: the file, and options that contradict each other.
        """
        if read.without_effect:
            logger.info("%s: no effect here: %s", read.where, ", ".join(read.without_effect))
        for note in read.recipe.notes:
            logger.info("%s: %s", read.where, note)
        try:
            return cls(**read.fields, recipe=read.recipe)
        except HelixError as error:
            raise type(error)(f"{read.where}: {error}") from error


OPTIONS: dict[str, Option] = {f.name: f.metadata["option"] for f in fields(HelixOptions)}
# keys that show a mapping to be ours; fields that TensorRT-LLM has too say nothing
OWN_NAMES = {*OPTIONS} - {"max_batch_size", "max_seq_len"}


def takes_options(compiling: Callable[P, R]) -> Callable[P, R]:
    """A function that is called with a keyword for each field, or with `options` for all; it always gets `options`.

    Its docstring gets a line for each field in place of "{fields of HelixOptions}".
    """
    signature, run = inspect.signature(compiling), cast(Callable[..., R], compiling)

    @functools.wraps(compiling)
    def call(*args: P.args, **keywords: P.kwargs) -> R:
        check_keywords(compiling.__name__, keywords, signature.parameters)
        try:
            given = signature.bind(*args, **keywords).arguments
        except TypeError as error:
            raise KeywordError(
                f"{compiling.__name__}: {error}; expected {compiling.__name__}(model, cp=N, ...)"
            ) from None
        stated = {name: given.pop(name) for name in OPTIONS if name in given}
        if (plan := given.get("plan")) is not None:
            given["options"] = _of_plan_alone(plan, {**stated, **({"options": 0} if given.get("options") else {})})
        else:
            given["options"] = _stated_once(stated, given.get("options"))
        return run(**given)

    lines = [textwrap.fill(f"{n}: {o.meaning}", 120, subsequent_indent="    ") for n, o in OPTIONS.items()]
    call.__doc__ = (call.__doc__ or "").replace(
        "        {fields of HelixOptions}", textwrap.indent("\n".join(lines), " " * 8)
    )
    return call


def _of_plan_alone(plan: Any, beside: Mapping[str, Any]) -> HelixOptions:
    """The options of a plan: a HelixPlan, or the path of its JSON."""
    if beside:
        raise PlanError(
            f"helix_compile: got plan and {', '.join(beside)}, expected one or the other: a plan says all options"
        )
    if isinstance(plan, (str, Path)):
        text = Path(plan)
        if text.suffix != ".json" or not is_plan(read_source(text).values or {}):
            raise PlanError(
                f"helix_compile: plan={str(plan)!r} is no plan.json; options in files are read by HelixOptions.from_file()"
            )
        return HelixOptions.from_file(text)
    if not isinstance(getattr(plan, "options", None), HelixOptions):
        raise PlanError(
            f"helix_compile: plan must be a HelixPlan or the path of a plan.json, got {plan!r} ({type(plan).__name__})"
        )
    return replace(plan.options, ep=plan.layout.ep)


def check_keywords(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise KeywordError for a keyword that is not known: the nearest one, and all."""
    for name in given:
        if name not in (names := list(known)):
            raise KeywordError(
                f"{what}: got an unknown keyword {name!r}, expected one of {', '.join(names)}; the nearest is {nearest(name, names)}"
            )


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


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Raise LayoutError unless `value` is a real int >= `least` that the int32 of `visible` can hold."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise LayoutError(f"{name} must be an int >= {least}, got {value!r} ({type(value).__name__})")
    if value > MAX_COUNT:
        raise LayoutError(f"{name} must be at most {MAX_COUNT:,} (local slots are int32), got {value:,}")


def checked_numbers(name: str, value: Any) -> float | tuple[float, ...]:
    """One number or several, each finite and > 0 in float32; PlanError otherwise."""
    several = isinstance(value, (list, tuple))
    for number in value if several else [value]:
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not LEAST <= number <= MOST:
            raise PlanError(
                f"option {name}={reprlib.repr(value)}: got {number!r} ({type(number).__name__}), expected a number from {LEAST:g} "
                f"to {MOST:g}, or a list of them, one for each cached attention"
            )
    if several and not value:
        raise PlanError(f"option {name}={value!r} is empty; expected a number > 0, or one for each cached attention")
    return tuple(float(n) for n in value) if several else float(value)


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


def own_fields(section: ConfigSection) -> dict[str, Any]:
    """The fields of HelixOptions that a mapping of ours holds, each checked for its type and choices.

    Raises:
        PlanError: key path, got, expected.
    """
    for name, option in OPTIONS.items():
        if option.flag:
            section.flag(name)
        elif option.numbers:
            section.numbers(name)
        elif option.choices:
            section.choice(name, option.choices, option.choices[0])
        else:
            section.count(name, least=option.least)
    alias = {name: f"write {ours!r}, our name of it" for name, ours in ALIASES.items()}
    section.finish({}, ELSEWHERE | alias)
    return {name: value for name, value in section.values.items() if name in OPTIONS}
