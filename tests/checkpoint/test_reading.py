"""What is read by slices is, bit for bit, what transformers loads whole and cut_param cuts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, fx
from transformers import AutoModelForCausalLM

from helix_compile import CheckpointError, helix_compile
from helix_compile.checkpoint.files import CheckpointFiles
from helix_compile.checkpoint.model import open_checkpoint
from helix_compile.checkpoint.weights import CheckpointWeights
from helix_compile.layout.degrees import HelixLayout
from helix_compile.plan.helix_plan import Cut, ParamShard
from helix_compile.plan.shard import cut_param, shard_boxes
from helix_compile.runtime.claims import weights_digest
from helix_compile.runtime.rank import build_ranks, originals
from tests.support.checkpoints import LAYOUTS, rewrite, set_config, shards_of, to_fp8, write

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("bf16"))


def opened(folder: Path, dtype: torch.dtype | None = None) -> CheckpointWeights:
    return open_checkpoint(folder, dtype, CPU).weights


def loaded(folder: Path, dtype: torch.dtype | None = None) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto").eval()


def same(got: Tensor, expected: Tensor) -> bool:
    return got.dtype == expected.dtype and got.shape == expected.shape and torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16, torch.float64], ids=str)
def test_parts_and_wholes_are_what_transformers_loads(folder: Path, dtype: torch.dtype | None) -> None:
    """Rotary tables and fp32 islands too; in the dtype that is asked."""
    weights, whole = opened(folder, dtype), originals(loaded(folder, dtype))
    assert set(weights) == set(whole)
    assert not [name for name in whole if not same(weights[name], whole[name])]
    assert weights["model.rotary_emb.inv_freq"].device.type == "cpu"
    padded = 0
    for options in LAYOUTS:
        for source, shard, plan, rank in shards_of("short", **options):
            expected = cut_param(whole[source], shard, plan.layout, rank)
            padded += shard.padding(plan.layout, rank) > 0
            got = weights.part(source, shard, plan.layout, rank)
            assert same(got, expected), (options, shard.name, rank)
    assert padded


@pytest.mark.parametrize("block", [(128, 128), (16, 24), (7, 5)], ids=str)
def test_fp8_is_dequantised_as_the_whole_matrix_is(tmp_path: Path, block: tuple[int, int]) -> None:
    """No shard boundary of these sizes is a block boundary; the reference multiplies the whole matrix."""
    expected = to_fp8(write(tmp_path), block)
    weights = opened(tmp_path)
    whole = {name: weights[name] for name in weights}
    for name, tensor in expected.items():
        if ".experts." not in name:
            assert same(whole[name], tensor), name
            continue
        prefix, number, part = (name.removesuffix(".weight").split(".experts.")[0], *name.split(".")[-3:-1])
        if part == "down_proj":
            held = whole[f"{prefix}.experts.down_proj"][int(number)]
        else:
            half = whole[f"{prefix}.experts.gate_up_proj"][int(number)].chunk(2)
            held = half[part == "up_proj"]
        assert same(held, tensor), name
    for options in LAYOUTS[2:]:
        for source, shard, plan, rank in shards_of("short", **options):
            got = weights.part(source, shard, plan.layout, rank)
            assert same(got, cut_param(whole[source], shard, plan.layout, rank)), shard.name


def test_experts_may_be_stored_stacked(folder: Path, tmp_path: Path) -> None:
    whole = originals(loaded(folder))

    def stack(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        kept = {n: t for n, t in tensors.items() if ".experts." not in n}
        return kept | {n: t for n, t in whole.items() if ".experts." in n}

    weights = opened(rewrite(Path(shutil.copytree(folder, tmp_path / "stacked")), stack))
    assert not [name for name in whole if not same(weights[name], whole[name])]


@pytest.mark.parametrize("stored", ["embedding", "head", "equal", "different"])
def test_tied_embeddings(tmp_path: Path, stored: str) -> None:
    """Either name may be the stored one; stored twice with other values they are two tensors, as in transformers."""
    write(tmp_path, "tied")

    def change(tensors: dict[str, Tensor]) -> None:
        embedding = tensors["model.embed_tokens.weight"]
        if stored != "embedding":
            tensors["lm_head.weight"] = embedding + 1 if stored == "different" else embedding.clone()
        if stored == "head":
            del tensors["model.embed_tokens.weight"]

    rewrite(tmp_path, change)
    checkpoint, whole = open_checkpoint(tmp_path, None, CPU), originals(loaded(tmp_path))
    head, embedding = (checkpoint.weights["lm_head.weight"], checkpoint.weights["model.embed_tokens.weight"])
    assert same(head, whole["lm_head.weight"]) and same(embedding, whole["model.embed_tokens.weight"])
    assert (head is embedding) == (stored != "different")
    model = checkpoint.model
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (stored != "different")


def test_layers_for_multi_token_prediction_are_ignored_with_a_note(tmp_path: Path) -> None:
    """Behind the model's own layers, also with FP8 and its scales; and old rotary tables."""
    to_fp8(write(tmp_path), (16, 24))

    def add(tensors: dict[str, Tensor]) -> None:
        name = "model.layers.0.self_attn.o_proj.weight"
        for tail in (name, f"{name}_scale_inv"):
            tensors[tail.replace("layers.0", "layers.2")] = tensors[tail].clone()
        tensors["model.layers.2.enorm.weight"] = torch.ones(7)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)

    quantised, ignored, further = open_checkpoint(rewrite(tmp_path, add), None, CPU).notes
    assert "are FP8 in blocks of 16 x 24 (fp8), by config.json: dequantised into torch.bfloat16" in quantised
    assert "1 tensor(s) are no part of the model: ignored" in ignored
    assert "2 tensor(s) belong to layers of multi-token prediction, behind the model's own: ignored" in further


def test_layers_of_a_deeper_model_are_no_multi_token_prediction(tmp_path: Path) -> None:
    """A configuration that says fewer layers than are stored: those behind them have nothing of MTP's, and are left over."""
    name = "model.layers.3.self_attn.o_proj.weight"

    def add(tensors: dict[str, Tensor]) -> None:
        for layer in (2, 3, 61):
            stored = name.replace(".3.", f".{layer}.")
            tensors[stored] = tensors[name.replace(".3.", ".0.")].clone()
        tensors["model.layers.2.eh_proj.weight"] = torch.ones(7, 14)

    folder = rewrite(write(tmp_path), add)
    set_config(folder, num_nextn_predict_layers=3)
    with pytest.raises(CheckpointError, match="0 missing, 2 left over") as caught:
        open_checkpoint(folder, None, CPU)
    assert f"left over: {name}" in str(caught.value) and "layers.2." not in str(caught.value)

    def mend(tensors: dict[str, Tensor]) -> None:
        del tensors[name], tensors[name.replace(".3.", ".61.")]

    (note,) = open_checkpoint(rewrite(folder, mend), None, CPU).notes
    assert "ignored (1 such layer(s), config.json says 3): model.layers.2." in note


def test_one_tensor_is_shared_by_all_who_hold_it_and_read_again_when_none_does(folder: Path) -> None:
    weights = opened(folder)
    norm = weights["model.norm.weight"]
    assert weights["model.norm.weight"] is norm
    pointer = norm.data_ptr()
    norm.fill_(7)
    assert weights["model.norm.weight"].data_ptr() == pointer
    del norm
    assert not (weights["model.norm.weight"] == 7).any()


@pytest.mark.parametrize("index", [None, (3, 2, 5, 0, 1, 9, 8, 7)], ids=["view", "rows"])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_boxes_are_the_elements_that_cut_param_takes(index: tuple[int, ...] | None, parts: int) -> None:
    """A gather of rows, which only odd attention heads need, and a window, each with padding."""
    view, window = ((4, 2, 6), None) if index else ((2, 5, 6), (1, 1, 3))
    total = view[0]
    local = (-(-total // parts), *(view[1:] if index else (3, 6)))
    shard = ParamShard("w", "w", (10, 6), view, (Cut(0, "kvp", total),), local, "", window, index)
    whole = torch.arange(1.0, 61).view(10, 6)
    layout = HelixLayout(kvp=parts, tpa=1, tpf=parts, ep=1)
    for rank in range(parts):
        boxes = shard_boxes(shard, layout, rank)
        got = torch.zeros(boxes.local_shape)
        for box in boxes.boxes:
            target = got[tuple(slice(*r) for r in box.local)]
            source = whole[tuple(slice(*r) for r in box.source)]
            target.copy_(source.view(target.shape))
        expected = cut_param(whole, shard, layout, rank)
        assert torch.equal(got.view(shard.shape), expected)
        assert boxes.padded == bool((expected == 0).any())


def with_a_layer_to_ignore(folder: Path) -> Path:
    """A further file of the index, with a tensor that only multi-token prediction needs."""
    name, file = "model.layers.61.embed_tokens.weight", "mtp.safetensors"
    save_file({name: torch.zeros(97, 7)}, folder / file)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][name] = file
    path.write_text(json.dumps(index))
    return folder


@pytest.fixture
def slices(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Bytes of every slice that is read."""
    read: list[int] = []
    plain = CheckpointFiles.slice

    def counted(self: CheckpointFiles, name: str, ranges: Any) -> Tensor:
        part = plain(self, name, ranges)
        read.append(part.numel() * part.element_size())
        return part

    monkeypatch.setattr(CheckpointFiles, "slice", counted)
    yield read


def test_compiled_from_a_folder_is_compiled_from_the_model(
    folder: Path, slices: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Plan, lowered graph, parameters and logits, bit for bit; all ranks together read each byte once."""
    folder = with_a_layer_to_ignore(Path(shutil.copytree(folder, tmp_path / "copy")))
    totals: list[int] = []
    monkeypatch.setattr("helix_compile.checkpoint.weights.tqdm", _bar_that_notes(totals))
    compiled = helix_compile(str(folder), cp=4)
    stored = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    assert totals == [sum(slices), sum(slices)] and 0.9 * stored < sum(slices) < stored
    model = loaded(folder)
    reference = helix_compile(model, cp=4)
    ignored = [n for n in compiled.plan.notes if "1 tensor(s) belong to layers of multi-token prediction" in n]
    others = tuple(n for n in compiled.plan.notes if n not in ignored)
    assert len(ignored) == 1
    assert replace(compiled.plan, notes=others) == reference.plan
    assert _operations(compiled.graph) == _operations(reference.graph)
    for mine, theirs in zip(compiled.ranks, reference.ranks, strict=True):
        assert mine.params.keys() == theirs.params.keys()
        assert not [n for n in theirs.params if not same(mine.params[n], theirs.params[n])]
    ids = torch.arange(24).view(2, 12)
    assert torch.equal(compiled(ids), reference(ids))
    for module in (compiled, reference):
        module.reset()
    assert torch.equal(compiled.run_stage("ffn", ids), reference.run_stage("ffn", ids))

    slices.clear()
    world: Any = SimpleNamespace(ranks=[2])
    (one,) = build_ranks(compiled.plan, compiled.graph, _fresh(compiled.facts, folder), world)
    held = sum(t.numel() * t.element_size() for t in one.params.values())
    assert sum(slices) < held < 0.5 * stored
    assert not [n for n, t in compiled.ranks[2].params.items() if not same(one.params[n], t)]


def _operations(stage: fx.GraphModule) -> list[Any]:
    """Every node but its name: fx numbers them anew where an earlier stage held others."""
    graphs = [m.graph for m in stage.modules() if isinstance(m, fx.GraphModule)]
    return [
        (n.op, n.meta.get("input") or str(n.target), str(n.kwargs.get("device")), str(n.meta.get("layout")))
        for graph in graphs
        for n in graph.nodes
        if n.op != "output"
    ]


def _fresh(facts: Any, folder: Path) -> Any:
    return type(facts)(**{**vars(facts), "originals": opened(folder)})


def _bar_that_notes(totals: list[int]) -> Any:
    class Bar:
        def __init__(self, total: int, **_: Any):
            self.counted = 0
            totals.append(total)

        def __enter__(self) -> Bar:
            return self

        def update(self, count: int) -> None:
            self.counted += count

        def __exit__(self, *_: object) -> None:
            totals.append(self.counted)

    return Bar


def test_ranks_tell_two_checkpoints_apart_by_little(folder: Path, tmp_path: Path, slices: list[int]) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.mlp.experts.5.up_proj.weight"][20, 3] += 1

    one, again = (opened(folder).fingerprint() for _ in range(2))
    read = sum(slices) / 2
    other = opened(rewrite(Path(shutil.copytree(folder, tmp_path / "copy")), change)).fingerprint()
    assert one == again and weights_digest(opened(folder)) != weights_digest(opened(tmp_path / "copy"))
    assert read < 0.05 * sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    assert len(set(one.splitlines()) ^ set(other.splitlines())) == 2


def test_on_meta_nothing_is_read(folder: Path, slices: list[int]) -> None:
    weights = open_checkpoint(folder, None, torch.device("meta")).weights
    assert weights["model.norm.weight"].device.type == "meta" and not slices


def test_a_configuration_without_a_dtype_takes_the_stored_one(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    set_config(copy, dtype=None)
    assert opened(copy)["lm_head.weight"].dtype == torch.bfloat16
