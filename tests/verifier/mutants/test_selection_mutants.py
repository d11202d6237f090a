"""Faults of sparse attention: by their effect on an op, and put into one line of a kernel's source. The cases by which a
kernel is judged (tests/support/kernel_cases.py) reject each, and accept the unedited source.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import helix_compile.kernels.catalog  # noqa: F401
from helix_compile.kernels.mla import launch as mla_launch
from helix_compile.kernels.mla import pointer as mla_pointer
from helix_compile.kernels.mla import tma as mla_tma
from helix_compile.kernels.sparse import decode, kth, order, scores, select, topk
from helix_compile.verifier.mutants.selection_mutants import FAULTY_OPS
from tests.support.edited import Load, source_loader, source_of
from tests.support.kernel_cases import CASES, expected_results, on_device, worst_deviation
from tests.support.kernel_checks import poisoned_memory

BOUND = 5e-6  # as in tests/cli/test_kernel_cases.py


def is_rejected(op: str, function: Callable[..., Any]) -> bool:
    """Whether any case of the op tells a function from it."""
    for case in (c for c in CASES if c.op == op):
        for seed in (0, 1):
            arguments = case.arguments(torch.float32, seed)
            with poisoned_memory():
                out = function(*on_device(arguments, "cpu"))
            try:
                deviation = worst_deviation(
                    [*([out] if isinstance(out, torch.Tensor) else out)], expected_results(case, arguments), case.exact
                )
            except AssertionError:
                return True
            if not deviation <= BOUND:
                return True
    return False


@pytest.mark.parametrize("name", FAULTY_OPS)
def test_each_fault_of_the_catalogue_is_rejected(name: str) -> None:
    op, faulty = FAULTY_OPS[name]
    assert is_rejected(op, faulty)


@dataclass(frozen=True)
class Edit:
    """One line of a kernel's source; `file` says which where an op's kernel has several: "order", "pointer", "tma"."""

    name: str
    op: str
    before: str
    after: str
    file: str = ""


EDITS = [
    Edit("-0.0 is below 0.0", "topk_candidates", "tl.where(bits == LOWEST_KEY, 0, bits)", "bits", "order"),
    Edit("a NaN is below all", "topk_candidates", "score != score, HIGHEST_KEY", "score != score, LOWEST_KEY", "order"),
    Edit("the search stops a digit early", "topk_candidates", "while (shift > 0)", "while (shift > 8)"),
    Edit("one tie too few", "topk_candidates", "(ties < wanted)", "(ties < wanted - 1)"),
    Edit(
        "a hidden slot is offered",
        "topk_candidates",
        "end = tl.minimum(end, visible)",
        "end = tl.minimum(end, visible + 1)",
    ),
    Edit(
        "no filler",
        "topk_candidates",
        "tl.minimum(in_range, wanted), M, BLOCK)",
        "tl.minimum(in_range, wanted), 0, BLOCK)",
    ),
    Edit("a slot for a position", "topk_candidates", "slot = position_of(", "position_of("),
    Edit("the search stops a digit early", "kth_candidate", "while (shift > 0)", "while (shift > 40)"),
    Edit("another row's bound", "kth_candidate", "entries_ptr += row * M", "entries_ptr += 0 * row"),
    Edit("the higher position wins", "kth_candidate", "(entry >> 32) ^ NOWHERE", "(entry >> 32)"),
    Edit("the bound is left out", "select_slots", "(position <= kth_position)", "(position < kth_position)"),
    Edit("all ties are chosen", "select_slots", "(position <= kth_position)", "(position <= position)"),
    Edit("a slot for a position", "select_slots", "position = position_of(", "position = slot + 0 * position_of("),
    Edit("each part begins at 0", "select_slots", "mask=parts < part", "mask=parts < 0"),
    Edit(
        "the list is not filled",
        "select_slots",
        "for first in range(count, M, BLOCK)",
        "for first in range(M, M, BLOCK)",
    ),
    Edit("one slot too many", "index_scores", "used = slots < visible", "used = slots <= visible"),
    Edit("no relu", "index_scores", "tl.where(raw < 0, 0.0, raw)", "raw"),
    Edit("the rest is not written", "index_scores", "tiles + split * rest + rest)", "tiles + split * rest)"),
    *(
        Edit(f"{name}, {file}", "mla_decode_slots", before, after, file)
        for file in ("pointer", "tma")
        for name, before, after in (
            ("the list of another query", "b.to(tl.int64) * stride_slots", "b.to(tl.int64) * 0"),
            ("pages of another sequence", "(b // queries).to(tl.int64)", "(b * 0).to(tl.int64)"),
        )
    ),
    Edit(
        "places for slots, pointer", "mla_decode_slots", "if slots_ptr is not None:", "if slots_ptr is None:", "pointer"
    ),
    Edit("places for slots, tma", "mla_decode_slots", "PAGE + slot % PAGE", "PAGE + place % PAGE", "tma"),
    Edit("a place past the count, tma", "mla_decode_slots", "BLOCK_N), kv_len - 1)", "BLOCK_N), kv_len)", "tma"),
]
FILES: dict[str, tuple[ModuleType, str]] = {
    "topk_candidates": (topk, "topk_candidates_triton"),
    "kth_candidate": (kth, "kth_candidate_triton"),
    "select_slots": (select, "select_slots_triton"),
    "index_scores": (scores, "index_scores_triton"),
}


@pytest.fixture
def load_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    return source_loader(tmp_path, monkeypatch)


def edited(text: str, edit: Edit | None) -> str:
    if edit is None:
        return text
    assert edit.before in text, f"{edit.before!r} is no longer in the source"
    return text.replace(edit.before, edit.after)


def edited_launcher(op: str, edit: Edit | None, load: Load, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The launcher of an op over fresh modules; several parts a row where the op has them."""
    if op == "mla_decode_slots":  # its loops are those of mla_decode
        for file, module in (("pointer", mla_pointer), ("tma", mla_tma)):
            text = edited(source_of(module), edit if edit is not None and edit.file == file else None)
            name = f"mla_{file}_kernel"
            monkeypatch.setattr(mla_launch, name, getattr(load(f"edited_{file}", text), name))
        mla_launch.decode_case.cache_clear()
        return partial(decode.mla_decode_slots_triton, num_splits=2)
    shared = edit is not None and edit.file == "order"
    load("edited_order", edited(source_of(order), edit if shared else None))
    module, launcher = FILES[op]
    own = edited(source_of(module), None if shared else edit)
    own = re.sub(r"\n[A-Z_]+ = register_kernel\(.*", "\n", own, flags=re.DOTALL)  # it is registered already
    return getattr(load(f"edited_{op}", own.replace("helix_compile.kernels.sparse.order", "edited_order")), launcher)


@pytest.fixture(autouse=True)
def unedited_cases() -> Any:
    """Cases of mla_decode are kept by their sizes; none may hold an edited kernel afterwards."""
    yield
    mla_launch.decode_case.cache_clear()


@pytest.mark.parametrize("op", [*FILES, "mla_decode_slots"])
def test_unedited_source_passes(op: str, load_source: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_rejected(op, edited_launcher(op, None, load_source, monkeypatch))


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: f"{edit.op}-{edit.name}".replace(" ", "-"))
def test_each_edit_is_rejected(edit: Edit, load_source: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_rejected(edit.op, edited_launcher(edit.op, edit, load_source, monkeypatch))
