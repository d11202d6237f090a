"""What reads the cache, its length or the mask outside of attention is refused with its line, not met by a pass."""

from __future__ import annotations

import inspect

import pytest

from helix_compile import MatchError
from helix_compile.capture.model import capture
from helix_compile.passes.match.attention import find_attention
from helix_compile.passes.match.context import check_context
from tests.support import toy_mla
from tests.support.family_run import compiled_family

MISSES = {
    "cache_out": ("sum.dim_IntList", "what is cached (`past_latent_0`)"),
    "length_out": ("add.Tensor", "how much is cached (`past_"),
    "mask_out": ("sum.dim_IntList", "the attention mask, or how much is cached (`attention_mask`)"),
}


def test_each_reader_is_named_with_its_line() -> None:
    captured = capture(toy_mla.toy_layers(*(("cat", miss) for miss in ("", *MISSES))))
    lines = inspect.getsource(toy_mla).splitlines()  # torch.export keeps the lines of forward alone
    line = 1 + next(i for i, source in enumerate(lines) if "return self._more(" in source)
    for body, miss in zip(captured.bodies, ("", *MISSES), strict=True):
        sites = find_attention(captured.bodies[body].graph)
        if not miss:
            check_context(captured, body, sites)  # type: ignore[arg-type] # they are no failures
            continue
        with pytest.raises(MatchError) as caught:
            check_context(captured, body, sites)  # type: ignore[arg-type]
        op, what = MISSES[miss]
        message = str(caught.value)
        assert f"aten.{op}, toy_mla.py:{line})" in message and what in message, message
        assert "nearest that works: compute it from the new tokens" in message


def test_helix_compile_refuses_it() -> None:
    with pytest.raises(MatchError, match=r"layer 0: node `add_\d+` .*reads how much is cached"):
        compiled_family(toy_mla.toy_model("cat", "length_out"), 2)
