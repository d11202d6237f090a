"""Fuzzed configurations: a HelixError or exactly the options that the engine's rules give, never anything else."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helix_compile import HelixError
from helix_compile.config.dialects import fields_of_file
from helix_compile.config.options import HelixOptions
from tests.support.config_cases import OWN, TRTLLM, VLLM, own_result, trtllm_result, vllm_result

CASES = {
    "own": (OWN, HelixOptions.from_file, own_result),
    "TensorRT-LLM": (TRTLLM, HelixOptions.from_trtllm, trtllm_result),
    "vLLM": (VLLM, HelixOptions.from_vllm, vllm_result),
}
TEXTS = {
    ".json": '{"cp": 4, "merge": "a2a", "cp_config": {"cp_type": "HELIX", "tokens_per_block": 32}}',
    ".yaml": "cp: 4\nmerge: &a a2a\ncp_config: {cp_type: HELIX, tokens_per_block: 32}\nx: !!int '1'\n? *a\n: 2\n",
    ".toml": 'cp = 4\nmerge = "a2a"\n[cp_config]\ncp_type = "HELIX"\n"tokens_per_block" = 0x20\n',
}
PIECES = [
    "!!int ''",
    "!!bool x",
    "!!timestamp x",
    "<<: *a",
    "&a",
    "- ",
    "? ",
    "{",
    "[",
    "}",
    '"',
    "'",
    "1e999",
    "0x",
    "\\ud800",
    "\x00",
    "\n",
    ": ",
    " = ",
    "9" * 5000,
    "cp",
    "null",
    "~",
    "2024-99-99",
    "\u00e9",
]


def check_values(dialect: str, values: dict[str, Any], suffix: str) -> None:
    """One mapping, through a file: the loader says what the rules, written apart, say."""
    _, load, result = CASES[dialect]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"c{suffix}"
        path.write_text(json.dumps(values) if suffix == ".json" else yaml.safe_dump(values))
        expected = result(values)
        try:
            got = load(path)
        except HelixError as error:
            assert expected is None, f"{values} was refused: {error}"
            assert str(path) in str(error)
            return
        assert expected is not None, f"{values} was taken for {got}"
        assert got == HelixOptions(**expected)


def check_text(text: str, suffix: str) -> None:
    """Any text: options or a HelixError."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"c{suffix}"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        for read in (fields_of_file, HelixOptions.from_file, HelixOptions.from_trtllm, HelixOptions.from_vllm):
            try:
                read(path)
            except HelixError as error:
                assert str(path) in str(error)


@st.composite
def broken_texts(draw: st.DrawFn) -> tuple[str, str]:
    """(text, suffix): a good file with pieces put in or cut out."""
    suffix = draw(st.sampled_from(sorted(TEXTS)))
    text = TEXTS[suffix]
    for _ in range(draw(st.integers(1, 4))):
        at, cut = draw(st.integers(0, len(text))), draw(st.integers(0, 5))
        text = text[:at] + draw(st.sampled_from(["", *PIECES])) + text[at + cut :]
    return text, suffix


def fuzzed(check: Callable[..., None], examples: int, *strategies: Any) -> None:
    quick = settings(
        max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck), derandomize=True
    )
    quick(given(st.tuples(*strategies))(lambda case: check(*case)))()


SUFFIX = st.sampled_from([".json", ".yaml"])


@pytest.mark.parametrize("examples", [40, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dialect", CASES)
def test_any_values(dialect: str, examples: int) -> None:
    fuzzed(lambda v, s: check_values(dialect, v, s), examples, CASES[dialect][0], SUFFIX)


@pytest.mark.parametrize("examples", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_any_text(examples: int) -> None:
    fuzzed(lambda case: check_text(*case), examples, broken_texts())


def test_the_rules_take_about_half_of_the_cases() -> None:
    """Else the fuzz would show refusals only."""
    for name, (strategy, _, result) in CASES.items():
        taken = []
        fuzzed(lambda v, r=result, t=taken: t.append(r(v) is not None), 100, strategy)
        assert 10 <= sum(taken) <= 90, name
