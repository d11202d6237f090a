"""Files that come into a folder all together or not at all: in a hidden subfolder first, so that a full disk leaves nothing.

Whether a folder can be written to is asked before anything slow begins.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from safetensors import SafetensorError

from helix_compile.errors import HelixError


def check_folder(out: Path, asked_as: str = "--out") -> None:
    """The nearest part of the path that exists is a folder that can be written.

    Raises:
        HelixError: it is not; names the part.
    """
    nearest = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    if not nearest.is_dir():
        raise HelixError(f"{asked_as} {out}: {nearest} is not a folder; choose another folder")
    try:
        tempfile.TemporaryFile(dir=nearest).close()  # permissions don't tell: root has all, disks may be read-only
    except OSError as error:
        raise HelixError(
            f"{asked_as} {out}: {nearest} can't be written ({error.strerror}); choose another folder"
        ) from error


def unfinished(owner: str) -> str:
    """Name of the hidden subfolder in which StagedFiles of `owner` writes; what a killed process left in it is nobody's."""
    return f".unfinished-{owner}"


class StagedFiles:
    """write() each file, then move() them; leaving the `with` block without that takes everything back.

    Make it before another rank may write to `folder`: it notes which folders are there.
    """

    def __init__(self, folder: Path, owner: str):
        """`owner` tells the subfolders of several writers apart; what an earlier one left in its own is replaced."""
        self.folder = folder
        self._stage = folder / unfinished(owner)
        self._new_folders = [p for p in (folder, *folder.parents) if not p.exists()]
        self._names: list[str] = []
        self._appeared: list[Path] = []
        self._moved = False

    def __enter__(self) -> StagedFiles:
        return self

    def write(self, name: str, act: Callable[[Path], object]) -> None:
        """Let `act` write one file, to the path that it is called with.

        Raises:
            HelixError: the disk refuses; names the file and the reason.
        """
        if not self._names:
            self._open()
        path = self._stage / name
        with _explained(self.folder / name):
            act(path)
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)  # a network disk that is full says so here at the earliest
            finally:
                os.close(descriptor)
        self._names.append(name)

    def write_text(self, name: str, text: str) -> None:
        """Write one file of text; raises as write() does."""
        self.write(name, lambda path: path.write_text(text, encoding="utf-8"))

    def move(self) -> list[Path]:
        """Put the files in their places, in the order in which they were written; they replace what is there.

        Raises:
            HelixError: names the file and the reason; what had come is gone again then.
        """
        for name in self._names:
            target = self.folder / name
            is_new = not os.path.lexists(target)
            with _explained(self.folder / name):
                os.replace(self._stage / name, target)
            if is_new:
                self._appeared.append(target)
        self._moved = True
        return [self.folder / name for name in self._names]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self._stage, ignore_errors=True)
        if self._moved and error is None:
            return
        for path in reversed(self._appeared):
            with suppress(OSError):
                path.unlink()
        for path in self._new_folders:  # deepest first; one that holds something stays
            with suppress(OSError):
                path.rmdir()

    def _open(self) -> None:
        shutil.rmtree(self._stage, ignore_errors=True)
        with _explained(self.folder):
            self._stage.mkdir(parents=True)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """What a disk refuses, said with the name of the file, which many errors lack."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise HelixError(f"{path}: can't be written: {reason}; nothing of it is kept") from error
