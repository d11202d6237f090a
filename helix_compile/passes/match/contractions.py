"""Products with a weight, however they are written: linear, matmul, bmm and einsum as one sum over one letter.

    linear(x, W)                     "abz,yz->aby"
    matmul(x [B, H, S, R], W [H, R, D])   "abyz,bzx->abyx"
    einsum("bsr,hrd->bhsd", x, W)    as it is

A weight may be any view of a parameter: the view's strides say where each of its elements is in the parameter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from helix_compile.ir.elements import is_layout_op, run_move
from helix_compile.ir.graph import aten, input_ref, is_call, is_param
from helix_compile.ir.sizes import shape_of
from helix_compile.passes.match.reject import Reject
from helix_compile.plan.matches import UpWeight

PRODUCTS = (aten.linear.default, aten.matmul.default, aten.mm.default, aten.bmm.default, aten.einsum.default)


@dataclass(frozen=True)
class Product:
    """out = sum over `summed` of a * b, one letter a dim. A letter in one operand only, and not in out, has size 1."""

    node: fx.Node
    a: fx.Node
    b: fx.Node
    a_letters: str
    b_letters: str
    out: str
    summed: str

    def letters_of(self, operand: fx.Node) -> str:
        """Letters of one of the operands."""
        return self.a_letters if operand is self.a else self.b_letters


def product_of(node: Any) -> Product | None:
    """A node as a sum of products over one letter, or None."""
    if not is_call(node, *PRODUCTS):
        return None
    if is_call(node, aten.einsum.default):
        operands = node.args[1]
        if len(operands) != 2 or "." in node.args[0]:
            return None
        terms, arrow, out = node.args[0].replace(" ", "").partition("->")
        a, b = terms.split(",")
        if not arrow:
            out = "".join(sorted(c for c in set(a + b) if (a + b).count(c) == 1))
    else:
        operands = node.args[:2]
        dims = [len(shape_of(n)) for n in operands]
        if is_call(node, aten.linear.default):
            lead = "abcdefgh"[: dims[0] - 1]
            a, b, out = f"{lead}z", "yz", f"{lead}y"
        elif min(dims) < 2:
            return None
        else:
            batch = "abcdefgh"[: max(dims) - 2]
            a, b = (batch[len(batch) + 2 - d :] + e for d, e in zip(dims, ("yz", "zx"), strict=True))
            out = f"{batch}yx"
    if len(set(a)) != len(a) or len(set(b)) != len(b) or set(out) - set(a + b):
        return None
    a, b = _without_broadcast(operands[0], operands[1], a, b)
    summed = [c for c in a if c in b and c not in out]
    if len(summed) != 1:
        return None
    return Product(node, operands[0], operands[1], a, b, out, summed[0])


def _without_broadcast(x: fx.Node, y: fx.Node, a: str, b: str) -> tuple[str, str]:
    """A dim of size 1 that is repeated for the other operand gets a letter of its own."""
    spare = iter("ABCDEFGH")
    sizes_a, sizes_b = (dict(zip(a, shape_of(x), strict=True)), dict(zip(b, shape_of(y), strict=True)))
    for letter in set(a) & set(b):
        if sizes_a[letter] == 1 != sizes_b[letter]:
            a = a.replace(letter, next(spare))
        elif sizes_b[letter] == 1 != sizes_a[letter]:
            b = b.replace(letter, next(spare))
    return a, b


@dataclass(frozen=True)
class WeightView:
    """A value that is a view of a parameter. `window` has its strides and its offset, in elements of the parameter."""

    param: fx.Node
    window: Tensor


def weight_view(node: fx.Node) -> WeightView | None:
    """`node` as a view of one parameter, or None: it is computed, or a copy in another order."""
    params: dict[fx.Node, Tensor] = {}

    def value(n: Any) -> Any:
        if isinstance(n, (list, tuple)):
            return [value(x) for x in n]
        if not isinstance(n, fx.Node):
            return n
        if is_param(n):
            return params.setdefault(n, torch.empty(shape_of(n), device="meta"))
        return run_move(n, value) if is_layout_op(n) else None

    try:
        window = value(node)
    except (TypeError, RuntimeError, AttributeError):  # a layout op on something computed
        return None
    if not isinstance(window, Tensor) or len(params) != 1:
        return None
    ((param, whole),) = params.items()
    same = window.untyped_storage()._cdata == whole.untyped_storage()._cdata
    return WeightView(param, window) if same else None


def weight_product(node: Any) -> tuple[Product, fx.Node, WeightView] | None:
    """(product, the other operand, the weight) of a product with a view of a parameter, or None."""
    product = product_of(node)
    if product is None:
        return None
    for weight, other in ((product.b, product.a), (product.a, product.b)):
        view = weight_view(weight)
        if view is not None:
            return product, other, view
    return None


def numbers(view: WeightView, letters: str, at: Mapping[str, Tensor], summed: str) -> tuple[Tensor, int]:
    """(number in the parameter of the element at these coordinates with `summed` at 0, step from one `summed` to the next)."""
    first: Any = view.window.storage_offset()
    for letter, stride in zip(letters, view.window.stride(), strict=True):
        if letter in at and letter != summed:
            first = first + at[letter] * stride
    return first, view.window.stride()[letters.index(summed)]


def up_weight(view: WeightView, first: Tensor, step: int, R: int, what: str, node: fx.Node) -> UpWeight:
    """W_UK or W_UV whose element (h, d, r) is number first[h, d] + r * step.

    Raises:
        Reject: it lies in the parameter in a way that a rank's part is no simple cut of it.
    """
    shape, (H, D) = shape_of(view.param), first.shape
    made = lambda order: UpWeight(  # noqa: E731
        input_ref(view.param).name, shape, tuple(map(tuple, first.tolist())), step, order, what.lower(), node.name
    )
    numel, start = view.param.meta["val"].numel(), int(first[0, 0])
    stride = int(first[1, 0]) - start if H > 1 else numel
    affine = start + torch.arange(H)[:, None] * stride
    if step == 1 and R == shape[-1] and bool((first % R == 0).all()):
        by_row = torch.equal(first, affine + torch.arange(D) * R) and numel == H * stride
        if len(shape) == 2 or by_row:
            return made("hdr")
    elif torch.equal(first, affine + torch.arange(D)):
        if stride == R * step and numel == H * stride and start + D <= step:
            return made("hrd")
        if H * stride == step and numel == R * step and start + D <= stride:
            return made("rhd")
    raise Reject(
        f"{what} lies in `{made('').param}` {list(shape)} in a way that heads can't be cut from "
        "(expected [H * D, R], [H, D, R], [H, R, D] or [R, H * D])",
        node,
        3,
    )
