"""--collectives ort-nccl: onnxruntime's own ops where they say the same, by what its sources say of them; else refused before a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from helix_compile.errors import ExportError
from helix_compile.export.formats import check_export
from helix_compile.export.onnx_graph import nodes_in_order
from helix_compile.export.onnx_nccl import map_to_nccl
from helix_compile.layout.degrees import HelixLayout
from tests.export.test_onnx_check import codes, edit
from tests.export.test_onnx_ranks import TOLERANCE, compiled_tiny, run
from tests.support.models import tiny_model
from tests.support.onnx_ranks import Exchange, OnnxRanks

NCCL = "com.microsoft"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, dict[str, Any]]:
    folder, compiled = tmp_path_factory.mktemp("nccl") / "out", compiled_tiny()
    return compiled, folder, compiled.export(folder, collectives="ort-nccl")


def nccl_rank(path: Path, rank: int, exchange: Exchange) -> Any:
    """A rank whose collectives are those of onnxruntime's kernels: no groups, sums alone, chunk i of the flat tensor goes to rank i."""
    (everyone,) = exchange._groups["world"]

    class AllReduce(OpRun):
        op_domain = NCCL

        def _run(self, x: Any) -> tuple[Any]:
            return (np.sum(np.stack(exchange.meet(rank, "world", len(everyone), x)), axis=0, dtype=x.dtype),)

    class AllGather(OpRun):
        op_domain = NCCL

        def _run(self, x: Any, axis: int, group_size: int) -> tuple[Any]:
            return (np.concatenate(exchange.meet(rank, "world", group_size, x), axis=axis),)

    class AllToAll(OpRun):
        op_domain = NCCL

        def _run(self, x: Any, group_size: int) -> tuple[Any]:
            brought = exchange.meet(rank, "world", group_size, x.reshape(group_size, -1))
            return (np.concatenate([part[rank] for part in brought]).reshape(x.shape),)

    class Rank(ReferenceEvaluator):
        def __init__(self, proto: Any, **keywords: Any):
            super().__init__(proto, **{**keywords, "new_ops": [AllReduce, AllGather, AllToAll]})

    model = Rank(onnx.load(path))
    return lambda feeds: model.run(None, feeds)


def test_four_ranks_with_onnxruntimes_collectives_are_the_model(exported: Any) -> None:
    compiled, folder, manifest = exported
    assert run(tiny_model("plain", torch.float32), compiled, OnnxRanks(folder, manifest, nccl_rank)) <= TOLERANCE


def test_every_node_is_mapped_and_says_what_it_must(exported: Any) -> None:
    """Attributes are those of onnxruntime's schemas, none is left to a default; nothing of helix.collective is left, imports neither."""
    _, folder, manifest = exported
    model = onnx.load(folder / "rank3.onnx", load_external_data=False)
    onnx.checker.check_model(str(folder / "rank3.onnx"))
    found = [n for n in nodes_in_order(model) if n.domain == NCCL]
    said = {n.op_type: {a.name: helper.get_attribute_value(a) for a in n.attribute} for n in found}
    assert said == {"AllReduce": {}, "AllToAll": {"group_size": 4}}
    assert len(found) == len(manifest["collectives"]) == 4 * 3 and manifest["collectives_by"] == "ort-nccl"
    text = model.SerializeToString()
    assert b"helix.collective" not in text and {o.domain for o in model.opset_import} >= {NCCL, "helix"}
    assert any("never run here" in needed for needed in manifest["needs"])
    assert check_export(folder) == []


def test_a_gather_says_its_dim(tmp_path: Path) -> None:
    """Left out it is 1 in the schema and 0 in the kernel."""
    manifest = compiled_tiny(q_proj="gather", head="shard", pad_heads=True).export(
        tmp_path / "out", collectives="ort-nccl", layers=[3]
    )
    model = onnx.load(tmp_path / "out" / "rank0.onnx", load_external_data=False)
    gathers = [n for n in nodes_in_order(model) if n.op_type == "AllGather"]
    assert gathers and all({a.name: a.i for a in n.attribute} == {"group_size": 4, "axis": 0} for n in gathers)
    assert ["AllGather", "world", 4, ""] in manifest["collectives"] and check_export(tmp_path / "out") == []


def test_verify_finds_a_collective_of_another_size_or_of_ours(exported: Any, tmp_path: Path) -> None:
    import shutil

    _, whole, _ = exported

    def halves(model: Any, rank: int) -> None:
        node = next(n for f in model.functions for n in f.node if n.op_type == "AllToAll")
        next(a for a in node.attribute if a.name == "group_size").i = 2

    def ours(model: Any, rank: int) -> None:
        node = next(n for f in model.functions for n in f.node if n.op_type == "AllReduce")
        node.domain = "helix.collective"
        for holder in (model, *model.functions):  # as a file that a checker of ONNX takes
            holder.opset_import.append(helper.make_opsetid("helix.collective", 1))

    for number, fault in enumerate((halves, ours)):
        folder = Path(shutil.copytree(whole, tmp_path / str(number)))
        edit(folder, range(4), fault)
        assert "collectives" in codes(folder)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "groups": (
        {"cp": 2, "tpa": 2},
        r"AllToAllSingle over kvp, in groups \[\[0, 1\], \[2, 3\]\]: theirs is over all 4 ranks",
    ),
    "reduce_scatter": ({"merge": "ag_rs"}, "no such op for ReduceScatter over kvp"),
    "one rank": ({"cp": 1}, "has no effect: this export of 1 rank"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_they_do_not_say_is_refused_before_a_file_is_written(case: str, tmp_path: Path) -> None:
    options, message = REFUSED[case]
    with pytest.raises(ExportError, match=message):
        compiled_tiny(**options).export(tmp_path / "out", collectives="ort-nccl")
    assert not (tmp_path / "out").exists()


def test_bfloat16_and_other_reductions_are_refused_and_the_model_is_as_it_was(exported: Any) -> None:
    compiled, _, _ = exported
    layout: HelixLayout = compiled.plan.layout
    node = helper.make_node(
        "AllReduce", ["x"], ["y"], domain="helix.collective", axis="world", group_size=4, reduce_op="max"
    )
    model = helper.make_model(helper.make_graph([node], "g", [], []))
    before = model.SerializeToString()
    with pytest.raises(ExportError, match=r"AllReduce \(max\) over world: theirs sums; bfloat16: they take float16"):
        map_to_nccl(model, layout, "bfloat16")
    assert model.SerializeToString() == before


def test_names_that_are_unknown_or_have_no_effect(exported: Any, tmp_path: Path) -> None:
    compiled, _, _ = exported
    with pytest.raises(ExportError, match="collectives='nccl' is unknown; one of helix, ort-nccl"):
        compiled.export(tmp_path / "out", collectives="nccl")
    with pytest.raises(ExportError, match="has no effect in format='pt2'"):
        compiled.export(tmp_path / "out", "pt2", collectives="ort-nccl")
