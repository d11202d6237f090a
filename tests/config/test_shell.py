"""What the words of a shell text stand for, against bash itself; what stays open; that nothing of a text runs."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from helix_compile import HelixError, HelixOptions
from helix_compile.config.shell import OpenWord, ShellCommand, shell_commands


def launches(text: str) -> list[ShellCommand]:
    return [c for c in shell_commands(text) if c.words[0] == "show"]


# texts whose `show` says its words; bash runs them with a function of that name
STATIC = [
    "show a 'b c' \"d  e\" f\\ g \\\n  h # i\nshow j#k",
    'A="x  y"; show $A "$A" p$A"$A"q \'$A\'',
    "A=' lead and trail '\nshow [$A] \"[$A]\" x$A",
    'A=(1 "2 3" \'4\' # note\n 5)\nshow "${A[@]}" ${A[@]} "${A[*]}" $A ${A[1]} "x${A[@]}y"',
    'A=()\nshow a "${A[@]}" b ${A[@]} c "${A[*]}"',
    'A=(a); A+=(b "c d"); B=x; B+="y z"; A+=("$B")\nshow "${A[@]}" $B',
    'show ${N:-8} "${N:-a b}" ${N-1} ${N:-"q r"} ${N:-${M:-deep}}; N=; show "${N:-e}" "${N-f}"',
    ": ${N:=4}\nshow $N ${N:=5}; unset N; show ${N:-gone}",
    "A=3 B=$A; show $B; show $((A * 4)) $(( (A+5)/2 )) $((A-10)) $(( $A + ${B} ))",
    "A=1; (A=2; show $A); show $A; { A=3; }; show $A",
    "A=1 && B=2 && show $A $B; A=5; show $A",
    'f=x.yaml\ncat <<EOF > $f\nshow inside\nEOF\nshow "$f"\nif true; then A=4; show $A; else A=5; fi',
    "case a in\n a) show one;;\nesac\nshow two",
    'CMD="show a b"\n$CMD c; eval "$CMD d; Z=1"; show $Z',
    "bash -c 'show() { :; }' ; show \"a\\\"b\\$c\\d\" $'plain' '\"'",
    'export A=1 B="2 3"; declare -r C=4; show $A "$B" $C 2>/dev/null >/dev/stdout',
    "A=1\nset -a; B=2; set +a\nshow $A$B",
    "show a; exit 0\nshow b",
    "[[ a == b || c < d ]] && show both\n((1 + 1))\nshow x",
    'A="1"\nA+=2; show "$A"; printf -v A x; A=9; show $A',
]
BEGIN = "show() { local w; for w in \"$@\"; do printf '%s\\0' \"$w\"; done; printf 'END\\0'; }\n"


@pytest.mark.parametrize("text", STATIC, ids=range(len(STATIC)))
def test_words_are_those_of_bash(text: str, tmp_path: Path) -> None:
    ran = subprocess.run(
        ["bash", "-c", BEGIN + text], capture_output=True, cwd=tmp_path, check=False, timeout=20, text=True
    )
    expected = [words.split("\0")[:-1] for words in ran.stdout.split("END\0")[:-1]]
    got = [list(c.words[1:]) for c in launches(text)]
    assert got == expected, ran.stderr
    assert not any(isinstance(w, OpenWord) for words in got for w in words)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("show $A", "line 1: A is not set"),
        ("A=1; show $(date)", "line 1: $(date) is known only when it runs"),
        ("show `date`", "known only when it runs"),
        ("A=abc; show ${A%c}", "line 1: ${A%c} is known only when it runs"),
        ("A=abc; show ${#A}", "known only when it runs"),
        ("show $1", "line 1: $1 is what the script is called with"),
        ("f() { show ${1:-8}; }\nf 3", "what the script is called with"),
        ("A=1\nif x; then\nA=2\nelse\nA=3; fi\nshow $A", "A is set behind the if of line 2"),
        ("A=1\nx || A=2\nshow $A", "A is set behind the && of line 2"),
        ("A=1\nwhile x; do show $A; A=2; done", "line 2: A is set again behind the loop of line 2"),
        ("A=1; f() { A=2; }; f; show $A", "A is set behind the function of line 1"),
        ("A=1; source x; show $A", "line 1: `source x` may set it"),
        ("source x; show ${A:-1}", "line 1: `source x` may set it"),
        ("A=1; export $(cat .env); show $A", "line 1: `export` may set it"),
        ("A=1; read A; show $A", "line 1: A is set by `read`"),
        ("A=1; ((A++)); show $A", "line 1: A is set by a sum"),
        ("A=1; for ((A=0; A<3; A++)); do x; done; show $A", "A is set behind the loop of line 1"),
        ("A=010; show $((A + 1))", "known only when it runs"),  # octal in a shell
        ("show {1,2}", "known only when it runs"),
        ('A=x; eval "A=$(y)"; show $A', "line 1: `eval` may set it"),
        ("case $x in\n1) A=1;;\n*) A=2;;\nesac\nshow $A", "A is set behind the case of line 1"),
    ],
)
def test_what_stays_open(text: str, reason: str) -> None:
    (command,) = launches(text)
    (word,) = command.words[1:]
    assert isinstance(word, OpenWord) and reason in word.why


def test_files_that_a_text_writes() -> None:
    text = "N=2\ncat > a.yaml <<EOF\nx: $N\nEOF\ncat <<'EOF' >> a.yaml\ny: $N\nEOF\ncat <<-X | tee b.yaml\n\tz: $(date)\n\tX\n"
    (command,) = launches(text + "show")
    assert command.files["a.yaml"] == "x: 2\ny: $N\n"
    assert "b.yaml" not in command.files or isinstance(command.files["b.yaml"], OpenWord)
    for change in ("sed -i s/2/4/ a.yaml", "echo 'w: 1' >> a.yaml", "if c; then\ncat > a.yaml <<E\nq: 1\nE\nfi"):
        (command,) = launches(f"{text}{change}\nshow")
        assert isinstance(command.files["a.yaml"], OpenWord), change


def test_nothing_runs(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    text = (
        f"touch {mark}; A=$(touch {mark}); eval 'touch {mark}'; B=`touch {mark}`; : $((__import__('os').system('touch {mark}')))"
        f"\ncat <<E > {mark}\n$(touch {mark})\nE\nbash -c 'touch {mark}'\nvllm serve X -tp 4 --port $A <(touch {mark})"
    )
    with pytest.raises(HelixError, match="known only when it runs"):
        HelixOptions.from_file(text)
    assert not mark.exists()


@pytest.mark.parametrize("text", ["a 'b", 'a "b', "a ${b", "a $(b", "A=(b", "cat <<E\nb", "[[ a", "a `b", "cat <<\n"])
def test_what_does_not_end_is_refused_with_its_line(text: str) -> None:
    with pytest.raises(HelixError, match=r"line [23]: "):
        HelixOptions.from_file("x\n" + text)


@pytest.mark.parametrize(
    "text",
    [
        "A=aaaaaaaa\n" + "A=$A$A\n" * 40,
        "A=(a b)\n" + 'A+=("${A[@]}" "${A[@]}")\n' * 40,
        "A=" + "a" * 10_000 + "\nshow " + "$A" * 1000,
        "while x; do\n" * 1000,
        "x && A=1\n" * 5000,
        "show " + "${A:-" * 3000 + "}" * 3000,
    ],
    ids=["doubled", "array", "word", "loops", "conditions", "brackets"],
)
def test_what_grows_without_end_is_refused(text: str) -> None:
    with pytest.raises(HelixError, match="can't be parsed: "):
        HelixOptions.from_file(text + "\n")
