"""Two runs side by side in the virtual world: equal ones, three faults of one rank, other layouts, damaged dumps."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from helix_compile import HelixError, HelixModule, HelixPlan, capture, compare, helix_compile
from helix_compile.layout.degrees import HelixLayout, HelixMesh
from helix_compile.runtime.values import ValueEntry, cut_of, kept_places, sampled_places, shared_places
from helix_compile.verifier.compare.dumps import Value
from helix_compile.verifier.compare.whole import deviation, fitted, own, wholes
from tests.distributed.steps import OPTIONS, prompts
from tests.support.gqa_models import fresh_gqa
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


def changed(source: Path, to: Path, change: Any, files: str = "rank_*_step_1.json") -> Path:
    """A copy with other entries: `change` gets an entry and the rank, and gives an entry or None."""
    for path in copied(source, to).glob(files):
        told = json.loads(path.read_text())
        entries = [change(entry, told["rank"]) for entry in told["values"]]
        path.write_text(json.dumps({**told, "values": [entry for entry in entries if entry is not None]}))
    return to


@pytest.mark.parametrize("run", ["plain", "mixed"])
def test_values_that_a_rank_lacks(dumps: Path, tmp_path: Path, run: str) -> None:
    """Of a layer on one rank; in either run, and in both; whether runs are compared by rank or by meaning."""
    without = changed(
        dumps / run, tmp_path / "without", lambda e, rank: None if (rank, e["place"]) == (0, "layer_1") else e
    )
    for sides, other in (
        ((dumps / "plain", without), "A"),
        ((without, dumps / "plain"), "B"),
        ((without, without), ""),
    ):
        comparison = compare(*sides)
        found = comparison.found
        assert not comparison.equal and found.first is None and "nothing differs" not in str(comparison)
        lacking = {name: len(texts) for name, texts in found.lacking.items()}
        assert all((count > 50) == (name != other) for name, count in lacking.items()), lacking
        assert "values that some ranks of" in str(comparison) and "(step 1, rank 0)" in str(comparison)


@pytest.mark.parametrize("run", ["plain", "mixed"])
def test_a_value_that_one_run_lacks(dumps: Path, tmp_path: Path, run: str) -> None:
    less = changed(
        dumps / run, tmp_path / "less", lambda e, _: None if (e["place"], e["role"]) == ("layer_1", "attn_out") else e
    )
    comparison = compare(dumps / "plain", less)
    assert not comparison.equal and len(comparison.found.only["A"]) == 1 and not comparison.found.only["B"]
    assert "nodes that only A has: layer_1." in str(comparison)


def test_figures_and_dtypes_that_differ(dumps: Path, tmp_path: Path) -> None:
    """A norm that is no number, and another dtype on one rank: in JSON, with the same elements beside them."""
    target = ("layer_1", "attn_out")

    def damaged(name: str, run: str, **fields: Any) -> Path:
        def change(entry: dict[str, Any], rank: int) -> dict[str, Any]:
            return {**entry, **fields} if (entry["place"], entry["role"], rank) == (*target, 1) else entry

        return changed(dumps / run, tmp_path / name, change)

    for field in ("norm", "largest"):
        for value in (math.nan, math.inf):
            first = compare(dumps / "plain", damaged(f"{field}_{value}", "plain", **{field: value})).found.first
            assert (first.step, first.place, first.role, first.ranks) == (1, *target, (1,)) and first.off == math.inf
    comparison = compare(dumps / "plain", damaged("dtype", "plain", dtype="bfloat16"))
    assert (comparison.found.first.what, comparison.found.first.ranks) == ("dtype", (1,))
    assert "has another dtype in each" in str(comparison)
    comparison = compare(dumps / "plain", damaged("other_dtype", "mixed", dtype="bfloat16"))
    assert [(c.run, c.what, c.ranks) for c in comparison.found.contradictions] == [("B", "dtype", (1,))]


def test_an_older_dump_is_read(dumps: Path, tmp_path: Path) -> None:
    """Version 1 had 64 elements of a large value and no `through`."""
    older = copied(dumps / "plain", tmp_path / "older")
    mesh = HelixMesh(HelixPlan.from_json((older / "plan.json").read_text()).layout)
    for path in older.glob("rank_*_step_*.json"):
        told, tensors = json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))
        for entry in told["values"]:
            name, shape = f"{entry['place']}.{entry['name']}", tuple(entry["shape"])
            kept = kept_places(shape, cut_of(entry["layout"], told["rank"], mesh))
            tensors[name] = tensors[name][torch.isin(kept, sampled_places(shape))].contiguous()
            del entry["through"]
        path.write_text(json.dumps({**told, "version": 1}))
        save_file(tensors, path.with_suffix(".safetensors"))
    for other in ("plain", "alone"):
        assert compare(older, dumps / other).equal
    assert not compare(older, dumps / "mixed_swapped").equal
    (path,) = older.glob("rank_0_step_0.json")
    path.write_text(path.read_text().replace('"version": 1', '"version": 3'))
    with pytest.raises(HelixError, match="version 3, expected 2 or 1"):
        compare(older, older)


class OwnCast(nn.Module):
    """An FFN that no graph holds (it looks at a number of its input) and that computes in float32 whatever it is given."""

    def __init__(self, mlp: nn.Module):
        super().__init__()
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        out = self.mlp(x)
        return out if out.abs().max().item() < 0 else torch.softmax(out.float(), -1).to(x.dtype)


def wrong_first_norm(compiled: Any) -> None:
    """A millionth off: within what float32 leaves, beyond what float64 does."""
    name = "model.layers.0.input_layernorm.weight"
    compiled.ranks[FAULTY].params[name] = compiled.ranks[FAULTY].params[name] * (1 + 1e-6)


def test_a_part_that_is_no_graph_has_the_tolerance_of_what_it_computes_in(tmp_path: Path) -> None:
    """In float64: what float32 casts inside of it leave between two layouts is no fault; a fault before it is."""
    model = fresh_gqa("llama", num_hidden_layers=3)
    width = model.config.hidden_size
    for owner in (*model.model.layers, model.model):  # transformers' own norms cast too
        for name in ("input_layernorm", "post_attention_layernorm", "norm"):
            if hasattr(owner, name):
                setattr(owner, name, nn.RMSNorm(width, dtype=torch.float64))
    model.model.layers[1].mlp = OwnCast(model.model.layers[1].mlp)
    for name, cp in (("one", 1), ("four", 4)):
        compiled = helix_compile(model.eval(), cp=cp, tokens_per_block=4, max_seq_len=32, unmatched="keep")
        dump_run(compiled, tmp_path / name, nothing)
    dump_run(compiled, tmp_path / "wrong", wrong_first_norm)
    found = compare(tmp_path / "one", tmp_path / "four").found
    limits = {(g.place, g.role): g.tolerance for g in found.growth}
    assert found.equal
    assert limits["layer_0", "attn_out"] == limits["layer_0", "output"] == 1e-10
    assert limits["layer_1", "output"] == limits["layer_2", "attn_out"] == limits["outer", "logits"] == 1e-5
    comparison = compare(tmp_path / "one", tmp_path / "wrong")
    first = comparison.found.first
    assert first is not None and (first.place, first.narrowest) == ("layer_0", "float64")
    assert "tolerance 1e-10 (float64 is the narrowest on its path)" in str(comparison)


def test_other_tokens_are_refused(dumps: Path, tmp_path: Path) -> None:
    other = copied(dumps / "plain", tmp_path / "other")
    for path in other.glob("rank_*_step_0.json"):
        told = json.loads(path.read_text())
        told["mask"][1] = [1] * 13
        path.write_text(json.dumps(told))
    with pytest.raises(HelixError, match=r"step 0: A has tokens \[3, 13\] \(19 not padding\), B \[3, 13\] \(27 not"):
        compare(dumps / "plain", other)


MESH = HelixMesh(HelixLayout(kvp=2, tpa=2, ep=2, tpf=2))


def value(part: Tensor, layout: str, rank: int = 0, mesh: HelixMesh = MESH) -> Value:
    shape = tuple(part.shape)
    places = kept_places(shape, cut_of(layout, rank, mesh))
    figures = (float(part.norm()), float(part.abs().max()), 0)
    entry = ValueEntry("outer", "x", "", "", [*shape], "float64", layout, *figures, [], "", False, [])
    return Value(entry, part.flatten()[places], places)


@pytest.mark.parametrize(("shape", "is_whole"), [((3, 8, 5), True), ((40, 80, 7), False), ((1, 1, 4096), False)])
def test_shards_are_joined_and_sums_summed(shape: tuple[int, ...], is_whole: bool) -> None:
    """Against plain chunks: cp 2 x tpa 2, where ranks of one kvp group are neighbours."""
    mesh, dim = MESH, max(range(3), key=lambda d: shape[d] if shape[d] % 4 == 0 else 0)
    x = torch.randn(shape, dtype=torch.float64)
    halves, quarters = x.chunk(2, dim), x.chunk(4, dim)
    cases = {
        f"world:S({dim})": (list(quarters), [(0, 1, 2, 3)]),
        f"kvp:S({dim})": ([halves[0], halves[1]] * 2, [(0, 1), (2, 3)]),
        f"tpa:S({dim})": ([halves[0], halves[0], halves[1], halves[1]], [(0, 2), (1, 3)]),
    }
    alone, same = own(value(x, "R"), 0), set(range(x.numel()))
    for layout, (parts, groups) in cases.items():
        joined = wholes([value(part, layout, rank) for rank, part in enumerate(parts)], mesh)
        assert [w.ranks for w in joined] == groups
        for whole in joined:
            assert whole.shape == shape and whole.figures is not None
            assert whole.figures.norm == pytest.approx(float(x.norm()), rel=1e-12)
            assert whole.figures.largest == float(x.abs().max())
            assert (len(whole.places) == x.numel()) == is_whole or shape[0] == 1
            assert torch.equal(whole.elements, x.flatten()[whole.places]) and bool((whole.places.diff() > 0).all())
            same &= set(whole.places.tolist())
        last = tuple(size - 1 if d == dim else 0 for d, size in enumerate(shape))
        assert joined[0].owner(last) == groups[0][-1:]
    # however it is cut, the same elements are kept
    assert len(same & set(alone.places.tolist())) >= min(x.numel(), 100)
    (summed,) = wholes([value(x * (r + 1), "world:P(sum)", r) for r in range(4)], mesh)
    assert summed.figures is None
    torch.testing.assert_close(summed.elements, 10 * x.flatten()[summed.places], rtol=1e-13, atol=0)
    assert wholes([value(x, "kvp:PS")] * 4, mesh) == [] == wholes([value(x, "-")] * 4, mesh)


@pytest.mark.parametrize("size", [1500, 2046, 2050, 4097])
def test_padding_and_layouts_keep_the_same_elements(size: int) -> None:
    """Alone, and padded to eight parts, where the padded side may be twice a power of two longer."""
    x = torch.randn(3, 2, size, dtype=torch.float64)
    part = -(-size // 8)
    padded = torch.nn.functional.pad(x, (0, 8 * part - size))
    eight = HelixMesh(HelixLayout(kvp=8, tpa=1, ep=8, tpf=1))
    values = [value(p.contiguous(), "world:S(2)", r, eight) for r, p in enumerate(padded.chunk(8, 2))]
    assert len({len(v.places) for v in values}) > 1 or part * 6 <= 1024
    for broken in (False, True):
        y = x.clone()
        if broken:  # two heads have each other's place: the same norm, the same largest element
            y[..., 256:512], y[..., 1024:1280] = x[..., 1024:1280], x[..., 256:512]
        (whole,) = wholes(values, eight)
        pair = fitted(own(value(y, "R", 0, eight), 0), whole)
        assert pair is not None and len(set(pair[0].places.tolist()) & set(pair[1].places.tolist())) >= 40
        found = deviation(*pair, None)
        assert (found.off > 0.01 and found.what == "element") == broken and (broken or found.off < 1e-12)


def test_shared_places_do_not_hang_on_the_length() -> None:
    for shape in ((7168,), (64, 576), (3, 5, 1000), (2, 2, 2, 2, 2, 129)):
        places = shared_places(shape)
        assert len(places) >= 100
        assert (places < torch.tensor(shape)).all() and len(places) <= 256
        longer = {tuple(at) for at in shared_places((*shape[:-1], shape[-1] + 7)).tolist()}
        assert len(longer & {tuple(at) for at in places.tolist()}) >= min(len(places), 40)


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
