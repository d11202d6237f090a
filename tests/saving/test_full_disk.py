"""A disk that is full says which file and why, and nothing half-written is left: save(), inspect(), write_cache()."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from helix_compile import HelixError, HelixModule, RuntimeFault, helix_compile
from helix_compile.cache.file import read_cache, write_cache
from helix_compile.files import StagedFiles
from tests.support.disk import REASON, full_after
from tests.support.handover import random_entries
from tests.support.models import tiny_model


@pytest.fixture(scope="module")
def compiled() -> HelixModule:
    return helix_compile(tiny_model("short"), cp=2, max_seq_len=32)


def sizes(folder: Path) -> dict[str, int]:
    return {f.name: f.stat().st_size for f in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("name", ["rank_1.safetensors", "plan.json"])
def test_a_save_is_whole_or_not_there(
    compiled: HelixModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The first of two weight files is there already; then everything but the last file."""
    write = StagedFiles.write

    def refuse(files: StagedFiles, which: str, act: Callable[[Path], object]) -> None:
        with full_after(4) if which == name else nullcontext():
            write(files, which, act)

    bad = tmp_path / "new" / "bad"
    with monkeypatch.context() as patch, pytest.raises(HelixError) as caught:
        patch.setattr(StagedFiles, "write", refuse)
        compiled.save(bad)
    assert re.fullmatch(rf"{bad}/{name}: can't be written: .*{REASON}.*; nothing of it is kept", str(caught.value))
    assert not list(tmp_path.iterdir())  # neither the folder nor its parent
    compiled.save(bad)
    assert name in sizes(bad) and not list(bad.glob(".*"))


def test_files_that_were_there_stay_as_they_were(compiled: HelixModule, tmp_path: Path) -> None:
    (tmp_path / "report.txt").write_text("mine")  # inspect() would replace it, save() writes none
    (tmp_path / "notes.txt").write_text("mine too")
    with full_after(3000), pytest.raises(HelixError, match=REASON):
        compiled.save(tmp_path)
    with full_after(3000), pytest.raises(HelixError, match=REASON):
        compiled.inspect(tmp_path)
    assert {f.name: f.read_text() for f in tmp_path.iterdir()} == {"report.txt": "mine", "notes.txt": "mine too"}


def test_a_report_is_whole_or_not_there(compiled: HelixModule, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with full_after(5000), pytest.raises(HelixError, match=rf"{out}/\S+: can't be written: {REASON}"):
        compiled.inspect(out)
    assert not out.exists()
    compiled.inspect(out)
    before = sizes(out)
    with full_after(5000), pytest.raises(HelixError, match=REASON):
        compiled.inspect(out)
    assert sizes(out) == before and "report.html" in before


def test_what_can_not_be_moved_takes_back_what_has_come(tmp_path: Path) -> None:
    """The second file's place is taken by a folder."""
    (tmp_path / "two").mkdir()
    with pytest.raises(HelixError, match=r"two: can't be written"), StagedFiles(tmp_path, "t") as files:
        for name in ("one", "two"):
            files.write(name, lambda path: path.write_text("text"))
        files.move()
    assert [f.name for f in tmp_path.iterdir()] == ["two"]


def test_a_cache_is_whole_or_as_it_was(tmp_path: Path) -> None:
    path, entries = tmp_path / "cache.safetensors", random_entries([40, 31], [20] * 2, [6] * 2)
    for _ in range(2):
        with full_after(8000), pytest.raises(RuntimeFault, match=rf"{path}: can't write the cache: .*{REASON}"):
            write_cache(path, entries)
        assert [f.name for f in tmp_path.iterdir()] == ([path.name] if path.exists() else [])
        write_cache(path, entries)  # the second round has an older file
    again = read_cache(path)
    assert all(torch.equal(a, b) for a, b in zip(again.latents, entries.latents, strict=True))
