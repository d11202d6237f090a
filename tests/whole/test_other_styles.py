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
from helix_compile.capture.model import capture
from helix_compile.passes.match.attention import find_attention
from helix_compile.plan.matches import AttentionMatch, Latent, MatchFailure
from tests.support.driver import random_ids
from tests.support.family_run import compiled_family, run_family
from tests.support.numerics import LIMIT
from tests.support.toy_mla import NOPE, H, R, ToyMLA, V, toy_layers, toy_model

STYLES = ("separate", "stacked_bmm", "flat", "chain", "absorbed", "split")
MORE = ("stacked_hdr", "absorbed_stacked", "split_einsum")
SETS = [pytest.param(STYLES, id="styles"), pytest.param(MORE, id="more", marks=pytest.mark.slow)]


@cache
def model_of(styles: tuple[str, ...]) -> Any:
    """One style a layer; kept, so that its capture is."""
    return toy_layers(*((style, "") for style in styles))


@cache
def sites(styles: tuple[str, ...]) -> dict[str, Latent]:
    found = {}
    for layer, style in enumerate(styles):
        (match,) = find_attention(capture(model_of(styles)).bodies[f"body_{layer}"].graph)
        assert isinstance(match, AttentionMatch) and isinstance(match.kind, Latent), match
        found[style] = match.kind
    return found


def expected_weights(style: str, toy: ToyMLA) -> tuple[Tensor, Tensor]:
    """W_UK [H, NOPE, R] and W_UV [H, V, R] of a toy, from how it computes."""
    both = toy.kv.weight.view(H, NOPE + V, R)
    by_column = [w.view(R, H, -1).permute(1, 2, 0) for w in (toy.uk_flat, toy.uv_flat)]
    return {
        "separate": (toy.k_only.weight.view(H, NOPE, R), toy.v_only.weight.view(H, V, R)),
        "stacked_bmm": (toy.uk.mT, toy.uv.mT),
        "stacked_hdr": (toy.uk_rows, toy.uv_rows),
        "flat": (by_column[0], by_column[1]),
        "absorbed_stacked": (toy.uk_rows, toy.uv.mT),
    }.get(style, (both[:, :NOPE], both[:, NOPE:]))


@pytest.mark.parametrize("styles", SETS)
@pytest.mark.parametrize(
    ("cp", "options"),
    [(1, {}), (2, {"tpa": 2}), (4, {"v_up": "after"}), (4, {"q_proj": "gather", "merge": "ag_rs"})],
    ids=str,
)
def test_every_style_computes_the_same(styles: tuple[str, ...], cp: int, options: dict[str, Any]) -> None:
    model = model_of(styles)
    compiled = compiled_family(model, cp, **options)
    run = run_family(model, compiled)
    assert run.worst <= LIMIT[torch.float64] and run.same_tokens
    check_shards(compiled, model, styles)


def check_shards(compiled: HelixModule, model: Any, styles: tuple[str, ...]) -> None:
    """A rank holds W_UK and W_UV of its heads, as views of the original; the plan counts their bytes."""
    plan, layout = compiled.plan, compiled.plan.layout
    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    for index, (style, kind) in enumerate(sites(styles).items()):
        layer = model.model.layers[index]
        expected = expected_weights(style, layer.self_attn)
        for weight, suffix, wanted in zip((kind.w_uk, kind.w_uv), ("w_uk", "w_uv"), expected, strict=True):
            name = f"{weight.param}.{suffix}"
            assert weight.name == name
            assert torch.equal(weight.of(layer.get_parameter(weight.param)), wanted)
            shard = plan.body(f"body_{index}").shard(name)
            assert shard is not None
            heads = H // layout.size(shard.cuts[0].axis)
            for rank in compiled.ranks:
                held = rank.params[f"model.layers.{index}.{name}"]
                assert held.untyped_storage().data_ptr() in storages
                first = layout.index(shard.cuts[0].axis, rank.rank) * heads
                mine = held.permute([weight.order.index(c) for c in "hdr"])
                assert torch.equal(mine, wanted[first : first + heads])
    for rank in compiled.ranks:
        held = sum(p.numel() * p.itemsize for p in rank.params.values())
        assert plan.params_bytes_per_rank == held


@pytest.mark.parametrize("styles", SETS)
def test_the_verifier_and_a_reload_take_every_style(styles: tuple[str, ...], tmp_path: Path) -> None:
    """A saved module runs bit for bit; with the heads of one W_UV turned by one it is neither close nor accepted."""
    model = model_of(styles)
    compiled = compiled_family(model, 2)
    report = verify(compiled, model)
    assert report.ok, str(report)
    compiled.save(tmp_path / "saved")
    loaded = HelixModule.load(tmp_path / "saved")
    ids = random_ids(model, 2, 5)
    assert torch.equal(loaded(ids), compiled(ids))
    last = len(styles) - 1
    name = f"model.layers.{last}.{sites(styles)[styles[last]].w_uv.param}.w_uv"
    for rank in loaded.ranks:
        rank.params[name] = rank.params[name].roll(1, 0)
    loaded.reset()
    assert run_family(model, loaded).worst > 1e-6
    loaded.reset()
    assert not verify(loaded, model).ok


MISSES = {
    ("separate", "v_uncached"): "the input of the linear that makes V is not what the layer caches",
    ("separate", "v_elsewhere"): "no part of K derives from a linear over the cached latent that V is made from",
    ("separate", "shifted"): "V: an element comes from another position",
    ("stacked_bmm", "rope_per_head"): "the rope part differs per head",
    ("chain", "rope_per_head"): "the rope part differs per head",
    ("chain", "scaled_keys"): r"the score chain holds `aten\.mul\.Tensor`",
    ("chain", "softmax_axis"): r"the softmax runs over dim 2 of \[B, T, H, S\], not over the keys",
    ("chain", "two_sinks"): r"part of the softmax is cut off|score chain holds `aten\.cat\.default`",
    ("eager", "softmax_axis"): r"the softmax runs over dim 1 of \[B, H, T, S\], not over the keys",
    ("absorbed", "rope_per_head"): "K of absorbed attention is not what the layer caches, but `linear",
    ("absorbed", "scaled_keys"): r"the score chain holds `aten\.mul\.Tensor`",
    ("absorbed", "v_uncached"): "V of absorbed attention is not what the layer caches, but `mul",
    ("absorbed", "shifted"): "V: an element comes from another position",
    ("absorbed", "v_heads"): "W_UV is computed, not a view of a parameter",
    ("split", "rope_per_head"): "the rope part differs per head",
    ("split", "one_scaled"): r"scales \[0\.125, 0\.25\]",
    ("split", "mixed_parts"): "both products of the scores read K from `linear|one product of the scores reads both",
    ("split", "scaled_keys"): r"the score chain holds `aten\.mul\.Tensor`",
    ("split", "v_uncached"): "the input of the linear that makes V is not what the layer caches",
    ("split", "v_elsewhere"): "no part of K derives from a linear over the cached latent that V is made from",
    ("split", "shifted"): "V: an element comes from another position",
    ("split", "softmax_axis"): r"the softmax runs over dim 1 of \[B, H, T, S\], not over the keys",
    ("split", "two_sinks"): r"part of the softmax is cut off|score chain holds `aten\.cat\.default`",
    ("split", "fill_mask"): r"the scores are masked by `aten\.masked_fill\.Scalar`, expected a mask that is added",
    ("eager", "fill_mask"): r"the scores are masked by `aten\.masked_fill\.Scalar`, expected a mask that is added",
    ("eager", "where_mask"): r"the scores are masked by `aten\.where\.\w+`, expected a mask that is added",
}
FIRST = (
    ("separate", "v_uncached"),
    ("chain", "rope_per_head"),
    ("chain", "softmax_axis"),
    ("absorbed", "shifted"),
    ("split", "rope_per_head"),
    ("split", "one_scaled"),
    ("split", "mixed_parts"),
    ("eager", "fill_mask"),
)


@pytest.mark.parametrize(
    "misses",
    [FIRST, pytest.param(tuple(m for m in MISSES if m not in FIRST), marks=pytest.mark.slow)],
    ids=["some", "others"],
)
def test_near_misses_are_refused_with_their_reason(misses: tuple[tuple[str, str], ...]) -> None:
    captured = capture(toy_layers(*misses))
    for layer, miss in enumerate(misses):
        (failure,) = find_attention(captured.bodies[f"body_{layer}"].graph)
        assert isinstance(failure, MatchFailure), miss
        assert re.search(MISSES[miss], failure.reason), (miss, failure)


@pytest.mark.slow
@pytest.mark.parametrize("style", ["eager", "chain", "absorbed"])
def test_a_bias_in_the_mask_is_refused(style: str) -> None:
    with pytest.raises(MatchError, match="adds other numbers than 0 to scores of visible keys"):
        compiled_family(toy_model(style, "bias"), 2)
