"""The offline compiler on kernels that fail: each is a record with its reason, never a crash or half a file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import helix_compile.cli.commands as cli
from helix_compile.cli.kernels import format_table
from helix_compile.kernels.lab.record import KernelRecord

ROOT = Path(__file__).parents[3]
BAD_COMMAND = "from tests.support.bad_kernels import main; main()"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command over kernels of which some are bad, in a process that compiles."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", BAD_COMMAND, *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)


Outcome = tuple[Path, subprocess.CompletedProcess[str], dict[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """DIR, the finished process, and its records by kernel and architecture."""
    folder = tmp_path_factory.mktemp("kernels") / "out"
    done = run("--arch", "sm_100", "--arch", "sm_90", "--json", "--out", str(folder))
    assert done.stdout, done.stderr
    records = json.loads(done.stdout)["kernels"]
    return folder, done, {f"{r['kernel']} {r['arch']}": r for r in records}


def test_one_bad_kernel_costs_the_exit_status_and_not_the_others(outcome: Outcome) -> None:
    _, done, records = outcome
    assert done.returncode == 1 and "Traceback" not in done.stderr
    bad = ["broken sm_100", "mla_decode sm_100", "deadly sm_90", "mla_decode sm_90"]
    assert list(records) == [*bad[:2], "merge_lse sm_100", *bad[2:], "merge_lse sm_90"]
    assert [name for name, record in records.items() if not record["fits"]] == bad


def test_what_does_not_compile_gives_the_compilers_words(outcome: Outcome) -> None:
    record = outcome[2]["broken sm_100"]
    assert record["reason"].startswith("not compiled: ") and "power of 2" in record["reason"]
    assert "/" not in record["reason"].replace("//", "")  # no folder of this machine
    for figure in ("registers", "spills", "shared_bytes", "tmem_columns", "ptx", "cubin", "ttgir"):
        assert record[figure] is None


def test_a_compiler_that_dies_is_a_record_too(outcome: Outcome) -> None:
    record = outcome[2]["deadly sm_90"]
    assert record["reason"] == "not compiled: the compiler died (exit status 3)"
    record = outcome[2]["mla_decode sm_90"]
    assert record["reason"].endswith("LLVM ERROR: unsupported load type for producer commit")
    assert record["registers"] is None


def test_what_is_too_large_is_told_with_the_numbers(outcome: Outcome) -> None:
    record = outcome[2]["mla_decode sm_100"]
    shared, columns = record["shared_bytes"], record["tmem_columns"]
    assert shared > 232_448 and columns > 512
    assert f"shared memory {shared:,} > 232,448 B" in record["reason"]
    assert f"tensor memory {columns:,} > 512 columns" in record["reason"]


def test_the_table_says_the_same(outcome: Outcome) -> None:
    names = {f.name for f in fields(KernelRecord)} - {"loops"}
    records = [KernelRecord(**{n: r[n] for n in names}) for r in outcome[2].values()]
    table = format_table(records, [])
    for record in records:
        line = f"does not fit: {record.kernel} ({record.config}) on {record.arch}: {record.reason}"
        assert (" ".join(line.split()) in " ".join(table.split())) is not record.fits


def test_files_are_those_of_the_records_and_whole(outcome: Outcome) -> None:
    folder, _, records = outcome
    named = {r[kind] for r in records.values() for kind in ("ptx", "cubin", "ttgir") if r[kind]}
    assert {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} == named
    assert len(named) == 3 * 3  # what was too large was compiled, and can be looked at
    assert all((folder / name).stat().st_size > 100 for name in named)


@pytest.mark.slow
def test_a_file_that_cant_be_written_ends_the_command(tmp_path: Path, outcome: Outcome) -> None:
    ptx = tmp_path / outcome[2]["merge_lse sm_90"]["ptx"].replace("sm_90", "sm_80")
    ptx.mkdir(parents=True)  # a folder stands where the first file belongs
    done = run("--arch", "sm_80", "--out", str(tmp_path))
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    assert f"--out {tmp_path}: Is a directory" in done.stderr
    assert list(ptx.parent.iterdir()) == [ptx]


def test_wrong_use_is_told_before_anything_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "used" / "sm_90").mkdir(parents=True)
    (tmp_path / "used" / "sm_90" / "notes.txt").touch()
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "sm_100").touch()
    for arguments, message in (
        (["--arch", "sm_42", "--out", str(tmp_path / "new")], "sm_100"),
        ([], "--out DIR"),
        (["--out", str(tmp_path / "file")], "is not a folder"),
        (["--out", "/sys/kernels"], "/sys can't be written"),
        (["--out", str(tmp_path / "used")], "notes.txt"),
        (["--out", str(tmp_path / "flat")], "sm_100 is not a folder"),
    ):
        monkeypatch.setattr(sys, "argv", ["helix-compile", "kernels", "no-such-model", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        assert caught.value.code == 2 and out == "" and message in err, err
    assert not (tmp_path / "new").exists()
