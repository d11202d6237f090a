"""Heavy tests of CI that run no line of their own, the longest first: `make coverage` asks after its run.

Tests under LIGHT seconds stay. Of the others those are kept, one after the other, that add most lines a second to what is run so
far; what adds none is listed. A listed test may still be the only one that sees a number: choose by hand what goes to
tests/slow_variants.txt.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

from coverage import CoverageData

LIGHT = 1.5


def seconds_of(junit: Path) -> dict[str, float]:
    """Seconds by test id, of a report in the family xunit1 (the others name no file)."""
    cases = ElementTree.parse(junit).iter("testcase")
    return {f"{case.get('file')}::{case.get('name')}": float(case.get("time", 0)) for case in cases}


def lines_of(recorded: Path) -> dict[str, set[tuple[str, int]]]:
    """(file, line) by test id; "" has what runs in imports and processes that tests start."""
    data = CoverageData(str(recorded))
    data.read()
    found: dict[str, set[tuple[str, int]]] = defaultdict(set)
    for file in data.measured_files():
        for line, contexts in data.contexts_by_lineno(file).items():
            for context in contexts:
                found[context.rpartition("|")[0]].add((file, line))
    return found


def main(junit: Path, recorded: Path) -> None:
    """Print `seconds id` of each."""
    seconds, lines = seconds_of(junit), lines_of(recorded)
    heavy = {name for name, s in seconds.items() if s >= LIGHT}
    run = {line for name, own in lines.items() if name not in heavy for line in own}
    left = {name: lines[name] - run for name in heavy}
    while any(left.values()):
        best = max(left, key=lambda name: len(left[name]) / seconds[name])
        added = left.pop(best)
        left = {name: own - added for name, own in left.items()}
    for name in sorted(left, key=lambda name: -seconds[name]):
        print(f"{seconds[name]:6.1f} {name}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
