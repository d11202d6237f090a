"""docs/torch_compile.md is true: its Python runs in the page's order, and what it says of two models and generate() holds."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit
from transformers import DynamicCache, StaticCache

from helix_compile import RuntimeFault, helix_compile
from helix_compile.backend import compiled_modules
from helix_compile.dynamo.session import CompiledGraph
from tests.support.gqa_models import fresh_gqa, tiny_gqa

TEXT = (Path(__file__).parents[1] / "docs/torch_compile.md").read_text()
LOOP, TWO, IN_PLACE, EXPORT = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
PROMPT = torch.randint(0, 97, (2, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def clean() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each step that the backend ran."""
    ran: list[int] = []
    call = CompiledGraph.__call__

    def counted(self: CompiledGraph, *args: Any) -> Any:
        ran.append(1)
        return call(self, *args)

    monkeypatch.setattr(CompiledGraph, "__call__", counted)
    return ran


def run(code: str, **given: Any) -> dict[str, Any]:
    exec(compile(code, "docs/torch_compile.md", "exec"), given)
    return given


def generated(model: Any, mask: Tensor | None = None) -> Tensor:
    return model.generate(PROMPT, attention_mask=mask, max_new_tokens=8, do_sample=False)


def compiled_with(model: Any, **options: Any) -> Any:
    options = {"cp": 4, "max_seq_len": 64, **options}
    return torch.compile(model, backend="helix", fullgraph=True, options=options)


def next_ids(model: Any, ids: Tensor, cache: Any) -> Tensor:
    with torch.no_grad():
        logits = model(input_ids=ids, past_key_values=cache).logits
    assert not logits.isnan().any()
    return logits[:, -1:].argmax(-1)


def test_the_loop(steps: list[int]) -> None:
    model = tiny_gqa()
    tokens = run(LOOP, model=model, prompt=PROMPT)["tokens"]
    assert torch.equal(torch.cat([PROMPT, *tokens], 1), generated(model))
    assert len(steps) == 8


def in_turn(compiled: list[Any], models: list[Any]) -> None:
    """Two loops, a step each; tokens are the models' own."""
    mine, reference = ([DynamicCache(config=m.config) for m in models] for _ in range(2))
    ids = [PROMPT, PROMPT.flip(1)]
    for _ in range(4):
        for i, model in enumerate(models):
            got = next_ids(compiled[i], ids[i], mine[i])
            ids[i] = next_ids(model, ids[i], reference[i])
            assert torch.equal(got, ids[i])


def test_two_at_a_time() -> None:
    model = tiny_gqa()
    two = run(TWO, torch=torch, model=model)
    in_turn([two["first"], two["second"]], [model, model])
    assert len(compiled_modules(model)) == 2


@pytest.mark.slow
def test_equal_options_are_one_compiled_model() -> None:
    model = tiny_gqa()
    compiled = [compiled_with(model, max_batch_size=b) for b in (2, 2, 3)]
    in_turn(compiled[1:], [model, model])
    with pytest.raises(RuntimeFault, match="another cache object"):
        in_turn(compiled[:2], [model, model])


def test_too_many_graphs_never_look_right() -> None:
    """Dynamo gives up: an error with fullgraph, NaN without."""
    model = tiny_gqa()
    for fullgraph, error, what in ((True, FailOnRecompileLimitHit, "fullgraph=True"), (False, AssertionError, "isnan")):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="helix", fullgraph=fullgraph, options={"cp": 4, "max_seq_len": 64})
        cache = DynamicCache(config=model.config)
        with torch._dynamo.config.patch(recompile_limit=1):
            ids = next_ids(compiled, PROMPT, cache)
            with pytest.raises(error, match=what):
                next_ids(compiled, ids, cache)


@pytest.mark.slow
def test_two_models_of_one_class() -> None:
    models = [tiny_gqa(), fresh_gqa()]
    with torch.no_grad():
        models[1].lm_head.weight.mul_(-1.0)
    compiled = [compiled_with(m) for m in models]
    with pytest.raises(RuntimeFault, match="this is another model: Dynamo takes"):
        in_turn(compiled, models)
    torch._dynamo.reset()
    in_turn([run(TWO, torch=torch, model=m)["first"] for m in models], models)


@pytest.mark.slow
def test_a_backend_object_of_its_own_can_be_reset() -> None:
    model = fresh_gqa()
    compiled = run(TWO, torch=torch, model=model)["first"]
    next_ids(compiled, PROMPT, None)
    with torch.no_grad():
        model.lm_head.weight.mul_(-1.0)
    with pytest.raises(RuntimeFault, match="1 weights changed"):
        next_ids(compiled, PROMPT, None)
    torch._dynamo.reset()
    assert torch.equal(next_ids(compiled, PROMPT, None), next_ids(model, PROMPT, None))


def test_generate(steps: list[int]) -> None:
    model, reference = fresh_gqa(), tiny_gqa()
    compiled = compiled_with(model)
    assert torch.equal(generated(compiled), generated(reference)) and steps == []
    found = run(IN_PLACE, model=model, prompt=PROMPT)["sequences"]
    assert torch.equal(found, generated(reference)) and len(steps) == 8
    mask = torch.ones_like(PROMPT)
    mask[0, :3] = 0
    assert torch.equal(generated(model, mask), generated(reference, mask)) and len(steps) == 16


def new_cache(kind: Callable[..., Any], **more: Any) -> Any:
    with torch.inference_mode():
        return kind(config=tiny_gqa().config, **more)


@pytest.mark.slow
def test_caches_of_inference_mode() -> None:
    model = tiny_gqa()
    compiled = compiled_with(model)
    dynamic, static = new_cache(DynamicCache), new_cache(StaticCache, max_cache_len=20)
    early = new_cache(StaticCache, max_cache_len=20)
    with torch.inference_mode():
        early.early_initialization(2, 4, 10, torch.float64, torch.device("cpu"))
    for cache in (static, early):
        with pytest.raises(RuntimeFault, match="inference_mode"):
            next_ids(compiled, PROMPT, cache)
    with torch.inference_mode():
        with pytest.raises(RuntimeFault, match="edits can't be seen"):
            next_ids(compiled, PROMPT, early)
        for cache in (dynamic, static):
            ids = next_ids(compiled, PROMPT, cache)
            ids = next_ids(compiled, ids, cache)
            cache.layers[0].keys.zero_()
            with pytest.raises(RuntimeFault, match="written in place"):
                next_ids(compiled, ids, cache)


def test_the_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny_gqa()
    run(EXPORT, model=model)
    compiled = helix_compile(tmp_path / "step.pt2", cp=4, max_seq_len=64)
    with torch.no_grad():
        expected = model(PROMPT).logits
    assert (compiled(PROMPT) - expected).abs().max() <= 1e-10 * expected.abs().max()
