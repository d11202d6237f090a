"""ConfigSection: strict look-ups in one mapping of a configuration. Every message has key path, got and expected."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from helix_compile.errors import PlanError

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
                self.refuse(reprlib.repr(key), f"got a key of type {type(key).__name__}, expected a name")  # fmt: skip
            if value is None:
                self.refuse(key, "got None, expected a value; None never means a default here: leave the key out")  # fmt: skip

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
        is_bool = isinstance(value, bool)
        if not isinstance(value, KINDS[kind]) or (is_bool and kind != "bool"):
            self.wrong(key, kind)

    def flag(self, key: str, default: bool = False) -> bool:
        """True or False."""
        self.taken.add(key)
        if key in self.values:
            self.kind(key, "bool")
        return bool(self.values.get(key, default))

    def text(self, key: str, default: str) -> str:
        """A string."""
        self.taken.add(key)
        if key in self.values:
            self.kind(key, "str")
        return str(self.values.get(key, default))

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
                self.refuse(key, f"got {reprlib.repr(self.values[key])}, expected no such key: {refused[key]}")  # fmt: skip
            if key not in without_effect:
                self._unknown(key, [*self.taken, *without_effect])
            self.kind(key, without_effect[key])
            idle.append(f"{self.prefix}{key}")
        return idle

    def _unknown(self, key: str, known: Iterable[str]) -> NoReturn:
        names = sorted(set(known))
        close = difflib.get_close_matches(key, names, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(names)}"
        self.refuse(key, f"got an unknown key, expected one that is understood; {hint}")
