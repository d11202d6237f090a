"""Whose configuration is this: ours, TensorRT-LLM's, vLLM's or SGLang's? Read it by the rules of the one that wrote it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from helix_compile.config.command import Command, arguments, as_mapping, read_command
from helix_compile.config.files import ConfigSection, Source, read_options, read_source
from helix_compile.config.keys_dynamo import SHORT_TRTLLM, WORKER, is_of_prefill
from helix_compile.config.keys_sglang import SGLANG
from helix_compile.config.keys_trtllm import (
    COMMAND_CACHE,
    COMMAND_FILE,
    COMMAND_ONLY,
    TRTLLM,
    TRTLLM_COMMAND,
    TRTLLM_DISAGGREGATED,
    TRTLLM_OTHER_SERVERS,
)
from helix_compile.config.keys_vllm import VLLM
from helix_compile.config.recipe import ConfigFields, EngineKeys, Recipe, in_kind
from helix_compile.config.sglang import sglang_fields
from helix_compile.config.shell import OpenWord
from helix_compile.config.trtllm import trtllm_fields
from helix_compile.config.vllm import vllm_fields
from helix_compile.errors import PlanError

OURS = "helix_compile"
ENGINES = {keys.name: keys for keys in (TRTLLM, VLLM, SGLANG)}
# fields of ours that TensorRT-LLM has too: they say nothing
_SHARED = ("max_batch_size", "max_seq_len")
# launchers of several kinds of servers keep an engine's own options at these places; the servers that decode are read
_NESTED = {
    ("backend", "vllm_config", "decode"): "vLLM",
    ("backend", "vllm_config", "aggregated"): "vLLM",
    ("backend", "sglang_config", "decode"): "SGLang",
    ("backend", "sglang_config", "aggregated"): "SGLang",
    ("backend", "trtllm_config", "decode"): "TensorRT-LLM",
    ("backend", "trtllm_config", "aggregated"): "TensorRT-LLM",
}
# what to_engine() writes for what an engine has no argument for
UNSAID = re.compile(r"^[ \t]*# not in (?:TensorRT-LLM|vLLM|SGLang): (\w+)=([^\s:]+)", re.MULTILINE)
_MANIFESTS = {"Kubernetes": {"apiVersion", "kind"}, "Docker Compose": {"services"}}
OwnReader = Callable[[ConfigSection], dict[str, Any]]


def read_recipe(
    source: Mapping[str, Any] | str | Path,
    own_fields: OwnReader,
    own_names: set[str],
    engine: str | None = None,
    lenient: bool = False,
) -> ConfigFields:
    """What a mapping, a file or the text of a command says.

    Args:
        source: a mapping; the path of a TOML, YAML, JSON or text file; or the text of a command.
        own_fields: reader of a mapping of ours, as a section.
        own_names: its keys.
        engine: whose it is; None: found by its keys, or by the program that a command starts.
        lenient: unknown keys, and what a plan can't hold, are left out with a note.

    Raises:
        PlanError: what can't be read, keys of several dialects, or what the dialect's own reader refuses.
    """
    found = read_source(source)
    if found.values is None:
        read = _read_command(found, engine, lenient)
    else:
        values = of_plan(found.values) if engine is None and is_plan(found.values) else found.values
        read = _read_mapping(values, found.where, own_fields, own_names, engine, lenient)
    if read.dialect != OURS:
        read.fields.update(_unsaid(found, own_fields))
    return read


def is_plan(values: Mapping[str, Any]) -> bool:
    """Is this a plan.json: of `plan --out`, `inspect --out`, HelixPlan.to_json()?"""
    return {"version", "layout", "options", "bodies"} <= values.keys()


def of_plan(values: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a plan was made by, with the ep that it came to."""
    options, layout = values["options"], values["layout"]
    if not isinstance(options, Mapping) or not isinstance(layout, Mapping) or "ep" not in layout:
        raise PlanError("plan: its layout and options are no tables; expected a plan.json as it was written")
    return {**options, "ep": layout["ep"]}


def _read_command(found: Source, engine: str | None, lenient: bool) -> ConfigFields:
    command = read_command(found.text, found.where)
    name = engine or command.engine or _engine_of_flags(command.words, found.where)
    if command.engine and name != command.engine:
        raise PlanError(f"{found.where}: got a command of {command.engine}, expected one of {name}")
    if name == TRTLLM.name:
        return _read_trtllm_serve(command, found, lenient)
    keys = ENGINES[name]
    values, idle = _said(command, keys, found)
    notes: tuple[str, ...] = ()
    if (path := values.pop("config", None)) is not None:
        filed = _named(_file_of_command(path, "config", command, found), keys, str(path))
        overridden = [k for k in values if k in filed and filed[k] != values[k] and k in keys.applied]
        notes = tuple(
            f"{k}={values[k]}: {name} takes the command line's, not the {filed[k]} of {path}" for k in overridden
        )
        values = {**filed, **values}
    read = (vllm_fields if keys is VLLM else sglang_fields)(values, found.where, lenient, command.environment)
    recipe = replace(read.recipe, notes=(*notes, *read.recipe.notes))
    return replace(read, without_effect=(*read.without_effect, *idle), recipe=recipe)


def _said(command: Command, keys: EngineKeys, found: Source) -> tuple[dict[str, Any], list[str]]:
    """(what the flags say, keys without effect whose value the text leaves open, or that are of Dynamo's worker)."""
    known = keys
    if command.worker:
        short = {**keys.short, **SHORT_TRTLLM} if keys.name == TRTLLM.name else keys.short
        known = replace(keys, without_effect={**WORKER, **keys.without_effect}, short=short)
    values = arguments(command, known, found.where)
    if not values:
        raise PlanError(f"{found.where}: got no flags of {keys.name}, expected options")
    idle = [key for key, value in values.items() if isinstance(value, OpenWord)]
    own = {key: value for key, value in values.items() if key not in keys.kinds and key in WORKER and command.worker}
    if is_of_prefill(own):
        raise PlanError(f"{found.where}: got Dynamo's worker of prompts, expected the recipe of the one that decodes")
    idle += [key for key in own if key not in idle]
    return {key: value for key, value in values.items() if key not in idle}, idle


def _file_of_command(path: Any, key: str, command: Command, found: Source) -> dict[str, Any]:
    """The options in a file that a command names: one that the text writes, or one beside it."""
    if not isinstance(path, str):
        raise PlanError(f"{found.where}: {key}: got {path!r}, expected the path of a file")
    written = command.files.get(path)
    if isinstance(written, OpenWord):
        raise PlanError(f"{found.where}: {key}: got {path!r}, expected a file whose text is said; {written.why}")
    if written is not None:
        return read_options(Path(path), written)
    if not (there := found.folder / path).is_file():
        raise PlanError(
            f"{found.where}: {key}: got {path!r}, expected a file that the text writes (cat << EOF > {path}) or that lies "
            f"beside it; there is none at {there}"
        )
    return read_options(there)


def _read_trtllm_serve(command: Command, found: Source, lenient: bool) -> ConfigFields:
    """trtllm-serve: its flags and the file that it names are one set of options."""
    server = command.words[0] if command.words else ""
    if server in TRTLLM_OTHER_SERVERS:
        raise PlanError(f"{found.where}: got trtllm-serve {server}, expected a server that decodes")
    if server.startswith("disaggregated"):
        rest = replace(command, words=command.words[1:], model_first=False)
        values, idle = _said(rest, TRTLLM_DISAGGREGATED, found)
        if "config_file" not in values:
            raise PlanError(
                f"{found.where}: trtllm-serve {server}: got no --config_file, expected the servers' options"
            )
        given = _file_of_command(values.pop("config_file"), "config_file", command, found)
        read = trtllm_fields(_named(given, TRTLLM, found.where), found.where, lenient)
        return replace(read, without_effect=(*read.without_effect, *values, *idle))
    values, idle = _said(command, TRTLLM_COMMAND, found)
    if values.get("server_role", "").upper() == "CONTEXT":
        raise PlanError(
            f"{found.where}: server_role: got {values['server_role']!r}, expected the generation server's recipe"
        )
    path, cache = values.pop(COMMAND_FILE, None), values.pop(COMMAND_CACHE, None)
    filed = {} if path is None else _named(_file_of_command(path, COMMAND_FILE, command, found), TRTLLM, str(path))
    if cache is not None:
        theirs = filed.get("kv_cache_config")
        theirs = theirs if isinstance(theirs, Mapping) else {}
        _agree(COMMAND_CACHE, cache, theirs.get("dtype", cache), path, found)
        values["kv_cache_config"] = {**theirs, "dtype": cache}
    for key in values.keys() & filed.keys() & TRTLLM.applied.keys() - {"kv_cache_config"}:
        _agree(key, values[key], filed[key], path, found)
    idle += [key for key in values if key in COMMAND_ONLY]
    merged = {**filed, **{k: v for k, v in values.items() if k not in COMMAND_ONLY}}
    read = trtllm_fields(merged, found.where, lenient)
    return replace(read, without_effect=(*read.without_effect, *idle))


def _agree(key: str, flag: Any, filed: Any, path: Any, found: Source) -> None:
    if flag != filed:
        raise PlanError(
            f"{found.where}: {key}: got {flag!r} on the command line and {filed!r} in {path}, expected one of them: older "
            "TensorRT-LLM takes the file's, newer the command line's"
        )


def _engine_of_flags(words: tuple[str, ...], where: str) -> str:
    """Whose flags these are, where no program is named."""
    names = [w.lstrip("-").split("=")[0].replace("-", "_") for w in words if w.startswith("-")]
    scores = {keys.name: _score(names, keys) for keys in (VLLM, SGLANG, TRTLLM_COMMAND)}
    best = [name for name, score in scores.items() if score == max(scores.values())]
    if len(best) > 1:
        raise PlanError(
            f"{where}: these flags may be of {' or '.join(best)}; begin with `vllm serve`, `python -m sglang.launch_server` or "
            "`trtllm-serve`, or call from_vllm, from_sglang or from_trtllm"
        )
    return best[0]


def _read_mapping(
    values: Mapping[str, Any], where: str, own_fields: OwnReader, own_names: set[str], engine: str | None, lenient: bool
) -> ConfigFields:
    for path, name in _NESTED.items():
        if (inner := _at(values, path)) is not None and engine in (None, name):
            environment = _at(values, (path[0], f"{path[-1]}_environment")) or {}
            read = _read_engine(inner, where, name, lenient, {k: str(v) for k, v in environment.items()})
            idle = (*(k for k in values if k != path[0]), *read.without_effect)
            return ConfigFields(read.dialect, read.fields, idle, read.recipe, where)
    _refuse_manifest(values, where)
    dialect = engine or _dialect(values, where, own_names)
    if dialect == OURS:
        section = ConfigSection(values, where, lenient=lenient)
        return ConfigFields(OURS, own_fields(section), recipe=Recipe(section.said()), where=where)
    return _read_engine(values, where, dialect, lenient, {})


def _refuse_manifest(values: Mapping[str, Any], where: str) -> None:
    """Files around a launch: which of their containers decodes, and what runs there, no key says."""
    kind = next((name for name, keys in _MANIFESTS.items() if keys <= values.keys()), "")
    if kind:
        raise PlanError(
            f"{where}: got a file of {kind}, expected the options of an engine; give the command of the container that decodes "
            'as text, in a .sh file or in quotes: --config "vllm serve MODEL --flags"'
        )


def _read_engine(
    values: Mapping[str, Any], where: str, engine: str, lenient: bool, environment: Mapping[str, str]
) -> ConfigFields:
    keys = ENGINES[engine]
    named = _named(values, keys, where)
    if keys is TRTLLM:
        return trtllm_fields(named, where, lenient)
    return (vllm_fields if keys is VLLM else sglang_fields)(named, where, lenient, environment)


def _at(values: Mapping[str, Any], path: tuple[str, ...]) -> Mapping[str, Any] | None:
    found: Any = values
    for key in path:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found if isinstance(found, Mapping) and found else None


def _dialect(values: Mapping[str, Any], where: str, own_names: set[str]) -> str:
    names = [key.replace("-", "_") for key in values if isinstance(key, str)]
    markers = {OURS: own_names, **{keys.name: set(keys.markers) for keys in ENGINES.values()}}
    found = {dialect: sorted({*names} & known) for dialect, known in markers.items() if {*names} & known}
    if len(found) == 1:
        return next(iter(found))
    telling = [name for name in names if name not in _SHARED]
    dashed = any("-" in key for key in values if isinstance(key, str))
    engines = [keys for keys in ENGINES.values() if not (dashed and keys is TRTLLM)]  # its files have no dashes
    scores = {keys.name: _score(telling, keys) for keys in engines}
    best = [name for name, score in scores.items() if score == max(scores.values()) > 0]
    if OURS in found or (found and len(best) > 1):
        mixed = "; ".join(f"{', '.join(keys)} of {dialect}" for dialect, keys in found.items())
        raise PlanError(f"{where}: got keys of several dialects, expected one: {mixed}")
    if len(best) > 1:
        raise PlanError(
            f"{where}: these keys may be of {' or '.join(best)}; call from_trtllm, from_vllm or from_sglang, or add a key that "
            "one of them alone has"
        )
    return best[0] if best else OURS


def _score(names: list[str], keys: EngineKeys) -> float:
    """How many of the names an engine has; one that is another's first spelling counts half."""
    kinds = keys.kinds
    return sum(1 if n in kinds else 0.5 if n in keys.short else 0 for n in (n.removeprefix("no_") for n in names))


def _named(values: Mapping[Any, Any], keys: EngineKeys, where: str) -> dict[Any, Any]:
    """The mapping with keys as the engine's tables have them; PlanError where one is there in two spellings."""
    kinds, named = keys.kinds, dict[Any, Any]()
    for key, value in values.items():
        name = key
        if isinstance(key, str):
            name = key.lstrip("-").replace("-", "_")
            name = keys.short.get(name, name) if len(name) > 3 or name in ("tp", "dp", "pp", "ep", "dcp") else name
            if name.startswith("no_") and name not in kinds and name[3:] in kinds and isinstance(value, bool):
                name, value = name[3:], not value
        if name in named:
            raise PlanError(f"{where}: {name}: got it with dashes and with underscores, expected it once")
        if keys is not TRTLLM and name in keys.without_effect:  # their files become command lines: all is text
            value = as_mapping(in_kind(value, keys.without_effect[name]))
            if keys.without_effect[name].startswith("str") and type(value) in (int, float):
                value = str(value)
        if keys is not TRTLLM and keys.applied.get(name) == "int":
            value = in_kind(value, "int")  # "8", 128k
        named[name] = value
    return named


def _numbers(text: str) -> Any:
    """0.5, or 0.5,0.25 as a list; None of what is neither."""
    try:
        numbers = [float(word) for word in text.removesuffix(",").split(",")]
    except ValueError:
        return None
    return numbers if "," in text else numbers[0]


def _unsaid(found: Source, own_fields: OwnReader) -> dict[str, Any]:
    """What comments of to_engine() say, where an engine has no argument for it."""
    if not (said := UNSAID.findall(found.text)):
        return {}
    words = {"none": None, "true": True, "false": False}
    values = {name: int(v) if v.isdigit() else _numbers(v) or words.get(v, v) for name, v in said}
    nothing = {name: value for name, value in values.items() if value is None}
    stated = {name: value for name, value in values.items() if value is not None}
    return {**nothing, **(own_fields(ConfigSection(stated, found.where)) if stated else {})}
