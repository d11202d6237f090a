"""Read a configuration file (TOML, YAML or JSON) into a mapping. A key that is written twice is an error, not the last one."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any

import yaml

from helix_compile.errors import PlanError

MAX_BYTES = 256 * 1024  # a file of options is small; a checkpoint given by mistake is not
# what the parsers raise on text that is wrong; PyYAML lets errors of its own conversions through ("!!int ''")
_PARSE_ERRORS = (
    yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, OverflowError, RecursionError,
)  # fmt: skip


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML that refuses a key written twice in one mapping."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        keys = [
            self.construct_object(key, deep=True)
            for key, _ in node.value
            if key.tag != "tag:yaml.org,2002:merge"
        ]
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


def _json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_json_object, parse_constant=_no_constant)


def _yaml(text: str) -> Any:
    return yaml.load(text, Loader=_StrictLoader)


PARSERS: dict[str, Callable[[str], Any]] = {
    ".toml": tomllib.loads,
    ".yaml": _yaml,
    ".yml": _yaml,
    ".json": _json,
}


def read_mapping(path: str | Path) -> dict[str, Any]:
    """The file's top-level mapping; its suffix says the format.

    Raises:
        PlanError: another suffix, a file that can't be read or parsed, a key written twice, or no mapping.
    """
    parse = PARSERS.get(Path(path).suffix.lower())
    if parse is None:
        raise PlanError(
            f"{path}: unknown kind of file {Path(path).suffix!r}; expected one of {', '.join(PARSERS)}"
        )
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
        raise PlanError(
            f"{path}: expected a mapping of options at the top, got {type(content).__name__}"
        )
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
    raise PlanError(
        f"configuration: expected a mapping or the path of a file, got {type(source).__name__}"
    )
