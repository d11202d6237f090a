"""helix-compile export and verify of what it wrote, a folder of save() too; some layers alone."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from typer.testing import CliRunner

from helix_compile import HelixError, HelixModule
from helix_compile.cli.commands import app
from helix_compile.errors import ExportError
from helix_compile.export.formats import check_export
from tests.export.test_onnx_ranks import compiled_tiny
from tests.support.driver import deviation, random_ids
from tests.support.models import tiny_model
from tests.support.onnx_ranks import OnnxRanks
from tests.support.ort_ranks import ort_rank

runner = CliRunner()
SIZES = ("--max-batch-size", "2", "--max-seq-len", "64", "--tokens-per-block", "4")


def run(*arguments: str) -> Any:
    return runner.invoke(app, list(arguments))


def test_a_model_is_exported_and_read_back(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    result = run("export", "tiny", "--cp", "4", "--out", out, *SIZES)
    assert result.exit_code == 0, result.output
    assert re.search(r"onnx, 4 ranks, 4 layers, [\d,]+ bytes", result.stdout)
    assert "helix.collective" in result.stdout
    good = run("verify", out)
    assert (good.exit_code, "as exported" in good.stdout) == (0, True), good.output
    (tmp_path / "out" / "rank1.onnx").unlink()
    bad = run("verify", out, "--json")
    assert bad.exit_code == 1
    assert json.loads(bad.stdout)["faults"][0] == {
        "code": "missing_file",
        "where": "rank1.onnx",
        "what": "the manifest has it, the folder has not",
    }


def test_a_saved_module_is_exported_as_it_is(tmp_path: Path) -> None:
    compiled = compiled_tiny()
    compiled.save(tmp_path / "saved")
    result = run("export", str(tmp_path / "saved"), "--out", str(tmp_path / "out"), "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["plan"] == json.loads(compiled.plan.to_json())
    assert check_export(tmp_path / "out") == []
    packed = run(
        "export", str(tmp_path / "saved"), "--format", "pt2", "--layers", "0", "--out", str(tmp_path / "packed")
    )
    assert packed.exit_code == 0 and "programs, called as walk.json says" in packed.stdout, packed.output
    good = run("verify", str(tmp_path / "packed"))
    assert (good.exit_code, "as exported" in good.stdout) == (0, True), good.output
    refused = run("export", str(tmp_path / "saved"), "--cp", "4", "--out", str(tmp_path / "other"))
    assert isinstance(refused.exception, HelixError) and "leave --cp" in str(refused.exception)


def test_layers_that_are_left_out_are_not_there(tmp_path: Path) -> None:
    """Of layers 0 and 3 the models hold the weights, caches and collectives; what is between is as if it added nothing."""
    compiled = compiled_tiny()
    manifest = compiled.export(tmp_path / "out", layers=[0, 3])
    assert manifest["layers"] == [0, 3]
    assert {name.split(".")[2] for name in manifest["weights"] if ".layers." in name} == {"0", "3"}
    assert [i["name"] for i in manifest["inputs"]][3:] == ["cache_0", "cache_3"]
    assert check_export(tmp_path / "out") == []
    for layer in (1, 2):  # a layer adds to its input what these two return
        for name in (
            "self_attn.o_proj.weight",
            "mlp.down_proj.weight",
            "mlp.experts.down_proj",
            "mlp.shared_experts.down_proj.weight",
        ):
            for rank in compiled.ranks:
                full = f"model.layers.{layer}.{name}"
                if full in rank.params:
                    rank.params[full] = torch.zeros_like(rank.params[full])
    ids = torch.randint(0, 97, (2, 5))
    got = OnnxRanks(tmp_path / "out", manifest).step(ids, torch.ones(2, 5, dtype=torch.int64))[0]
    torch.testing.assert_close(torch.tensor(got), compiled(ids), rtol=1e-5, atol=1e-5)


def test_sizes_that_are_fixed_are_numbers(tmp_path: Path) -> None:
    """In onnxruntime, one step a model: what was asked for is the model, another T is no input."""
    compiled, model = compiled_tiny(), tiny_model("plain", torch.float32)
    ids, ones = random_ids(model, 2, 3), torch.ones(2, 3, dtype=torch.int64)
    manifest = compiled.export(tmp_path / "out", batch=2, tokens=3)
    assert [i["shape"] for i in manifest["inputs"][:2]] == [[2, 3], [2, 3]]
    assert manifest["outputs"][0]["shape"] == [2, 3, 97]
    assert check_export(tmp_path / "out") == []
    ranks = OnnxRanks(tmp_path / "out", manifest, ort_rank)
    with torch.no_grad():
        expected = model(ids).logits
    assert deviation(torch.tensor(ranks.step(ids, ones)[0]), expected, ones) <= 1e-5
    with pytest.raises(Exception, match="Got: 1 Expected: 3"):
        ranks.step(ids[:, :1], ones[:, :1])
    for asked, said in (({"batch": 5}, "batch=5: .* 1 to 4"), ({"tokens": 0}, "tokens=0: .* 1 to 64")):
        with pytest.raises(ExportError, match=said):
            compiled.export(tmp_path / "other", **asked)
    with pytest.raises(ExportError, match="programs take any B and T"):
        compiled.export(tmp_path / "other", "pt2", tokens=1)
    assert not (tmp_path / "other").exists()


def test_a_place_that_is_none_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    """A file in the way; and what a killed export left behind is nobody's."""
    (tmp_path / "file").write_text("")
    compiled = compiled_tiny()
    for format in ("onnx", "pt2"):
        with pytest.raises(HelixError, match=r"export: .*file is not a folder"):
            compiled.export(tmp_path / "file", format)
    left = tmp_path / "out" / ".unfinished-export"
    left.mkdir(parents=True)
    (left / "walk.json").write_text("half of")
    compiled.export(tmp_path / "out", "pt2", layers=[0])
    assert check_export(tmp_path / "out") == [] and not left.exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("export", "tiny", "--cp", "4", "--format", "onx", "--out", "OUT"), "format='onx' is unknown"),
        (("export", "tiny", "--cp", "4", "--layers", "0;3", "--out", "OUT"), "--layers '0;3'"),
        (("verify", "EXPORT", "--dtype", "float64"), "leave --dtype"),
    ],
)
def test_wrong_use(tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "manifest.json").write_text("{}")
    places = {"OUT": str(tmp_path / "out"), "EXPORT": str(tmp_path / "export")}
    result = run(*(places.get(a, a) for a in arguments))
    assert isinstance(result.exception, HelixError) and said in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_a_layer_that_is_not_there_and_leaves_are_refused(tmp_path: Path) -> None:
    compiled: HelixModule = compiled_tiny()
    with pytest.raises(ExportError, match=r"--layers \[9\]: the model has layers 0 to 3"):
        compiled.export(tmp_path / "out", layers=[1, 9])
    with pytest.raises(ExportError, match="not the manifest of an export"):
        check_export(tmp_path)
    assert not (tmp_path / "out").exists() and onnx.__version__


def test_kernels_of_this_machine_are_refused_with_what_works(tmp_path: Path) -> None:
    compiled = compiled_tiny(lower="cpp")
    for format in ("onnx", "pt2", "aoti"):
        with pytest.raises(ExportError, match=r"helix_cpp.mla_decode.*compile the model with lower='reference'"):
            compiled.export(tmp_path / "out", format=format)
    assert not (tmp_path / "out").exists()
