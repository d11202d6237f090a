"""Two runs side by side in the virtual world: equal ones, three faults of one rank, other layouts, damaged dumps."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helix_compile import HelixError, HelixModule, capture, compare, helix_compile
from helix_compile.layout.degrees import HelixLayout, HelixMesh
from helix_compile.runtime.values import ValueEntry, sampled_places
from helix_compile.verifier.compare.dumps import Value
from helix_compile.verifier.compare.whole import wholes
from tests.distributed.steps import OPTIONS, prompts
from tests.support.models import fresh_model
from tests.support.run_faults import FAULTS, FAULTY, check_found, dump_run, nothing, swapped_shards, wrong_norm

LAYOUTS: dict[str, dict[str, Any]] = {
    "plain": {"cp": 4},
    "alone": {"cp": 1},
    "mixed": {"cp": 2, "tpa": 2, "ep": 2, "merge": "ag_rs", "q_proj": "gather"},
}


@pytest.fixture(scope="module")
def dumps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one dump a case, of the same tokens."""
    root = tmp_path_factory.mktemp("dumps")
    model = fresh_model("short", torch.float32)
    captured = capture(model)  # once: a fixture of a module comes before the one that remembers captures
    for layout, degrees in LAYOUTS.items():
        compiled = helix_compile(captured, **degrees, **OPTIONS)
        dump_run(compiled, root / layout, nothing)
        if layout == "plain":
            for name in FAULTS.keys() - {"plain"}:
                dump_run(compiled, root / name, FAULTS[name])
            compiled.save(root / "saved")
        if layout == "mixed":
            dump_run(compiled, root / "mixed_norm", wrong_norm)
            dump_run(compiled, root / "mixed_swapped", swapped_shards)
    return root


@pytest.mark.parametrize("name", FAULTS)
def test_first_wrong_node_and_rank(dumps: Path, name: str) -> None:
    comparison = compare(dumps / "plain", dumps / name)
    assert comparison.found.by_rank and comparison.equal == (name in ("plain", "again"))
    check_found(name, comparison.found)
    if name != "plain":
        assert comparison.equal or "first value that differs" in str(comparison)


def test_the_run_that_is_wrong_is_named(dumps: Path) -> None:
    """Whichever side it is on: its ranks contradict each other."""
    found = compare(dumps / "norm", dumps / "plain").found
    assert [(c.run, c.ranks) for c in found.contradictions] == [("A", (FAULTY,))]
    twice = compare(dumps / "norm", dumps / "norm")
    assert not twice.equal and twice.found.first is None  # equal runs, and both are wrong
    assert {c.run for c in twice.found.contradictions} == {"A", "B"}


@pytest.mark.parametrize("name", ["alone", "mixed"])
def test_other_layouts_are_equal(dumps: Path, name: str) -> None:
    """Joined, summed and renamed values: another order of summing, no more."""
    comparison = compare(dumps / "plain", dumps / name)
    found = comparison.found
    assert comparison.equal and not found.by_rank, str(comparison)
    assert found.compared > 2 * 150
    seen = {(g.place, g.role) for g in found.growth}
    layers = {(f"layer_{i}", role) for i in (0, 1) for role in ("attn_out", "output")}
    assert seen == layers | {("outer", "logits")}
    assert 0 < max(g.off for g in found.growth) < 1e-5


def test_a_fault_shows_in_another_layout(dumps: Path) -> None:
    found = compare(dumps / "plain", dumps / "mixed_norm").found
    assert (found.first.place, found.first.ranks) == ("layer_1", (FAULTY,))
    found = compare(dumps / "alone", dumps / "mixed_norm").found
    assert (found.first.place, found.first.ranks) == ("layer_1", (FAULTY,))
    found = compare(dumps / "plain", dumps / "mixed_swapped").found
    assert (found.first.place, found.first.role, found.first.ranks) == ("layer_1", "attn_out", (0, 1, 2, 3))
    assert [(d.node, d.ranks) for d in found.parameters] == [("self_attn_o_proj_weight", (1, FAULTY))]


def test_a_reloaded_module_writes_the_same(dumps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files hold no layouts: they are inferred."""
    monkeypatch.setenv("HELIX_DUMP_VALUES", str(tmp_path / "again"))
    reloaded, (ids, mask) = HelixModule.load(dumps / "saved"), prompts()
    reloaded(ids, mask), reloaded(ids[:, :1])
    for name in ("rank_3_step_0.json", "rank_1_step_1.json"):
        assert (tmp_path / "again" / name).read_text() == (dumps / "plain" / name).read_text()


def test_json_and_page(dumps: Path, tmp_path: Path) -> None:
    comparison = compare(dumps / "plain", dumps / "swapped")
    told = json.loads(comparison.to_json())
    assert told["kind"] == "runs" and told["equal"] is False
    assert told["first"]["ranks"] == [1, 2] and told["first"]["place"] == "layer_1"
    comparison.write_html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.count("<svg") == 1 and page.count("<polyline") == 2 and "They differ" in page
    assert page.count('class="s0 over"') == 1  # of two attention outputs the second
    assert not re.search(r"(?:src|href)=\"(?!data:)", page)  # nothing is loaded
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


def test_tolerance(dumps: Path) -> None:
    assert not compare(dumps / "plain", dumps / "alone", tolerance=1e-9).equal
    found = compare(dumps / "plain", dumps / "norm", tolerance=0.9).found
    assert found.first is None and found.parameters  # weights are equal or not
    with pytest.raises(HelixError, match="tolerance must be a number >= 0"):
        compare(dumps / "plain", dumps / "again", tolerance=-1.0)


def copied(source: Path, to: Path) -> Path:
    to.mkdir()
    for path in source.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def test_damage_is_named(dumps: Path, tmp_path: Path) -> None:
    lost = copied(dumps / "plain", tmp_path / "lost")
    for path in lost.glob("rank_2_*"):
        path.unlink()
    with pytest.raises(HelixError, match=r"ranks \[2\] of 4 have written nothing here"):
        compare(dumps / "plain", lost)
    short = copied(dumps / "plain", tmp_path / "short")
    (short / "rank_1_step_1.json").unlink()
    comparison = compare(dumps / "plain", short)
    assert comparison.equal and comparison.found.steps == 1 and "steps [1] are not of every rank" in str(comparison)
    cut = copied(dumps / "plain", tmp_path / "cut")
    (cut / "rank_1_step_0.safetensors").write_bytes(b"short")
    with pytest.raises(HelixError, match=r"rank_1_step_0: damaged"):
        compare(dumps / "plain", cut)
    mixed = copied(dumps / "plain", tmp_path / "mixed")
    (mixed / "rank_3_step_0.json").write_text((dumps / "plain" / "rank_3_step_1.json").read_text())
    with pytest.raises(HelixError, match=r"rank_3_step_0: damaged, or not of one dump"):
        compare(dumps / "plain", mixed)


def test_other_tokens_are_refused(dumps: Path, tmp_path: Path) -> None:
    other = copied(dumps / "plain", tmp_path / "other")
    for path in other.glob("rank_*_step_0.json"):
        told = json.loads(path.read_text())
        told["mask"][1] = [1] * 13
        path.write_text(json.dumps(told))
    with pytest.raises(HelixError, match=r"step 0: A has tokens \[3, 13\] \(19 not padding\), B \[3, 13\] \(27 not"):
        compare(dumps / "plain", other)


def value(part: Tensor, layout: str) -> Value:
    shape = tuple(part.shape)
    figures = (float(part.norm()), float(part.abs().max()), 0)
    entry = ValueEntry("outer", "x", "", "", [*shape], "float64", layout, *figures, [], "", False, [])
    return Value(entry, part.flatten()[sampled_places(shape)])


@pytest.mark.parametrize(("shape", "is_whole"), [((3, 8, 5), True), ((40, 80, 7), False)])
def test_shards_are_joined_and_sums_summed(shape: tuple[int, ...], is_whole: bool) -> None:
    """Against plain chunks: cp 2 x tpa 2, where ranks of one kvp group are neighbours."""
    mesh = HelixMesh(HelixLayout(kvp=2, tpa=2, ep=2, tpf=2))
    x = torch.randn(shape, dtype=torch.float64)
    halves, quarters = x.chunk(2, 1), x.chunk(4, 1)
    cases = {
        "world:S(1)": (list(quarters), [(0, 1, 2, 3)]),
        "kvp:S(1)": ([halves[0], halves[1]] * 2, [(0, 1), (2, 3)]),
        "tpa:S(1)": ([halves[0], halves[0], halves[1], halves[1]], [(0, 2), (1, 3)]),
    }
    for layout, (parts, groups) in cases.items():
        joined = wholes([value(part, layout) for part in parts], mesh)
        assert [w.ranks for w in joined] == groups
        for whole in joined:
            assert whole.shape == shape and whole.figures is not None
            assert whole.figures.norm == pytest.approx(float(x.norm()), rel=1e-12)
            assert whole.figures.largest == float(x.abs().max())
            assert (whole.elements is not None) == is_whole
            if is_whole:
                assert torch.equal(whole.elements, x.flatten())
        assert joined[0].owner((0, shape[1] - 1, 0)) == groups[0][-1:]
    (summed,) = wholes([value(x * (r + 1), "world:P(sum)") for r in range(4)], mesh)
    assert summed.elements is not None and summed.figures is None
    torch.testing.assert_close(summed.elements, 10 * x.flatten()[summed.places], rtol=1e-13, atol=0)
    assert wholes([value(x, "kvp:PS")] * 4, mesh) == [] == wholes([value(x, "-")] * 4, mesh)


@pytest.mark.slow
def test_kernels_and_sixteen_bits(tmp_path: Path) -> None:
    """Kernels fuse nodes, so runs of one plan are compared by meaning; what comes from bfloat16 is no more exact than it."""
    cases: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
        "reference": (torch.float32, {"cp": 2, "lower": "reference"}),
        "triton": (torch.float32, {"cp": 2, "lower": "triton"}),
        "half_2": (torch.bfloat16, {"cp": 2}),
        "half_4": (torch.bfloat16, {"cp": 4}),
    }
    for name, (dtype, options) in cases.items():
        compiled = helix_compile(fresh_model("short", dtype), **options, **OPTIONS)
        dump_run(compiled, tmp_path / name, nothing)
        if name == "half_4":
            dump_run(compiled, tmp_path / "half_wrong", wrong_norm)
    for a, b in (("reference", "triton"), ("half_2", "half_4")):
        comparison = compare(tmp_path / a, tmp_path / b)
        assert comparison.equal and not comparison.found.by_rank, str(comparison)
    first = compare(tmp_path / "half_2", tmp_path / "half_wrong").found.first
    assert first is not None and (first.place, first.ranks) == ("layer_1", (FAULTY,))
