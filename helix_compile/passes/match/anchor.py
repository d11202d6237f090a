"""Attention in one normal form, softmax(scale * sum of q k + mask) v, however it is spelled.

    scaled_dot_product_attention(q, k, v, mask)                      fused
    softmax(q @ k.transpose(2, 3) * scale + mask, -1) @ v            eager
    softmax(cat([scores, sinks], -1), -1)[..., :-1] @ v              the same with sinks, their maximum taken off or not
    s = einsum("bthd,bshd->bths", q, k) * scale + mask               dims in any order; one product, or a sum of two:
    s = (einsum("bthc,bsc->bths", q_latent, latent) + einsum("bthr,bsr->bths", q_rope, rope)) * scale + mask
    o = einsum("bths,bshd->bthd", softmax(s, -1), v)

Each product is one of letters (contractions.py). Batch, new tokens and context are told by their sizes, which the graph
keeps as symbols, and by the order of dims that matmul alone takes where a size is no symbol; no letter is looked at.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import fx

from helix_compile.ir.elements import is_cache_update, is_cached
from helix_compile.ir.graph import aten, input_ref, is_call, past_dim
from helix_compile.ir.sizes import shape_of
from helix_compile.passes.match.contractions import Product, product_of
from helix_compile.passes.match.reject import Reject, unknown_in_scores
from helix_compile.passes.match.sinks import cat_sinks, is_maximum_of
from helix_compile.plan.matches import HeadRows

SDPA = aten.scaled_dot_product_attention.default
_MATMUL = (aten.matmul.default, aten.bmm.default)
_SOFTMAX = (aten.softmax.int, aten._softmax.default)
_SAME_ELEMENTS = (
    aten._to_copy.default,
    aten.type_as.default,
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
)
_BEHIND_SOFTMAX = (*_SAME_ELEMENTS, aten.expand.default, aten.view.default, aten.slice.Tensor)


@dataclass(frozen=True)
class Operand:
    """A value and the roles of its dims: B, H, T (new tokens), S (context), C (the channel that is summed)."""

    node: fx.Node
    form: str


@dataclass(frozen=True)
class Anchor:
    """One attention. `pairs` are the (q, k) of each product that makes the scores; one, where it is not a sum.

    `form` is the order of dims of the node's own value, `mask_form` that of the scores that the mask is added to.
    `shared_heads`: k and v have fewer heads than q, and the op repeats each one. `sinks`: a parameter that takes part in
    the softmax; `scores`: what the softmax is of, where it is spelled out.
    """

    node: fx.Node
    pairs: tuple[tuple[Operand, Operand], ...]
    v: Operand
    mask: fx.Node | None
    scale: float
    form: str = "BHTV"
    mask_form: str = "BHTS"
    shared_heads: bool = False
    sinks: HeadRows | None = None
    scores: fx.Node | None = None


def ends_attention(node: fx.Node) -> bool:
    """True for a fused attention, and for the product of a softmax over the keys and V."""
    if is_call(node, SDPA):
        return True
    softmax = _softmax_before(node)
    # a softmax that an einsum reads may be one over experts, say
    return softmax is not None and (is_call(node, *_MATMUL) or _Axes(node.graph).has_context(softmax))


def anchor_of(node: fx.Node) -> Anchor:
    """The attention that `node` ends.

    Raises:
        Reject: the chain holds something else, or works on other dims.
    """
    return _fused_anchor(node) if is_call(node, SDPA) else _spelled_anchor(node)


def _fused_anchor(node: fx.Node) -> Anchor:
    q, k, v = node.args[:3]
    mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    if (len(node.args) > 5 and node.args[5]) or node.kwargs.get("is_causal"):
        raise Reject("is_causal without a mask is not the causal mask of a decode step", node, 0)
    scale = node.kwargs.get("scale")
    scale = 1.0 / math.sqrt(shape_of(q)[-1]) if scale is None else float(scale)
    pairs = ((Operand(q, "BHTC"), Operand(k, "BHSC")),)
    return Anchor(node, pairs, Operand(v, "BHSC"), mask, scale, shared_heads=bool(node.kwargs.get("enable_gqa")))


def _softmax_before(node: fx.Node) -> fx.Node | None:
    """The softmax whose result `node` multiplies, through casts, copies and cuts."""
    if not is_call(node, aten.einsum.default, *_MATMUL):
        return None
    source: Any = node.args[1][0] if is_call(node, aten.einsum.default) else node.args[0]
    while is_call(source, *_BEHIND_SOFTMAX):
        source = source.args[0]
    return source if is_call(source, *_SOFTMAX) else None


def _spelled_anchor(node: fx.Node) -> Anchor:
    softmax, last = _softmax_before(node), product_of(node)
    if softmax is None or last is None:
        raise Reject("softmax times V is no sum over one letter", node, 1)
    chain = _Chain()
    _walk(softmax.args[0], 1.0, chain)
    _refuse_cuts(last.a, softmax, bool(chain.sinks))
    axes = _Axes(node.graph)
    found = [axes.scores(product) for product, _ in chain.products]
    scales, forms = {factor for _, factor in chain.products}, {form for *_, form in found}
    if len(scales) != 1 or len(forms) != 1:
        raise Reject(
            f"the products that make the scores have scales {sorted(scales)} and dims {sorted(forms)}", softmax, 1
        )
    (form,), (scale,) = forms, scales
    dim = softmax.args[1] % 4
    if form[dim] != "S":
        raise Reject(f"the softmax runs over dim {dim} of [{', '.join(form)}], not over the keys", softmax, 1)
    if len(chain.masks) > 1:
        raise Reject(f"{len(chain.masks)} values are added to the scores (a bias?)", softmax, 1)
    v, out_form = axes.values(last, form)
    mask = chain.masks[0] if chain.masks else None
    sinks = cat_sinks(chain.sinks[0], form) if chain.sinks else None
    pairs = tuple((q, k) for q, k, _ in found)
    return Anchor(node, pairs, v, mask, scale, out_form, form, sinks=sinks, scores=softmax.args[0])


@dataclass
class _Chain:
    """What stands between the products and the softmax."""

    products: list[tuple[Product, float]] = field(default_factory=list)
    masks: list[fx.Node] = field(default_factory=list)
    sinks: list[fx.Node] = field(default_factory=list)


def _refuse_cuts(source: Any, softmax: fx.Node, sinks: bool) -> None:
    """Between the softmax and V nothing is cut off but the last column, where that is one of sinks."""
    cuts = []
    while source is not softmax:
        before, after = shape_of(source.args[0]), shape_of(source)
        if before != after:
            cuts.append(source)
            last = is_call(source, aten.slice.Tensor) and after == (*before[:-1], before[-1] - 1)
            if not (sinks and last and source.args[2] in (None, 0)):
                raise Reject("part of the softmax is cut off before it meets V (sinks?)", source, 1)
        source = source.args[0]
    if sinks and len(cuts) != 1:
        raise Reject("a column beside the scores is not cut off before the softmax meets V", softmax, 1)


def _reaches_product(step: Any) -> bool:
    while is_call(step, aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, *_SAME_ELEMENTS):
        step = step.args[0]
    return product_of(step) is not None


def _walk(step: Any, factor: float, chain: _Chain) -> None:
    """Collect products with what they are multiplied by, and what else is added."""
    product = product_of(step)
    if product is not None:
        chain.products.append((product, factor))
    elif is_call(step, aten.mul.Tensor, aten.div.Tensor) and isinstance(step.args[1], (int, float)):
        number = float(step.args[1])
        _walk(step.args[0], factor * number if step.target is aten.mul.Tensor else factor / number, chain)
    elif is_call(step, aten.add.Tensor) and isinstance(step.args[1], fx.Node) and not step.kwargs:
        _walk(step.args[0], factor, chain)
        if _reaches_product(step.args[1]):
            _walk(step.args[1], factor, chain)
        elif factor != 1.0:
            raise Reject("the scores are scaled after the mask is added", step, 1)
        else:
            chain.masks.append(step.args[1])
    elif is_call(step, *_SAME_ELEMENTS) or (
        is_call(step, aten.sub.Tensor) and not step.kwargs and is_maximum_of(step.args[1], step.args[0])
    ):
        _walk(step.args[0], factor, chain)
    elif _is_beside_sinks(step) and not (chain.sinks or chain.masks or chain.products):
        if factor != 1.0:
            raise Reject("the scores are scaled after sinks are put beside them", step, 1)
        chain.sinks.append(step.args[0][1])
        _walk(step.args[0][0], factor, chain)
    else:
        raise Reject(unknown_in_scores(step), step, 1)


def _is_beside_sinks(step: Any) -> bool:
    """cat([scores, one column], -1)."""
    if not is_call(step, aten.cat.default) or len(step.args) != 2 or len(step.args[0]) != 2:
        return False
    return step.args[1] in (-1, 3) and _reaches_product(step.args[0][0]) and shape_of(step.args[0][1])[-1] == 1


class _Axes:
    """Roles of dims by their sizes in this graph."""

    def __init__(self, graph: fx.Graph):
        hidden = next(n for n in graph.nodes if n.op == "placeholder").meta["val"]
        update = next((n for n in graph.nodes if is_cached(n)), None)
        self.sizes: dict[Any, str] = {}
        if update is not None:
            self.sizes[_key(update.meta["val"].shape[2])] = "S"
        self.sizes |= {_key(hidden.shape[1]): "T", _key(hidden.shape[0]): "B"}
        step = {symbol for size in hidden.shape for symbol in _symbols(size)}
        self.past = {s for size in self.sizes for s in getattr(size, "free_symbols", ())} - step

    def role(self, size: Any) -> str:
        """B, T, S, or "" for a fixed size."""
        return self.sizes.get(_key(size), "") if isinstance(size, torch.SymInt) else ""

    def has_context(self, node: fx.Node) -> bool:
        """True if one of a value's dims depends on how much is cached: it runs over the keys, sinks or not."""
        sizes = [_key(size) for size in node.meta["val"].shape]
        return any(self.past & getattr(size, "free_symbols", set()) for size in sizes)

    def of(self, product: Product, operand: fx.Node, letters: str) -> dict[str, str]:
        """Letter -> role, without letters of fixed dims but the summed one."""
        sizes = dict(zip(letters, operand.meta["val"].shape, strict=True))
        return {c: role for c, size in sizes.items() if (role := self.role(size))}

    def scores(self, product: Product) -> tuple[Operand, Operand, str]:
        """(q, k, form of the scores) of one product."""
        sides = [(product.a, product.a_letters), (product.b, product.b_letters)]
        roles: dict[str, str] = {}
        for operand, letters in sides:
            roles |= self.of(product, operand, letters)
        roles[product.summed] = "C"
        fixed = [c for c in product.out if c not in roles]
        in_place = dict(zip(product.out, "BHTS", strict=False))
        if is_call(product.node, *_MATMUL) and all(roles.get(c, role) == role for c, role in in_place.items()):
            roles |= in_place
        elif len(fixed) == 1:
            roles[fixed[0]] = "H"
        forms = [_form(letters, roles) for _, letters in sides]
        if "T" in forms[1]:
            sides, forms = sides[::-1], forms[::-1]
        out = _form(product.out, roles)
        if (
            sorted(out) != sorted("BHTS")
            or sorted(forms[0]) != sorted("BHTC")
            or set(forms[1]) - set("BHSC1")
            or not set("BSC") <= set(forms[1])
        ):
            raise Reject(
                f"the scores are no product of q [B, H, T, C] and K [B, (H,) S, C], but of [{', '.join(forms[0])}] and "
                f"[{', '.join(forms[1])}]",
                product.node,
                1,
            )
        return Operand(sides[0][0], forms[0]), _upright(Operand(sides[1][0], forms[1])), out

    def values(self, product: Product, form: str) -> tuple[Operand, str]:
        """(V, form of what attention returns) of softmax [form] times V."""
        if len(product.a_letters) != len(form):
            raise Reject(f"the softmax [{', '.join(form)}] meets V as a value of other dims", product.node, 1)
        roles = dict(zip(product.a_letters, form, strict=True))
        if roles.get(product.summed) != "S":
            raise Reject("the softmax meets V over another dim than the keys", product.node, 1)
        roles |= {c: "C" for c in product.out if c not in roles}
        v, out = _form(product.b_letters, roles), _form(product.out, roles)
        if sorted(out) != sorted("BHTC") or set(v) - set("BHSC1") or not set("BSC") <= set(v):
            raise Reject(f"the softmax [{', '.join(form)}] meets V as [{', '.join(v)}]", product.node, 1)
        return Operand(product.b, v), out.replace("C", "V")


def _upright(k: Operand) -> Operand:
    """K before it was transposed for matmul."""
    turned = is_call(k.node, aten.transpose.int) and k.form == "BHCS"
    if turned and {dim % 4 for dim in k.node.args[1:]} == {2, 3}:
        return Operand(k.node.args[0], "BHSC")
    return k


def _form(letters: str, roles: dict[str, str]) -> str:
    return "".join(roles.get(c, "1") for c in letters)


def _key(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def _symbols(size: Any) -> set[Any]:
    return set(getattr(_key(size), "free_symbols", ()))


class Cached(NamedTuple):
    """What a site caches of new tokens and of those before, or (of an earlier layer) both in one; in the order of PARTS."""

    new: tuple[fx.Node, ...]
    past: tuple[fx.Node, ...]
    shared: tuple[fx.Node, ...] = ()


def names(nodes: tuple[fx.Node, ...]) -> tuple[str, ...]:
    """As a match has them."""
    return tuple(node.name for node in nodes)


def cached_by(parts: tuple[tuple[fx.Node, str], ...], node: fx.Node) -> Cached:
    """Both parts of what a site caches (each with what it is called), of its own layer or of an earlier one."""
    shared = [(update, input_ref(update)) for update, _ in parts if input_ref(update).kind == "shared"]
    if not shared:
        new, past = zip(*(cache_parts(update, what, node) for update, what in parts), strict=True)
        return Cached(new, past)
    refs = [ref for _, ref in shared]
    if len(shared) < len(parts) or [r.part for r in refs] != [0, 1] or len({r.site for r in refs}) > 1:
        got = ", ".join(f"{what} from `{update.name}`" for update, what in parts)
        raise Reject(
            f"a site reads parts of two caches: {got}; expected both as one earlier layer caches them", node, 5
        )
    return Cached((), (), tuple(update for update, _ in shared))


def cache_parts(update: fx.Node, what: str, node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """(new, past) of a cache update cat([past, new]) along the tokens: dim 2 of K, V and latents, dim 1 of index keys."""
    if not is_cache_update(update):
        raise Reject(f"the {what} (`{update.name}`) is not cached", node, 5)
    parts, dim = update.args[0], update.args[1] if len(update.args) > 1 else 0
    tokens = past_dim(update.meta["val"])
    if len(parts) != 2 or dim not in (tokens, -2) or input_ref(parts[0]).kind != "past":
        raise Reject(f"{what}: the cache is not extended as cat([past, new], dim={tokens})", update, 5)
    return parts[1], parts[0]
