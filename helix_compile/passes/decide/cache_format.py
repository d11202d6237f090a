"""What the cache is in, and the bytes that a token takes there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fractions import Fraction

from helix_compile.capture.captured import CapturedGraph
from helix_compile.config.options import FP8_DS_MLA, FP8_E4M3, PAGE_SIZE, HelixOptions
from helix_compile.errors import PlanError
from helix_compile.layout.degrees import HelixLayout
from helix_compile.plan.helix_plan import Decision, number
from helix_compile.plan.matches import AttentionMatch, LayerMatch

_RULES = {
    FP8_E4M3: "as asked: an entry / scale (float32), clamped to +-448, to nearest even; attention reads value * scale",
    FP8_DS_MLA: "as asked: each 128 latent values share the scale amax / 448 (float32, at least 1e-12), the rope part is bfloat16",
}


def kv_bytes_per_token(
    captured: CapturedGraph,
    matches: dict[str, LayerMatch],
    options: HelixOptions,
    layout: HelixLayout,
    rings: Mapping[tuple[str, int], int],
) -> Fraction:
    """Bytes that a token takes in the caches of a rank, on average; all layers together, without those that hold the last tokens alone."""
    rows = (a for site, a in _sites(captured, matches) if site not in rings)
    return sum((_bytes(a, options.cache_dtype, captured, layout) for a in rows), Fraction(0)) / layout.kvp


def ring_bytes(
    captured: CapturedGraph,
    matches: dict[str, LayerMatch],
    options: HelixOptions,
    layout: HelixLayout,
    rings: Mapping[tuple[str, int], int],
) -> int:
    """Bytes that a sequence takes in those of a rank, whatever its length."""
    total = 0
    for site, a in _sites(captured, matches):
        if site in rings:
            parts = min(layout.world_size, a.cache.heads) or 1
            total += rings[site] * PAGE_SIZE * a.cache.stored(options.cache_dtype, captured.dtype, parts).nbytes
    return total


def cache_decision(
    captured: CapturedGraph, matches: dict[str, LayerMatch], options: HelixOptions, layout: HelixLayout
) -> Decision | None:
    """What the cache is in, where that is not the model's dtype.

    Raises:
        PlanError: a format that an attention can't have, another number of scales than of attentions.
    """
    asked, sites = options.cache_dtype, list(_cached(captured, matches))
    if asked == "auto":
        return None
    if asked == FP8_DS_MLA:
        for name, match in matches.items():
            if any(a.cache.heads for a in match.attentions):
                raise PlanError(
                    f"layer {captured.layers_of(name)[0].index}: cache_dtype={asked!r} is a format of latents and rope parts (MLA), and "
                    f"this attention caches K and V; nearest that works: cache_dtype={FP8_E4M3!r}"
                )
    scales = options.cache_scale
    if isinstance(scales, tuple) and len(scales) != len(sites):
        raise PlanError(
            f"option cache_scale: got {len(scales)} numbers, expected one, or {len(sites)}: one for each cached attention, in the "
            "order of the layers"
        )
    inputs = [
        ("bytes_per_token", number(sum((_bytes(a, asked, captured, layout) for a in sites), Fraction(0)))),
        ("bytes_in_dtype_of_model", number(sum((_bytes(a, "auto", captured, layout) for a in sites), Fraction(0)))),
        *((("scale", scales),) if asked == FP8_E4M3 else ()),
    ]
    rule = _RULES[asked]
    if asked == FP8_E4M3 and options.cache_scale == HelixOptions.cache_scale:
        rule += "; scale 1, the default: those that a checkpoint may hold are not read, cache_scale takes them"
    if any(a.cache.index for a in sites):
        rule += "; index keys stay in the model's dtype"
    return Decision("cache_dtype", rule, tuple(inputs), asked)


def _cached(captured: CapturedGraph, matches: dict[str, LayerMatch]) -> Iterator[AttentionMatch]:
    """Every cached attention of the model, in the order of the layers; those that read an earlier one's cache have none."""
    yield from (a for _, a in _sites(captured, matches))


def _sites(captured: CapturedGraph, matches: dict[str, LayerMatch]) -> Iterator[tuple[tuple[str, int], AttentionMatch]]:
    """The same with body and number."""
    for layer in captured.layers:
        yield from (((layer.body, i), a) for i, a in enumerate(matches[layer.body].attentions) if not a.shared)


def _bytes(attention: AttentionMatch, cache_dtype: str, captured: CapturedGraph, layout: HelixLayout) -> Fraction:
    return Fraction(attention.cache.stored(cache_dtype, captured.dtype, layout.tpa).nbytes)
