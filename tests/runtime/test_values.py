"""HELIX_DUMP_VALUES: what is written equals what a hook of the world sees; nothing at all without it; refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, fx

from helix_compile import HelixError, HelixModule, HelixPlan, helix_compile
from helix_compile.layout.degrees import HelixMesh
from helix_compile.runtime.values import SAMPLE, SHARED, WHOLE, ValueDump, cut_of, kept_places, sampled_places
from tests.distributed.steps import OPTIONS, prompts
from tests.support.disk import full_after
from tests.support.models import tiny_model


def compiled_tiny() -> HelixModule:
    return helix_compile(tiny_model("short", torch.float32), cp=2, **OPTIONS)


def dumping(compiled: HelixModule, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if it were made with the variable set."""
    monkeypatch.setenv("HELIX_DUMP_VALUES", str(folder))
    compiled._value_dump = ValueDump.from_environment(compiled.plan)


def test_what_is_written_is_what_was_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a hook of our own that keeps whole values."""
    monkeypatch.setenv("HELIX_DUMP_VALUES", str(tmp_path / "run"))
    compiled = compiled_tiny()
    ids, mask = prompts()
    seen: dict[tuple[int, str], list[Tensor]] = {}
    inner: Any = compiled.world.run

    def run(graph: fx.GraphModule, inputs: Any, hook: Any, agreed: Any) -> Any:
        def both(rank: int, node: fx.Node, value: Any) -> None:
            hook(rank, node, value)
            if isinstance(value, Tensor):
                name = "output" if node.op == "call_module" else node.name
                seen.setdefault((rank, name), []).append(value.clone())

        return inner(graph, inputs, both, agreed)

    with patch.object(compiled.world, "run", run):
        compiled(ids, mask)
    assert HelixPlan.from_json((tmp_path / "run" / "plan.json").read_text()) == compiled.plan
    mesh = HelixMesh(compiled.plan.layout)
    for rank in range(2):
        told = json.loads((tmp_path / "run" / f"rank_{rank}_step_0.json").read_text())
        kept = load_file(tmp_path / "run" / f"rank_{rank}_step_0.safetensors")
        assert told["mask"] == mask.tolist()
        values = {(v["place"], v["name"]): v for v in told["values"]}
        assert len(values) == len(told["values"]) == len(kept) > 200
        for (place, name), entry in values.items():
            # a layer's nodes have the names of the other layer's: theirs is the one with these elements
            elements = kept[f"{place}.{name}"]
            value = next(
                (
                    v
                    for v in seen[rank, name]
                    if list(v.shape) == entry["shape"]
                    and torch.equal(
                        v.flatten()[kept_places(tuple(v.shape), cut_of(entry["layout"], rank, mesh))], elements
                    )
                ),
                None,
            )
            assert value is not None, name
            assert entry["dtype"] == str(value.dtype).removeprefix("torch.")
            assert value.numel() > WHOLE or len(elements) == value.numel()
            assert value.numel() <= WHOLE or SAMPLE <= len(elements) <= SAMPLE + 2 * SHARED
            tokens = value[mask.bool()] if value.shape[:2] == mask.shape else value
            if value.is_floating_point() and value.dim() == 3 and len(value) != mask.numel():
                assert entry["nonfinite"] == int((~tokens.isfinite()).sum())
                tokens = tokens[tokens.isfinite()]
                assert entry["norm"] == pytest.approx(float(tokens.double().norm()), rel=1e-6), name
                assert entry["largest"] == float(tokens.abs().max())
        roles = [(v["place"], v["role"]) for v in told["values"] if v["role"] not in ("", "parameter")]
        assert roles == [
            *((f"layer_{i}", role) for i in (0, 1) for role in ("attn_out", "output")),
            ("outer", "logits"),
        ]
        layouts = {v["name"]: v["layout"] for v in told["values"] if v["place"] == "layer_1"}
        assert layouts["o_flat"] == "world:S(2)" and layouts["linear_4"] == "world:P(sum)"
        weights = {v["name"] for v in told["values"] if v["role"] == "parameter"}
        assert {"lm_head_weight", "input_layernorm_weight", "mlp_experts_down_proj"} <= weights
        assert not any("cache" in v["name"] for v in told["values"])


def test_a_few_steps_each_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = compiled_tiny()
    ids, _ = prompts()
    monkeypatch.setenv("HELIX_DUMP_VALUES_STEPS", "2")
    dumping(compiled, tmp_path / "run", monkeypatch)
    for _ in range(3):
        compiled(ids[:, :1])
    names = {f"rank_{r}_step_{s}.{end}" for r in (0, 1) for s in (0, 1) for end in ("json", "safetensors")}
    assert {p.name for p in (tmp_path / "run").iterdir()} == names | {"plan.json"}
    later = json.loads((tmp_path / "run" / "rank_0_step_1.json").read_text())
    assert "parameter" not in {v["role"] for v in later["values"]}  # they are the same in every step
    # another module of this process goes beside, and one of another process would be refused
    dumping(compiled, tmp_path / "run", monkeypatch)
    compiled(ids[:, :1])
    assert (tmp_path / "run" / "module_2" / "rank_1_step_0.json").exists()
    refused = pytest.raises(HelixError, match=r"run: holds the values of another run; choose another folder")
    with patch.dict("helix_compile.runtime.values._CLAIMED", clear=True), refused:
        ValueDump.from_environment(compiled.plan)


def test_a_full_disk_leaves_nothing_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = compiled_tiny()
    ids, _ = prompts()
    dumping(compiled, tmp_path / "run", monkeypatch)
    compiled(ids[:, :1])
    with full_after(20_000), pytest.raises(HelixError, match=r"rank_0_step_1\.\w+: can't be written"):
        compiled(ids[:, :1])
    assert not list((tmp_path / "run").glob("*step_1*")) and not list((tmp_path / "run").glob(".*"))


def test_nothing_without_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HELIX_DUMP_VALUES", raising=False)
    compiled = compiled_tiny()
    assert compiled.value_dump is None
    with patch.object(compiled.world, "run", wraps=compiled.world.run) as run:
        compiled(prompts()[0][:, :1])
    assert run.call_args.args[2] is None  # no hook


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = compiled_tiny().plan
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HELIX_DUMP_VALUES", str(tmp_path / "file"))
    with pytest.raises(HelixError, match=r"HELIX_DUMP_VALUES=.*file: can't be made a folder of values"):
        compiled_tiny()
    monkeypatch.setenv("HELIX_DUMP_VALUES", str(tmp_path / "run"))
    for text in ("0", "-1", "few"):
        monkeypatch.setenv("HELIX_DUMP_VALUES_STEPS", text)
        with pytest.raises(HelixError, match=f"HELIX_DUMP_VALUES_STEPS must be a number of steps >= 1, got '{text}'"):
            ValueDump.from_environment(plan)


def test_places_are_spread(tmp_path: Path) -> None:
    assert sampled_places((4, 5)).tolist() == list(range(20))
    for shape in ((2, 1, 7168), (1, 1025), (64, 1024, 32)):
        places = sampled_places(shape)
        assert len(set(places.tolist())) == SAMPLE and places.max() < torch.Size(shape).numel()
        columns = places % shape[-1]
        assert len(set(columns.tolist())) > shape[-1] // 32 or len(set(columns.tolist())) > SAMPLE // 2
        assert int(places.diff().max()) < 3 * torch.Size(shape).numel() / SAMPLE
