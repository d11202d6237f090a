"""What accumulates while verifying, and how a fault of the module under test becomes a finding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from helix_compile.verifier.reference import OriginalFails
from helix_compile.verifier.report import Coverage, Finding

Progress = Callable[[str], None]


@dataclass
class Check:
    """Findings, notes and coverage of a run; `dtypes` are those that were checked."""

    dtypes: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    coverage: Coverage = field(default_factory=Coverage)

    def merge(self, other: Check) -> None:
        """Take over what another dtype has shown."""
        self.dtypes += other.dtypes
        self.findings += [replace(f, where=f"{other.dtypes[0]}: {f.where}") for f in other.findings]
        self.notes += [f"in {other.dtypes[0]}: {n}" for n in other.notes]
        for name in ("steps", "tokens", "needles", "empty_shards", "unequal_shards"):
            total = getattr(self.coverage, name) + getattr(other.coverage, name)
            setattr(self.coverage, name, total)

    def guarded(self, where: str, run: Callable[[], Any]) -> Any:
        """run(), or None and a finding: whatever the module under test makes a check do, verify() does not raise."""
        try:
            return run()
        except Exception as error:
            self.findings.append(fault(error, where))
            return None


def fault(error: Exception, where: str) -> Finding:
    """A finding for an exception of the module under test."""
    if isinstance(error, OriginalFails):
        expected = "an original that runs by itself: change its own settings, such as the experts' implementation"
        return Finding("HX503", where, str(error), expected, 0, "numeric")
    text = str(error)
    collective = "deadlock" in text or "ranks disagree" in text or "waited for" in text
    pending = "wait" in text and not text.startswith("deadlock")
    got = f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"
    family = 10 if collective or pending else 0
    return Finding("HX502" if collective else "HX501", where, got, "a step that runs", family, "numeric")  # fmt: skip
