"""Faults in the files of an export, each named by verify.

`reseal` makes the manifest's digests of files anew, as an exporter with this fault would have: then digests see nothing.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

from helix_compile import HelixError
from helix_compile.errors import ExportError
from helix_compile.export.formats import check_export
from helix_compile.export.manifest import sha256_of
from tests.export.test_onnx_ranks import TOLERANCE, check_caches, compiled_tiny, run
from tests.support.models import tiny_model
from tests.support.onnx_ranks import OnnxRanks

O_PROJ = "model.layers.1.self_attn.o_proj.weight"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "out"
    compiled_tiny().export(folder)
    return folder


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def edit(folder: Path, ranks: range, change: Callable[[Any, int], None], reseal: bool = True) -> None:
    """Change the models of these ranks."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for rank in ranks:
        path = folder / f"rank{rank}.onnx"
        model = onnx.load(path, load_external_data=False)
        change(model, rank)
        onnx.save(model, path)
        if reseal:
            manifest["files"][path.name] = {"sha256": sha256_of(path), "bytes": path.stat().st_size}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def codes(folder: Path) -> dict[str, set[str]]:
    """Code of a fault -> where."""
    found: dict[str, set[str]] = {}
    for fault in check_export(folder):
        found.setdefault(fault.code, set()).add(fault.where)
    return found


def swap_kvp_ranks(model: Any, rank: int) -> None:
    for tensor in model.graph.initializer:
        if tensor.name == "kvp_rank":
            tensor.CopyFrom(numpy_helper.from_array(np.array((rank + 1) % 4), "kvp_rank"))


def change_blocks(model: Any, rank: int) -> None:
    for node in model.graph.node:
        for attribute in node.attribute:
            attribute.i = 2 if attribute.name == "tokens_per_block" else attribute.i


def drop_all_reduce(model: Any, rank: int) -> None:
    """The first one, in every body that has it: the value goes on as it is."""
    for function in model.functions:
        node = next((n for n in function.node if n.op_type == "AllReduce"), None)
        if node is not None:
            node.CopyFrom(helper.make_node("Identity", list(node.input), list(node.output), name=node.name))


def leave_cache(model: Any, rank: int) -> None:
    node = next(n for n in model.graph.node if list(n.output) == ["cache_2_out"])
    node.input[0] = "cache_2"


def swap_o_proj(model: Any, rank: int) -> None:
    """Ranks 0 and 1 read each other's rows."""
    tensor = next(t for t in model.graph.initializer if t.name == O_PROJ)
    location = next(e for e in tensor.external_data if e.key == "location")
    location.value = f"rank{1 - rank}.onnx.data"


def test_what_was_exported_is_without_faults(folder: Path) -> None:
    assert check_export(folder) == []


@pytest.mark.parametrize(
    ("ranks", "change", "code", "count"),
    [
        (range(4), swap_kvp_ranks, "rank_coordinate", 4),
        (range(4), change_blocks, "ledger", 4),
        (range(4), drop_all_reduce, "collectives", 4),
        (range(2, 3), drop_all_reduce, "collectives", 1),
        (range(4), leave_cache, "cache_unwritten", 4),
        (range(2), swap_o_proj, "weights", 2),
    ],
    ids=["kvp_rank", "tokens_per_block", "all_reduce", "all_reduce_of_one", "cache_unwritten", "o_proj"],
)
def test_an_exporter_with_a_fault_is_named(folder: Path, ranks: range, change: Any, code: str, count: int) -> None:
    edit(folder, ranks, change)
    found = codes(folder)
    assert len(found.pop(code)) == count
    assert set(found) <= ({"ranks_differ"} if len(ranks) < 2 else set()), found


def test_swapped_weights_are_traced_to_their_rank(folder: Path) -> None:
    edit(folder, range(2), swap_o_proj)
    said = [str(fault) for fault in check_export(folder)]
    assert said == [f"weights: rank{r}.onnx, {O_PROJ}: it is rank {1 - r}'s" for r in (0, 1)]


def test_an_edited_file_is_a_changed_file(folder: Path) -> None:
    edit(folder, range(1), swap_kvp_ranks, reseal=False)
    assert codes(folder)["changed_file"] == {"rank0.onnx"}


def test_a_flipped_bit_is_found_in_its_tensor(folder: Path) -> None:
    model = onnx.load(folder / "rank1.onnx", load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.name == O_PROJ)
    start = int(next(e.value for e in tensor.external_data if e.key == "offset"))
    with open(folder / "rank1.onnx.data", "r+b") as file:
        file.seek(start + 5)
        byte = file.read(1)[0]
        file.seek(start + 5)
        file.write(bytes([byte ^ 4]))
    assert codes(folder) == {"changed_file": {"rank1.onnx.data"}, "weights": {f"rank1.onnx, {O_PROJ}"}}


@pytest.mark.parametrize("name", ["rank2.onnx", "rank2.onnx.data"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert codes(folder)["missing_file"] == {name}


def test_the_manifest_of_another_model_is_named(folder: Path, tmp_path: Path) -> None:
    compiled_tiny(tokens_per_block=2).export(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "manifest.json", folder / "manifest.json")
    assert codes(folder)["other_export"] == {f"rank{r}.onnx" for r in range(4)}


def test_a_function_that_is_not_the_spec_is_named(folder: Path) -> None:
    def change(model: Any, rank: int) -> None:
        function = next(f for f in model.functions if f.name == "softmax_of_seen")
        next(n for n in function.node if n.op_type == "Sub").op_type = "Add"

    edit(folder, range(4), change)
    assert codes(folder) == {"other_function": {f"rank{r}.onnx, helix::softmax_of_seen" for r in range(4)}}


def test_what_exists_is_not_overwritten(exported: Path) -> None:
    before = sha256_of(exported / "manifest.json")
    with pytest.raises(ExportError, match=r"holds rank0.onnx, .*would be replaced"):
        compiled_tiny().export(exported)
    assert sha256_of(exported / "manifest.json") == before


def test_formats_that_are_not_there_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"format='onx' is unknown; one of onnx, pt2, aoti"):
        compiled_tiny().export(tmp_path / "out", format="onx")
    assert not (tmp_path / "out").exists()


def test_an_export_that_fails_leaves_nothing(tmp_path: Path) -> None:
    compiled = compiled_tiny()
    compiled.ranks[3].params[O_PROJ] = compiled.ranks[3].params[O_PROJ].to(torch.complex64)
    with pytest.raises(HelixError, match="not exported"):
        compiled.export(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "ranks", "seen_by"),
    [
        (swap_kvp_ranks, range(4), "caches"),
        (change_blocks, range(4), "caches"),
        (leave_cache, range(4), "logits"),
        (swap_o_proj, range(2), "logits"),
        (drop_all_reduce, range(4), "ranks"),
    ],
    ids=["kvp_rank", "tokens_per_block", "cache_unwritten", "o_proj", "all_reduce"],
)
def test_what_a_run_sees_of_it(folder: Path, change: Any, ranks: range, seen_by: str) -> None:
    """The comparisons of test_onnx_ranks.py can fail: on a wrong ledger that all ranks agree on by their caches alone."""
    edit(folder, ranks, change)
    compiled, model = compiled_tiny(), tiny_model("plain", torch.float32)
    models = OnnxRanks(folder, json.loads((folder / "manifest.json").read_text()))
    if seen_by == "ranks":
        with pytest.raises(AssertionError):
            run(model, compiled, models, steps=(1,))
        return
    worst = run(model, compiled, models, steps=(1, 3))
    assert (worst > 1e-2) == (seen_by == "logits") and (worst <= TOLERANCE) == (seen_by == "caches")
    if seen_by == "caches":
        with pytest.raises(AssertionError):
            check_caches(compiled, models)
