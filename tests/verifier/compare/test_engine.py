"""A run against another engine's attention outputs: the unmodified model's, by forward hooks; one tampered is found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import DynamicCache

from helix_compile import HelixError, compare, helix_compile
from tests.distributed.steps import OPTIONS, prompts
from tests.support.models import fresh_model, tiny_model
from tests.support.run_faults import dump_run, nothing


def attention_outputs(model: Any) -> list[dict[str, Tensor]]:
    """What the attention modules of the unmodified model return in the prompt and the step of dump_run()."""
    ids, mask = prompts()
    seen: list[dict[str, Tensor]] = []
    for index, layer in enumerate(model.model.layers):

        def keep(module: Any, inputs: Any, output: Any, name: str = f"layer_{index}.attn_out") -> None:
            seen[-1][name] = output[0].detach().clone()

        layer.self_attn.register_forward_hook(keep)
    cache = DynamicCache(config=model.config)
    whole = torch.ones(3, 14, dtype=torch.int64)
    whole[:, :13] = mask
    positions = (whole.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        for columns, tokens in ((slice(0, 13), ids), (slice(13, 14), ids[:, :1])):
            seen.append({})
            model(
                input_ids=tokens,
                attention_mask=whole[:, : columns.stop],
                position_ids=positions[:, columns],
                past_key_values=cache,
            )
    return seen


@pytest.fixture(scope="module")
def outputs() -> list[dict[str, Tensor]]:
    return attention_outputs(fresh_model("short_biased", torch.float32))  # hooks would be part of what is captured


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "dump"
    dump_run(helix_compile(tiny_model("short_biased", torch.float32), cp=2, tpa=2, **OPTIONS), folder, nothing)
    return folder


def written(folder: Path, steps: list[dict[str, Tensor]]) -> Path:
    folder.mkdir()
    for number, tensors in enumerate(steps):
        save_file(tensors, folder / f"attention_step_{number}.safetensors")
    return folder


def test_the_unmodified_model_is_equal(dump: Path, outputs: list[dict[str, Tensor]], tmp_path: Path) -> None:
    comparison = compare(dump, written(tmp_path / "engine", outputs))
    assert comparison.equal and comparison.found.compared == 4, str(comparison)
    assert {g.role for g in comparison.found.growth} == {"attn_out"}
    assert compare(tmp_path / "engine", dump).equal


def test_other_shapes_of_the_same(dump: Path, outputs: list[dict[str, Tensor]], tmp_path: Path) -> None:
    """Flat rows, and rows of tokens alone, as engines with packed batches have."""
    mask = prompts()[1].bool()
    flat = [{name: x.flatten(0, 1) for name, x in step.items()} for step in outputs]
    assert compare(dump, written(tmp_path / "flat", flat)).equal
    packed = [{name: x[mask] for name, x in outputs[0].items()}, outputs[1]]
    assert compare(dump, written(tmp_path / "packed", packed)).equal
    rolled = [{name: x.roll(1, 0) for name, x in packed[0].items()}, outputs[1]]
    assert not compare(dump, written(tmp_path / "rolled", rolled)).equal
    short = [{name: x[1:] for name, x in packed[0].items()}, outputs[1]]
    with pytest.raises(HelixError, match=r"layer_0.attn_out of B is \[18, 72\], of A \[3, 13, 72\]: expected that"):
        compare(dump, written(tmp_path / "short", short))


def test_a_tampered_one_is_found(dump: Path, outputs: list[dict[str, Tensor]], tmp_path: Path) -> None:
    wrong = [outputs[0], {**outputs[1], "layer_1.attn_out": outputs[1]["layer_1.attn_out"].flip(0)}]
    comparison = compare(dump, written(tmp_path / "wrong", wrong))
    first = comparison.found.first
    assert not comparison.equal and first is not None
    assert (first.step, first.place, first.role) == (1, "layer_1", "attn_out")
    assert [g.off > g.tolerance for g in comparison.found.growth] == [False, False, False, True]


def test_two_engines(outputs: list[dict[str, Tensor]], tmp_path: Path) -> None:
    one, two = (written(tmp_path / name, outputs) for name in ("one", "two"))
    assert compare(one, two).equal
    wrong = written(tmp_path / "three", [{n: x + (n[6] == "1") for n, x in step.items()} for step in outputs])
    first = compare(one, wrong).found.first
    assert first is not None and (first.step, first.place) == (0, "layer_1")


def test_refusals(dump: Path, outputs: list[dict[str, Tensor]], tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    save_file({"model.norm.weight": torch.ones(2)}, other / "model.safetensors")
    with pytest.raises(HelixError, match=r"other: step 0 has no tensor named layer_\{i\}\.attn_out"):
        compare(dump, other)
    twice = tmp_path / "twice"
    twice.mkdir()
    for name in ("a", "b"):
        save_file(outputs[0], twice / f"{name}.safetensors")
    with pytest.raises(HelixError, match=r"b\.safetensors: layer_0\.attn_out is in step 0 twice"):
        compare(dump, twice)
    more = written(tmp_path / "more", [{**outputs[0], "layer_0.hidden": torch.ones(2)}])
    comparison = compare(dump, more)
    assert comparison.equal and "layer_0.hidden is not compared" in str(comparison)
    assert "A has steps [0, 1], B [0]" in str(comparison)
