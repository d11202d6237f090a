"""The text of a launch command as keys and values: environment, short flags, --no-x, key=value, a.b=c.

What the words of a text stand for is config/shell.py's; what it leaves open (a variable that only a run knows) may be the
value of a key without effect here, and is refused elsewhere, with its line.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from helix_compile.config.recipe import EngineKeys, in_kind
from helix_compile.config.shell import OpenWord, ShellCommand, shell_commands
from helix_compile.config.shell_tokens import ShellError
from helix_compile.errors import PlanError

_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=.*", re.DOTALL)
_MODULES = {
    "vllm.entrypoints.openai.api_server": "vLLM",
    "vllm.entrypoints.api_server": "vLLM",
    "sglang.launch_server": "SGLang",
    "tensorrt_llm.commands.serve": "TensorRT-LLM",
}
# NVIDIA Dynamo's workers: an engine's flags with some of their own
_WORKERS = {"dynamo.vllm": "vLLM", "dynamo.sglang": "SGLang", "dynamo.trtllm": "TensorRT-LLM"}
_SERVE = {"vllm": "vLLM", "sglang": "SGLang"}
_MEASURE = ("trtllm-bench", "trtllm-build", "trtllm-eval")
_NO_LAUNCH = (
    "echo",
    "printf",
    "pkill",
    "pgrep",
    "grep",
    "kill",
    "killall",
    "ps",
)  # they name a program, and start none
# an image whose entry point is the server, of any registry
_VLLM_IMAGE = re.compile(r"(?:[\w.-]+(?::\d+)?/)*vllm/vllm-openai\b")
_PREFIXES = ("VLLM_", "SGLANG_", "SGL_", "TRTLLM_", "TLLM_")


@dataclass(frozen=True)
class Command:
    """One launch command.

    Attributes:
        engine: whose it is; "" where the text is flags alone.
        words: its arguments.
        environment: variables that it sees of those that the text sets.
        files: path -> text of files that the text writes before.
        model_first: one word that no flag takes is the model.
        worker: it is one of Dynamo's workers, which takes flags of its own besides.
    """

    engine: str
    words: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    model_first: bool = True
    worker: bool = False


def read_command(text: str, where: str) -> Command:
    """The one command of an engine in a text.

    Raises:
        PlanError: text that can't be parsed, no command of an engine, several, or a variable for it that is not exported.
    """
    try:
        commands = shell_commands(text)
    except ShellError as error:
        raise PlanError(f"{where}: can't be parsed: {error}") from error
    except RecursionError as error:
        raise PlanError(f"{where}: can't be parsed: brackets too deep in one another") from error
    found = [(c, *_engine(list(c.words))) for c in commands if PurePosixPath(c.words[0]).name not in _NO_LAUNCH]
    found = [line for line in found if line[1]]
    flags = [c for c in commands if c.words[0].startswith("-")]
    if not found and len(flags) == 1:
        return Command("", flags[0].words, flags[0].environment, flags[0].files, model_first=False)
    if len(found) == 1 and flags:
        raise PlanError(
            f"{where}: got flags apart from the command ({flags[0].words[0]} ..., line {flags[0].line}), expected them behind "
            "it; a line that goes on ends in a backslash"
        )
    if not found and (nested := _nested(commands)):
        return read_command(nested, where)
    if len(found) != 1:
        lines = ", ".join(str(c.line) for c, *_ in found)
        what = f"{len(found)} commands of an engine (lines {lines})" if found else _no_command(commands)
        raise PlanError(
            f"{where}: got {what}, expected one: `vllm serve MODEL --flags`, `python -m sglang.launch_server --flags`, "
            "`trtllm-serve MODEL --flags`, or its flags alone"
            f"{'; of servers that share the work, the one that decodes' if len(found) > 1 else ''}"
        )
    command, engine, at = found[0]
    _check_seen(command, where)
    before = dict(w.split("=", 1) for w in command.words[:at] if _ASSIGNMENT.fullmatch(w))  # env A=B, docker -e A=B
    program = command.words[at - 1]
    seen = {**command.environment, **before}
    is_module = program in _MODULES or program in _WORKERS
    return Command(engine, command.words[at:], seen, command.files, not is_module, program in _WORKERS)


def _nested(commands: list[ShellCommand]) -> str:
    """The one word that is a launch of its own: ssh HOST 'vllm serve ...', ray exec FILE "..."."""
    words = [w for c in commands for w in c.words if not isinstance(w, OpenWord) and " " in w]
    launches = [w for w in words if _engine(w.split())[0]]
    return launches[0] if len(launches) == 1 else ""


def _no_command(commands: list[ShellCommand]) -> str:
    """What stands there in place of a launch."""
    for command in commands:
        for word in command.words:
            if PurePosixPath(word).name in _MEASURE:
                return f"`{PurePosixPath(word).name}`, which starts no server"
        for word, following in itertools.pairwise(command.words):
            if PurePosixPath(word).name in _SERVE and not following.startswith("-"):
                return f"`{PurePosixPath(word).name} {following}`, which starts no server"
    return "no command of an engine"


def _check_seen(command: ShellCommand, where: str) -> None:
    for name, line in command.unexported.items():
        if name.startswith(_PREFIXES):
            raise PlanError(
                f"{where}: line {line}: {name} is set but not exported, expected `export {name}=...`: the engine does not see it"
            )


def _engine(words: list[str]) -> tuple[str, int]:
    """(whose command it is, place of its first argument)."""
    for i, word in enumerate(words):
        name, following = PurePosixPath(word).name, words[i + 1 : i + 2]
        if word in _MODULES or word in _WORKERS:
            return {**_MODULES, **_WORKERS}[word], i + 1
        if name in _SERVE and following == ["serve"]:
            return _SERVE[name], i + 2
        if name == "trtllm-serve":
            return "TensorRT-LLM", i + 1 + (following == ["serve"])
    image = next((i for i, word in enumerate(words) if _VLLM_IMAGE.match(word)), None)
    if image is None or PurePosixPath(next(iter(words[image + 1 :]), "")).name in ("bash", "sh"):
        return "", 0
    return "vLLM", image + 1  # its entry point is the server


def arguments(command: Command, keys: EngineKeys, where: str) -> dict[str, Any]:
    """Key -> value, underscored, each as the kind of value that its key has.

    The value of a key without effect, or of one about CUDA graphs, may be open: it is as it is written then, an OpenWord.

    Raises:
        PlanError: a flag without its value, a word that belongs to none, a key written twice, a value that the text does not
            say.
    """
    kinds, values = keys.kinds, dict[str, Any]()
    words, i, model = command.words, 0, False
    while i < len(words):
        word, i = words[i], i + 1
        if not _is_flag(word):
            if isinstance(word, OpenWord) and (i > 1 or not command.model_first):
                raise _unsaid(word, where)
            if model or not command.engine:
                raise PlanError(f"{where}: got {word!r}, which no flag takes; expected flags")
            model = True  # `vllm serve MODEL`: what is planned is said beside the file
            continue
        name, equals, joined = word.lstrip("-").partition("=")
        if isinstance(word, OpenWord):
            if not equals or "$" in name or "`" in name:
                raise _unsaid(word, where)
            joined = OpenWord(joined, word.why)
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
        unsaid = _open_value(
            value, f"{where}: {key}", key in keys.graphs or (key in keys.without_effect and key not in keys.changing)
        )
        if dot:
            values.setdefault(key, {})
            if isinstance(values[key], dict):
                values[key][tail] = value
                continue
        if key in values:
            raise PlanError(f"{where}: {key}: got it twice, expected it once")
        values[key] = unsaid if unsaid is not None else in_kind(value, kinds.get(key, "any"))
    return values


def _open_value(value: Any, where: str, may_be_open: bool) -> OpenWord | None:
    """What of a value the text does not say; PlanError where that is more than one value, or one that must be said."""
    said = value if isinstance(value, list) else [value]
    for word in said:
        if isinstance(word, OpenWord):
            may_be_flags = word.several and (len(said) > 1 or re.search(r"[@*]", word))
            if may_be_flags or not may_be_open:
                raise _unsaid(word, where)
            return word
    return None


def _unsaid(word: OpenWord, where: str) -> PlanError:
    return PlanError(f"{where}: got {str(word)!r}, expected a text that says it; {word.why}")


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
