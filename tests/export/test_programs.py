"""Exports of programs (pt2, aoti): steps, files, and faults in files, each named by verify. Real ranks: tests/slow."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from helix_compile import HelixModule, helix_compile, load_exported
from helix_compile.errors import ExportError, RuntimeFault
from helix_compile.export.formats import check_export
from helix_compile.export.manifest import OTHER_VALUES, described_file, format_manifest
from helix_compile.export.programs import cut_for_export, program_of, save_native
from helix_compile.ir.graph import placeholders
from helix_compile.ir.sizes import size_at_step
from tests.export.test_onnx_check import edit_manifest
from tests.support.driver import Reference, deviation, left_padded, random_ids
from tests.support.models import tiny_model

O_PROJ = "model.layers.1.self_attn.o_proj.weight"


def compiled_short(**options: Any) -> HelixModule:
    sizes = {"cp": 4, "tokens_per_block": 4, "max_batch_size": 4, "max_seq_len": 64}
    return helix_compile(tiny_model("short", torch.float32), **{**sizes, **options})


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "out"
    compiled_short().export(folder, format="pt2")
    return folder


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def test_a_loaded_export_is_the_model(exported: Path) -> None:
    """All ranks here: ragged, an idle row, T = 1 and 3, empty shards; then truncate() and reset(), as the module that was exported."""
    assert check_export(exported) == []
    model, compiled, module = tiny_model("short", torch.float32), compiled_short(), load_exported(exported)
    assert [entry.name for entry in sorted(exported.iterdir()) if entry.suffix == ".safetensors"] == [
        f"rank{r}.safetensors" for r in range(4)
    ]
    reference, mask, worst = Reference(model), left_padded([5, 2, 9, 1]), 0.0
    for number, tokens in enumerate((9, 1, 3, 1)):
        if number:
            mask = torch.ones(4, tokens, dtype=torch.int64)
            mask[3] = number % 2
        ids = random_ids(model, 4, tokens)
        logits = module(ids, mask)
        assert torch.equal(logits, compiled(ids, mask))
        worst = max(worst, deviation(logits, reference.step(ids, mask), mask))
    assert worst <= 1e-5
    assert all(
        torch.equal(a, b)
        for r, s in zip(module.ranks, compiled.ranks, strict=True)
        for a, b in zip(r.cache, s.cache, strict=True)
    )
    for again in (module, compiled):
        again.truncate([3, 2, 5, 0])
        again.reset([1])
    ids = random_ids(model, 4, 2)
    assert torch.equal(module(ids, logits_to_keep=1), compiled(ids)[:, -1:])
    assert module.lengths.tolist() == [5, 2, 7, 2]
    with pytest.raises(RuntimeFault, match="max_seq_len=64"):
        module(random_ids(model, 4, 63))


@pytest.mark.slow
def test_no_program_knows_ranks_and_none_needs_helix_compile(exported: Path) -> None:
    """What another process needs to load them is torch."""
    programs = sorted(exported.glob("*.pt2"))
    assert [path.stem for path in programs] == [
        *("body_0_segment_0", "body_0_segment_1", "body_0_segment_2", "body_1_segment_2", "body_1_segment_3"),
        *("outer_segment_0", "outer_segment_1"),
    ]
    script = "import sys, torch; print(torch.export.load(sys.argv[1]).graph); assert 'helix_compile' not in sys.modules"
    run = subprocess.run([sys.executable, "-c", script, str(programs[1])], capture_output=True, text=True, check=True)
    assert "torch.ops.aten" in run.stdout and "helix" not in run.stdout and "_c10d_functional" not in run.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.bfloat16, {}),
        (torch.float16, {"merge": "ag_rs"}),
        (torch.float32, {"cache_dtype": "fp8_e4m3", "cache_scale": 0.02}),
    ],
)
def test_other_dtypes_are_bit_for_bit_what_was_exported(dtype: torch.dtype, options: Any, tmp_path: Path) -> None:
    sizes = {"cp": 4, "tokens_per_block": 4, "max_batch_size": 4, "max_seq_len": 64}
    compiled = helix_compile(tiny_model("short", dtype), **sizes, **options)
    compiled.export(tmp_path / "out", format="pt2")
    assert check_export(tmp_path / "out") == []
    module = load_exported(tmp_path / "out")
    for tokens in (5, 1, 3):
        ids = torch.randint(0, 97, (4, tokens))
        assert torch.equal(module(ids), compiled(ids))


def test_a_native_program_takes_any_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norm and head, compiled: what AOTInductor checks of inputs holds for B = 1 and T = 1 too."""
    monkeypatch.setenv("AOTI_RUNTIME_CHECK_INPUTS", "1")
    segment = cut_for_export(compiled_short().graph).get_submodule("outer_segment_1")
    save_native(program_of(segment, "end"), tmp_path / "end.pt2", "1234")
    native = torch._inductor.aoti_load_package(tmp_path / "end.pt2")
    assert native.get_metadata()["helix_export"] == "1234"
    for B, T in ((1, 1), (3, 1), (1, 4), (2, 3)):
        given = [
            torch.randn([size_at_step(n, B, T, 0) for n in p.meta["val"].shape]) for p in placeholders(segment.graph)
        ]
        torch.testing.assert_close(native(*given), segment(*given), rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match="expected"):
        native(*[given[0][..., :-1], *given[1:]])


def codes(folder: Path) -> dict[str, set[str]]:
    """Code of a fault -> where."""
    found: dict[str, set[str]] = {}
    for fault in check_export(folder):
        found.setdefault(fault.code, set()).add(fault.where)
    return found


def reseal(folder: Path, *names: str) -> None:
    """The manifest's digests of files made anew, as an exporter with this fault would have."""
    edit_manifest(folder, lambda m: m["files"].update({name: described_file(folder / name) for name in names}))


def edit_walk(folder: Path, change: Callable[[list[dict[str, Any]]], None]) -> None:
    """Change every graph of the walk."""
    walk = json.loads((folder / "walk.json").read_text())
    for entries in (walk["outer"], *walk["bodies"].values()):
        change(entries)
    (folder / "walk.json").write_text(json.dumps(walk))
    reseal(folder, "walk.json")


def edit_rank(folder: Path, rank: int, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = folder / f"rank{rank}.safetensors"
    with safe_open(path, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name).clone() for name in file.keys()}, file.metadata()  # noqa: SIM118
    change(tensors)
    save_file(tensors, path, metadata)
    reseal(folder, path.name)


def change_blocks(entries: list[dict[str, Any]]) -> None:
    for entry in entries:
        if entry["target"] == "helix.shard_index.default":
            entry["args"][3] = 2


def read_past(entries: list[dict[str, Any]], target: str) -> None:
    """Whoever reads the calls of `target` reads their first argument instead."""
    for call in [entry for entry in entries if entry["target"] == target]:
        for entry in entries:
            entry["args"] = [call["args"][0] if a == {"node": call["name"]} else a for a in entry.get("args", [])]
        entries.remove(call)


def drop_all_reduce(entries: list[dict[str, Any]]) -> None:
    for target in ("_c10d_functional.wait_tensor.default", "_c10d_functional.all_reduce.default"):
        names = {e["name"] for e in entries if e["target"] == "_c10d_functional.all_reduce.default"}
        if target.endswith("wait_tensor.default"):
            waits = [e for e in entries if e["target"] == target and e["args"][0]["node"] in names]
            for wait in waits:
                wait["target"] = "dropped"
            read_past(entries, "dropped")
        else:
            read_past(entries, target)


def leave_cache(entries: list[dict[str, Any]]) -> None:
    """Attention goes by what was visible before."""
    for call in [entry for entry in entries if entry["target"] == "helix.cache_append.default"]:
        for entry in entries:
            entry["args"] = [call["args"][3] if a == {"node": call["name"]} else a for a in entry.get("args", [])]
        entries.remove(call)


@pytest.mark.parametrize(
    ("change", "code"), [(change_blocks, "ledger"), (drop_all_reduce, "collectives"), (leave_cache, "cache_unwritten")]
)
def test_an_exporter_whose_walk_is_wrong_is_named(folder: Path, change: Any, code: str) -> None:
    edit_walk(folder, change)
    assert set(codes(folder)) == {code}


def test_a_rank_that_takes_itself_for_another_is_named_and_not_loaded(folder: Path) -> None:
    for rank in range(4):
        edit_rank(folder, rank, lambda held, rank=rank: held.update(kvp_rank=torch.tensor((rank + 1) % 4)))
    assert codes(folder) == {"rank_coordinate": {f"rank{r}.safetensors, kvp_rank" for r in range(4)}}
    with pytest.raises(ExportError, match=r"rank0.safetensors: it is the file of the rank at .*'kvp': 1"):
        load_exported(folder)


def test_swapped_and_damaged_weights_are_named(folder: Path) -> None:
    held = [{}, {}]
    for rank in range(2):
        edit_rank(folder, rank, lambda tensors, rank=rank: held[rank].update(tensors))
    for rank in range(2):
        edit_rank(folder, rank, lambda tensors, rank=rank: tensors.update({O_PROJ: held[1 - rank][O_PROJ]}))
    edit_rank(folder, 2, lambda tensors: tensors[O_PROJ].view(torch.int32)[0, 3].bitwise_xor_(4))
    said = [str(fault) for fault in check_export(folder)]
    assert said == [
        *(f"weights: rank{r}.safetensors, {O_PROJ}: it is rank {1 - r}'s" for r in (0, 1)),
        f"weights: rank2.safetensors, {O_PROJ}: {OTHER_VALUES}",
    ]


def test_a_file_that_is_missing_changed_or_none_is_named(folder: Path) -> None:
    (folder / "body_0_segment_1.pt2").unlink()
    (folder / "outer_segment_0.pt2").write_bytes(b"no archive")
    assert codes(folder) == {
        "missing_file": {"body_0_segment_1.pt2"},
        "changed_file": {"outer_segment_0.pt2"},
        "unreadable": {"outer_segment_0.pt2"},
    }
    with pytest.raises(ExportError, match=r"body_0_segment_1.pt2 not there"):
        load_exported(folder)


def test_another_export_s_manifest_or_version_is_named(folder: Path) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(format_manifest({**manifest, "helix_export": "0" * 64}))
    assert set(codes(folder)) == {"other_export"}
    with pytest.raises(ExportError, match=r"another export than manifest\.json"):
        load_exported(folder)
    for change in ({"vocab_size": 9}, {"limits": {"B": [1, 2], "T": [1, 5]}}, {"groups": {}}):
        path.write_text(json.dumps({**manifest, **change}))
        assert codes(folder)["changed_file"] == {"manifest.json"}
        with pytest.raises(ExportError, match=r"manifest\.json: edited after the export"):
            load_exported(folder)
    path.write_text(json.dumps({**manifest, "version": 7}))
    for read in (check_export, load_exported):
        with pytest.raises(ExportError, match="version 7, expected 2"):
            read(folder)
    path.write_text(format_manifest({**manifest, "format": "onnx"}))
    with pytest.raises(ExportError, match="expected pt2 or aoti"):
        load_exported(folder)


def test_a_program_in_the_place_of_another_is_named_and_not_run(folder: Path) -> None:
    """All are of one export, so it is what they take and give that tells; the walk would call the wrong one with what fits or not."""
    shutil.copy(folder / "outer_segment_0.pt2", folder / "outer_segment_1.pt2")
    with pytest.raises(ExportError, match=r"outer_segment_1\.pt2 not as exported"):
        load_exported(folder)
    reseal(folder, "outer_segment_1.pt2")
    assert codes(folder) == {"other_inputs": {"outer_segment_1.pt2"}, "other_outputs": {"outer_segment_1.pt2"}}


def test_a_program_of_another_version_is_named(folder: Path) -> None:
    """As a torch of years to come would write it."""
    path, name = folder / "outer_segment_1.pt2", "models/model.json"
    with zipfile.ZipFile(path) as archive:
        held = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in held.items():
            if member.endswith(name):
                content = json.dumps({**json.loads(content), "schema_version": {"major": 99, "minor": 0}}).encode()
            archive.writestr(member, content)
    reseal(folder, path.name)
    (fault,) = check_export(folder)
    assert fault.code == "unreadable" and "99" in fault.what, fault


@pytest.mark.slow
def test_batches_in_parts(tmp_path: Path) -> None:
    """overlap="hopb": one sequence leaves a part without rows; what can't be read back, or was never run, is refused."""
    model = tiny_model("short", torch.float32)
    compiled = compiled_short(cp=2, overlap="hopb", v_up="after")
    compiled.export(tmp_path / "out", format="pt2")
    assert check_export(tmp_path / "out") == []
    module = load_exported(tmp_path / "out")
    for B in (1, 2, 3):
        module.reset()
        reference, ones = Reference(model), torch.ones(B, 4, dtype=torch.int64)
        for tokens in (4, 1, 3):
            ids = random_ids(model, B, tokens)
            assert deviation(module(ids), reference.step(ids, ones[:, :tokens]), ones[:, :tokens]) <= 1e-5
    with pytest.raises(ExportError, match=r"overlap='hopb' leaves a part .* without rows.*overlap='none'"):
        compiled.export(tmp_path / "other", format="aoti")
    before = compiled_short(cp=2, overlap="hopb", v_up="before")
    with pytest.raises(ExportError, match=r"W_UV before the exchange.*v_up='after'"):
        before.export(tmp_path / "other", format="pt2")
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_layers_that_are_left_out_are_not_there(tmp_path: Path) -> None:
    compiled = compiled_short()
    manifest = compiled.export(tmp_path / "out", format="pt2", layers=[1])
    assert manifest["layers"] == [1] and not [name for name in manifest["weights"] if ".layers.0." in name]
    assert check_export(tmp_path / "out") == []
    for name in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):  # a layer adds to its input what these two return
        for rank in compiled.ranks:
            rank.params[f"model.layers.0.{name}"] = torch.zeros_like(rank.params[f"model.layers.0.{name}"])
    ids = torch.randint(0, 97, (2, 5))
    torch.testing.assert_close(load_exported(tmp_path / "out")(ids), compiled(ids), rtol=1e-5, atol=1e-5)


def test_what_can_not_be_exported_is_refused(exported: Path, tmp_path: Path) -> None:
    compiled = compiled_short()
    with pytest.raises(ExportError, match=r"holds body_0_segment_0.pt2, .*, ...; choose a folder of its own"):
        compiled.export(exported, format="pt2")
    with pytest.raises(ExportError, match=r"--layers \[9\]: the model has layers 0 to 1"):
        compiled.export(tmp_path / "out", format="pt2", layers=[9])
    edited = compiled_short()
    edited.graph.get_submodule("body_0").graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor)[
        -1
    ].target = max
    with pytest.raises(ExportError, match="target <built-in function max> can't be saved"):
        edited.export(tmp_path / "out", format="pt2")
    with pytest.raises(ExportError, match=r"logical= is for plan\.onnx"):
        compiled.export(tmp_path / "out", format="pt2", logical=compiled)
    assert not (tmp_path / "out").exists()


def test_groups_that_do_not_fit_are_refused(exported: Path) -> None:
    with pytest.raises(ExportError, match="expected one for 'world' at least"):
        load_exported(exported, 0, {"kvp": None})
    with pytest.raises(ExportError, match="programs were made for the CPU"):
        load_exported(exported, device="cuda")


@pytest.mark.slow
def test_shapes_alone_are_loaded_on_meta(exported: Path) -> None:
    module = load_exported(exported, device="meta")
    assert module.ranks[0].params[O_PROJ].is_meta
    with pytest.raises(RuntimeFault, match="on the meta device"):
        module(torch.zeros(1, 1, dtype=torch.int64))
