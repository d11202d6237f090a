"""MLA that its author has absorbed already: scores and values over the latent itself, W_UK on q and W_UV on the result.

q_latent = einsum("bthd,hdc->bthc", q_nope, W_UK)
s = einsum("bthc,bsc->bths", q_latent, latent) + einsum("bthr,bsr->bths", q_rope, rope)
o = einsum("bthc,hdc->bthd", einsum("bths,bsc->bthc", softmax(s), latent), W_UV)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import permutations

import torch
from torch import fx

from helix_compile.ir.elements import Provenance, is_cached, is_layout_op, trace_elements
from helix_compile.ir.graph import is_call
from helix_compile.ir.sizes import shape_of
from helix_compile.passes.match.anchor import Anchor, Operand
from helix_compile.passes.match.contractions import PRODUCTS, Product, WeightView, up_weight, weight_product
from helix_compile.passes.match.reject import Reject
from helix_compile.plan.matches import UpWeight


@dataclass(frozen=True)
class Absorbed:
    """What an absorbed site is made of. `q` is what W_UK is applied to, `v_up` is the product with W_UV."""

    q: Operand
    q_rope: Operand
    v_up: fx.Node
    form: str
    w_uk: UpWeight
    w_uv: UpWeight
    latent: fx.Node
    rope: fx.Node


def absorbed_site(anchor: Anchor) -> Absorbed:
    """The parts of a site whose scores are a sum of two products.

    Raises:
        Reject: with the first part that is not as it should be.
    """
    node = anchor.node
    if len(anchor.pairs) != 2:
        raise Reject(f"the scores are a sum of {len(anchor.pairs)} products", node, 1)
    latent = _cached(anchor.v, "V", node)
    keys = [_cached(k, "K", node) for _, k in anchor.pairs]
    if latent not in keys or keys[0] is keys[1]:
        names = ", ".join(f"`{k.name}`" for k in keys)
        raise Reject(
            f"absorbed attention reads V from `{latent.name}`, its scores from {names}: expected the latent and one rope part",
            node,
            4,
        )
    which = keys.index(latent)
    q_latent, q_rope = anchor.pairs[which][0], anchor.pairs[1 - which][0]
    R = shape_of(latent)[-1]
    q, w_uk = _absorption(q_latent, R)
    v_up, form, w_uv = _expansion(node, anchor.form.replace("V", "C"), R)
    return Absorbed(q, q_rope, v_up, form, w_uk, w_uv, latent, keys[1 - which])


def _cached(operand: Operand, what: str, node: fx.Node) -> fx.Node:
    """The cache [B, 1, S, *] that an operand is, position by position and channel by channel."""
    source = trace_elements(operand.node)
    used = source.used()
    if len(used) != 1 or not is_cached(used[0]) or source.undefined():
        names = ", ".join(f"`{s.name}` ({s.target})" for s in used)
        raise Reject(f"{what} of absorbed attention is not what the layer caches, but {names}", node, 4)
    update = used[0]
    if shape_of(update)[1] != 1:
        raise Reject(f"{what}: the cached `{update.name}` has {shape_of(update)[1]} heads, not one", node, 4)
    B, _, S, width = shape_of(update)
    form = operand.form
    ids = source.ids.permute([form.index(c) for c in "BSC"] + [i for i, c in enumerate(form) if c not in "BSC"])
    expected = (source.sources[update] + torch.arange(B * S * width)).view(B, S, width)
    if ids.shape[:3] != expected.shape:
        raise Reject(f"{what} has {tuple(ids.shape[:3])} elements of a cache of {(B, S, width)} (a window?)", node, 4)
    wrong = ids != expected.view(B, S, width, *[1] * (ids.dim() - 3))
    if bool(wrong.any()):
        raise Reject(f"{what}: an element comes from another position or channel of `{update.name}`", node, 4)
    return update


def _permutation(source: Provenance, of: fx.Node) -> tuple[int, ...] | None:
    """Dim i of a value is dim permutation[i] of `of`; None if it is anything else than `of` with its dims reordered."""
    shape, ids = shape_of(of), source.ids
    if of not in source.sources or ids.dim() != len(shape):
        return None
    straight = (source.sources[of] + torch.arange(math.prod(shape))).view(shape)
    for order in permutations(range(len(shape))):
        if torch.equal(straight.permute(order), ids):
            return order
    return None


def _absorption(q_latent: Operand, R: int) -> tuple[Operand, UpWeight]:
    """(q before it, W_UK) of q in the latent space."""
    source, asked = trace_elements(q_latent.node), q_latent.node
    used = source.used()
    found = weight_product(used[0]) if len(used) == 1 else None
    if found is None:
        names = ", ".join(f"`{s.name}` ({s.target})" for s in used)
        raise Reject(f"q meets the latent as {names}, not as a product of q and a view of a parameter", asked, 4)
    product, q, view = found
    order = _permutation(source, product.node)
    if order is None:
        raise Reject("q in the latent space is cut or mixed before it meets the latent", asked, 4)
    form = "".join(q_latent.form[order.index(dim)] for dim in range(4))
    roles = dict(zip(product.out, form, strict=True)) | {product.summed: "D"}
    q_form = "".join(roles.get(c, "1") for c in product.letters_of(q))
    if sorted(q_form) != sorted("BHTD"):
        raise Reject(f"W_UK is applied to q as [{', '.join(q_form)}]", product.node, 4)
    weight = _head_weight(product, q, view, roles, "HDC", R, "W_UK")
    return Operand(q, q_form.replace("D", "C")), weight


def _expansion(node: fx.Node, form: str, R: int) -> tuple[fx.Node, str, UpWeight]:
    """(product, its form, W_UV) of what brings attention's result [form] out of the latent space."""
    value = node
    while value is node or not is_call(value, *PRODUCTS):
        if len(value.users) != 1:
            raise Reject(f"{len(value.users)} users between absorbed attention and W_UV", value, 4)
        value = next(iter(value.users))
        if not is_layout_op(value) and not is_call(value, *PRODUCTS):
            raise Reject(f"`{value.target}` stands between absorbed attention and W_UV", value, 4)
    found = weight_product(value)
    if found is None:
        raise Reject("W_UV is computed, not a view of a parameter (heads in another order?)", value, 4)
    product, x, view = found
    order = _permutation(trace_elements(x, stop=lambda n: n is node), node)
    roles = dict(zip(product.letters_of(x), (form[i] for i in order or ()), strict=order is not None))
    if roles.get(product.summed) != "C":
        raise Reject("W_UV is not applied to the latent channels of absorbed attention", value, 4)
    roles |= {c: "V" for c in product.out if c not in roles}
    out = "".join(roles[c] for c in product.out)
    if sorted(out) != sorted("BHTV"):
        raise Reject(f"W_UV makes [{', '.join(out)}] of absorbed attention", value, 4)
    return value, out, _head_weight(product, x, view, roles, "HVC", R, "W_UV")


def _head_weight(
    product: Product, x: fx.Node, view: WeightView, roles: dict[str, str], dims: str, R: int, what: str
) -> UpWeight:
    """The weight of a product with `x`, whose dims must be `dims`: heads, channels of a head, latent channels."""
    letters = product.letters_of(product.b if x is product.a else product.a)
    held = "".join(roles.get(c, "1") for c in letters)
    if sorted(held) != sorted(dims):
        raise Reject(f"{what} is not applied head by head: its dims are [{', '.join(held)}]", product.node, 4)
    (heads, rows, _), (by_head, by_row, step) = (
        [values[held.index(d)] for d in dims] for values in (view.window.shape, view.window.stride())
    )
    first = int(view.window.storage_offset()) + torch.arange(heads)[:, None] * by_head + torch.arange(rows) * by_row
    return up_weight(view, first, step, R, what, product.node)
