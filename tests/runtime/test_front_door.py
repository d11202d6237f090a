"""What a user may hand over by mistake is told as what, where, got and expected; nothing is computed or written before."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from helix_compile import CaptureError, HelixError, HelixModule, HelixOptions, PlanError, RuntimeFault, helix_compile
from tests.capture.test_program import exported
from tests.support.driver import random_ids
from tests.support.models import tiny_model

OPTIONS: dict[str, Any] = {"cp": 2, "max_seq_len": 64, "tokens_per_block": 4}


class Wrapper(nn.Module):
    """Something with a configuration around a model, as adapters, engines and data-parallel wrappers are."""

    def __init__(self, inner: Any):
        super().__init__()
        self.base, self.config = inner, inner.config


@pytest.mark.parametrize(
    ("act", "kind", "message"),
    [
        (lambda m: helix_compile(Wrapper(m).eval(), **OPTIONS), CaptureError, r"got Wrapper, a wrapper.* `\.base`"),
        (
            lambda m: helix_compile(m, **OPTIONS, dtype=torch.float8_e4m3fn),
            CaptureError,
            r"one that a step computes in",
        ),
        (lambda m: helix_compile(m, **OPTIONS, device="cuda:7"), HelixError, r"device='cuda:7' can't be used here"),
        (lambda m: HelixModule.load("nowhere", device="cuda:7"), HelixError, r"device='cuda:7' can't be used here"),
        (lambda m: helix_compile(m, cp=2, max_batch_size=2**24), PlanError, r"caches of one rank take .*max_seq_len="),
    ],
)
def test_what_cannot_be_compiled(act: Callable[[Any], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        act(tiny_model())


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: helix_compile(tiny_model(), cp=2, tokens_per_blok=4), r"keyword 'tokens_per_blok', expected one of model, cp, .*; the nearest is tokens_per_block"),
        (lambda: helix_compile(tiny_model(), 2, 3), r"too many positional arguments; expected helix_compile\(model, cp=N"),
        (lambda: helix_compile(cp=2), r"missing a required argument: 'model'"),
        (lambda: HelixOptions(cp=2, tpaa=1), "HelixOptions: got an unknown keyword 'tpaa', .*; the nearest is tpa"),
        (lambda: HelixOptions.from_file(None), "expected a mapping or the path of a file, got NoneType"),
        (lambda: HelixOptions.from_vllm(3), "expected a mapping or the path of a file, got int"),
    ],
)  # fmt: skip
def test_keywords_that_nobody_knows(act: Callable[[], Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        act()


def test_a_module_is_not_transformed_or_traced() -> None:
    compiled, ids = helix_compile(tiny_model(), **OPTIONS), random_ids(tiny_model(), 2, 5)
    with pytest.raises(HelixError, match="can't be transformed"):
        torch.func.vmap(compiled)(ids[:, None])
    with pytest.raises(HelixError, match="can't be transformed"):
        torch.func.functionalize(compiled)(ids)
    for mode in ("real", "fake", "symbolic"):
        with pytest.raises(HelixError, match="can't be traced or run without values"):
            make_fx(compiled, tracing_mode=mode)(ids)
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(HelixError, match="FakeTensorMode"):
        compiled(ids)
    for traced in (compiled, torch.nn.Sequential(compiled)):
        with pytest.raises(HelixError, match=r"can't be traced \(torch\.fx\.symbolic_trace\)"):
            torch.fx.symbolic_trace(traced)
    assert repr(compiled).startswith("HelixModule(")
    assert compiled.lengths.tolist() == [] and compiled(ids).shape[:2] == (2, 5)


def test_a_step_takes_ids_and_mask_alone() -> None:
    compiled, ids = helix_compile(tiny_model(), **OPTIONS), random_ids(tiny_model(), 2, 5)
    with pytest.raises(RuntimeFault, match="got position_ids, use_cache: positions follow"):
        compiled(ids, position_ids=torch.arange(5), use_cache=True, past_key_values=None)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(HelixError, match=r"inside torch\.autocast"):
        compiled(ids)
    assert compiled.lengths.tolist() == []
    with torch.inference_mode():
        compiled(ids)
    assert compiled.lengths.tolist() == [5, 5]


@pytest.fixture
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def test_a_default_device_does_not_reach_a_step(request: pytest.FixtureRequest) -> None:
    compiled, ids = helix_compile(tiny_model(), **OPTIONS), random_ids(tiny_model(), 2, 5)
    expected = compiled(ids)
    request.getfixturevalue("default_device")
    compiled.reset()
    assert torch.equal(compiled(ids, logits_to_keep=5), expected)
    compiled.truncate(3)
    compiled.import_cache(*compiled.export_cache())
    assert compiled.lengths.tolist() == [3, 3]


def test_weights_are_loaded_into_the_model() -> None:
    with pytest.raises(HelixError, match=r"model\.load_state_dict\(\.\.\.\), and the next step sees it"):
        helix_compile(tiny_model(), **OPTIONS).load_state_dict(tiny_model().state_dict())


def test_integers_of_numpy_and_torch_are_integers() -> None:
    compiled, ids = helix_compile(tiny_model(), **OPTIONS), random_ids(tiny_model(), 2, 5)
    compiled(ids)
    compiled.truncate([np.int64(4), torch.tensor(3)])
    assert compiled.lengths.tolist() == [4, 3]
    compiled.truncate(np.int32(2))
    compiled.reset(rows=[np.int64(1)])
    assert compiled.lengths.tolist() == [2, 0]
    compiled.import_cache(*compiled.export_cache()[:2], lengths=np.array([2, 0]).tolist())
    for bad in ([True], [1.0], [np.bool_(True)], ["1"], [torch.ones(2, dtype=torch.int64)]):
        with pytest.raises(RuntimeFault, match="are not rows of the current batch"):
            compiled.reset(rows=bad)  # type: ignore[arg-type]


def test_helix_dump_that_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HELIX_DUMP", str(tmp_path / "file"))
    with pytest.raises(HelixError, match=r"HELIX_DUMP=.*file: can't be made a folder"):
        helix_compile(tiny_model(), **OPTIONS)


def test_a_checkpoint_beside_an_adapter_is_refused(tmp_path: Path) -> None:
    tiny_model(dtype=torch.float32).save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(CaptureError, match=r"adapter_config\.json.*merge it first"):
        helix_compile(tmp_path, **OPTIONS)


def test_an_activation_that_nobody_knows_is_told(tmp_path: Path) -> None:
    tiny_model(dtype=torch.float32).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_act": "unheard_of"}))
    with pytest.raises(HelixError, match=r"config\.json: hidden_act 'unheard_of' is no activation of transformers"):
        helix_compile(tmp_path, **OPTIONS)


def overflowing(shares: tuple[float, float]) -> Any:
    """The first layer's down_proj gives a sum of two parts, of which each rank holds one."""
    model = tiny_model(dtype=torch.float16)
    down = model.model.layers[0].mlp.down_proj
    with torch.no_grad():
        half = down.weight.shape[1] // 2
        down.weight[:, :half], down.weight[:, half:] = shares
        for part in (model.model.layers[0].mlp.gate_proj, model.model.layers[0].mlp.up_proj):
            part.weight.copy_(part.weight[:1].expand_as(part.weight) * 30)
    return model


def test_a_rank_that_leaves_the_range_of_float16_is_told() -> None:
    """The parts of two ranks are beyond 65504 and cancel: finite in the model, infinite less infinite on the ranks."""
    model = overflowing((30000.0, -30000.0))
    ids = random_ids(model, 2, 5)
    with torch.no_grad():
        assert model(input_ids=ids).logits.isfinite().all()
    compiled = helix_compile(model, **OPTIONS)
    with pytest.raises(RuntimeFault, match=r"float16: logits that are not finite: .* 65504"):
        compiled(ids)
    assert compiled.lengths.tolist() == []
    assert helix_compile(model, **OPTIONS, dtype=torch.float32)(ids).isfinite().all()


def test_limits_of_a_program_are_saved(tmp_path: Path) -> None:
    compiled = helix_compile(exported(tiny_model("short"), tokens=8), **OPTIONS)
    compiled.save(tmp_path / "saved")
    loaded = HelixModule.load(tmp_path / "saved")
    for module in (compiled, loaded):
        with pytest.raises(RuntimeFault, match="<= T <= 8"):
            module(random_ids(tiny_model(), 1, 9))


def everywhere(document: Any) -> None:
    """Another block in a plan that does not contradict itself."""
    for key, value in document.items() if isinstance(document, dict) else enumerate(document):
        if key == "tokens_per_block":
            document[key] = 8
        elif isinstance(value, (dict, list)):
            everywhere(value)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("plan.json", everywhere, r"tokens_per_block is 4, plan\.json says 8"),
        ("graphs.json", lambda d: d.update(vocab_size=10**6), r"vocab_size is 1000000, its embedding .* has"),
    ],
)
def test_a_saved_plan_and_its_graph_must_agree(
    file: str, change: Callable[[Any], Any], message: str, tmp_path: Path
) -> None:
    helix_compile(tiny_model(), **OPTIONS).save(tmp_path / "saved")
    path = tmp_path / "saved" / file
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(HelixError, match=message):
        HelixModule.load(tmp_path / "saved")


@pytest.mark.parametrize(
    ("odd", "said"),
    [
        (torch.ones(1, 2, dtype=torch.int64, device="meta"), "input_ids is on meta"),
        (torch.ones(1, 2, dtype=torch.int64).to_sparse(), "input_ids is sparse"),
    ],
)
def test_a_tensor_without_plain_values_is_refused(odd: torch.Tensor, said: str) -> None:
    with pytest.raises(RuntimeFault, match=said):
        helix_compile(tiny_model(), **OPTIONS)(odd)
