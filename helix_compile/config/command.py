"""The text of a launch command as keys and values: environment, line breaks, short flags, --no-x, key=value, a.b=c.

It is split as a shell splits it, and nothing of it runs. $NAME is replaced where the text says what it is, ${NAME:-x} else
by x; where output goes is no part of it.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from string import Template
from typing import Any

from helix_compile.config.recipe import EngineKeys, in_kind
from helix_compile.errors import PlanError

_DEFAULT = re.compile(r"\$\{(\w+):?-([^{}]*)\}")
_REDIRECTION = re.compile(r"(?<=\s)(\d?>&\d|\d(?=>))")
_SEPARATORS = "\n;&|"
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=.*", re.DOTALL)
_MODULES = {
    "vllm.entrypoints.openai.api_server": "vLLM",
    "sglang.launch_server": "SGLang",
    "tensorrt_llm.commands.serve": "TensorRT-LLM",
}
_SERVE = {"vllm": "vLLM", "sglang": "SGLang"}


@dataclass(frozen=True)
class Command:
    """One launch command.

    Attributes:
        engine: whose it is; "" where the text is flags alone.
        words: its arguments.
        environment: variables that the text sets.
    """

    engine: str
    words: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


def read_command(text: str, where: str) -> Command:
    """The one command of an engine in a text.

    Raises:
        PlanError: quotes that don't close, no command of an engine, or several.
    """
    environment: dict[str, str] = {}
    found: list[Command] = []
    commands = _commands(text, where)
    for words in commands:
        words = [_filled(w, environment) for w in words]
        engine, at = _engine(words)
        before = words[:at] if engine else words
        environment |= dict(w.split("=", 1) for w in before if _ASSIGNMENT.fullmatch(w))
        if engine:
            found.append(Command(engine, tuple(words[at:]), environment))
    flags = [words for words in commands if words[0].startswith("-")]
    if not found and len(flags) == 1:
        return Command("", tuple(_filled(w, environment) for w in flags[0]), environment)
    if len(found) == 1 and flags:
        raise PlanError(
            f"{where}: got flags apart from the command ({flags[0][0]} ...), expected them behind it; a line that goes on "
            "ends in a backslash"
        )
    if len(found) != 1:
        what = f"{len(found)} commands" if found else "no command"
        raise PlanError(
            f"{where}: got {what} of an engine, expected one: `vllm serve MODEL --flags`, `python -m sglang.launch_server "
            "--flags`, or its flags alone"
        )
    return found[0]


def _filled(word: str, environment: Mapping[str, str]) -> str:
    word = _DEFAULT.sub(lambda found: environment.get(found[1]) or found[2], word)
    return Template(word).safe_substitute(environment)


def _commands(text: str, where: str) -> list[list[str]]:
    joined = _REDIRECTION.sub(" ", re.sub(r"\\[ \t]*\r?\n", " ", text))
    lines = "\n\n".join(line for line in joined.splitlines() if not line.lstrip().startswith("#"))
    lexer = shlex.shlex(lines, posix=True, punctuation_chars=_SEPARATORS + "<>")
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t\r", True, ""
    try:
        tokens = list(lexer)
    except ValueError as error:
        raise PlanError(f"{where}: can't be parsed: {error}") from error
    commands: list[list[str]] = [[]]
    comment = redirected = False
    for token in tokens:
        if set(token) <= set(_SEPARATORS + "<>"):
            redirected = bool({*token} & {*"<>"})
            if not redirected:
                commands.append([])
                comment = comment and "\n" not in token
        elif token.startswith("#"):
            comment = True
        elif not comment and not redirected:
            commands[-1].append(token)
        else:
            redirected = False
    return [words for words in commands if words]


def _engine(words: list[str]) -> tuple[str, int]:
    """(whose command it is, place of its first argument)."""
    for i, word in enumerate(words):
        name, following = PurePosixPath(word).name, words[i + 1 : i + 2]
        if word in _MODULES:
            return _MODULES[word], i + 1
        if name in _SERVE and following == ["serve"]:
            return _SERVE[name], i + 2
        if name == "trtllm-serve":
            return "TensorRT-LLM", i + 1
    image = next((i for i, word in enumerate(words) if word.startswith("vllm/vllm-openai")), None)
    return ("", 0) if image is None else ("vLLM", image + 1)  # its entry point is the server


def arguments(command: Command, keys: EngineKeys, where: str) -> dict[str, Any]:
    """Key -> value, underscored, each as the kind of value that its key has.

    Raises:
        PlanError: a flag without its value, a word that belongs to none, a key written twice.
    """
    kinds, values = keys.kinds, dict[str, Any]()
    words, i, model = command.words, 0, False
    while i < len(words):
        word, i = words[i], i + 1
        if not _is_flag(word):
            if model or not command.engine:
                raise PlanError(f"{where}: got {word!r}, which no flag takes; expected flags")
            model = True  # `vllm serve MODEL`: what is planned is said beside the file
            continue
        name, equals, joined = word.lstrip("-").partition("=")
        if compact := re.fullmatch(r"O(\d)", name):
            name, equals, joined = "O", "=", compact[1]
        head, dot, tail = name.partition(".")
        key = _key(head, kinds, keys.short)
        following = _values(words[i:])
        if key.startswith("no_") and key not in kinds and key[3:] in kinds:
            taken, value = _flag(following, equals, joined)
            key, value = key[3:], not value
        elif kinds.get(key) == "bool" and not dot:
            taken, value = _flag(following, equals, joined)
        elif equals:
            taken, value = 0, joined
        elif key not in kinds or "list" in kinds[key]:
            taken = len(following)
            value = True if not taken else following[0] if taken == 1 else following
        elif following:
            taken, value = 1, following[0]
        elif kinds[key] == "any":
            taken, value = 0, True
        else:
            raise PlanError(f"{where}: {key}: got no value, expected one after {word}")
        i += taken
        if dot:
            values.setdefault(key, {})
            if isinstance(values[key], dict):
                values[key][tail] = value
                continue
        if key in values:
            raise PlanError(f"{where}: {key}: got it twice, expected it once")
        values[key] = in_kind(value, kinds.get(key, "any"))
    return values


def _is_flag(word: str) -> bool:
    return word.startswith("-") and len(word) > 1 and not re.match(r"-[\d.]", word)


def _values(words: tuple[str, ...]) -> list[str]:
    """The words up to the next flag."""
    stop = next((i for i, word in enumerate(words) if _is_flag(word)), len(words))
    return list(words[:stop])


def _flag(following: list[str], equals: str, joined: str) -> tuple[int, Any]:
    """(words taken, value) of a flag that may stand alone."""
    if equals:
        return 0, in_kind(joined, "bool")
    if following and following[0].lower() in ("true", "false"):
        return 1, following[0].lower() == "true"
    return 0, True


def _key(name: str, kinds: Mapping[str, str], short: Mapping[str, str]) -> str:
    """The key that a flag stands for; the beginning of one alone stands for it, as argparse has it."""
    key = name.replace("-", "_")
    if key in short:
        return short[key]
    if key in kinds or (key.startswith("no_") and key[3:] in kinds):
        return key
    begun = [k for k in kinds if k.startswith(key)]
    return begun[0] if len(begun) == 1 else key


def as_mapping(value: Any) -> Any:
    """The mapping that a JSON text stands for; anything else as it is."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value
