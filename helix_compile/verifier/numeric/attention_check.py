"""What reaches o_proj, against dense attention in fp64 over what the ranks' caches hold, with the ranks' own q."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from helix_compile.ir.stage import body_of
from helix_compile.kernels.exchange import codec_of
from helix_compile.layout.degrees import HelixLayout
from helix_compile.plan.matches import AttentionMatch
from helix_compile.verifier.contract import head_places
from helix_compile.verifier.decodes import decodes_by_site
from helix_compile.verifier.numeric.layer_run import CapturedReference, LayerRun, attention_output
from helix_compile.verifier.numeric.scratch import Scratch
from helix_compile.verifier.numeric.site_terms import seen_by, terms_of
from helix_compile.verifier.report import Finding, numeric_finding

# rel-RMSE of one attention output on identical inputs; bf16: correct runs reach 0.0018, the weakest fault 0.0117
ATTENTION = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}


def check_attention(
    run: LayerRun,
    attention: AttentionMatch,
    scratch: Scratch,
    site: int,
    reference: CapturedReference,
    layer: int,
    where: str,
    keys: Tensor | None = None,
) -> list[Finding]:
    """What reaches o_proj against dense attention over the gathered caches with the module's own q, in fp64.

    Args:
        keys: [B, T, n] by position, what the ranks chose; None: a query sees all keys before it.
    """
    body = body_of(scratch.graph, reference.call(layer).target)
    number, decodes = reference.sites(layer).index(site), decodes_by_site(body.graph)
    o_proj = next((n for n in body.graph.nodes if n.name == attention.o_proj), None)
    if number >= len(decodes) or o_proj is None:
        return []  # another graph than the passes make: the layer's output decides
    parts = decodes[number]
    decode = parts[0]
    layout, dtype = scratch.compiled.plan.layout, getattr(torch, scratch.compiled.plan.dtype)
    w_uv = None
    if attention.kind.v_up is not None:
        whole = reference.tensors[reference.prefix(layer) + attention.kind.v_up.param]
        w_uv = attention.kind.v_up.of(whole.double())
    places = head_places(attention.num_heads, attention.cache.heads, layout)
    sinks = None
    if attention.sinks is not None:
        # as the ranks hold them: rounding a logit moves a weight by as much
        whole = reference.tensors[reference.prefix(layer) + attention.sinks.name].to(dtype).double()
        sinks = torch.stack([whole.new_zeros(()) if h is None else whole[h] for h in places])
    owned = [v[attention_output(o_proj, attention).name] for v in run.values]
    queries = [terms_of(attention, layout).local_query(decode, v) for v in run.values]
    heads = len(places) // layout.world_size
    pooled, norm, worst = 0.0, 0.0, (0.0, 0, 0, 0)
    limit = ATTENTION[dtype] + codec_of(scratch.compiled.plan.options).noise
    for rank, o in enumerate(owned):
        tpa = rank // layout.kvp
        first = 0 if scratch.sites[site].ring else rank * heads - tpa * layout.kvp * heads
        mine = places[rank * heads : (rank + 1) * heads]
        for row, length in enumerate(scratch.lengths):
            entries = scratch.gathered(site, row, length, rank).double()
            q = queries[rank][row, :, first : first + heads]
            own = None if sinks is None else sinks[rank * heads : (rank + 1) * heads]
            seen = _seen(attention, q.shape[0], torch.arange(length), length, keys, row)
            v = _dense(q, entries, attention, seen, first, layout, own)
            if w_uv is not None:
                raised_by = [w_uv.new_zeros(w_uv.shape[1:]) if h is None else w_uv[h] for h in mine]
                v = torch.einsum("thr,hvr->thv", v, torch.stack(raised_by))
            # what a zero head attends to meets zeros of o_proj; a sink of it is none of the model's
            own_heads = [place for place, head in enumerate(mine) if head is not None]
            got, v = o[row].reshape(*v.shape).double()[:, own_heads], v[:, own_heads]
            error = (got - v).square().sum(dim=(1, 2))
            pooled, norm = pooled + float(error.sum()), norm + float(v.square().sum())
            relative = (error / v.square().sum(dim=(1, 2)).clamp(min=1e-300)).sqrt().nan_to_num(torch.inf)
            if float(relative.max()) > worst[0]:
                t = int(relative.argmax())
                worst = (float(relative.max()), rank, row, length - relative.shape[0] + t)
    rel = (pooled / norm) ** 0.5 if norm and pooled == pooled else float("inf")
    if rel <= limit:
        return []
    culprit, family = _blame(run, attention, scratch, site, parts, ATTENTION[dtype], keys)
    at = f"{where}, rank {worst[1]}, sequence {worst[2]}, position {worst[3]}, node `{decode.name}`"
    got = f"rel-RMSE {rel:.2e} (worst token {worst[0]:.2e}); {culprit}"
    return [numeric_finding("HX402", at, got, f"at most {limit:.0e}", family)]


def _blame(
    run: LayerRun,
    attention: AttentionMatch,
    scratch: Scratch,
    site: int,
    parts: list[fx.Node],
    limit: float,
    keys: Tensor | None,
) -> tuple[str, int]:
    """Which half is wrong: a rank's own attention over its shard (`parts`, one op or one for each part of the batch), or what is made
    of the ranks' partial outputs.
    """
    layout, decode = scratch.compiled.plan.layout, parts[0]
    for rank, values in enumerate(run.values):
        q = terms_of(attention, layout).local_query(decode, values)
        o, lse = _merged(*(torch.cat([values[p.name][i].double() for p in parts]) for i in range(2)))
        for row, length in enumerate(scratch.lengths):
            T = q.shape[1]
            mine = [*scratch.hand(site, length, rank)]
            held = scratch.shard(site, row, rank, length).double()
            seen = _seen(attention, T, torch.tensor(mine, dtype=torch.int64), length, keys, row)
            s = _scores(q[row], held, attention, seen)
            expected = torch.logsumexp(s, dim=-1)
            at = f"`{decode.name}` on rank {rank}, sequence {row} ({len(mine)} local keys)"
            alive = expected > -torch.inf
            if not torch.equal(alive, lse[row] > -torch.inf) or bool(lse[row].isnan().any()):
                return f"{at} says the wrong shards are empty", 5
            wanted = terms_of(attention, layout).weighted(s.softmax(-1).nan_to_num(0), held)
            norm = max(float(wanted.square().sum()), 1e-300)
            off = (float((o[row] - wanted)[alive].square().sum()) / norm) ** 0.5
            apart = float((lse[row] - expected)[alive].abs().max()) if bool(alive.any()) else 0.0
            lse_is_right = apart <= max(limit, 1e-3)
            if not off <= 2 * limit:
                # other keys, or other scores, would show in the statistics too
                family = 6 if lse_is_right else 4
                return (f"{at}: its partial output is wrong, its lse {'right' if lse_is_right else 'too'}", family)
            if not lse_is_right:
                return f"{at}: its lse is wrong", 6
    return "each rank's own part is right: the exchange or the merge is wrong", 6


def _merged(o: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """One part a row: a kernel may leave the parts of its splits, o [B, T, H, S, R] and lse [B, T, H, S]."""
    if lse.dim() == 3:
        return o, lse
    whole = torch.logsumexp(lse, dim=3)
    shares = torch.where(lse > -torch.inf, lse - whole[..., None], -torch.inf).exp()
    return torch.where(shares[..., None] > 0, o, 0.0).mul(shares[..., None]).sum(dim=3), whole


def _dense(
    q: Tensor,
    entries: Tensor,
    attention: AttentionMatch,
    seen: Tensor,
    first_head: int,
    layout: HelixLayout,
    sinks: Tensor | None,
) -> Tensor:
    """Attention of q [T, h, *] over the entries [length, *] that each of T tokens sees; sinks [h] beside the keys."""
    scores, length = _scores(q, entries, attention, seen), len(entries)
    if sinks is not None:
        scores = torch.cat([scores, sinks[None, :, None].expand(*scores.shape[:2], 1)], dim=-1)
    return terms_of(attention, layout).weighted(scores.softmax(-1)[..., :length], entries, first_head)


def _seen(attention: AttentionMatch, T: int, positions: Tensor, length: int, keys: Tensor | None, row: int) -> Tensor:
    """[T, n]: which of the keys at these positions [n] each of a sequence's last T tokens sees."""
    if keys is not None:
        return keys[row, -T:][:, positions]
    return seen_by(attention, torch.arange(length - T, length), positions)


def _scores(q: Tensor, entries: Tensor, attention: AttentionMatch, seen: Tensor) -> Tensor:
    """[T, h, S]; -inf where seen [T, S] is False. An index key behind an entry has no part in them."""
    s = torch.einsum("thw,sw->ths", q, entries[:, : q.shape[-1]]) * attention.scale
    return s.masked_fill(~seen[:, None], -torch.inf)
