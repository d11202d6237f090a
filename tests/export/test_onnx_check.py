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
from helix_compile.export.manifest import OTHER_VALUES, described_file, format_manifest, sha256_of
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
    for rank in ranks:
        path = folder / f"rank{rank}.onnx"
        model = onnx.load(path, load_external_data=False)
        change(model, rank)
        onnx.save(model, path)
        if reseal:
            edit_manifest(folder, lambda m, path=path: m["files"].update({path.name: described_file(path)}))


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], Any], reseal: bool = True) -> None:
    """Change the manifest, as an exporter that meant it, or (not `reseal`) by hand."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(format_manifest(manifest) if reseal else json.dumps(manifest))


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
            if attribute.name == "tokens_per_block":
                attribute.i = 2


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


def weight(model: Any) -> Any:
    return next(t for t in model.graph.initializer if t.name == O_PROJ)


def other_sizes(model: Any, rank: int) -> None:
    """The same bytes, read the other way round."""
    weight(model).dims[:] = list(weight(model).dims)[::-1]


def other_dtype(model: Any, rank: int) -> None:
    weight(model).data_type = onnx.TensorProto.INT32


def no_length(model: Any, rank: int) -> None:
    kept = [(entry.key, entry.value) for entry in weight(model).external_data if entry.key != "length"]
    del weight(model).external_data[:]
    for key, value in kept:
        weight(model).external_data.add(key=key, value=value)


def outside(model: Any, rank: int) -> None:
    next(e for e in weight(model).external_data if e.key == "location").value = "../manifest.json"


def circle(model: Any, rank: int) -> None:
    next(n for n in model.graph.node if list(n.output) == ["cache_2_out"]).input[0] = "cache_2_out"


def no_coordinate(model: Any, rank: int) -> None:
    place = next(i for i, tensor in enumerate(model.graph.initializer) if tensor.name == "kvp_rank")
    del model.graph.initializer[place]


def no_function(model: Any, rank: int) -> None:
    place = next(i for i, function in enumerate(model.functions) if function.name == "mla_decode")
    del model.functions[place]


def no_axis(model: Any, rank: int) -> None:
    for node in [n for f in model.functions for n in f.node if n.op_type == "AllReduce"]:
        del node.attribute[:]


def other_ir(model: Any, rank: int) -> None:
    model.ir_version = 10


def other_opset(model: Any, rank: int) -> None:
    next(o for o in model.opset_import if not o.domain).version = 22


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (other_sizes, f"weights: rank1.onnx, {O_PROJ}: {OTHER_VALUES}"),
        (other_dtype, f"weights: rank1.onnx, {O_PROJ}: {OTHER_VALUES}"),
        (no_length, f"weights: rank1.onnx, {O_PROJ}: its external data is not there"),
        (outside, f"weights: rank1.onnx, {O_PROJ}: its external data is not there"),
        (circle, "unreadable: rank1.onnx: no ONNX model: "),
        (no_coordinate, "unreadable: rank1.onnx: no ONNX model: "),
        (no_function, "other_function: rank1.onnx: mla_decode called, and not defined"),
        (no_axis, "collectives: rank1.onnx: 12 of 12; the first that differs is #1: ['AllReduce', '', 0, '']"),
        (other_ir, "unreadable: rank1.onnx: (IR, opset) are (10, 23)"),
        (other_opset, "unreadable: rank1.onnx: no ONNX model: Opset import"),
    ],
    ids=lambda case: getattr(case, "__name__", ""),
)
def test_a_model_that_can_not_be_is_named_in_words(folder: Path, change: Any, said: str) -> None:
    """Without a trace, and without an end to the search."""
    edit(folder, range(1, 2), change)
    found = [str(fault) for fault in check_export(folder)]
    assert any(fault.startswith(said) for fault in found), found
    assert all("rank1.onnx" in fault for fault in found)


def turn_groups(manifest: dict[str, Any]) -> None:
    manifest["groups"]["kvp"][0].reverse()


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (turn_groups, "manifest.json, groups"),
        (lambda m: m.update(ranks=3), "manifest.json, ranks"),
        (lambda m: m.update(layers=[0, 1]), "manifest.json, layers"),
        (lambda m: m["ledger"].update(tokens_per_block=9), "manifest.json, ledger"),
        (lambda m: m.pop("max_seq_len"), "manifest.json, max_seq_len"),
        (lambda m: m["plan"]["options"].update(tokens_per_block=2), "manifest.json"),
        (lambda m: m.pop("plan"), "manifest.json"),
    ],
    ids=["groups", "ranks", "layers", "ledger", "max_seq_len", "plan", "none"],
)
def test_a_manifest_that_is_edited_is_named(folder: Path, change: Any, where: str) -> None:
    """By its digest, and by what its plan says. `groups` turned round: every file is as it was, and what is exchanged comes in another order."""
    if change is not turn_groups:
        edit_manifest(folder, change, reseal=False)
        assert "manifest.json" in codes(folder)["changed_file"]
    else:
        edit_manifest(folder, change)
        assert codes(folder) == {"manifest": {where}}
    assert where in codes(folder).get("manifest", set()) or where == "manifest.json, layers"


def test_rank_files_that_are_swapped_and_strangers_are_named(folder: Path) -> None:
    for end in ("onnx", "onnx.data"):
        (folder / f"rank0.{end}").rename(folder / "kept")
        (folder / f"rank1.{end}").rename(folder / f"rank0.{end}")
        (folder / "kept").rename(folder / f"rank1.{end}")
    shutil.copy(folder / "rank2.onnx", folder / "rank4.onnx")
    (folder / "notes.txt").write_text("anyone may put a file here")
    found = codes(folder)
    assert found["extra_file"] == {"rank4.onnx"}
    assert found["changed_file"] == {f"rank{r}.{end}" for r in (0, 1) for end in ("onnx", "onnx.data")}
    assert {"rank0.onnx, kvp_rank", "rank1.onnx, kvp_rank"} <= found["rank_coordinate"]


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
