"""Shell text as tokens: words with what is quoted and what stands for something else, operators, arrays, here-documents.

Only cut, nothing is looked up and nothing runs; config/shell.py says what the words stand for.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

_OPERATORS = (
    ";;&", "&>>", "<<<", "<<-", ";;", ";&", "&&", "||", "|&", "&>", "<<", ">>", ">&", "<&", "<>", ">|", ";", "&", "|",
    "(", ")", "<", ">",
)  # fmt: skip
REDIRECTIONS = ("&>>", "<<<", "<<-", "&>", "<<", ">>", ">&", "<&", "<>", ">|", "<", ">")
_CONTINUED = re.compile(r"\\[ \t]*\r?\n")
_NAME = re.compile(r"[A-Za-z_]\w*|[0-9@*#?$!-]")
_ARRAY = re.compile(r"([A-Za-z_]\w*)(\+?)=")
_BRACES = re.compile(r"\{[^{}\s]*(,|\.\.)[^{}\s]*\}")
_BEFORE_COMMANDS = ("if", "then", "elif", "else", "while", "until", "for", "do", "!", "{", "time")


class ShellError(ValueError):
    """Text that is no shell text; the line stands in the message."""


@dataclass(frozen=True)
class Part:
    """A piece of a word: text, or the inside of a `$NAME` or `${...}`, of a `$((...))`, or something that only running tells."""

    kind: Literal["text", "name", "sum", "open"]
    text: str
    quoted: bool = False


@dataclass(frozen=True)
class Token:
    """A word, an operator (a line's end is one too), or an array that is written out.

    Attributes:
        line: where it begins, from 1.
        kind: what it is.
        text: as it is written; of an array its name.
        parts: of a word; of a here-document's operator the parts of what is handed over.
        items: of an array.
        more: `+=` instead of `=`.
    """

    line: int
    kind: Literal["word", "operator", "array"]
    text: str
    parts: tuple[Part, ...] = ()
    items: tuple[Token, ...] = ()
    more: bool = False

    @property
    def plain(self) -> str:
        """The word where nothing of it is quoted or stands for something, else ""."""
        return self.text if all(p.kind == "text" and not p.quoted for p in self.parts) else ""


@dataclass
class _Cutter:
    text: str
    at: int = 0
    line: int = 1
    tokens: list[Token] = field(default_factory=list)
    waiting: list[tuple[int, str]] = field(default_factory=list)  # (place of its operator, operator) of here-documents

    def cut(self, closes: str = "") -> list[Token]:
        """Tokens to the end of the text, or to the parenthesis that closes an array."""
        begun, tokens = self.line, list[Token]()
        while self.at < len(self.text):
            c = self.text[self.at]
            if found := _CONTINUED.match(self.text, self.at):
                self._on(found.end())
            elif c in " \t\r" or (closes and c == "\n"):
                self._on(self.at + 1)
            elif c == "#":
                end = self.text.find("\n", self.at)
                self._on(len(self.text) if end < 0 else end)
            elif closes and c == closes:
                self._on(self.at + 1)
                return tokens
            elif c == "\n":
                tokens.append(Token(self.line, "operator", "\n"))
                self._on(self.at + 1)
                self._here_documents(tokens)
            elif (symbol := self._operator()) and not closes:
                self._symbol(symbol, tokens)
            else:
                tokens.append(self._word(tokens))
        if closes:
            raise ShellError(f"line {begun}: an array is not closed, expected {closes!r}")
        return tokens

    def _on(self, end: int) -> None:
        self.line += self.text.count("\n", self.at, end)
        self.at = end

    def _operator(self) -> str:
        if self.text.startswith(("<(", ">("), self.at):
            return ""  # a word: a file that a command writes
        return next((o for o in _OPERATORS if self.text.startswith(o, self.at)), "")

    def _symbol(self, symbol: str, tokens: list[Token]) -> None:
        if symbol == "(" and self.text.startswith("((", self.at) and _begins(tokens):
            end = _matching(self.text, self.at + 1, ")", self.line) + 1
            inside = self.text[self.at : end]
            tokens.append(Token(self.line, "word", inside, (Part("open", inside),)))
            self._on(end)
            return
        if symbol in REDIRECTIONS and tokens and tokens[-1].plain.isdigit() and self.text[self.at - 1].isdigit():
            tokens.pop()  # the number of what is redirected
        if symbol in ("<<", "<<-"):
            self.waiting.append((len(tokens), symbol))
        tokens.append(Token(self.line, "operator", symbol))
        self._on(self.at + len(symbol))

    def _here_documents(self, tokens: list[Token]) -> None:
        for place, symbol in self.waiting:
            if place + 1 >= len(tokens) or tokens[place + 1].kind != "word":
                raise ShellError(f"line {tokens[place].line}: {symbol} has no word behind it")
            delimiter = tokens[place + 1]
            end = "".join(p.text for p in delimiter.parts)
            verbatim, lines, begun = any(p.quoted for p in delimiter.parts), list[str](), self.line
            while True:
                if self.at >= len(self.text):
                    raise ShellError(f"line {begun}: the here-document does not end, expected {end!r} on a line")
                stop = self.text.find("\n", self.at)
                stop = len(self.text) if stop < 0 else stop
                line = self.text[self.at : stop].rstrip("\r")
                line = line.lstrip("\t") if symbol == "<<-" else line
                self._on(min(stop + 1, len(self.text)))
                if line == end:
                    break
                lines.append(line + "\n")
            body = "".join(lines)
            parts = (Part("text", body, True),) if verbatim else parts_of(body, True, begun)
            tokens[place] = Token(tokens[place].line, "operator", symbol, parts)
        self.waiting.clear()

    def _word(self, before: list[Token]) -> Token:
        begun, start, parts = self.line, self.at, list[Part]()
        while self.at < len(self.text):
            c = self.text[self.at]
            if found := _CONTINUED.match(self.text, self.at):
                self._on(found.end())
                continue
            if c in " \t\r\n" or (c in ";&|()<>" and not self.text.startswith(("<(", ">("), self.at)):
                array = _ARRAY.fullmatch(self.text, start, self.at)
                if c == "(" and array:
                    self._on(self.at + 1)
                    return Token(begun, "array", array[1], (), tuple(self.cut(")")), array[2] == "+")
                break
            if c in "<>":
                end = _matching(self.text, self.at + 1, ")", self.line)
                parts.append(Part("open", self.text[self.at : end]))
                self._on(end)
                continue
            found_parts, end = _piece(self.text, self.at, self.line)
            parts += found_parts
            self._on(end)
        raw = self.text[start : self.at]
        if raw == "[[" and _begins(before):
            test = re.compile(r"\s\]\](?=[\s;&|)]|$)").search(self.text, self.at)
            if test is None:
                raise ShellError(f"line {begun}: [[ is not closed, expected ]]")
            self._on(test.end())
        if any(p.kind == "text" and not p.quoted and _BRACES.search(p.text) for p in _joined(parts)):
            parts = [Part("open", raw)]  # {a,b}: several words
        return Token(begun, "word", raw, tuple(_joined(parts)))


def shell_tokens(text: str) -> list[Token]:
    """The tokens of a text.

    Raises:
        ShellError: quotes, brackets or here-documents that don't end, with their line.
    """
    cutter = _Cutter(text)
    tokens = cutter.cut()
    cutter._here_documents(tokens)
    return tokens


def parts_of(text: str, quoted: bool, line: int = 1) -> tuple[Part, ...]:
    """The parts of what stands between double quotes, in a here-document, or as a default."""
    parts, at = list[Part](), 0
    while at < len(text):
        if quoted:
            found, at = _inside(text, at, line)
        else:
            found, at = _piece(text, at, line)
        parts += found
    return tuple(_joined(parts))


def _begins(tokens: list[Token]) -> bool:
    """Is the next word the first of a command?"""
    if not tokens:
        return True
    last = tokens[-1]
    return (last.kind == "operator" and last.text not in REDIRECTIONS) or last.plain in _BEFORE_COMMANDS


def _joined(parts: list[Part]) -> list[Part]:
    joined: list[Part] = []
    for part in parts:
        if joined and part.kind == joined[-1].kind == "text" and part.quoted == joined[-1].quoted:
            joined[-1] = Part("text", joined[-1].text + part.text, part.quoted)
        else:
            joined.append(part)
    return joined


def _piece(text: str, at: int, line: int) -> tuple[list[Part], int]:
    """What begins at a place outside of quotes, and where it ends."""
    c = text[at]
    if c == "\\":
        return [Part("text", text[at + 1 : at + 2], True)], at + 2
    if c == "'" or text.startswith("$'", at):
        end = text.find("'", text.index("'", at) + 1)
        if end < 0:
            raise ShellError(f"line {line}: No closing quotation")
        inside = text[text.index("'", at) + 1 : end]
        if c == "$" and "\\" in inside:
            return [Part("open", text[at : end + 1], True)], end + 1
        return [Part("text", inside, True)], end + 1
    if c == '"' or text.startswith('$"', at):
        parts, at = [Part("text", "", True)], text.index('"', at) + 1
        while at < len(text) and text[at] != '"':
            found, at = _inside(text, at, line)
            parts += found
        if at >= len(text):
            raise ShellError(f"line {line}: No closing quotation")
        return parts, at + 1
    if c in "$`":
        return _dollar(text, at, False, line)
    return [Part("text", c)], at + 1


def _inside(text: str, at: int, line: int) -> tuple[list[Part], int]:
    """What begins at a place between double quotes."""
    c = text[at]
    if c == "\\" and at + 1 < len(text):
        following = text[at + 1]
        kept = "" if following == "\n" else following if following in '$`"\\' else c + following
        return [Part("text", kept, True)], at + 2
    if c in "$`":
        return _dollar(text, at, True, line)
    return [Part("text", c, True)], at + 1


def _dollar(text: str, at: int, quoted: bool, line: int) -> tuple[list[Part], int]:
    if text[at] == "`":
        end = text.find("`", at + 1)
        if end < 0:
            raise ShellError(f"line {line}: ` is not closed")
        return [Part("open", text[at : end + 1], quoted)], end + 1
    if text.startswith("$((", at):
        end = _matching(text, at + 1, ")", line)
        return [Part("sum", text[at + 3 : end - 2], quoted)], end
    if text.startswith("$(", at):
        end = _matching(text, at + 1, ")", line)
        return [Part("open", text[at:end], quoted)], end
    if text.startswith("${", at):
        end = _matching(text, at + 1, "}", line)
        return [Part("name", text[at + 2 : end - 1], quoted)], end
    if found := _NAME.match(text, at + 1):
        return [Part("name", found[0], quoted)], found.end()
    return [Part("text", "$", quoted)], at + 1


def _matching(text: str, at: int, closes: str, line: int) -> int:
    """Behind the bracket that closes the one at a place; brackets between quotes don't count."""
    start, opens, depth, quote = at, text[at], 0, ""
    while at < len(text):
        c = text[at]
        if c == "\\" and quote != "'":
            at += 2
            continue
        if quote:
            if quote == '"' and text.startswith(("$(", "${"), at):
                at = _matching(text, at + 1, ")" if text[at + 1] == "(" else "}", line)
                continue
            quote = "" if c == quote else quote
        elif c in "'\"":
            quote = c
        elif c == opens:
            depth += 1
        elif c == closes:
            depth -= 1
            if not depth:
                return at + 1
        at += 1
    raise ShellError(f"line {line}: {text[start]} is not closed, expected {closes!r}")
