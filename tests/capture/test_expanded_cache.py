"""K and V of every head are cached though both are expanded from one latent (transformers 5.17's sparse MLA): the latent is cached.

By toys, so that every version of transformers shows it: those that this family has from 5.18 on cache the latent themselves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from helix_compile import CapturedGraph
from helix_compile.capture.model import capture
from helix_compile.ir.cache_argument import CACHE_NAMES
from helix_compile.ir.graph import inputs_of
from helix_compile.passes.match.layers import match_bodies
from tests.support.family_run import compiled_family, run_family
from tests.support.numerics import LIMIT
from tests.support.toy_mla import NOPE, ROPE, H, R, ToyMLA, V, rotated, toy_model


class HeadsCached(ToyMLA):
    """Caches what it expands a token's latent into.

    `miss`: "rope_per_head"; "mixed" (V is the last token's for all); "added" (K is computed behind the linear).
    """

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, attention_mask: Tensor, position_embeddings: tuple[Tensor, Tensor], **kwargs: Any
    ) -> tuple[Tensor, None]:
        cache = kwargs[next(name for name in CACHE_NAMES if name in kwargs)]  # 5.24 renamed it
        B, T, _ = hidden_states.shape
        q_a, latent, k_rope = self.a(hidden_states).split([28, R, ROPE], dim=-1)
        cos, sin = (t[:, None, :, :ROPE] for t in position_embeddings)
        q = self.q(q_a).view(B, T, H, NOPE + ROPE).transpose(1, 2)
        q = torch.cat([q[..., :NOPE], rotated(q[..., NOPE:], cos, sin)], dim=-1)
        rope = rotated(k_rope[:, None], cos, sin)
        if self.miss == "rope_per_head":
            rope = self.k_heads(rope[:, 0]).view(B, T, H, ROPE).transpose(1, 2)
        k_nope, v = self._expanded(latent)
        if self.miss == "mixed":
            v = v[:, :, -1:].expand(-1, -1, T, -1)
        if self.miss == "added":
            k_nope = k_nope + 1.0
        k = k_nope.new_empty(B, H, T, NOPE + ROPE)  # as transformers writes it
        k[..., :NOPE].copy_(k_nope)
        k[..., NOPE:].copy_(rope.expand(-1, H, -1, -1))
        k, v = cache.update(k, v, self.layer)
        return self.o(self._attended(q, k, v, attention_mask).transpose(1, 2).reshape(B, T, H * V)), None


def model_with(*misses: str) -> Any:
    """A dense model whose layers cache K and V of every head, fp64."""
    model = toy_model("cat", layers=len(misses))
    torch.manual_seed(3)
    for layer, miss in enumerate(misses):
        model.model.layers[layer].self_attn = HeadsCached("cat", miss, layer).double().eval()
    return model


def cached_of(captured: CapturedGraph) -> list[list[tuple[int, int]]]:
    """(heads, width) of K and V, or of latent and rope part, of each body."""
    shapes = [[n.meta["val"].shape for n in inputs_of(body.graph, "past")] for body in captured.bodies.values()]
    return [[(int(shape[1]), int(shape[3])) for shape in pair] for pair in shapes]


def test_the_latent_is_cached_and_the_model_computes_the_same() -> None:
    model = model_with("")
    captured = capture(model)
    assert cached_of(captured) == [[(1, R), (1, ROPE)]]
    (note,) = (n for n in captured.notes if "K and V of every head" in n)
    assert f"({H * (NOPE + ROPE + V)} numbers a token and layer)" in note and f"({R + ROPE})" in note
    compiled = compiled_family(model, 2, tpa=2)
    assert {cache.shape[-1] for rank in compiled.ranks for cache in rank.cache} == {R + ROPE}
    run = run_family(model, compiled)
    assert run.worst <= LIMIT[torch.float64] and run.same_tokens


def test_what_is_no_expansion_of_one_tokens_latent_stays_as_it_is() -> None:
    """One capture for all; no other cache would do, so that no layer is recognised."""
    misses = ("rope_per_head", "mixed", "added")
    captured = capture(model_with(*misses))
    assert cached_of(captured) == [[(H, NOPE + ROPE), (H, V)]] * len(misses)
    matches, failures = match_bodies(captured, 64)
    assert not matches and len(failures) == len(misses)
