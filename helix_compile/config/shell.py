"""The commands of a shell text with what their words stand for, where the text says it; nothing of it runs.

Variables, arrays, defaults and sums are followed from line to line. What only a run would tell (`$(...)`, the script's own
arguments, a variable that is set under a condition, in a loop or by another file) stays open: an OpenWord, with the line
and the reason, that whoever wants its value refuses.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from helix_compile.config.shell_tokens import REDIRECTIONS, Part, ShellError, Token, parts_of, shell_tokens

_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(\+?)=")
_PARAMETER = re.compile(r"([A-Za-z_]\w*|[0-9]+|[@*#?$!-])(?:\[([^\]]*)\])?(?:(:?[-=])(.*))?", re.DOTALL)
_DECLARE = ("export", "declare", "local", "readonly", "typeset")
_FILLS = ("read", "mapfile", "readarray", "getopts", "unset", "printf", "let")  # set the names they are given
_OTHER_FILES = ("source", ".")
_HARMLESS = re.compile(r"(^|/)(activate|conda\.sh)$")
_ENDS = {"fi": ("if",), "done": ("loop",), "esac": ("case",), "}": ("function", "group")}
_SHELLS = ("bash", "sh", "zsh")
_FILE = "\0"  # before the path of a file that is written
_MAX_DEPTH = 8
_MAX_WORDS, _MAX_CHARACTERS = 10_000, 2**18  # a launch script is small; one that doubles a variable line by line is not
_MAX_BLOCKS, _MAX_REPEATED = 2000, 200


class OpenWord(str):
    """A word, as it is written, whose value the text does not say.

    Attributes:
        why: line and reason.
        several: it may be any number of words.
    """

    why: str
    several: bool

    def __new__(cls, text: str, why: str, several: bool = False) -> OpenWord:
        """The word as it is written, with why it is open."""
        word = super().__new__(cls, text)
        word.why, word.several = why, several
        return word


Value = str | list[str]


@dataclass(frozen=True)
class ShellCommand:
    """One simple command.

    Attributes:
        line: of its first word.
        words: what they stand for; OpenWord where the text does not say it.
        environment: what is exported, and what stands before the command.
        unexported: variable -> line, of those that are set and that the command does not see.
        files: path -> text of files that the text writes before it.
    """

    line: int
    words: tuple[str, ...]
    environment: Mapping[str, str]
    unexported: Mapping[str, int]
    files: Mapping[str, str]


@dataclass
class _Block:
    """A part of the text that may run never or often: what it sets is open behind it."""

    kind: str
    line: int
    before: dict[str, Value]
    set_here: dict[str, int] = field(default_factory=dict)


def shell_commands(text: str) -> list[ShellCommand]:
    """The commands of a text, in order.

    Raises:
        ShellError: text that can't be parsed, with its line.
    """
    return _Reader().read(text)


@dataclass
class _Reader:
    values: dict[str, Value] = field(default_factory=dict)  # variables, and files that were written under _FILE + path
    exported: set[str] = field(default_factory=set)
    lines: dict[str, int] = field(default_factory=dict)
    blocks: list[_Block] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    found: list[ShellCommand] = field(default_factory=list)
    function: int = 0  # line of a definition whose body comes next
    other: str = ""  # where another file or an unknown text ran, which may have set anything
    all_exported: bool = False
    over: bool = False
    depth: int = 0
    opened: int = 0
    repeated: int = 0

    def read(self, text: str) -> list[ShellCommand]:
        self.tokens, at = shell_tokens(text), 0
        while at < len(self.tokens) and not self.over:
            end = at
            while end < len(self.tokens) and not _separates(self.tokens[end]):
                end += 1
            self._command(self.tokens[at:end], at)
            if end < len(self.tokens):
                self._separator(self.tokens[end])
            at = end + 1
        self._end_list()
        return self.found

    # what separates commands, and what may run or not

    def _separator(self, token: Token) -> None:
        symbol = token.text
        if symbol in ("&&", "||"):
            if symbol == "||":
                self._end_list()
            if not self.blocks or self.blocks[-1].kind != "&&":
                self._open("&&", token.line)
        elif symbol not in ("|", "|&"):
            self._end_list()
        if symbol == "(":
            self._open("(", token.line)
        elif symbol == ")" and self.blocks and self.blocks[-1].kind == "(":
            self.values = self.blocks.pop().before  # a shell of its own: nothing of it stays
        elif symbol in (";;", ";&", ";;&") and self.blocks and self.blocks[-1].kind == "case":
            self.values = dict(self.blocks[-1].before)

    def _open(self, kind: str, line: int, at: int | None = None) -> None:
        """Begin a block; with a place, one of which what is set further down may be set already."""
        self.opened += 1
        self.repeated += at is not None
        if self.opened > _MAX_BLOCKS or self.repeated > _MAX_REPEATED:
            raise ShellError(f"line {line}: more than {_MAX_BLOCKS} conditions, or {_MAX_REPEATED} loops and functions")
        self.blocks.append(_Block(kind, line, dict(self.values)))
        for name, where in _names_set(self.tokens[at:]) if at is not None else ():
            self.values[name] = OpenWord(
                f"${name}", f"line {where}: {name} is set again behind the {kind} of line {line}", True
            )

    def _close(self, kinds: tuple[str, ...]) -> None:
        if not any(block.kind in kinds for block in self.blocks):
            return
        while (block := self.blocks.pop()).kind not in kinds:
            pass
        if block.kind == "group":
            return
        self.values = block.before
        for name, line in block.set_here.items():
            shown = name.removeprefix(_FILE)
            self.values[name] = OpenWord(
                f"${shown}", f"line {line}: {shown} is set behind the {block.kind} of line {block.line}", True
            )

    def _end_list(self) -> None:
        while self.blocks and self.blocks[-1].kind == "&&":
            self._close(("&&",))

    # one command

    def _command(self, tokens: list[Token], at: int) -> None:
        tokens = self._reserved(tokens, at)
        if not tokens:
            return
        line, leading = tokens[0].line, 0
        while leading < len(tokens) and _sets(tokens[leading]):
            leading += 1
        if leading == len(tokens):
            for token in tokens:  # each sees those before it
                self._assign_all([self._assignment(token)], token.line)
            return
        own = {name: str(value) for name, value, _ in map(self._assignment, tokens[:leading])}
        words, here, targets = self._words(tokens[leading:])
        plain = [w if isinstance(w, str) else f"{w[0]}={w[1]}" for w in words]
        if not plain:
            return
        program = PurePosixPath(plain[0]).name or plain[0]
        exported = {n: self._scalar(n) for n in sorted(self.exported) if n in self.values}
        hidden = {n: self.lines[n] for n in self.values if n in self.lines and n not in {**exported, **own}}
        files = {n[1:]: v for n, v in self.values.items() if n.startswith(_FILE) and isinstance(v, str)}
        self.found.append(ShellCommand(line, tuple(plain), {**exported, **own}, hidden, files))
        self._builtin(program, words, plain, line)
        self._writes(program, plain, here, targets, line)
        if not self.blocks and (program == "exit" or (program == "exec" and len(plain) > 1)):
            self.over = True

    def _reserved(self, tokens: list[Token], at: int) -> list[Token]:
        """Take the words that open and close blocks from the front of a command."""
        while tokens:
            word, line = tokens[0].plain, tokens[0].line
            following = [t.text for t in self.tokens[at + 1 : at + 3] if t.kind == "operator"]
            if (following == ["(", ")"] and len(tokens) == 1 and _is_name(word)) or word == "function":
                self.function = line
                tokens, at = tokens[2:], at + 2
                continue
            if word == "{":
                if self.function:
                    self._open("function", self.function, at)
                else:
                    self._open("group", line)
                self.function = 0
            elif word == "case":
                self._open("case", line)
                return []
            elif word in ("for", "select"):
                self._open("loop", line, at)
                for name in _sum_names(tokens[1].text) if len(tokens) > 1 else ():
                    self._assign(name, OpenWord(f"${name}", f"line {line}: {name} runs through a loop"), line)
                return []
            elif word in ("while", "until"):
                self._open("loop", line, at)
            elif word == "if":
                self._open("if", line)
            elif word in ("else", "elif"):
                if self.blocks:
                    self.values = dict(self.blocks[-1].before)
            elif word in _ENDS:
                self._close(_ENDS[word])
            elif word not in ("then", "do", "!", "time"):
                return tokens
            tokens, at = tokens[1:], at + 1
        return tokens

    def _assignment(self, token: Token) -> tuple[str, Value, bool]:
        """(name, value, is it added to what is there) of a word that sets a variable."""
        if token.kind == "array":
            return token.text, [w for item in token.items for w in self._expand(item.parts, item.line)], token.more
        found = _ASSIGNMENT.match(token.text)
        assert found is not None
        value = self._expand(_without(token.parts, found.end()), token.line, split=False)
        return found[1], value[0] if value else "", found[2] == "+"

    def _words(self, tokens: list[Token]) -> tuple[list[Any], str | None, list[tuple[str, str]]]:
        """(words, and what a declaration sets; what a here-document hands over; (operator, file) of redirections)."""
        words, here, targets, skip = list[Any](), None, list[tuple[str, str]](), ""
        for token in tokens:
            if token.kind == "operator":
                skip = token.text
                if skip in ("<<", "<<-"):
                    here = next((w for w in self._expand(token.parts, token.line, split=False)), "")
            elif skip:
                targets += [(skip, w) for w in self._expand(token.parts, token.line)[:1]]
                skip = ""
            elif token.kind == "array" or (_sets(token) and words and words[0] in _DECLARE):
                words.append(self._assignment(token))
            else:
                words += self._expand(token.parts, token.line)
            if len(words) > _MAX_WORDS:
                raise ShellError(f"line {token.line}: more than {_MAX_WORDS} words")
        return words, here, targets

    def _builtin(self, program: str, words: list[Any], plain: list[str], line: int) -> None:
        """What the programs that belong to the shell change."""
        if program in _DECLARE:
            self._assign_all([w for w in words if isinstance(w, tuple)], line)
            names = {w if isinstance(w, str) else w[0] for w in words[1:]}
            if program == "export" or any(re.fullmatch(r"-\w*x\w*", n) for n in names):
                self.exported |= {n for n in names if _is_name(n)}
            if any(isinstance(w, OpenWord) for w in words):  # export $(cat .env)
                self._anything(f"line {line}: `{program}` may set it")
        elif program in _FILLS:
            filled = plain[2:3] if program == "printf" and plain[1:2] == ["-v"] else plain[1:]
            for name in (n for word in filled for n in _sum_names(word) if program == "let" or n == word):
                self._assign(name, OpenWord(f"${name}", f"line {line}: {name} is set by `{program}`", True), line)
                if program == "unset" and not self.blocks:
                    del self.values[name]
        elif plain[0].startswith("(("):
            for name in _sum_names(plain[0]):
                self._assign(name, OpenWord(f"${name}", f"line {line}: {name} is set by a sum"), line)
        elif program in _OTHER_FILES and not _HARMLESS.search(" ".join(plain[1:2])):
            self._anything(f"line {line}: `{' '.join(plain[:2])}` may set it")
        elif program == "eval" and any(isinstance(w, OpenWord) for w in plain):
            self._anything(f"line {line}: `eval` may set it")
        elif program == "eval":
            self._nested(" ".join(plain[1:]), self)
        elif program == "set" and (re.match(r"[-+]\w*a\w*$", "".join(plain[1:2])) or plain[2:3] == ["allexport"]):
            self.all_exported = plain[1].startswith("-")
        for i, word in enumerate(plain[:-2]):
            if PurePosixPath(word).name in _SHELLS and re.fullmatch(r"-\w*c", plain[i + 1]):
                seen = self.exported if i == 0 else ()  # another machine or container has others
                inner = _Reader({n: self.values[n] for n in seen if n in self.values}, {*seen}, other=self.other)
                if not isinstance(plain[i + 2], OpenWord):
                    self._nested(plain[i + 2], inner)
                break

    def _nested(self, text: str, reader: _Reader) -> None:
        """Read what a command is handed as text."""
        if self.depth >= _MAX_DEPTH:
            raise ShellError(f"commands in commands, more than {_MAX_DEPTH} deep")
        tokens, blocks, over = self.tokens, self.blocks, self.over
        reader.depth, reader.found, reader.tokens = self.depth + 1, self.found, []
        if reader is not self:
            reader.blocks = []
        reader.read(text)
        if reader is self:
            self.depth -= 1
        self.tokens, self.blocks, self.over = tokens, blocks, over

    def _writes(
        self, program: str, plain: list[str], here: str | None, targets: list[tuple[str, str]], line: int
    ) -> None:
        """Files that a command writes, as values: the text of a here-document, or open."""
        written = [(o, f) for o, f in targets if o in (">", ">>", ">|", "&>", "&>>")]
        if program == "tee":
            written += [(">>" if "-a" in plain else ">", w) for w in plain[1:] if not w.startswith("-")]
        as_it_is = here is not None and (plain == ["cat"] or program == "tee" or plain == ["cat", "-"])
        for symbol, path in written:
            before = self.values.get(_FILE + path) if symbol in (">>", "&>>") else ""
            if as_it_is and here is not None and isinstance(before, str):
                text = _together([before, here])
            else:
                text = OpenWord(path, f"line {line}: {path} is written by `{program}`")
            self._assign(_FILE + path, text, line)
        if program not in _READERS and not _is_launch(plain):
            for path in {*plain[1:]} - {path for _, path in written}:
                if _FILE + path in self.values:
                    self._assign(
                        _FILE + path, OpenWord(path, f"line {line}: {path} may be changed by `{program}`"), line
                    )

    # variables

    def _assign_all(self, given: list[tuple[str, Value, bool]], line: int) -> None:
        for name, value, more in given:
            old = self.values.get(name)
            if more and (isinstance(old, OpenWord) or (old is None and self.other)):
                value = OpenWord(f"${name}", old.why if isinstance(old, OpenWord) else self.other, True)
            elif more and (isinstance(value, list) or isinstance(old, list)):
                old = [old] if isinstance(old, str) else old or []
                new = value if isinstance(value, list) else [_together([*old[:1], value]), *old[1:]]
                value = [*old, *new] if isinstance(value, list) else new
            elif more and isinstance(value, str):
                value = _together([old if isinstance(old, str) else "", value])
            self._assign(name, value, line)

    def _assign(self, name: str, value: Value, line: int) -> None:
        if len(value) > _MAX_CHARACTERS or (isinstance(value, list) and len(value) > _MAX_WORDS):
            raise ShellError(f"line {line}: {name.removeprefix(_FILE)} is longer than {_MAX_CHARACTERS} characters")
        self.values[name] = value
        if not name.startswith(_FILE):
            self.lines[name] = line
            self.exported |= {name} if self.all_exported else set()
        for block in reversed(self.blocks):
            block.set_here[name] = line
            if block.kind == "(":
                break

    def _anything(self, why: str) -> None:
        """From here on nothing that was set before is sure."""
        self.other = why
        for name in self.values:
            if not name.startswith(_FILE):
                self._assign(name, OpenWord(f"${name}", why, True), self.lines.get(name, 1))

    def _scalar(self, name: str) -> str:
        value = self.values.get(name, "")
        return value if isinstance(value, str) else (value[0] if value else "")

    # what a word stands for

    def _expand(self, parts: tuple[Part, ...], line: int, split: bool = True) -> list[str]:
        """The words that one word stands for."""
        words, pieces, begun, empty = list[str](), list[str](), False, False

        def end() -> None:
            nonlocal pieces, begun
            if sum(map(len, pieces)) > 4 * _MAX_CHARACTERS:
                raise ShellError(f"line {line}: a word of more than {4 * _MAX_CHARACTERS} characters")
            word = _together(pieces)
            if (pieces or begun) and (word or not empty):
                words.append(word)
            pieces, begun = [], False

        for part in parts:
            if part.kind == "text":
                pieces.append(part.text)
                begun = True
                continue
            values, apart = self._values(part, line, split)
            empty |= apart and not values  # "${A[@]}" of nothing is no word
            if split and (apart or not part.quoted):
                for i, value in enumerate(values):
                    if i:
                        end()
                    if apart or isinstance(value, OpenWord):
                        pieces.append(value)
                        begun = True
                        continue
                    cut = value.split()
                    if value[:1].isspace():
                        end()
                    for k, piece in enumerate(cut):
                        if k:
                            end()
                        pieces.append(piece)
                    if value[-1:].isspace():
                        end()
            else:
                pieces.append(_together(values, " "))
                begun = True
        end()
        return words

    def _values(self, part: Part, line: int, split: bool) -> tuple[list[str], bool]:
        """(the values of a part; is each a word of its own, although it is quoted)."""
        if part.kind == "sum":
            return [self._sum(part.text, line)], False
        plain = part.kind != "name" or re.fullmatch(r"\w+|\W", part.text)
        written = part.text if part.kind == "open" else f"${part.text}" if plain else f"${{{part.text}}}"
        found = _PARAMETER.fullmatch(part.text) if part.kind == "name" else None
        if found is None:
            return [OpenWord(written, f"line {line}: {written} is known only when it runs", not part.quoted)], False
        name, index, sign, default = found.groups()
        every = "@" in (name, index) or "*" in (name, index)
        apart = part.quoted and "@" in (name, index)
        value = self.values.get(name)
        called = sign and name.isdigit() and not any(block.kind == "function" for block in self.blocks)
        if value is None and (self.other or not _is_name(name)) and not called:
            why = self.other if _is_name(name) else f"line {line}: {written} is what the script is called with"
            return [OpenWord(written, why, every or not part.quoted)], False
        if isinstance(value, OpenWord):
            return [OpenWord(written, value.why, value.several and (every or not part.quoted))], False
        if index not in (None, "@", "*"):
            if not index.isdigit():
                return [OpenWord(written, f"line {line}: {written} is known only when it runs", True)], False
            items = [value] if isinstance(value, str) else value or []
            value = items[int(index)] if int(index[:6]) < len(items) else None
        elif isinstance(value, list) and not every:
            value = value[0] if value else None
        if isinstance(value, OpenWord):
            return [value if not part.quoted else OpenWord(value, value.why)], False
        if sign and (value is None or (sign.startswith(":") and value in ("", []))):
            parts = parts_of(default, part.quoted, line)
            if sign.endswith("="):
                self._assign(name, next(iter(self._expand(parts, line, split=False)), ""), line)
            words = self._expand(parts, line, split and not part.quoted)
            return words, not part.quoted
        if value is None and not every:
            return [OpenWord(written, f"line {line}: {name} is not set in this text", not part.quoted)], False
        return ([] if value is None else value if isinstance(value, list) else [value]), apart

    def _sum(self, text: str, line: int) -> str:
        written = f"$(({text}))"
        try:
            return str(self._number(ast.parse(re.sub(r"\$\{?(\w+)\}?", r"\1", text).strip(), mode="eval").body))
        except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
            return OpenWord(written, f"line {line}: {written} is known only when it runs")

    def _number(self, node: ast.expr) -> int:
        if isinstance(node, ast.Constant) and type(node.value) is int and node.value < 10**9:
            return node.value
        if isinstance(node, ast.Name):
            value = self._scalar(node.id)
            if isinstance(value, OpenWord) or not re.fullmatch(r"[1-9]\d{0,8}|0", value):
                raise ValueError(node.id)
            return int(value)
        if isinstance(node, ast.BinOp) and type(node.op) in _SUMS:
            return _SUMS[type(node.op)](self._number(node.left), self._number(node.right))
        raise ValueError("no sum")


_SUMS: dict[type, Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: lambda a, b: abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1),
}
_READERS = (
    "cat",
    "echo",
    "ls",
    "chmod",
    "head",
    "tail",
    "test",
    "[",
    "[[",
    "wc",
    "tee",
    "mkdir",
    "exec",
    "nohup",
    "env",
)
_LAUNCHES = ("vllm", "sglang", "sglang.launch_server", "trtllm-serve", "tensorrt_llm.commands.serve")


def _is_launch(words: list[str]) -> bool:
    return any(PurePosixPath(w).name in _LAUNCHES for w in words)


def _is_name(text: str) -> bool:
    return re.fullmatch(r"[A-Za-z_]\w*", text) is not None


def _sets(token: Token) -> bool:
    return token.kind == "array" or (token.kind == "word" and _ASSIGNMENT.match(token.text) is not None)


def _sum_names(text: str) -> list[str]:
    """Names that a sum may set; a name alone is one."""
    if _is_name(text):
        return [text]
    set_there = re.findall(r"([A-Za-z_]\w*)\s*(?:\+\+|--|(?:[-+*/%&|^]|<<|>>)?=(?!=))", text)
    return set_there + re.findall(r"(?:\+\+|--)\s*([A-Za-z_]\w*)", text)


def _separates(token: Token) -> bool:
    return token.kind == "operator" and token.text not in REDIRECTIONS


def _without(parts: tuple[Part, ...], length: int) -> tuple[Part, ...]:
    """The parts of a word without its first characters, which are plain text."""
    first = parts[0]
    return (Part(first.kind, first.text[length:], first.quoted), *parts[1:])


def _together(pieces: list[str], between: str = "") -> str:
    """One word of several pieces; open if one of them is."""
    text = between.join(pieces)
    for piece in pieces:
        if isinstance(piece, OpenWord):
            return OpenWord(text, piece.why, piece.several)
    return text


def _names_set(tokens: list[Token]) -> list[tuple[str, int]]:
    """(name, line) of everything that the tokens set."""
    names, filling = list[tuple[str, int]](), False
    for token in tokens:
        if token.kind == "array":
            names.append((token.text, token.line))
        elif token.kind == "operator":
            filling = filling and not _separates(token)
        elif found := _ASSIGNMENT.match(token.text):
            names.append((found[1], token.line))
        elif token.text.startswith("(("):
            names += [(name, token.line) for name in _sum_names(token.text)]
        elif token.plain in (*_FILLS, "for", "select"):
            filling = True
        elif filling:
            names += [(name, token.line) for name in _sum_names(token.plain)]
    return names
