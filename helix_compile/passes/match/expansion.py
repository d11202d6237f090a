"""K and V as products of one cached latent with W_UK and W_UV: which latent, which elements of which parameter.

kv = linear(latent)                              one linear for both, cut into K and V
k, v = linear_k(latent), linear_v(latent)        two
v = einsum("bsr,hrd->bhsd", latent, W_UV)        stacked weights, [H, R, D] or [H, D, R]; bmm and matmul alike
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from helix_compile.ir.elements import Provenance, is_cached, trace_elements
from helix_compile.ir.graph import aten, is_call
from helix_compile.ir.sizes import shape_of
from helix_compile.passes.match.contractions import Product, WeightView, numbers, product_of, up_weight, weight_product
from helix_compile.passes.match.reject import Reject, computed_weight
from helix_compile.plan.matches import UpWeight


@dataclass(frozen=True)
class Expansion:
    """A product of the cached `latent` with a view of a parameter. `rows` [letters of x without the summed one] are
    rows of the latent [B * S].
    """

    product: Product
    view: WeightView
    weight_letters: str
    x_letters: str
    rows: Tensor
    latent: fx.Node

    @property
    def node(self) -> fx.Node:
        """The node of the product."""
        return self.product.node

    @property
    def width(self) -> int:
        """Width of the latent."""
        return shape_of(self.latent)[-1]


def expansion_of(node: fx.Node, what: str) -> Expansion:
    """`node` as an expansion of a cached latent.

    Raises:
        Reject: it is another thing; says what.
    """
    found = weight_product(node)
    if found is None:
        if is_call(node, aten.linear.default):
            raise Reject(computed_weight(node, node.args[1]), node, 3)
        if product_of(node) is not None:
            raise Reject(f"the weight of `{node.name}` is computed, not a view of a parameter", node, 3)
        raise Reject(f"{what} does not derive from one linear over the cache, but from `{node.name}`", node, 2)
    product, x, view = found
    if is_call(node, aten.linear.default) and len(node.args) > 2 and node.args[2] is not None:
        raise Reject("the linear that expands the latent has a bias; absorption can't hold it", node, 3)
    source = trace_elements(x)
    used = source.used()
    made = "linear" if is_call(node, aten.linear.default) else "product"
    if len(used) != 1 or not is_cached(used[0]):
        raise Reject(f"the input of the {made} that makes {what} is not what the layer caches", node, 5)
    latent, letters = used[0], product.letters_of(x)
    R = shape_of(latent)[-1]
    ids = source.ids.movedim(letters.index(product.summed), -1) - source.sources[latent]
    straight = ids[..., :1] + torch.arange(ids.shape[-1])
    if (
        shape_of(latent)[1] != 1
        or ids.shape[-1] != R
        or not torch.equal(ids, straight)
        or bool((ids[..., 0] % R).any())
    ):
        raise Reject("the cached latent has heads or is permuted before it is expanded", node, 5)
    weight = product.b if x is product.a else product.a
    x_letters = letters.replace(product.summed, "")
    return Expansion(product, view, product.letters_of(weight), x_letters, ids[..., 0] // R, latent)


def check_grid(batch: Tensor, sequence: Tensor, what: str, node: fx.Node, depth: int) -> None:
    """Coordinates of [B, H, S, *] must map batch to batch and sequence to sequence."""
    B, _, S, _ = batch.shape
    if not bool((batch == torch.arange(B).view(B, 1, 1, 1)).all()):
        raise Reject(f"{what}: an element comes from another sequence of the batch", node, depth)
    if not bool((sequence == torch.arange(S).view(1, 1, S, 1)).all()):
        raise Reject(f"{what}: an element comes from another position", node, depth)


def expanded(source: Provenance, expansion: Expansion, ids: Tensor, what: str, depth: int) -> tuple[Tensor, int]:
    """(numbers [H, D] of the weight's elements with r = 0, step) for ids [B, H, S, D] that are all in the product."""
    node, product = expansion.node, expansion.product
    coordinates = source.coordinates(node, ids)
    assert coordinates is not None
    at = dict(zip(product.out, coordinates, strict=True))
    zero = torch.zeros_like(ids)
    row = expansion.rows[tuple(at.get(letter, zero) for letter in expansion.x_letters)]
    S = shape_of(expansion.latent)[2]
    if ids.shape[2] != S:
        raise Reject(f"{what} has {ids.shape[2]} positions, {S} are cached (a window?)", node, depth)
    check_grid(row // S, row % S, what, node, depth)
    first, step = numbers(expansion.view, expansion.weight_letters, at, product.summed)
    if not isinstance(first, Tensor) or not bool((first == first[:1, :, :1]).all()):
        raise Reject(f"{what}'s channel map depends on batch or position", node, depth)
    return first[0, :, 0], step


def weight_of_v(v: Provenance, node: fx.Node) -> tuple[Expansion, UpWeight]:
    """The product that makes V, and W_UV."""
    used = v.used()
    if v.undefined():
        raise Reject("V holds elements that nothing wrote", node, 2)
    if len(used) != 1:
        names = ", ".join(f"`{s.name}`" for s in used)
        raise Reject(f"V does not derive from one linear over the cache, but from {names}", node, 2)
    expansion = expansion_of(used[0], "V")
    first, step = expanded(v, expansion, v.ids, "V", 3)
    return expansion, up_weight(expansion.view, first, step, expansion.width, "W_UV", expansion.node)


def expansion_of_k(k: Provenance, of_v: Expansion, node: fx.Node) -> Expansion:
    """The product over the same latent as V's that the nope part of K comes from."""
    if k.undefined():
        raise Reject("K holds elements that nothing wrote", node, 4)
    found: list[Expansion] = []
    others: list[Expansion] = []
    for source in k.used():
        try:
            expansion = of_v if source is of_v.node else expansion_of(source, "K")
        except Reject:
            continue
        (found if expansion.latent is of_v.latent else others).append(expansion)
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(f"`{e.node.name}`" for e in found)
        raise Reject(f"several products with the latent make K: {names}", node, 4)
    reads = f": K is made from `{others[0].latent.name}`, V from `{of_v.latent.name}`" if others else ""
    raise Reject(f"no part of K derives from a linear over the cached latent that V is made from{reads}", node, 4)
