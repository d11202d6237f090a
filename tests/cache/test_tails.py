"""What a batch leaves behind its lengths never reaches a later result, NaN included, however it was given up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from helix_compile import HelixModule, helix_compile
from helix_compile.models.presets import build_model, preset_config
from tests.support.gqa_models import fresh_gqa

BAD = 7  # a token whose embedding is infinite: what it leaves in the cache is NaN


def mla() -> Any:
    config = preset_config("tiny")
    config.num_hidden_layers = 1
    return build_model(config, dtype=torch.float32)


def overflowing(make: Callable[[], Any], lower: str) -> HelixModule:
    model = make()
    with torch.no_grad():
        model.model.embed_tokens.weight[BAD] = float("inf")
    return helix_compile(model, cp=2, tokens_per_block=4, max_seq_len=64, max_batch_size=2, lower=lower)


def clean(batch: int, columns: int) -> torch.Tensor:
    return torch.randint(BAD + 1, 90, (batch, columns), generator=torch.Generator().manual_seed(0))


def reset(compiled: HelixModule) -> torch.Tensor:
    compiled(torch.full((2, 40), BAD))
    compiled.reset()
    return compiled(clean(2, 7))


def reset_a_row(compiled: HelixModule) -> torch.Tensor:
    ids = torch.cat([torch.full((1, 40), BAD), clean(1, 40)])
    compiled(ids)
    compiled.reset(rows=[0])
    return compiled(clean(2, 7), torch.tensor([[1] * 7, [0] * 7]))[:1]


def smaller_batch_then_larger(compiled: HelixModule) -> torch.Tensor:
    compiled(torch.full((2, 40), BAD))
    compiled.reset()
    compiled(clean(1, 3))
    compiled.reset()
    return compiled(clean(2, 7))


def truncate(compiled: HelixModule) -> torch.Tensor:
    compiled(clean(2, 7)[:, :6])
    compiled(torch.full((2, 9), BAD))
    compiled.truncate(6)
    return compiled(clean(2, 7)[:, 6:])


def import_over(compiled: HelixModule) -> torch.Tensor:
    compiled(clean(2, 7)[:, :6])
    entries = compiled.export_cache()
    compiled.reset()
    compiled(torch.full((2, 40), BAD))
    compiled.import_cache(*entries)
    return compiled(clean(2, 7)[:, 6:])


def failed_step(compiled: HelixModule) -> torch.Tensor:
    compiled(clean(2, 7)[:, :6])
    run, calls = compiled.world.run, []

    def fails(*args: Any, **kwargs: Any) -> Any:
        calls.append(run(*args, **kwargs))
        raise KeyboardInterrupt

    object.__setattr__(compiled.world, "run", fails)
    with pytest.raises(KeyboardInterrupt):
        compiled(torch.full((2, 9), BAD))
    object.__setattr__(compiled.world, "run", run)
    return compiled(clean(2, 7)[:, 6:])


WAYS = [reset, reset_a_row, smaller_batch_then_larger, truncate, import_over, failed_step]
MODELS = {"mla": mla, "gqa": lambda: fresh_gqa("llama", num_hidden_layers=1, dtype=torch.float32)}
# the interpreter is slow: in CI kernels see one way a model
CASES = [
    pytest.param(
        way,
        make,
        lower,
        id=f"{way.__name__}-{name}-{lower}",
        marks=[]
        if (lower == "reference" and way in (truncate, import_over, failed_step)) or way in few
        else pytest.mark.slow,
    )
    for way in WAYS
    for (name, make), few in zip(MODELS.items(), ((truncate,), (reset,)), strict=True)
    for lower in ("reference", "triton")
]


@pytest.mark.parametrize(("give_up", "make", "lower"), CASES)
def test_a_nan_that_was_given_up_is_gone(give_up: Callable[[HelixModule], torch.Tensor], make: Any, lower: str) -> None:
    compiled = overflowing(make, lower)
    got = give_up(compiled)
    fresh = overflowing(make, lower)
    expected = fresh(clean(2, 7))[: got.shape[0], -got.shape[1] :]
    assert got.isfinite().all()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
