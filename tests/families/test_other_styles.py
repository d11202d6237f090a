"""W_UK and W_UV outside one linear: own linears, stacked weights, einsum scores, absorbed by the author. One capture for all."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helix_compile import HelixModule, MatchError, verify
from helix_compile.capture import capture
from helix_compile.matches import AttentionMatch, MatchFailure
from helix_compile.params import cut_param
from helix_compile.passes.match_mla import find_mla
from tests.support.driver import random_ids
from tests.support.family_run import compiled_family, run_family
from tests.support.numerics import LIMIT
from tests.support.toy_mla import NOPE, H, R, V, toy_layers, toy_model

STYLES = (
    "separate", "stacked_bmm", "stacked_hdr", "flat", "chain", "absorbed", "absorbed_stacked",
)  # fmt: skip


@cache
def model_of_styles() -> Any:
    """Kept, so that its capture is."""
    return toy_layers(*((style, "") for style in STYLES))


@cache
def site(style: str) -> AttentionMatch:
    body = capture(model_of_styles()).bodies[f"body_{STYLES.index(style)}"]
    (match,) = find_mla(body.graph)
    assert isinstance(match, AttentionMatch), match
    return match


def expected_weights(style: str) -> tuple[Tensor, Tensor]:
    """W_UK [H, NOPE, R] and W_UV [H, V, R] of a toy, from how it computes."""
    toy = model_of_styles().model.layers[STYLES.index(style)].self_attn
    if style == "separate":
        return toy.k_only.weight.view(H, NOPE, R), toy.v_only.weight.view(H, V, R)
    if style in ("stacked_bmm", "chain"):
        k, v = toy.uk.mT, toy.uv.mT
        both = toy.kv.weight.view(H, NOPE + V, R)
        return (k, v) if style == "stacked_bmm" else (both[:, :NOPE], both[:, NOPE:])
    if style == "stacked_hdr":
        return toy.uk_rows, toy.uv_rows
    if style == "flat":
        return toy.uk_flat.view(R, H, NOPE).permute(1, 2, 0), toy.uv_flat.view(R, H, V).permute(1, 2, 0)  # fmt: skip
    if style == "absorbed_stacked":
        return toy.uk_rows, toy.uv.mT
    both = toy.kv.weight.view(H, NOPE + V, R)
    return both[:, :NOPE], both[:, NOPE:]


@pytest.mark.parametrize("style", STYLES)
def test_the_match_says_where_w_uk_and_w_uv_are(style: str) -> None:
    params = dict(model_of_styles().model.layers[STYLES.index(style)].named_parameters())
    for weight, wanted in zip((site(style).w_uk, site(style).w_uv), expected_weights(style), strict=True):  # fmt: skip
        assert torch.equal(weight.of(params[weight.param]), wanted)


@pytest.mark.parametrize(
    ("cp", "options"),
    [(1, {}), (2, {"tpa": 2}), (4, {"v_up": "after"}), (4, {"q_proj": "gather", "merge": "ag_rs"})],
    ids=str,
)
def test_every_style_computes_the_same(cp: int, options: dict[str, Any]) -> None:
    model = model_of_styles()
    compiled = compiled_family(model, cp, **options)
    run = run_family(model, compiled)
    assert run.worst <= LIMIT[torch.float64] and run.same_tokens
    check_shards(compiled)


def check_shards(compiled: HelixModule) -> None:
    """A rank holds W of its heads, as a view of the original; put together, ranks hold W once for each copy."""
    plan, layout = compiled.plan, compiled.plan.layout
    whole = dict(model_of_styles().named_parameters())
    storages = {p.untyped_storage().data_ptr() for p in whole.values()}
    for index, style in enumerate(STYLES):
        prefix, match = f"model.layers.{index}.", site(style)
        for suffix, weight, wanted in zip(
            ("w_uk", "w_uv"), (match.w_uk, match.w_uv), expected_weights(style), strict=True
        ):
            shard = plan.body(f"body_{index}").shard(f"{weight.param}.{suffix}")
            assert shard is not None
            axis = shard.cuts[0].axis
            heads = H // layout.size(axis)
            for rank in range(layout.world_size):
                held = compiled.ranks[rank].params[f"{prefix}{weight.param}.{suffix}"]
                assert torch.equal(held, cut_param(whole[prefix + weight.param].detach(), shard, layout, rank))  # fmt: skip
                assert held.untyped_storage().data_ptr() in storages
                mine = held.permute([weight.order.index(c) for c in "hdr"])
                first = layout.index(axis, rank) * heads
                assert torch.equal(mine, wanted[first : first + heads])
    uncut = sum(p.numel() * p.itemsize for n, p in compiled.ranks[0].params.items())
    assert plan.params_bytes_per_rank == uncut


def test_the_verifier_accepts_every_style_and_rejects_a_head_of_another(tmp_path: Path) -> None:
    """A saved module runs bit for bit; with W_UV of the chain's heads turned by one it is neither close nor accepted."""
    model = model_of_styles()
    compiled = compiled_family(model, 2)
    report = verify(compiled, model)
    assert report.ok, str(report)
    compiled.save(tmp_path / "saved")
    loaded = HelixModule.load(tmp_path / "saved")
    ids = random_ids(model, 2, 5)
    assert torch.equal(loaded(ids), compiled(ids))
    layer, name = STYLES.index("absorbed_stacked"), site("absorbed_stacked").w_uv.param
    for rank in loaded.ranks:
        full = f"model.layers.{layer}.{name}.w_uv"
        rank.params[full] = rank.params[full].roll(1, 0)
    loaded.reset()
    assert run_family(model, loaded).worst > 1e-6
    loaded.reset()
    assert not verify(loaded, model).ok


MISSES = {
    ("separate", "v_uncached"): "the input of the linear that makes V is not what the layer caches",
    ("separate", "v_elsewhere"): "no part of K derives from a linear over the cached latent that V is made from",
    ("separate", "shifted"): "the cached latent has heads or is permuted before it is expanded",
    ("stacked_bmm", "rope_per_head"): "the rope part differs per head",
    ("chain", "rope_per_head"): "the rope part differs per head",
    ("chain", "scaled_keys"): r"the score chain holds `aten\.mul\.Tensor`",
    ("chain", "softmax_axis"): r"the softmax runs over dim 2 of \[B, T, H, S\], not over the keys",
    ("chain", "sinks"): r"part of the softmax is cut off|score chain holds `aten\.cat\.default`",
    ("eager", "softmax_axis"): "the softmax runs over dim 1, not over the keys",
    ("absorbed", "rope_per_head"): "K of absorbed attention is not what the layer caches, but `linear",
    ("absorbed", "scaled_keys"): r"the score chain holds `aten\.mul\.Tensor`",
    ("absorbed", "v_uncached"): "V of absorbed attention is not what the layer caches, but `mul",
    ("absorbed", "shifted"): "V: an element comes from another position",
    ("absorbed", "v_heads"): "W_UV is computed, not a view of a parameter",
}  # fmt: skip
FIRST = (
    ("separate", "v_uncached"), ("chain", "rope_per_head"), ("chain", "scaled_keys"), ("chain", "softmax_axis"),
    ("absorbed", "rope_per_head"), ("absorbed", "shifted"), ("absorbed", "v_heads"),
)  # fmt: skip


@pytest.mark.parametrize(
    "misses",
    [FIRST, pytest.param(tuple(m for m in MISSES if m not in FIRST), marks=pytest.mark.slow)],
    ids=["some", "others"],
)
def test_near_misses_are_refused_with_their_reason(misses: tuple[tuple[str, str], ...]) -> None:
    captured = capture(toy_layers(*misses))
    for layer, miss in enumerate(misses):
        (failure,) = find_mla(captured.bodies[f"body_{layer}"].graph)
        assert isinstance(failure, MatchFailure), miss
        assert re.search(MISSES[miss], failure.reason), (miss, failure)


@pytest.mark.slow
@pytest.mark.parametrize("style", ["eager", "chain", "absorbed"])
def test_a_bias_in_the_mask_is_refused(style: str) -> None:
    with pytest.raises(MatchError, match="adds other numbers than 0 to scores of visible keys"):
        compiled_family(toy_model(style, "bias"), 2)
