"""What a configuration says: fields of HelixOptions, keys without effect, notes; and what readers of engines share."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from helix_compile.config.files import NOTHING, Changing, ConfigSection
from helix_compile.errors import PlanError

# bytes of one element, of caches that hold nothing else; another format's are not said
CACHE_BYTES = {"fp8_e5m2": 1, "int8": 1}
FP8_CACHE = {"fp8": "fp8_e4m3", "fp8_e4m3": "fp8_e4m3", "fp8_ds_mla": "fp8_ds_mla"}  # ours of theirs
# why a plan does not follow keys that several engines have
STATES = "states of linear attention are in the dtype that the model computes them in"
EXCHANGED = "collectives carry the model's dtype"
ON_CPU = "weights that stay on the CPU are not supported"
QUANTISED = "a checkpoint says itself how its weights are quantised, and they are computed in --dtype"
FP8_SCALES = "an FP8 cache has the scales that cache_scale says, one for all layers or one for each"
FP8_LAYERS = "every layer's cache is in what cache_dtype says"
DECOMPRESSED = "latent attention caches latents and attends in them: no option stores keys and values of heads"

SAME_CACHE = ("auto",)
HALF_CACHE = ("bfloat16", "bf16", "float16", "fp16")


@dataclass(frozen=True)
class Recipe:
    """Where options come from, for the notes of a plan.

    Attributes:
        notes: what is left out, or planned otherwise than the engine does it.
        cache_dtype: what the recipe's cache is in, where the plan's is in the model's dtype; "" where they are one.
        dtype: what the recipe's model computes in; "" where it does not say.
    """

    notes: tuple[str, ...] = ()
    cache_dtype: str = ""
    dtype: str = ""

    def check_dtype(self, dtype: str) -> None:
        """PlanError where the model that is planned computes in another dtype than the recipe's."""
        if self.dtype and self.dtype != dtype:
            raise PlanError(
                f"the recipe says dtype {self.dtype}, the model that is planned is in {dtype}: give dtype= or --dtype "
                f"{self.dtype} beside the file, or leave its dtype out"
            )

    def said_apart(self) -> tuple[str, ...]:
        """The notes where there is no plan beside them."""
        if not self.cache_dtype:
            return self.notes
        return (*self.notes, f"the recipe's KV cache is in {self.cache_dtype}, here it is in the model's dtype")

    def said(self, kv_bytes: Fraction, itemsize: int, dtype: str) -> tuple[str, ...]:
        """The notes, with the bytes of a plan's cache (a token, on one rank) in the one on its dtype."""
        if not self.cache_dtype:
            return self.notes
        element = CACHE_BYTES.get(self.cache_dtype.lower())
        theirs = (
            f"{float(kv_bytes * element / itemsize):g} (scales, if any, not counted)"
            if element
            else "another number of bytes"
        )
        return (
            *self.notes,
            f"the recipe's KV cache is in {self.cache_dtype}: planned in the model's dtype, {dtype}: "
            f"{float(kv_bytes):g} bytes a token and rank in place of {theirs}",
        )


@dataclass(frozen=True)
class ConfigFields:
    """What a file says.

    Attributes:
        dialect: "helix_compile", "TensorRT-LLM", "vLLM" or "SGLang".
        fields: of HelixOptions, as said or implied by the file; the others are not in it.
        without_effect: key paths that were understood and change nothing here.
        recipe: what the plan shall note.
        where: what messages call the file.
    """

    dialect: str
    fields: dict[str, Any]
    without_effect: tuple[str, ...] = ()
    recipe: Recipe = field(default_factory=Recipe)
    where: str = "configuration"


@dataclass(frozen=True)
class EngineKeys:
    """The arguments of an engine, by what they are here.

    Attributes:
        name: of the engine.
        markers: keys that no other dialect has.
        applied: key -> kind; they say the layout.
        without_effect: key -> kind; they concern the engine alone.
        refused: key -> why no plan can follow it.
        beside: key -> why a plan does not hold it; a lenient reading leaves it out.
        nullable: applied keys whose null is their default.
        short: other spellings of a key, and its short flags.
        graphs: key -> kind; they say whether steps are recorded in CUDA graphs. One that a text leaves open says nothing.
        changing: keys without effect -> the values at which they have one; as those beside there.
        prefix: of the engine's variables of the environment.
        changing_variables: those that change what a rank computes or holds -> why a plan does not follow; off by 0 or nothing.
        idle_variables: those that concern the engine alone; one that is in neither is noted.
    """

    name: str
    markers: tuple[str, ...]
    applied: Mapping[str, str]
    without_effect: Mapping[str, str]
    refused: Mapping[str, str]
    beside: Mapping[str, str]
    nullable: tuple[str, ...] = ()
    short: Mapping[str, str] = field(default_factory=dict)
    graphs: Mapping[str, str] = field(default_factory=dict)
    changing: Mapping[str, Changing] = field(default_factory=dict)
    prefix: tuple[str, ...] = ()
    changing_variables: Mapping[str, str] = field(default_factory=dict)
    idle_variables: frozenset[str] = frozenset()

    @property
    def kinds(self) -> dict[str, str]:
        """Every key that is known -> kind of its value."""
        unsaid = dict.fromkeys((*self.refused, *self.beside), "any")
        flags = {k: "bool" for k in unsaid if k.startswith(("enable_", "disable_"))}
        several = {k: "scalar or list" for k in unsaid if k.endswith(("_paths", "_endpoints"))}
        return {**unsaid, **flags, **several, **self.without_effect, **self.graphs, **self.applied}


def without_nulls(
    values: Mapping[str, Any], keys: Mapping[str, Any], nullable: tuple[str, ...] = (), prefix: str = ""
) -> tuple[dict[str, Any], list[str]]:
    """(the mapping without nulls that ask for nothing, the paths of those that have no effect here).

    A null of an applied key stays and is refused, unless null is that key's default.
    """
    idle = [key for key, value in values.items() if value is None and key in keys]
    kept = {k: v for k, v in values.items() if not (v is None and (k in keys or k in nullable))}
    return kept, [f"{prefix}{key}" for key in idle]


def in_kind(value: Any, kind: str) -> Any:
    """A text as the kind of value that it stands for; whatever is not one stays as it is."""
    if not isinstance(value, str):
        return value
    if kind == "bool" and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if kind in ("int", "number"):
        return _number(value, whole=kind == "int")
    return value


_MULTIPLES = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def _number(text: str, whole: bool) -> Any:
    """An int, a float, or what vLLM and SGLang write for large ones: 128k is 128,000, 128K is 131,072."""
    if re.fullmatch(r"[+-]?\d{1,18}", text):
        return int(text)
    if found := re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)([kmgtKMGT])", text):
        return int(float(found[1]) * _MULTIPLES[found[2]])
    if not whole and re.fullmatch(r"[+-]?(\d{1,18}\.?\d{0,18}|\.\d{1,18})(e[+-]?\d{1,3})?", text, re.IGNORECASE):
        return float(text)
    return text


def check_environment(
    top: ConfigSection, keys: EngineKeys, environment: Mapping[str, str], taken: tuple[str, ...]
) -> list[str]:
    """Names of the variables without effect here; those of the engine that change something are as keys beside the plan."""
    idle, unknown = [], []
    for name, value in environment.items():
        if name in taken:
            continue
        if name in keys.changing_variables and value.lower() not in ("", "0", "false"):
            section = ConfigSection({name: value}, top.where, "", top.lenient, top.notes, top.left_out)
            section.beside(name, keys.changing_variables[name])
            continue
        known = name in keys.changing_variables or name in keys.idle_variables
        if name.startswith(keys.prefix) and not known:
            unknown.append(f"{name}={value}")
        idle.append(name)
    if unknown:
        top.notes.append(
            f"variables of {keys.name} that are not known here, planned as without them: {', '.join(unknown)}"
        )
    return idle


def check_cache_scales(top: ConfigSection, keys: Mapping[str, str], fields: Mapping[str, Any]) -> None:
    """Keys of an FP8 cache: beside the plan where the cache is in FP8, without effect on another."""
    for key, why in keys.items():
        if "cache_dtype" in fields and top.values.get(key, False) not in NOTHING:
            top.beside(key, why)


def check_cache_dtype(section: ConfigSection, key: str, fields: dict[str, Any]) -> str:
    """What the cache is in; "" where that is the model's dtype, or an FP8 of ours, which goes to `fields`. Only a lenient
    reading takes another.
    """
    given = section.text(key, "auto")
    if given.lower() in SAME_CACHE:
        return ""
    if given.lower() in FP8_CACHE:
        fields["cache_dtype"] = FP8_CACHE[given.lower()]
        return ""
    if given.lower() in HALF_CACHE:
        section.notes.append(f"{section.prefix}{key}={given}: the cache is planned in the model's dtype")
        return ""
    if not section.lenient:
        section.wrong(
            key,
            f"'auto' (the dtype of the model) or one of {', '.join(map(repr, FP8_CACHE))}; --lenient (lenient=True) plans it in the "
            "dtype of the model and says what changes",
        )
    return given


DTYPES = {"bfloat16": "bfloat16", "float16": "float16", "half": "float16", "float32": "float32", "float": "float32"}


def read_dtype(section: ConfigSection, key: str = "dtype") -> str:
    """What the model must be in, "" if the file does not say; a plan of a model in another is refused (Recipe.check_dtype)."""
    given = section.text(key, "auto")
    if given == "auto":
        return ""
    if given not in DTYPES:
        section.wrong(key, f"'auto' or one of {', '.join(map(repr, DTYPES))}")
    if section.lenient:
        section.notes.append(f"{key}={given} is left out: what is planned is in the dtype of the call or the command")
        return ""
    return DTYPES[given]


def replica_note(key: str, replicas: int, ranks: int, experts: str) -> str:
    """One of several data-parallel replicas of attention is planned."""
    return f"{key}: one of {replicas} data-parallel replicas of attention is planned, on its {ranks} ranks; {experts}"


def experts_of_replica(ep: int, ranks: int) -> int:
    """Expert parallelism over the ranks of one replica, where the engine's is over those of all."""
    return math.gcd(ep, ranks)


def add_stages(fields: dict[str, Any], pp: int, split: str) -> None:
    """The pipeline's stages; how an engine deals layers that don't divide is its own rule."""
    if pp > 1:
        fields |= {"pp": pp, "pp_split": split}
