"""A configuration file (TOML, YAML or JSON) as a mapping, and strict look-ups in it.

A key that is written twice is an error, not the last one; every message has key path, got and expected.
"""

from __future__ import annotations

import difflib
import json
import reprlib
import tomllib
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

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


def read_mapping(path: str | Path) -> dict[str, Any]:
    """The file's top-level mapping; its suffix says the format.

    Raises:
        PlanError: another suffix, a file that can't be read or parsed, a key written twice, or no mapping.
    """
    parse = PARSERS.get(Path(path).suffix.lower())
    if parse is None:
        raise PlanError(f"{path}: unknown kind of file {Path(path).suffix!r}; expected one of {', '.join(PARSERS)}")
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        reason = getattr(error, "strerror", None) or error
        raise PlanError(f"{path}: can't read this configuration: {reason}") from error
    if len(raw) > MAX_BYTES:
        raise PlanError(f"{path}: more than {MAX_BYTES} bytes: not a configuration of options")
    try:
        content = parse(raw.decode("utf-8-sig"))
    except _PARSE_ERRORS as error:
        reason = str(error) or type(error).__name__
        raise PlanError(f"{path}: can't be parsed: {reason}") from error
    if not isinstance(content, dict):
        raise PlanError(f"{path}: expected a mapping of options at the top, got {type(content).__name__}")
    return content


def mapping_of(source: Mapping[str, Any] | str | Path) -> tuple[Mapping[str, Any], str]:
    """(the options of a mapping or a file, what messages call it).

    Raises:
        PlanError: neither, or a file that read_mapping() refuses.
    """
    if isinstance(source, Mapping):
        return source, "configuration"
    if isinstance(source, (str, Path)):
        return read_mapping(source), str(source)
    raise PlanError(f"configuration: expected a mapping or the path of a file, got {type(source).__name__}")


KINDS: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "number": (int, float),
    "bool": (bool,),
    "str": (str,),
    "mapping": (Mapping,),
    "list": (list,),
    "str or mapping": (str, Mapping),
    "str or list": (str, list),
}


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
    """

    values: Mapping[str, Any]
    where: str
    prefix: str = ""
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

    def count(self, key: str, default: int = 1) -> int:
        """An int >= 1."""
        self.taken.add(key)
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self.wrong(key, "an int >= 1")
        return value

    def kind(self, key: str, kind: str) -> None:
        """Take a key that is there and check that it is of one of KINDS."""
        self.taken.add(key)
        value = self.values[key]
        if not isinstance(value, KINDS[kind]) or (isinstance(value, bool) and kind != "bool"):
            self.wrong(key, kind)

    def flag(self, key: str, default: bool = False) -> bool:
        """True or False."""
        return bool(self._of_kind(key, "bool", default))

    def text(self, key: str, default: str) -> str:
        """A string."""
        return str(self._of_kind(key, "str", default))

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
        return ConfigSection(self.values[key], self.where, f"{self.prefix}{key}.")

    def finish(self, without_effect: Mapping[str, str], refused: Mapping[str, str]) -> list[str]:
        """Refuse every key that nobody took, but for those known to have no effect here.

        Args:
            without_effect: key -> kind of value; understood, checked and without effect on what is compiled.
            refused: key -> why it can't be followed.

        Returns:
            Paths of the keys without effect.
        """
        idle = []
        for key in self.values:
            if key in self.taken:
                continue
            if key in refused:
                self.refuse(key, f"got {reprlib.repr(self.values[key])}, expected no such key: {refused[key]}")
            if key not in without_effect:
                names = sorted({*self.taken, *without_effect})
                close = difflib.get_close_matches(key, names, n=3)
                hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(names)}"
                self.refuse(key, f"got an unknown key, expected one that is understood; {hint}")
            self.kind(key, without_effect[key])
            idle.append(f"{self.prefix}{key}")
        return idle
