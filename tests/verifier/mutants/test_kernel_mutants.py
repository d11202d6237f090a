"""One-line faults put into the source of mla_decode's kernels: the comparison that their tests use catches each.

They are not in the catalogue of `verify --self-test`: verify's own runs take kernels as they are, and interpreting one
needs TRITON_INTERPRET=1 before Python starts, which the command can't ask for. docs/kernels.md has the table.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from helix_compile.kernels.mla import pointer as mla_pointer_decode
from helix_compile.kernels.mla import tiles as mla_tiles
from helix_compile.kernels.mla import tma as mla_tma
from helix_compile.kernels.mla.launch import decode_case
from helix_compile.kernels.mla.tuning import POINTER, ROWS, TRANSPOSED, MlaConfig
from tests.support.edited import Load, source_loader, source_of
from tests.support.mla import mismatch, mla_inputs, run_form

TILES = "mla_tiles"  # edits of what all forms share; "" edits the form's own file


@dataclass(frozen=True)
class KernelMutant:
    """A textual edit of one line of a kernel file; `transposed` is the line where KV slots are the rows, `pointer` that of
    the form without descriptors.
    """

    name: str
    file: str
    before: str
    after: str
    before_transposed: str = ""
    after_transposed: str = ""
    caught_by: str = "partial_o differs"
    before_pointer: str = ""
    after_pointer: str = ""

    def edit(self, form: str) -> tuple[str, str]:
        if form == POINTER and self.before_pointer:
            return self.before_pointer, self.after_pointer
        if form == TRANSPOSED and self.before_transposed:
            return self.before_transposed, self.after_transposed
        return self.before, self.after


MUTANTS = [
    KernelMutant(
        "mask off by one",
        "",
        "tl.expand_dims(slots, ROW_AXIS) < tl.expand_dims(limit, SLOT_AXIS)",
        "tl.expand_dims(slots, ROW_AXIS) <= tl.expand_dims(limit, SLOT_AXIS)",
        before_pointer="slots[None, :] < limit[:, None]",
        after_pointer="slots[None, :] <= limit[:, None]",
    ),
    KernelMutant("exp for exp2", TILES, "p = tl.exp2(", "p = tl.exp("),
    KernelMutant("stale max", TILES, "return p, tl.exp2(m - top), top", "return p, tl.exp2(m - top), m"),
    KernelMutant(
        "split dropped",
        TILES,
        "per_split = tl.cdiv(tiles, tl.num_programs(2))",
        "per_split = tiles // tl.num_programs(2)",
        caught_by="lse = -inf in other rows",
    ),
    KernelMutant("lse in base 2", TILES, "(m + tl.log2(divisor)) * LN2", "(m + tl.log2(divisor))"),
    KernelMutant(
        "rope part unscaled",
        "",
        "tl.dot(q_rope, ",
        "tl.dot(q_rope / scale_log2, ",
        "tl.dot(k_rope, q_rope, ",
        "tl.dot(k_rope, q_rope / scale_log2, ",
    ),
]
FORMS: dict[str, tuple[MlaConfig, ModuleType, str]] = {
    ROWS: (MlaConfig(ROWS, 16, 16, 4, 2, parts=2), mla_tma, "mla_tma_kernel"),
    TRANSPOSED: (MlaConfig(TRANSPOSED, 16, 16, 4, 2), mla_tma, "mla_tma_kernel"),
    POINTER: (MlaConfig(POINTER, 16, 16, 4, 2), mla_pointer_decode, "mla_pointer_kernel"),
}


@pytest.fixture
def load_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    return source_loader(tmp_path, monkeypatch)


def edited_kernel(form: str, mutant: KernelMutant | None, load: Load) -> Any:
    """The jit function of a form, in fresh modules with the mutant's edit (None: none)."""
    _, module, function = FORMS[form]
    tiles, own = source_of(mla_tiles), source_of(module)
    if mutant is not None:
        before, after = mutant.edit(form)
        target = tiles if mutant.file == TILES else own
        assert before in target, f"{before!r} is no longer in the source"
        edited = target.replace(before, after)
        tiles, own = (edited, own) if mutant.file == TILES else (tiles, edited)
    load("edited_mla_tiles", tiles)
    own = own.replace("helix_compile.kernels.mla.tiles", "edited_mla_tiles")
    return getattr(load(f"edited_{function}", own), function)


def fault_of(form: str, mutant: KernelMutant | None, load: Load) -> str | None:
    """What the comparison says of the edited kernel, over 4 splits, which 2 tiles do not fill."""
    inputs = mla_inputs([60, 17, 0], T=2, H=5, seed=1)
    config, H, R, r = FORMS[form][0], 5, 32, 16
    case = decode_case(config, H, R, r, 16, torch.float32, torch.float32, interpreted=True)
    case = replace(case, function=edited_kernel(form, mutant, load))
    wanted = torch.ops.helix.mla_decode(*inputs.args)
    return mismatch(run_form(config, inputs, splits=4, case=case), wanted)


@pytest.mark.parametrize("form", FORMS)
def test_unedited_source_passes(form: str, load_source: Load) -> None:
    assert fault_of(form, None, load_source) is None


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_each_mutant_is_caught(mutant: KernelMutant, form: str, load_source: Load) -> None:
    fault = fault_of(form, mutant, load_source)
    assert fault is not None and fault.startswith(mutant.caught_by)
