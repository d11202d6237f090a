"""Each format that is read, against a dequantiser of its own: whole, by ranks, by slices that begin anywhere."""

from __future__ import annotations

import random
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helix_compile.capture.source import load_folder
from helix_compile.checkpoint.configuration import read_configuration
from helix_compile.checkpoint.entries import read_entries
from helix_compile.checkpoint.files import CheckpointFiles
from helix_compile.checkpoint.model import Checkpoint, open_checkpoint
from helix_compile.checkpoint.stated import stated_format
from helix_compile.checkpoint.weights import CheckpointWeights
from helix_compile.plan.shard import cut_param
from helix_compile.runtime.rank import originals
from tests.support.checkpoints import quantise, rewrite, shards_of, state, write
from tests.support.quantisers import CASES

CPU = torch.device("cpu")
# 96 columns in 8 and in 3 parts: a rank begins inside groups and int32s
CUTS = ({"cp": 8}, {"cp": 3, "tpa": 2, "ep": 2})


def opened(folder: Path, dtype: torch.dtype | None = None) -> Checkpoint:
    return open_checkpoint(folder, dtype, CPU)


def held(weights: CheckpointWeights, name: str) -> Tensor:
    """The weight of a stored name, out of the experts that a layer stacks."""
    if ".experts." not in name:
        return weights[name]
    prefix, _, tail = name.partition(".experts.")
    number, part, _ = tail.split(".")
    if part == "down_proj":
        return weights[f"{prefix}.experts.down_proj"][int(number)]
    return weights[f"{prefix}.experts.gate_up_proj"][int(number)].chunk(2)[part == "up_proj"]


def same(got: Tensor, expected: Tensor) -> bool:
    return got.dtype == expected.dtype and got.shape == expected.shape and torch.equal(got, expected)


@cache
def cuts() -> list[tuple[Any, ...]]:
    """(options, name, shard, plan, rank) of all that ranks hold."""
    return [(options, *one) for options in CUTS for one in shards_of("grouped", **options)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {v: write(tmp_path_factory.mktemp(v), v) for v in ("short", "grouped")}


def copied(plain: dict[str, Path], case: str, folder: Path) -> Path:
    of = "grouped" if CASES[case].columns > 1 else "short"
    return Path(shutil.copytree(plain[of], folder / "copy"))


@pytest.mark.parametrize("case", CASES)
def test_whole_weights_and_notes(plain: dict[str, Path], tmp_path: Path, case: str) -> None:
    """In float32 and, rounded once, in the checkpoint's bfloat16; the note says the format and what has no effect."""
    folder, written = copied(plain, case, tmp_path), CASES[case]
    expected = quantise(folder, written)
    assert len(expected) > 30
    wide, narrow = opened(folder, torch.float32), opened(folder)
    for name, tensor in expected.items():
        assert same(held(wide.weights, name), tensor), name
        assert same(held(narrow.weights, name), tensor.to(torch.bfloat16)), name
    assert len(wide.weights.fingerprint().splitlines()) == len(CheckpointFiles(folder).tensors)
    first, *further = [note for note in wide.notes if "multi-token" not in note]
    assert first.startswith(
        f"checkpoint: {len(expected)} weight(s) are {written.name} ({written.said.get('quant_method', 'modelopt')})"
    )
    assert f"by {written.file}: dequantised into torch.float32" in first
    scales = [note for note in further if "have no effect" in note]
    assert len(scales) == bool(written.idle)
    assert all(note.startswith(f"checkpoint: {len(expected) * len(written.idle)} scale(s)") for note in scales)
    cache = [note for note in further if "wants a quantised cache (FP8)" in note]
    assert len(cache) == ("kv_cache_quant_algo" in written.said) and len(further) == len(scales) + len(cache)


@pytest.mark.parametrize("case", ["fp8_blocks_e8m0", "modelopt_nvfp4", "quark_mxfp4", "ct_int4", "quark_channel"])
def test_shards_are_cut_from_what_the_whole_stands_for(plain: dict[str, Path], tmp_path: Path, case: str) -> None:
    folder = Path(shutil.copytree(plain["grouped"], tmp_path / "copy"))
    quantise(folder, CASES[case])
    weights = opened(folder, torch.float32).weights
    whole = {name: weights[name] for name in weights}
    for options, source, shard, plan, rank in cuts():
        got = weights.part(source, shard, plan.layout, rank)
        assert same(got, cut_param(whole[source], shard, plan.layout, rank)), (options, shard.name, rank)


@pytest.mark.parametrize("case", CASES)
def test_slices_may_begin_and_end_anywhere(plain: dict[str, Path], tmp_path: Path, case: str) -> None:
    """And read little: at most an element of values more on either side than is asked."""
    folder = copied(plain, case, tmp_path)
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    expected = quantise(folder, CASES[case])[name]
    files, read = CheckpointFiles(folder), []
    entry = read_entries(files, stated_format(read_configuration(folder)))[name]
    draw, (rows, columns) = random.Random(1), expected.shape
    cuts = [sorted(draw.sample(range(columns + 1), 2)) + sorted(draw.sample(range(rows + 1), 2)) for _ in range(12)]
    plain_slice = files.slice

    def counted(key: str, ranges: Any) -> Tensor:
        part = plain_slice(key, ranges)
        if key == entry.name:
            read.append(part.numel() * part.element_size() * 8)
        return part

    files.slice = counted  # type: ignore[method-assign]
    for left, right, top, bottom in [*cuts, (3, 4, 5, 6), (0, columns, 0, rows)]:
        got = entry.part(files, ((top, bottom), (left, right)))
        assert torch.equal(got, expected[top:bottom, left:right]), (top, bottom, left, right)
        assert read.pop() <= (bottom - top) * ((right - left) * entry.bits + 2 * 32)


def test_a_last_int32_may_be_partly_filled(plain: dict[str, Path], tmp_path: Path) -> None:
    """A row of 20 weights is two and a half int32; its shape is stored."""
    folder = Path(shutil.copytree(plain["short"], tmp_path / "copy"))
    expected = quantise(folder, CASES["ct_int4_channel"])
    name = "model.layers.0.self_attn.kv_b_proj.weight"
    assert expected[name].shape[1] == 20
    assert same(opened(folder, torch.float32).weights[name], expected[name])


def test_a_statement_without_quantised_weights_is_noted(plain: dict[str, Path], tmp_path: Path) -> None:
    """A checkpoint that somebody dequantised, with its config.json as it was."""
    folder = Path(shutil.copytree(plain["short"], tmp_path / "copy"))
    state(folder, CASES["fp8_channel"])
    (note,) = opened(folder).notes
    assert "states FP8 per tensor or per channel (fp8), but all weights are stored in plain floats" in note


@pytest.mark.parametrize("case", ["fp8_blocks_e8m0", "ct_int4", "modelopt_nvfp4"])
def test_the_reference_of_verify_is_what_the_weights_stand_for(
    plain: dict[str, Path], tmp_path: Path, case: str
) -> None:
    """Read whole by the same reader into transformers' class."""
    folder = copied(plain, case, tmp_path)
    expected = quantise(folder, CASES[case])
    dense = Path(shutil.copytree(plain["grouped" if CASES[case].columns > 1 else "short"], tmp_path / "dense"))
    rewrite(dense, lambda tensors: tensors | {n: t.to(torch.bfloat16) for n, t in expected.items()})
    (loaded, (note,)), (reference, no_notes) = load_folder(folder, None), load_folder(dense, None)
    assert "dequantised by the same reader" in note and no_notes == ()
    mine, theirs = originals(loaded), originals(reference)
    assert mine.keys() == theirs.keys() and type(loaded) is type(reference) and not loaded.training
    assert not [name for name in mine if not same(mine[name], theirs[name])]
