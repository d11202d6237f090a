"""plan.onnx: the step of one device in stock onnxruntime, and specs that say how the ranks share it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from helix_compile import helix_compile
from helix_compile.errors import ExportError
from helix_compile.export.formats import check_export
from helix_compile.export.manifest import described_file
from helix_compile.export.onnx_shardings import check_shardings, parts_of, spec_of, specs_of
from helix_compile.layout.degrees import HelixLayout
from tests.export.test_onnx_check import edit_manifest
from tests.export.test_onnx_ranks import TOLERANCE, compiled_tiny
from tests.support.driver import Reference, deviation, left_padded, random_ids
from tests.support.models import tiny_model


@pytest.fixture(scope="module", params=[{"cp": 4}, {"cp": 2, "tpa": 2, "ep": 2}], ids=["cp4", "cp2-tpa2-ep2"])
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Path, dict[str, Any]]:
    """A module, its export with plan.onnx, and the manifest."""
    folder = tmp_path_factory.mktemp("plan") / "out"
    compiled, logical = compiled_tiny(**request.param), compiled_tiny(cp=1)
    return compiled, folder, compiled.export(folder, logical=logical)


class Device:
    """plan.onnx in onnxruntime, as it is."""

    def __init__(self, folder: Path, stated: dict[str, Any]):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(
            str(folder / stated["file"]), options, providers=["CPUExecutionProvider"]
        )
        inputs = {i["name"]: i for i in stated["inputs"]}
        self.pages = inputs["page_table"]["shape"][1]
        self.caches = {n: np.zeros(i["shape"], i["dtype"]) for n, i in inputs.items() if n.startswith("cache_")}
        self.lengths: Any = 0

    def step(self, ids: Any, mask: Any) -> torch.Tensor:
        ids, mask = np.asarray(ids), np.asarray(mask)
        positions = np.where(mask > 0, np.cumsum(mask, axis=1) - 1 + np.reshape(self.lengths, (-1, 1)), -1)
        table = np.arange(len(ids) * self.pages).reshape(len(ids), self.pages)
        feeds = {"input_ids": ids, "positions": positions, "page_table": table, **self.caches}
        logits, *caches = self.session.run(None, feeds)
        self.caches = dict(zip(self.caches, caches, strict=True))
        self.lengths = self.lengths + mask.sum(axis=1)
        return torch.tensor(logits)


def test_it_is_the_model_and_its_cut_cache_is_the_ranks(exported: tuple[Any, Path, dict[str, Any]]) -> None:
    """Stock onnxruntime against the unmodified model; its caches, cut as the specs say, against those of the ranks."""
    compiled, folder, manifest = exported
    model, device, mask = (
        tiny_model("plain", torch.float32),
        Device(folder, manifest["plan_model"]),
        left_padded([5, 2, 9, 1]),
    )
    compiled.reset()
    reference, worst = Reference(model), 0.0
    for tokens in (0, 1, 3, 1):
        mask = torch.ones(4, tokens, dtype=torch.int64) if tokens else mask
        ids = random_ids(model, *mask.shape)
        compiled(ids, mask)
        worst = max(worst, deviation(device.step(ids, mask), reference.step(ids, mask), mask))
    assert worst <= TOLERANCE
    specs = {
        spec.tensor_name: spec for _, _, spec in specs_of(onnx.load(folder / "plan.onnx", load_external_data=False))
    }
    for site, name in enumerate(device.caches):
        whole = device.caches[name]
        for rank, part in parts_of(specs[name], list(whole.shape)):
            own = torch.tensor(whole[part]).reshape(4, -1, whole.shape[-1])  # slots of each sequence, in order
            held = compiled.ranks[rank].cache[site].reshape(4, -1, whole.shape[-1])[:, : own.shape[1]]
            torch.testing.assert_close(own, held, rtol=1e-4, atol=1e-5)


def test_its_specs_give_each_rank_its_weights_bit_for_bit(exported: tuple[Any, Path, dict[str, Any]]) -> None:
    """Without our reader: what is cut is cut by the spec, what has none is whole on every rank."""
    compiled, folder, manifest = exported
    model = onnx.load(folder / "plan.onnx")
    onnx.checker.check_model(model, full_check=True)
    specs = {spec.tensor_name: spec for _, _, spec in specs_of(model)}
    cut = 0
    for tensor in model.graph.initializer:
        if tensor.name not in manifest["weights"]:
            continue
        whole = onnx.numpy_helper.to_array(tensor)
        parts = dict(parts_of(specs[tensor.name], list(whole.shape))) if tensor.name in specs else {}
        for rank in compiled.ranks:
            part = whole[parts[rank.rank]] if parts else whole
            assert torch.equal(torch.tensor(part), rank.params[tensor.name]), (tensor.name, rank.rank)
        cut += bool(parts)
    assert cut >= 4 * len(compiled.ranks[0].cache)  # o_proj, W_UV, and what each FFN is cut in
    said = manifest["plan_model"]["not_in_shardings"]
    assert "body_0.partial_o: PS over kvp" in said and any("P(sum) over world" in line for line in said)
    assert check_export(folder) == []


def first_spec(model: Any) -> Any:
    return next(specs_of(model))[2]


def sharded(model: Any) -> Any:
    """A spec of a weight."""
    return next(spec for _, _, spec in specs_of(model) if "o_proj" in spec.tensor_name)


def unknown_configuration(model: Any) -> None:
    next(n for n in model.graph.node if n.device_configurations).device_configurations[0].configuration_id = "other"


def unknown_tensor(model: Any) -> None:
    first_spec(model).tensor_name = "nowhere"


def axis_beyond(model: Any) -> None:
    sharded(model).sharded_dim[0].axis = 7


def axis_twice(model: Any) -> None:
    sharded(model).sharded_dim.add(axis=sharded(model).sharded_dim[0].axis).simple_sharding.add(num_shards=1)


def device_beyond(model: Any) -> None:
    sharded(model).device[0] = 9


def three_parts(model: Any) -> None:
    sharded(model).sharded_dim[0].simple_sharding[0].num_shards = 3


def uneven(model: Any) -> None:
    """336 columns in 5 parts on 5 devices, of which the model then has 5."""
    spec = sharded(model)
    spec.sharded_dim[0].simple_sharding[0].num_shards = 5
    spec.device[:] = range(5)
    model.configuration[0].num_devices = 5


def no_group(model: Any) -> None:
    sharded(model).device[0] = -5


FAULTS = {
    unknown_configuration: "is not in the model",
    unknown_tensor: "neither takes nor makes this tensor",
    axis_beyond: "axis 7 of a tensor of 2 dims",
    axis_twice: "cut twice",
    device_beyond: r"devices \[9\] of 4",
    three_parts: "3 parts on 4 devices",
    uneven: "in 5 equal parts",
    no_group: "stands for a group that is not there",
}


@pytest.mark.parametrize("change", FAULTS, ids=lambda change: change.__name__)
def test_what_onnx_checker_lets_pass_is_found(
    exported: tuple[Any, Path, dict[str, Any]], change: Callable[[Any], None], tmp_path: Path
) -> None:
    _, folder, _ = exported
    model = onnx.load(folder / "plan.onnx")
    assert check_shardings(model) == []
    change(model)
    onnx.checker.check_model(model)  # sees nothing
    said = "\n".join(f"{where}: {what}" for where, what in check_shardings(model))
    assert re.search(FAULTS[change], said), said


def test_a_spec_that_can_be_and_is_wrong_is_named(exported: tuple[Any, Path, dict[str, Any]], tmp_path: Path) -> None:
    """Ranks 0 and 1 exchanged in every spec of one weight: the weights of the ranks say otherwise."""
    _, folder, _ = exported
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    model = onnx.load(copy / "plan.onnx", load_external_data=False)
    name = sharded(model).tensor_name
    for _, _, spec in specs_of(model):
        if spec.tensor_name == name:
            spec.device[0], spec.device[1] = spec.device[1], spec.device[0]
    onnx.save(model, copy / "plan.onnx")
    edit_manifest(copy, lambda m: m["files"].update({"plan.onnx": described_file(copy / "plan.onnx")}))
    assert [str(f) for f in check_export(copy)] == [
        f"sharding: plan.onnx, {name}: what its spec gives ranks [1, 0] is not what they hold"
    ]


def test_a_part_on_several_devices_is_a_group() -> None:
    layout = HelixLayout(kvp=2, tpa=2, ep=1, tpf=4)
    spec = spec_of("x", [(1, "kvp")], layout)
    assert list(spec.device) == [-1, -2]
    assert dict(parts_of(spec, [3, 8])) == {
        rank: (slice(0, 3), slice(4 * (rank % 2), 4 * (rank % 2) + 4)) for rank in range(4)
    }


def test_another_model_is_no_plan_of_this_one(tmp_path: Path) -> None:
    other = helix_compile(tiny_model("short", torch.float32), cp=1, max_batch_size=4, max_seq_len=64)
    with pytest.raises(ExportError, match="the same model at cp=1"):
        compiled_tiny().export(tmp_path / "out", logical=other)
    with pytest.raises(ExportError, match="at 4 ranks"):
        compiled_tiny().export(tmp_path / "out", logical=compiled_tiny())
    assert not (tmp_path / "out").exists()
