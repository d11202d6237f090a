"""Attention in normal form, softmax(scale * q k^T + mask) v, found by its ops: fused (sdpa) or spelled out (eager).

Attention spelled out as products in any order of dims: which operand is q, which is K, where heads and tokens are.

    s = einsum("bthd,bshd->bths", q, k) * scale + mask               one product, or a sum of two:
    s = (einsum("bthc,bsc->bths", q_latent, latent) + einsum("bthr,bsr->bths", q_rope, rope)) * scale + mask
    o = einsum("bths,bshd->bthd", softmax(s, -1), v)

Batch, new tokens and context are told by their sizes, which the graph keeps as symbols; no letter is looked at.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from helix_compile.ir.elements import is_cache_update
from helix_compile.ir.graph import aten, input_ref, is_call
from helix_compile.ir.sizes import shape_of
from helix_compile.passes.match.contractions import PRODUCTS, Product, product_of
from helix_compile.passes.match.reject import Reject, unknown_in_scores

SDPA = aten.scaled_dot_product_attention.default


@dataclass(frozen=True)
class Anchor:
    """One attention in normal form. `shared_heads`: k and v have fewer heads than q, and the op repeats each one.

    Forms are the orders of dims of q, k, v, of the node's own value, and of the scores that the mask is added to.
    """

    node: fx.Node
    q: fx.Node
    k: fx.Node
    v: fx.Node
    mask: fx.Node | None
    scale: float
    shared_heads: bool = False
    q_form: str = "BHTC"
    k_form: str = "BHSC"
    v_form: str = "BHSC"
    form: str = "BHTV"
    mask_form: str = "BHTS"


def anchor_of(node: fx.Node) -> Anchor:
    """The attention that `node` (a fused op, or the product of softmax and v) ends; Reject where it is another thing."""
    return _fused_anchor(node) if is_call(node, SDPA) else _eager_anchor(node)


_BEHIND_SOFTMAX = (aten._to_copy.default, aten.clone.default, aten.expand.default, aten.view.default, aten.slice.Tensor)


def softmax_of(node: fx.Node) -> fx.Node | None:
    """The softmax whose result `node` multiplies, through casts, copies and cuts."""
    source: Any = node.args[0]
    while is_call(source, *_BEHIND_SOFTMAX):
        source = source.args[0]
    return source if is_call(source, aten.softmax.int, aten._softmax.default) else None


def _fused_anchor(node: fx.Node) -> Anchor:
    q, k, v = node.args[:3]
    mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    if (len(node.args) > 5 and node.args[5]) or node.kwargs.get("is_causal"):
        raise Reject("is_causal without a mask is not the causal mask of a decode step", node, 0)
    scale = node.kwargs.get("scale")
    scale = 1.0 / math.sqrt(shape_of(q)[-1]) if scale is None else float(scale)
    return Anchor(node, q, k, v, mask, scale, bool(node.kwargs.get("enable_gqa")))


def _eager_anchor(node: fx.Node) -> Anchor:
    """matmul(softmax(scale * matmul(q, k^T) + mask), v), the form of attn_implementation="eager"."""
    softmax = softmax_of(node)
    assert softmax is not None
    mask, scale = None, 1.0
    if softmax.args[1] not in (-1, len(shape_of(softmax)) - 1):
        raise Reject(f"the softmax runs over dim {softmax.args[1]}, not over the keys", softmax, 1)
    step: Any = softmax.args[0]
    while not is_call(step, aten.matmul.default):
        if is_call(step, aten.mul.Tensor, aten.div.Tensor) and isinstance(step.args[1], (int, float)):
            factor = float(step.args[1])
            scale = scale * factor if step.target is aten.mul.Tensor else scale / factor
        elif is_call(step, aten.add.Tensor) and mask is None and isinstance(step.args[1], fx.Node):
            mask = step.args[1]
            if scale != 1.0:
                raise Reject("the scores are scaled after the mask is added", step, 1)
        elif not is_call(step, aten._to_copy.default):
            raise Reject(unknown_in_scores(step), step, 1)
        step = step.args[0]
    source: Any = node.args[0]
    while source is not softmax:
        cuts = is_call(source, aten.slice.Tensor) and shape_of(source) != shape_of(source.args[0])
        if cuts:
            raise Reject("part of the softmax is cut off before it meets V (sinks?)", source, 1)
        source = source.args[0]
    key = step.args[1]
    if not is_call(key, aten.transpose.int):
        raise Reject("the scores are not q times a transposed K", step, 1)
    return Anchor(node, step.args[0], key.args[0], node.args[1], mask, scale)


def cache_parts(update: fx.Node, what: str, node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """(new, past) of a cache update cat([past, new], dim=2)."""
    if not is_cache_update(update):
        raise Reject(f"the {what} (`{update.name}`) is not cached", node, 5)
    parts, dim = update.args[0], update.args[1] if len(update.args) > 1 else 0
    if len(parts) != 2 or dim not in (2, -2) or input_ref(parts[0]).kind != "past":
        raise Reject(f"{what}: the cache is not extended as cat([past, new], dim=2)", update, 5)
    return parts[1], parts[0]


_SOFTMAX = (aten.softmax.int, aten._softmax.default)


_SAME_ELEMENTS = (
    aten._to_copy.default,
    aten.type_as.default,
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
)


_BEHIND_EINSUM_SOFTMAX = (*_SAME_ELEMENTS, aten.expand.default, aten.view.default, aten.slice.Tensor)


@dataclass(frozen=True)
class Operand:
    """A value and the roles of its dims: B, H, T (new tokens), S (context), C (the channel that is summed)."""

    node: fx.Node
    form: str


@dataclass(frozen=True)
class SpelledAnchor:
    """softmax(scale * sum of q k + mask) v. `pairs` are the (q, k) of each product; `form` is that of the scores."""

    node: fx.Node
    pairs: tuple[tuple[Operand, Operand], ...]
    v: Operand
    mask: fx.Node | None
    scale: float
    form: str
    out_form: str


@dataclass
class _Chain:
    """What stands between the products and the softmax."""

    products: list[tuple[Product, float]] = field(default_factory=list)
    masks: list[fx.Node] = field(default_factory=list)


def is_spelled(node: fx.Node) -> bool:
    """True for the product of a softmax and V that is an einsum, or whose scores are einsums or a sum of products."""
    softmax = _softmax_before(node)
    if softmax is None or not _Axes(node.graph).has_context(softmax):
        return False  # a softmax over experts, say
    if is_call(node, aten.einsum.default):
        return True
    todo, found = [softmax.args[0]], []
    while todo:
        step = todo.pop()
        if is_call(step, *PRODUCTS):
            found.append(step)
        elif is_call(step, aten.add.Tensor):
            todo += [a for a in step.args[:2] if isinstance(a, fx.Node)]
        elif is_call(step, aten.mul.Tensor, aten.div.Tensor, *_SAME_ELEMENTS):
            todo.append(step.args[0])
    return len(found) > 1 or any(is_call(n, aten.einsum.default) for n in found)


def _softmax_before(node: fx.Node) -> fx.Node | None:
    if not is_call(node, aten.einsum.default, aten.matmul.default, aten.bmm.default):
        return None
    source: Any = node.args[1][0] if is_call(node, aten.einsum.default) else node.args[0]
    while is_call(source, *_BEHIND_EINSUM_SOFTMAX):
        source = source.args[0]
    return source if is_call(source, *_SOFTMAX) else None


def spelled_anchor(node: fx.Node) -> SpelledAnchor:
    """The attention that ends in `node`, a product of a softmax with V.

    Raises:
        Reject: the chain holds something else, or works on other dims.
    """
    softmax, last = _softmax_before(node), product_of(node)
    if softmax is None or last is None:
        raise Reject("softmax times V is no sum over one letter", node, 1)
    _refuse_cuts(last.a, softmax)
    chain = _Chain()
    _walk(softmax.args[0], 1.0, chain)
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
    pairs = tuple((q, k) for q, k, _ in found)
    return SpelledAnchor(node, pairs, v, mask, scale, form, out_form)


def _refuse_cuts(source: Any, softmax: fx.Node) -> None:
    while source is not softmax:
        if shape_of(source) != shape_of(source.args[0]):
            raise Reject("part of the softmax is cut off before it meets V (sinks?)", source, 1)
        source = source.args[0]


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
    elif is_call(step, *_SAME_ELEMENTS):
        _walk(step.args[0], factor, chain)
    else:
        raise Reject(unknown_in_scores(step), step, 1)


class _Axes:
    """Roles of dims by their sizes in this graph."""

    def __init__(self, graph: fx.Graph):
        hidden = next(n for n in graph.nodes if n.op == "placeholder").meta["val"]
        update = next((n for n in graph.nodes if is_cache_update(n)), None)
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
        if len(fixed) == 1:
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
        return Operand(sides[0][0], forms[0]), Operand(sides[1][0], forms[1]), out

    def values(self, product: Product, form: str) -> tuple[Operand, str]:
        """(V, form of what attention returns) of softmax [form] times V."""
        roles = dict(zip(product.a_letters, form, strict=True))
        if roles.get(product.summed) != "S":
            raise Reject("the softmax meets V over another dim than the keys", product.node, 1)
        roles |= {c: "C" for c in product.out if c not in roles}
        v, out = _form(product.b_letters, roles), _form(product.out, roles)
        if sorted(out) != sorted("BHTC") or set(v) - set("BHSC1") or not set("BSC") <= set(v):
            raise Reject(f"the softmax [{', '.join(form)}] meets V as [{', '.join(v)}]", product.node, 1)
        return Operand(product.b, v), out


def _form(letters: str, roles: dict[str, str]) -> str:
    return "".join(roles.get(c, "1") for c in letters)


def _key(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def _symbols(size: Any) -> set[Any]:
    return set(getattr(_key(size), "free_symbols", ()))
