"""A program saved by torch.export as input: the same numbers, and the same weights cut, as the model it came from."""

from __future__ import annotations

import io
import subprocess
import sys
import zipfile
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from transformers import DynamicCache
from transformers.integrations.executorch import register_dynamic_cache_export_support
from typer.testing import CliRunner

from helix_compile import CaptureError, RuntimeFault, helix_compile
from helix_compile.capture.program import load_program
from helix_compile.cli.commands import app
from tests.support.models import fresh_model, tiny_model
from tests.support.numerics import LIMIT

OPTIONS: dict[str, Any] = {"cp": 4, "tokens_per_block": 3, "max_seq_len": 64, "max_batch_size": 2}


class Step(nn.Module):
    """The step as docs/torch_compile.md shows it: tensors in, tensors out."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, pasts: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        cache = DynamicCache(list(zip(pasts[::2], pasts[1::2], strict=True)))
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        return out.logits, [t for layer in cache.layers for t in (layer.keys, layer.values)]


def exported(model: Any, dynamic: bool = True, **most: int) -> ExportedProgram:
    B, T, S = 2, 3, 5
    batch, tokens, past = (Dim(n, min=2 if n == "past" else 1, max=most.get(n)) for n in ("batch", "tokens", "past"))
    config = model.config
    pasts = [
        torch.zeros(B, 1, S, width, dtype=model.dtype)
        for _ in range(config.num_hidden_layers)
        for width in (config.kv_lora_rank, config.qk_rope_head_dim)
    ]
    ids, mask = torch.zeros(B, T, dtype=torch.int64), torch.ones(B, S + T, dtype=torch.int64)
    positions = torch.arange(S, S + T).expand(B, -1).contiguous()
    shapes = (
        {0: batch, 1: tokens},
        {0: batch, 1: Dim.AUTO},
        {0: batch, 1: tokens},
        [{0: batch, 2: past} for _ in pasts],
    )
    with torch.no_grad():
        return torch.export.export(
            Step(model), (ids, mask, positions, pasts), dynamic_shapes=shapes if dynamic else None, strict=False
        )


class StepOnCache(Step):
    """A step that takes and returns transformers' cache itself."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, cache: Any
    ) -> tuple[Tensor, Any]:  # type: ignore[override]
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        return out.logits, out.past_key_values


def exported_on_cache(model: Any) -> ExportedProgram:
    register_dynamic_cache_export_support()
    B, T, S = 2, 3, 5
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.zeros(B, S, dtype=torch.int64), past_key_values=cache)
        batch, tokens, past = Dim("batch", min=1), Dim("tokens", min=1), Dim("past", min=2)
        parts = [{0: batch, 2: past} for _ in cache.layers]
        ids, mask = torch.zeros(B, T, dtype=torch.int64), torch.ones(B, S + T, dtype=torch.int64)
        shapes = ({0: batch, 1: tokens}, {0: batch, 1: Dim.AUTO}, {0: batch, 1: tokens}, [parts, parts])
        given = (ids, mask, torch.arange(S, S + T).repeat(B, 1), cache)
        return torch.export.export(StepOnCache(model), given, dynamic_shapes=shapes, strict=False)


@pytest.mark.parametrize("kind", ["with gradients", "on a DynamicCache"])
def test_other_ways_to_export_a_step(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("short")
    if kind == "with gradients":
        monkeypatch.setattr(torch, "no_grad", nullcontext)
        program = exported(model)
        monkeypatch.undo()
        assert any("set_grad_enabled" in str(n.target) for n in program.graph.nodes)
    else:
        program = exported_on_cache(model)
    compiled, ids = helix_compile(program, **OPTIONS), torch.randint(0, 97, (2, 12))
    with torch.no_grad():
        expected = model(ids).logits
    got = torch.cat([compiled(part) for part in (ids[:, :9], ids[:, 9:10], ids[:, 10:])], 1)
    # with the fp32 islands of the model itself
    assert (got - expected).abs().max() <= 1e-7 * expected.abs().max()


@pytest.fixture(scope="module")
def program() -> ExportedProgram:
    return exported(tiny_model("short"))


def test_a_program_gives_the_models_logits(program: ExportedProgram) -> None:
    model = tiny_model("short")
    compiled, other = helix_compile(program, **OPTIONS), helix_compile(model, **OPTIONS)
    ids = torch.randint(0, 97, (2, 14))
    steps = [ids[:, :11], *ids[:, 11:].split(1, dim=1)]
    got, same = (torch.cat([m(i) for i in steps], 1) for m in (compiled, other))
    with torch.no_grad():
        expected = model(ids).logits
    largest = expected.abs().max()
    assert (got - same).abs().max() <= LIMIT[torch.float64] * largest
    assert (got - expected).abs().max() <= 1e-7 * largest  # the model's fp32 islands, in steps and at once
    shards = {s.source for body in compiled.plan.bodies for s in body.param_shards}
    assert {n.removeprefix("model.") for n in shards} >= {
        f"model.layers.{i}.self_attn.{p}_proj.weight" for i in (0, 1) for p in ("kv_b", "o", "q_b")
    }


def test_inspect_takes_a_saved_program(program: ExportedProgram, tmp_path: Path) -> None:
    path = tmp_path / "step.pt2"
    torch.export.save(program, path)
    result = CliRunner().invoke(app, ["inspect", str(path), "--cp", "4"])
    assert result.exit_code == 0, result.output
    assert "ExportedProgram" in result.output


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="batch size is fixed at 2"):
        helix_compile(exported(tiny_model("short"), dynamic=False), **OPTIONS)
    with pytest.raises(CaptureError, match="first input is not the token ids"):
        helix_compile(torch.export.export(nn.Linear(2, 2), (torch.ones(3, 2),)), **OPTIONS)
    broken = tmp_path / "broken.pt2"
    broken.write_bytes(b"not a program")
    with pytest.raises(CaptureError, match=r"broken\.pt2 can't be loaded"):
        helix_compile(broken, **OPTIONS)


class Doubled(nn.Module):
    """More than eight new tokens and the norm doubles: a program for at most eight does not hold that."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return y * 2.0 if x.shape[1] > 8 else y


def test_the_range_of_a_dim_is_a_limit_of_a_step() -> None:
    model = fresh_model("short")
    model.model.norm = Doubled(model.model.norm)
    compiled = helix_compile(exported(model, tokens=8), **OPTIONS)
    ids = torch.randint(0, 97, (2, 20))
    with pytest.raises(RuntimeFault, match=r"exported for 0 <= T <= 8 \(new tokens\), got T = 20"):
        compiled(ids)
    assert compiled.lengths.tolist() == []
    with torch.no_grad():
        expected = model(ids[:, :8]).logits
    assert (compiled(ids[:, :8]) - expected).abs().max() <= 1e-7 * expected.abs().max()


class Bound(nn.Module):
    """A branch on two sizes: the export holds one side."""

    def __init__(self, norm: nn.Module, apart: Any):
        super().__init__()
        self.norm, self.apart = norm, apart

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) * (2.0 if self.apart(x.shape[0], x.shape[1]) else 1.0)


APART: list[Callable[[Any, Any], Any]] = [lambda B, T: B * T > 16, lambda B, T: B > T, lambda B, T: T % 2 == 0]


@pytest.mark.parametrize(
    ("named", "apart"),
    [
        (False, APART[0]),
        (True, APART[1]),
        *(pytest.param(*x, marks=pytest.mark.slow) for x in product([False, True], APART)),
    ],
)
def test_a_condition_on_several_sizes_is_refused(named: bool, apart: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a guard where Dims are AUTO, as an assertion in the graph where they have names."""
    model = fresh_model("short")
    model.model.norm = Bound(model.model.norm, apart)
    export = torch.export.export
    if named:
        deferred = partial(export, prefer_deferred_runtime_asserts_over_guards=True)
        monkeypatch.setattr(torch.export, "export", deferred)
    else:
        monkeypatch.setattr("tests.capture.test_program.Dim", _Automatic)
    program = exported(model)
    monkeypatch.undo()
    with pytest.raises(CaptureError, match=r"binds its sizes together, .* sequences, .* new tokens"):
        helix_compile(program, **OPTIONS)


class _Automatic:
    """Dim, but that every size is found out."""

    AUTO = Dim.AUTO

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return Dim.AUTO


def test_so_are_those_of_batch_and_past() -> None:
    compiled = helix_compile(exported(tiny_model("short"), batch=2, past=6), **{**OPTIONS, "max_batch_size": 4})
    with pytest.raises(RuntimeFault, match=r"B <= 2 \(sequences\), got B = 3"):
        compiled(torch.zeros(3, 2, dtype=torch.int64))
    ids = torch.randint(0, 97, (2, 4))
    compiled(ids), compiled(ids[:, :2]), compiled(ids[:, :1])
    with pytest.raises(RuntimeFault, match=r"S <= 6 \(cached tokens\), got S = 7"):
        compiled(ids[:, :1])


class Touch:
    """What a pickle runs when it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_nothing_of_a_file_runs(program: ExportedProgram, tmp_path: Path) -> None:
    saved, changed, touched = (tmp_path / name for name in ("step.pt2", "changed.pt2", "touched"))
    torch.export.save(program, saved)
    examples = io.BytesIO()
    torch.save((Touch(touched),), examples)
    with zipfile.ZipFile(saved) as old, zipfile.ZipFile(changed, "w") as new:
        for name in old.namelist():
            new.writestr(name, examples.getvalue() if "sample_inputs" in name else old.read(name))
    with pytest.raises(CaptureError, match=r"changed\.pt2 can't be loaded by torch\.export\.load"):
        load_program(changed)
    assert not touched.exists() and load_program(saved).graph


@pytest.mark.slow
def test_a_step_on_a_cache_is_read_by_a_process_that_knows_no_such_input(tmp_path: Path) -> None:
    torch.export.save(exported_on_cache(tiny_model("short")), tmp_path / "step.pt2")
    command = (
        f"from helix_compile import helix_compile; helix_compile({str(tmp_path / 'step.pt2')!r}, cp=2, max_seq_len=64)"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "Logging error" not in done.stderr, done.stderr
