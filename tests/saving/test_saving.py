"""What was saved is what runs, bit for bit; what was tampered with is refused by file and node."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helix_compile import HelixError, HelixModule, RuntimeFault, helix_compile
from tests.support.driver import random_ids
from tests.support.models import fresh_model, tiny_model


def saved(folder: Path, dtype: torch.dtype = torch.float32, **plan: Any) -> HelixModule:
    model = tiny_model("plain" if dtype is torch.bfloat16 else "short", dtype)  # those that other tests capture too
    compiled = helix_compile(model, max_seq_len=64, **{"cp": 4, "tokens_per_block": 3, **plan})
    compiled.save(folder)
    return compiled


PADDED = {"cp": 3, "tpa": 2, "merge": "ag_rs", "v_up": "after"}


@pytest.mark.parametrize(
    ("dtype", "plan"),
    [
        (torch.bfloat16, PADDED),
        pytest.param(torch.float32, {}, marks=pytest.mark.slow),
        pytest.param(torch.float32, PADDED, marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, {}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_reload_is_bitwise(tmp_path: Path, dtype: torch.dtype, plan: dict[str, Any]) -> None:
    """At cp * tpa = 6 every FFN shard is padded."""
    compiled = saved(tmp_path / "saved", dtype, **plan)
    loaded = HelixModule.load(tmp_path / "saved")
    assert loaded.plan == compiled.plan
    for tokens in (9, 1, 3):
        ids = random_ids(tiny_model(), 2, tokens)
        assert torch.equal(loaded(ids), compiled(ids))
    assert str(loaded.graph.graph) == str(compiled.graph.graph)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(loaded.generate(ids, **options), compiled.generate(ids, **options))


def test_each_storage_is_written_once(tmp_path: Path) -> None:
    compiled = saved(tmp_path / "saved")
    size = sum(f.stat().st_size for f in (tmp_path / "saved").glob("*.safetensors"))
    weights = sum(t.numel() * t.itemsize for t in tiny_model("short", torch.float32).state_dict().values())
    assert size < 1.05 * weights
    assert len(compiled.ranks) == 4


def test_an_edit_of_one_rank_is_saved(tmp_path: Path) -> None:
    model = tiny_model("short", torch.float32)
    compiled = helix_compile(model, cp=2, max_seq_len=64)
    name = "model.layers.0.mlp.up_proj.weight"
    compiled.ranks[1].params[name] = torch.zeros_like(compiled.ranks[1].params[name])
    compiled.save(tmp_path / "saved")
    ids = random_ids(model, 1, 5)
    assert torch.equal(HelixModule.load(tmp_path / "saved")(ids), compiled(ids))


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("model.norm.wgt", torch.ones(72), r"rank 1: the graph takes no parameter model\.norm\.wgt"),
        ("model.norm.weight", torch.ones(71), r"rank 1: parameter model\.norm\.weight is \(\(71,\)"),
        ("model.norm.weight", torch.ones(72, dtype=torch.float64), r"torch\.float64\), the graph expects"),
        ("model.norm.weight", None, r"model\.norm\.weight is None"),
    ],
    ids=["name", "shape", "dtype", "none"],
)
def test_parameters_that_the_graph_does_not_take_are_not_saved(
    tmp_path: Path, name: str, tensor: Any, message: str
) -> None:
    compiled = helix_compile(tiny_model("short", torch.float32), cp=2, max_seq_len=64)
    compiled.ranks[1].params[name] = tensor
    with pytest.raises(RuntimeFault, match=message):
        compiled.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_an_edit_that_could_not_be_loaded_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    """A gathered value that is used before its sum: it runs, but load() would not trust it."""
    compiled = helix_compile(tiny_model("short"), cp=2)
    body = next(b for _, b in compiled.graph.named_children())
    assert isinstance(body, torch.fx.GraphModule)
    start = next(n for n in body.graph.nodes if "all_reduce" in str(n.target))
    next(iter(start.users)).replace_all_uses_with(start.args[0])
    body.recompile()
    with pytest.raises(HelixError, match=r"could not be loaded again.*\n?.*stage lowered"):
        compiled.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_an_edit_without_notes_on_shapes_is_saved(tmp_path: Path) -> None:
    """A user's own node has no meta at all."""
    compiled = helix_compile(tiny_model("short"), cp=2)
    body = next(b for _, b in compiled.graph.named_children())
    assert isinstance(body, torch.fx.GraphModule)
    output = next(n for n in body.graph.nodes if n.op == "output")
    with body.graph.inserting_before(output):
        doubled = body.graph.call_function(torch.ops.aten.mul.Tensor, (output.args[0], 2.0))
    output.args = (doubled,)
    body.recompile()
    compiled.save(tmp_path / "saved")
    ids = random_ids(tiny_model(), 2, 5)
    assert torch.equal(HelixModule.load(tmp_path / "saved")(ids), compiled(ids))


def test_a_reloaded_module_runs_the_last_stage_only(tmp_path: Path) -> None:
    saved(tmp_path / "saved")
    loaded = HelixModule.load(tmp_path / "saved")
    assert list(loaded.stages) == ["ffn", "lowered"]
    with pytest.raises(RuntimeFault, match="runs that stage alone"):
        loaded.run_stage("ffn", random_ids(tiny_model(), 1, 2))


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "graphs.json", "rank_1.safetensors"])
def test_a_folder_that_holds_what_would_be_replaced_is_refused(tmp_path: Path, name: str) -> None:
    """A checkpoint's config.json says how its weights are stored: it would be lost."""
    compiled = helix_compile(tiny_model("short", torch.float32), cp=2, max_seq_len=64)
    (tmp_path / name).write_text("mine")
    (tmp_path / "model.safetensors").write_text("mine too")
    with pytest.raises(HelixError, match=f"holds {name}, which would be replaced"):
        compiled.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([name, "model.safetensors"])
    assert (tmp_path / name).read_text() == "mine"


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    compiled = saved(tmp_path / "saved")
    with pytest.raises(HelixError, match="holds a saved module already"):
        compiled.save(tmp_path / "saved")


def _edit(path: Path, change: Callable[[Any], None]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def _node(document: Any, prefix: str) -> Any:
    body = document["stages"]["lowered"]["bodies"]["body_0"]
    return next(n for n in body if n["target"].startswith(prefix))


def _take_out_the_first_all_reduce(document: Any) -> None:
    """The graph still runs without it: its operand takes the place of its result."""
    body = document["stages"]["lowered"]["bodies"]["body_0"]
    reduce = _node(document, "_c10d_functional.all_reduce")
    wait = next(n for n in body if n["args"] == [{"node": reduce["name"]}])
    text = json.dumps([n for n in body if n not in (reduce, wait)])
    document["stages"]["lowered"]["bodies"]["body_0"] = json.loads(
        text.replace(json.dumps({"node": wait["name"]}), json.dumps(reduce["args"][0]))
    )


def _swap_two_arguments(document: Any) -> None:
    """Gate and up projection have one shape: the graph runs and would be wrong."""
    outer = document["stages"]["lowered"]["outer"]
    arguments = next(n for n in outer if n["op"] == "call_module")["args"]
    names = [a["node"] for a in arguments]
    i, j = (names.index(f"model_layers_0_mlp_{w}_proj_weight") for w in ("gate", "up"))
    arguments[i], arguments[j] = arguments[j], arguments[i]


TAMPERED: list[tuple[str, Callable[[Path], None], str]] = [
    (
        "target",
        lambda d: _edit(d / "graphs.json", lambda g: _node(g, "aten.silu").update(target="os.system")),
        "not on the list of allowed targets",
    ),
    (
        "unknown op",
        lambda d: _edit(d / "graphs.json", lambda g: _node(g, "aten.silu").update(target="aten.no_such.default")),
        "is not valid",
    ),
    (
        "reference",
        lambda d: _edit(d / "graphs.json", lambda g: _node(g, "aten.silu").update(args=[{"node": "nobody"}])),
        "is not valid",
    ),
    (
        "op kind",
        lambda d: _edit(d / "graphs.json", lambda g: _node(g, "aten.silu").update(op="get_attr")),
        "is not allowed",
    ),
    (
        "shape",
        lambda d: _edit(
            d / "graphs.json",
            lambda g: _node(g, "aten.einsum").update(args=["bhtn,hnr->bthn", _node(g, "aten.einsum")["args"][1]]),
        ),
        "does not take",
    ),
    ("graph version", lambda d: _edit(d / "graphs.json", lambda g: g.update(version=7)), "version 7, expected 2"),
    ("json", lambda d: (d / "graphs.json").write_text("{"), "not valid JSON"),
    (
        "view",
        lambda d: _edit(d / "views.json", lambda v: v["0"]["model.norm.weight"].update(shape=[10**6])),
        "model.norm.weight",
    ),
    ("collective taken out", lambda d: _edit(d / "graphs.json", _take_out_the_first_all_reduce), "body_0"),
    (
        "collective over another axis",
        lambda d: _edit(
            d / "graphs.json", lambda g: _node(g, "_c10d_functional.all_reduce")["args"].__setitem__(2, "tpa")
        ),
        "all_reduce",
    ),
    ("weights of two layers swapped", lambda d: _edit(d / "graphs.json", _swap_two_arguments), "stands for param"),
    (
        "body taken out",
        lambda d: _edit(d / "graphs.json", lambda g: g["stages"]["lowered"]["bodies"].pop("body_0")),
        "no body 'body_0'",
    ),
    (
        "cache width",
        lambda d: _edit(d / "graphs.json", lambda g: g["cache_widths"].__setitem__(0, 10**9)),
        "takes caches",
    ),
    (
        "latent width",
        lambda d: _edit(d / "graphs.json", lambda g: g["latent_widths"].__setitem__(0, 26)),
        "are not parts of cache_widths",
    ),
    ("capacity", lambda d: _edit(d / "plan.json", lambda p: p["options"].update(max_seq_len=10**9)), "takes caches"),
    (
        "view field",
        lambda d: _edit(d / "views.json", lambda v: v["0"]["model.norm.weight"].pop("offset")),
        "model.norm.weight",
    ),
    (
        "view of a file outside",
        lambda d: _edit(d / "views.json", lambda v: v["0"]["model.norm.weight"].update(file="../x.safetensors")),
        "is not the file of a rank",
    ),
    (
        "weight taken out",
        lambda d: _edit(d / "views.json", lambda v: v["1"].pop("model.norm.weight")),
        "rank 1: parameter model.norm.weight is None",
    ),
    ("rank taken out", lambda d: _edit(d / "views.json", lambda v: v.pop("3")), "views.json: damaged"),
    (
        "plan field",
        lambda d: _edit(d / "plan.json", lambda p: p["bodies"].__setitem__(0, None)),
        "not a plan of this version",
    ),
    (
        "config",
        lambda d: _edit(d / "config.json", lambda c: c.update(initializer_range="x")),
        "config.json: can't be read",
    ),
    (
        "code in the config",
        lambda d: _edit(d / "config.json", lambda c: c.update(model_type="zzz", auto_map={"AutoConfig": "evil.Evil"})),
        "code that an auto_map names is never run",
    ),
    (
        "vocabulary as text",
        lambda d: _edit(d / "graphs.json", lambda g: g.update(vocab_size=str(g["vocab_size"]))),
        "vocab_size is '",
    ),
    ("missing file", lambda d: (d / "plan.json").unlink(), "not a saved module"),
    (
        "truncated",
        lambda d: (d / "rank_0.safetensors").write_bytes((d / "rank_0.safetensors").read_bytes()[:-100]),
        "can't be read",
    ),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved module that nothing is wrong with; it loads."""
    folder = tmp_path_factory.mktemp("whole") / "saved"
    saved(folder)
    HelixModule.load(folder)
    return folder


@pytest.mark.parametrize(("tamper", "message"), [t[1:] for t in TAMPERED], ids=[t[0] for t in TAMPERED])
def test_what_was_tampered_with_is_refused(
    whole: Path, tmp_path: Path, tamper: Callable[[Path], None], message: str
) -> None:
    shutil.copytree(whole, tmp_path / "saved")
    tamper(tmp_path / "saved")
    with pytest.raises(HelixError, match=message):
        HelixModule.load(tmp_path / "saved")


def tanh_for_silu(folder: Path) -> None:
    text = (folder / "graphs.json").read_text()
    assert "aten.silu.default" in text
    (folder / "graphs.json").write_text(text.replace("aten.silu.default", "aten.tanh.default"))


def test_a_graph_that_was_changed_after_it_was_saved_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "saved", cp=2)
    tanh_for_silu(tmp_path / "saved")
    with pytest.raises(HelixError, match=r"graphs\.json: was changed after save\(\) wrote it"):
        HelixModule.load(tmp_path / "saved")


def test_inspect_replaces_no_file_of_a_saved_module(tmp_path: Path) -> None:
    compiled = saved(tmp_path / "saved", cp=2)
    before = (tmp_path / "saved" / "plan.json").read_text()
    with pytest.raises(HelixError, match=r"inspect: .* holds graphs\.json"):
        compiled.inspect(tmp_path / "saved")
    assert (tmp_path / "saved" / "plan.json").read_text() == before


def test_a_generation_config_that_can_not_be_written_is_told(tmp_path: Path) -> None:
    model = fresh_model("short", torch.float32)
    model.generation_config.temperature = 0.5  # without do_sample: transformers refuses to write it
    with pytest.raises(HelixError, match="GenerationConfig is invalid"):
        helix_compile(model, cp=2, max_seq_len=64).save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_saved_module_stays_in_its_dtype(tmp_path: Path) -> None:
    with pytest.raises(HelixError, match=r"HelixModule\.load takes folder, device, world and builder, got dtype"):
        HelixModule.load(tmp_path, dtype=torch.float32)
