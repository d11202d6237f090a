"""A configuration file (TOML, YAML or JSON) as a mapping, and strict look-ups in it.

A key that is written twice is an error, not the last one; every message has key path, got and expected. A file of
another kind is taken for the text of a command (config/command.py reads it).
"""

from __future__ import annotations

import difflib
import json
import re
import reprlib
import tomllib
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import yaml

from helix_compile.errors import PlanError

MAX_BYTES = 256 * 1024  # a file of options is small; a checkpoint given by mistake is not
# what the parsers raise on text that is wrong; PyYAML lets errors of its own conversions through ("!!int ''")
_PARSE_ERRORS = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, OverflowError, RecursionError)


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML that refuses a key written twice in one mapping."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        _refuse_twice(keys)
        return super().construct_mapping(node, deep=deep)


def _refuse_twice(keys: list[Any]) -> None:
    for i, key in enumerate(keys):
        if key in keys[:i]:
            raise ValueError(f"key {key!r} is written twice")


def _json_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _refuse_twice([key for key, _ in pairs])
    return dict(pairs)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number of JSON")


_yaml = partial(yaml.load, Loader=_StrictLoader)
_json = partial(json.loads, object_pairs_hook=_json_object, parse_constant=_no_constant)
PARSERS: dict[str, Callable[[str], Any]] = {".toml": tomllib.loads, ".yaml": _yaml, ".yml": _yaml, ".json": _json}


COMMANDS = (".txt", ".sh", ".bash", ".cmd", "")  # files that hold the text of a command


@dataclass(frozen=True)
class Source:
    """What a file or a string holds.

    Attributes:
        where: what messages call it.
        values: of a mapping; None where it is the text of a command.
        text: as it is written; of a YAML or JSON file that holds one string, that string. "" of a mapping in memory.
        folder: where a relative path in it begins: beside the file, or where this process works.
    """

    where: str
    values: Mapping[str, Any] | None
    text: str = ""
    folder: Path = Path()


def read_source(source: Mapping[str, Any] | str | Path) -> Source:
    """A mapping, the path of a file, or the text of a command (a string with flags or a line break in it).

    Raises:
        PlanError: none of them, an unknown suffix, a file that can't be read or parsed, a key written twice.
    """
    if isinstance(source, Mapping):
        return Source("configuration", source)
    if not isinstance(source, (str, Path)):
        raise PlanError(f"configuration: expected a mapping or the path of a file, got {type(source).__name__}")
    if isinstance(source, str) and _is_command(source) and not _is_file(source):
        return Source("command", None, source)
    suffix, folder = Path(source).suffix.lower(), Path(source).parent
    if suffix == ".py" or (isinstance(source, str) and re.match(r"[\w.]+\(.*=", source) and not _is_file(source)):
        raise PlanError(
            f"{source}: got Python, expected a file of options or the text of a command: write the arguments of LLM(...) into a "
            ".yaml file (tensor_parallel_size: 8), or pass them as a mapping to from_vllm, from_sglang or from_trtllm"
        )
    if not str(source).strip():
        raise PlanError("configuration: got an empty text, expected the path of a file or the text of a command")
    if suffix in COMMANDS:
        return Source(str(source), None, _text(source), folder)
    parse = PARSERS.get(suffix)
    if parse is None:
        raise PlanError(
            f"{source}: unknown kind of file {suffix!r}; expected one of {', '.join(PARSERS)}, or of a command: "
            f"{', '.join(filter(None, COMMANDS))}"
        )
    text = _text(source)
    content = _parsed(text, parse, str(source))
    if isinstance(content, str) and _is_command(content):
        return Source(str(source), None, content, folder)
    return Source(str(source), _mapping(content, str(source)), text, folder)


def read_options(path: Path, text: str | None = None) -> dict[str, Any]:
    """The mapping in a file of an engine's options, YAML unless its suffix says another format.

    Args:
        path: of the file.
        text: of it, where it is not on the disk.

    Raises:
        PlanError: no such file, no mapping, a key written twice.
    """
    if text is None and not path.is_file():  # a device or a pipe may wait for ever
        raise PlanError(f"{path}: no such file")
    parse = PARSERS.get(path.suffix.lower(), _yaml)
    return _mapping(_parsed(_text(path) if text is None else text, parse, str(path)), str(path))


def _parsed(text: str, parse: Callable[[str], Any], where: str) -> Any:
    try:
        return parse(text)
    except _PARSE_ERRORS as error:
        reason = str(error) or type(error).__name__
        raise PlanError(f"{where}: can't be parsed: {reason}") from error


def _mapping(content: Any, where: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise PlanError(f"{where}: expected a mapping of options at the top, got {type(content).__name__}")
    return content


def _is_command(text: str) -> bool:
    return text.lstrip().startswith("-") or " -" in text or "\n" in text


def _is_file(text: str) -> bool:
    try:
        return Path(text).exists()
    except (OSError, ValueError):  # too long for a path, or with a null byte
        return False


def _text(path: str | Path) -> str:
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        reason = getattr(error, "strerror", None) or error
        raise PlanError(f"{path}: can't read this configuration: {reason}") from error
    if len(raw) > MAX_BYTES:
        raise PlanError(f"{path}: more than {MAX_BYTES} bytes: not a configuration of options")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PlanError(f"{path}: can't be parsed: {error}") from error


KINDS: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "number": (int, float),
    "bool": (bool,),
    "str": (str,),
    "mapping": (Mapping,),
    "list": (list,),
    "str or mapping": (str, Mapping),
    "str or list": (str, list),
    "scalar or list": (str, int, float, list),
    "any": (object,),
}
NOTHING: tuple[Any, ...] = (
    False,
    0,
    "",
    "{}",
    "[]",
    "none",
    "None",
    "null",
    {},
    [],
)  # values of a key that asks for nothing


class Changing(NamedTuple):
    """A key that concerns the engine alone at some of its values, and at others changes what a rank computes or holds."""

    why: str
    but: tuple[Any, ...] = ()  # values without effect, beside those of NOTHING
    at: tuple[Any, ...] = ()  # values with one; (): all others

    def changes(self, value: Any) -> bool:
        """Does this value change what a rank computes or holds?"""
        plain = value.lower() if isinstance(value, str) else value
        if self.at:
            return plain in self.at
        return value not in NOTHING and plain not in self.but


def of_kinds(names: Mapping[str, str]) -> dict[str, str]:
    """Key -> kind, from kind -> keys."""
    return {key: kind for kind, keys in names.items() for key in keys.split()}


@dataclass
class ConfigSection:
    """A mapping whose keys are taken one by one; finish() refuses what nobody took.

    Attributes:
        values: the mapping; string keys, no None.
        where: the file, for messages.
        prefix: path of this mapping inside the file, such as "cp_config.".
        lenient: what only a strict reading refuses (unknown keys, what is beside the plan) is left out with a note.
        notes: what is planned otherwise than the engine does it.
        left_out: reason -> keys that are beside the plan.
    """

    values: Mapping[str, Any]
    where: str
    prefix: str = ""
    lenient: bool = False
    notes: list[str] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        if not self.values:
            here = self.prefix.removesuffix(".") or "the configuration"
            raise PlanError(f"{self.where}: {here} is empty; expected options")
        for key, value in self.values.items():
            if not isinstance(key, str):
                self.refuse(reprlib.repr(key), f"got a key of type {type(key).__name__}, expected a name")
            if value is None:
                self.refuse(key, "got None, expected a value; None never means a default here: leave the key out")

    def refuse(self, key: str, problem: str) -> NoReturn:
        """Raise PlanError for one key."""
        raise PlanError(f"{self.where}: {self.prefix}{key}: {problem}")

    def wrong(self, key: str, expected: str) -> NoReturn:
        """Raise PlanError: this value is not what is expected."""
        value = self.values[key]
        self.refuse(key, f"got {reprlib.repr(value)} ({type(value).__name__}), expected {expected}")

    def count(self, key: str, default: int = 1, least: int = 1) -> int:
        """An int >= `least`."""
        self.taken.add(key)
        if key not in self.values:
            return default
        value = self.values[key]
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            self.wrong(key, f"an int >= {least}")
        return value

    def kind(self, key: str, kind: str) -> None:
        """Take a key that is there and check that it is of one of KINDS."""
        self.taken.add(key)
        value = self.values[key]
        if not isinstance(value, KINDS[kind]) or (isinstance(value, bool) and kind not in ("bool", "any")):
            self.wrong(key, kind)

    def flag(self, key: str, default: bool = False) -> bool:
        """True or False."""
        return bool(self._of_kind(key, "bool", default))

    def text(self, key: str, default: str) -> str:
        """A string."""
        return str(self._of_kind(key, "str", default))

    def numbers(self, key: str) -> None:
        """A number, or a list of them."""
        self.taken.add(key)
        value = self.values.get(key, 1.0)
        if not all(type(n) in (int, float) for n in (value if isinstance(value, list) and value else [value])):
            self.wrong(key, "a number, or a list of them")

    def _of_kind(self, key: str, kind: str, default: Any) -> Any:
        self.taken.add(key)
        if key in self.values:
            self.kind(key, kind)
        return self.values.get(key, default)

    def choice(self, key: str, allowed: tuple[str, ...], default: str) -> str:
        """One of `allowed`."""
        value = self.text(key, default)
        if value not in allowed:
            self.wrong(key, "one of " + ", ".join(map(repr, allowed)))
        return value

    def only(self, key: str, allowed: Any, why: str) -> None:
        """A key that may only have the one value that changes nothing here."""
        self.taken.add(key)
        if key not in self.values:
            return
        value = self.values[key]
        if type(value) is not type(allowed) or value != allowed:
            self.wrong(key, f"{allowed!r}: {why}")

    def section(self, key: str) -> ConfigSection | None:
        """The mapping below `key`, None where the key is not there."""
        if key not in self.values:
            return None
        self.kind(key, "mapping")
        return ConfigSection(
            self.values[key], self.where, f"{self.prefix}{key}.", self.lenient, self.notes, self.left_out
        )

    def beside(self, key: str, why: str) -> None:
        """A key whose effect is not in a plan: refused, or where the reading is lenient left out with a note."""
        self.taken.add(key)
        if not self.lenient:
            self.refuse(
                key,
                f"got {reprlib.repr(self.values[key])}, expected no such key: {why}; --lenient (lenient=True) plans "
                "without it and says so",
            )
        self.left_out.setdefault(why, []).append(f"{self.prefix}{key}={reprlib.repr(self.values[key])}")

    def said(self) -> tuple[str, ...]:
        """All notes; what was left out for one reason stands in one."""
        return (*self.notes, *(f"left out: {', '.join(keys)}: {why}" for why, keys in self.left_out.items()))

    def finish(
        self,
        without_effect: Mapping[str, str],
        refused: Mapping[str, str],
        beside: Mapping[str, str] | None = None,
        changing: Mapping[str, Changing] | None = None,
    ) -> list[str]:
        """Refuse every key that nobody took, but for those known to have no effect here.

        Args:
            without_effect: key -> kind of value; understood, checked and without effect on what is compiled.
            refused: key -> why it can't be followed.
            beside: key -> why a plan does not hold it; refused unless the reading is lenient.
            changing: keys without effect -> at which values they have one, and are as those beside.

        Returns:
            Paths of the keys without effect.
        """
        idle = []
        for key in self.values:
            if key in self.taken:
                continue
            if key in refused or key in (beside or {}):
                if self.values[key] in NOTHING:
                    idle.append(f"{self.prefix}{key}")
                elif key in refused:
                    self.refuse(key, f"got {reprlib.repr(self.values[key])}, expected no such key: {refused[key]}")
                else:
                    self.beside(key, (beside or {})[key])
                continue
            if key not in without_effect:
                self._unknown(key, sorted({*self.taken, *without_effect, *refused, *(beside or {})}))
                continue
            self.kind(key, without_effect[key])
            if changing and key in changing and changing[key].changes(self.values[key]):
                self.beside(key, changing[key].why)
                continue
            idle.append(f"{self.prefix}{key}")
        return idle

    def check_names(self, known: Iterable[str]) -> None:
        """Strictly read, a key that nobody knows is told before what follows from the one that it was meant to be."""
        names = sorted({*known})
        for key in self.values:
            if not self.lenient and key not in names:
                self._unknown(key, names)

    def _unknown(self, key: str, names: list[str]) -> None:
        close = difflib.get_close_matches(str(key).lower(), names, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"the nearest is {nearest(key, names)}"
        if not self.lenient:
            self.refuse(key, f"got an unknown key, expected one that is understood; {hint}")
        self.notes.append(f"{self.prefix}{key} is unknown, and was ignored; {hint}")


def nearest(key: str, names: Iterable[str]) -> str:
    """The name that is most like `key`, however little."""
    return difflib.get_close_matches(key.lower(), list(names), n=1, cutoff=0.0)[0]
