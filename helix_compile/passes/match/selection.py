"""Find what chooses the keys that a query sees (an indexer, DeepSeek-V3.2's sparse attention), by what it computes.

    keys = cat([past, new])                                  [B, S + T, I], cached beside the latents
    raw = sum over index heads of w * relu(scale * q . key)  [B, T, S + T]
    indices = topk(raw where visible, min(k, S + T))         and the mask shows these keys and no others

Shown by values, not by names: random scores in place of the raw ones reach topk where a key is visible and nowhere else
(check_scores), random indices in place of the chosen ones are what the mask shows (mask.py), and random q, w and keys
make the raw scores that the formula makes (_check_formula). Nothing else may read the indices or topk's values: what a
layer reads of its cache besides attention is refused in context.py.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from helix_compile.capture.captured import CapturedGraph
from helix_compile.ir.dataflow import NotRun, ancestors, close, evaluate
from helix_compile.ir.elements import is_cache_update, is_layout_op
from helix_compile.ir.graph import aten, input_ref, is_call, node_named
from helix_compile.ir.sizes import shape_of
from helix_compile.kernels.reference import accumulation_dtype
from helix_compile.passes.match.anchor import cache_parts
from helix_compile.passes.match.contractions import Product, product_of
from helix_compile.passes.match.mask import Subject, evaluated, mask_error, subjects_of, tried_masks
from helix_compile.passes.match.reject import Reject
from helix_compile.plan.matches import AttentionMatch, HandedSelection, Selection

_TOPK = aten.topk.default
_RELU = aten.relu.default


def with_selection(graph: fx.Graph, match: AttentionMatch) -> AttentionMatch:
    """The match with what chooses the keys that it attends to, where something does.

    Raises:
        Reject: the keys are chosen in another way than a top-k of weighted, rectified products.
    """
    mask = node_named(graph, match.mask)
    cone = ancestors([mask], until=[])
    found = [n for n in graph.nodes if n in cone and is_call(n, _TOPK)]
    if len(found) > 1:
        raise Reject(f"the mask depends on {len(found)} top-ks, expected one that chooses keys", found[1], 7)
    if not found:
        handed = [n for n in graph.nodes if n in cone and _is_handed(n)]
        if len(handed) > 1:
            raise Reject(f"the mask depends on {len(handed)} inputs of indices", handed[1], 7)
        return replace(match, selection=HandedSelection(handed[0].name)) if handed else match
    selection = _selection(found[0], cone)
    past = (*match.past, selection.past)
    return replace(match, selection=selection, new=(*match.new, selection.new), past=past)


def _is_handed(node: fx.Node) -> bool:
    """An input [B, T, k] of ints: indices that an earlier layer chose."""
    value = node.meta.get("val")
    return input_ref(node).kind == "tensor" and isinstance(value, Tensor) and value.dim() == 3 and _is_int(value)


def _is_int(value: Tensor) -> bool:
    return not value.dtype.is_floating_point and value.dtype is not torch.bool


@dataclass(frozen=True)
class _Raw:
    """The raw scores: `node` [B, T, S + T] = sum over `j` of w * relu(scale * q . key)."""

    node: fx.Node
    q: fx.Node
    q_form: str
    w: fx.Node
    w_form: str
    keys: fx.Node
    scale: float


def _selection(topk: fx.Node, cone: set[fx.Node]) -> Selection:
    scores, top_k = topk.args[0], _top_k(topk)
    values = [u for u in topk.users if u.target is not operator.getitem or u.args[1] != 1]
    if any(u.users or u.target is not operator.getitem for u in values):
        raise Reject("the values of the top-k are read, expected its indices alone", topk, 7)
    indices = next((u for u in topk.users if u not in values), None)
    if indices is None or len(shape_of(scores)) != 3:
        raise Reject(f"the top-k is over {len(shape_of(scores))} dims, expected scores [B, T, S + T]", topk, 7)
    raw = _raw(scores, topk)
    new, past = cache_parts(raw.keys, "key of the indexer", topk)
    _check_formula(raw, topk)
    J, width = (shape_of(raw.q)[raw.q_form.index(letter)] for letter in "JI")
    return Selection(
        top_k=top_k,
        heads=J,
        width=width,
        query=raw.q.name,
        query_form=raw.q_form,
        weights=raw.w.name,
        weights_form=raw.w_form,
        scale=raw.scale,
        new=new.name,
        past=past.name,
        indices=_last_of_indices(indices, cone).name,
        score_dtype=accumulation_dtype(raw.q.meta["val"].dtype),
    )


def _last_of_indices(indices: fx.Node, cone: set[fx.Node]) -> fx.Node:
    """The indices as they are handed on: behind casts that have no other reader."""
    while (
        len(indices.users) == 1 and is_call(user := next(iter(indices.users)), aten._to_copy.default) and user in cone
    ):
        indices = user
    return indices


def _top_k(topk: fx.Node) -> int:
    """K of min(k, S + T).

    Raises:
        Reject: another number of keys, or the smallest, or along another dim.
    """
    scores, k, *rest = topk.args
    dim, largest = [*rest, -1, True][:2] if len(rest) == 0 else [*rest, True][:2]
    dim, largest = topk.kwargs.get("dim", dim), topk.kwargs.get("largest", largest)
    if dim not in (-1, len(shape_of(scores)) - 1) or not largest:
        raise Reject(f"the top-k takes the {'largest' if largest else 'smallest'} along dim {dim}", topk, 7)
    keys = scores.meta["val"].shape[-1]
    size = k.meta["val"] if isinstance(k, fx.Node) else k
    if size == 1 and isinstance(size, int):  # there is always a key: min(1, S + T)
        return 1
    if isinstance(size, torch.SymInt) and isinstance(keys, torch.SymInt):
        n = sympy.Symbol("n", integer=True, positive=True)
        expr = size.node.expr.subs(keys.node.expr, n)
        at = lambda number: expr.subs(n, number)  # noqa: E731
        most = at(10**12)
        if most.is_Integer and all(at(x) == min(int(most), x) for x in (1, 2, int(most) - 1, int(most), int(most) + 1)):
            return int(most)
    raise Reject(f"the top-k chooses {size} of {keys} keys, expected min(k, {keys}) with a fixed k", topk, 7)


def _raw(scores: fx.Node, topk: fx.Node) -> _Raw:
    """The raw scores among what topk's input is made from."""
    cone = ancestors([scores], until=[])
    updates = [n for n in cone if is_cache_update(n) and n.meta["val"].dim() == 3]
    if len(updates) != 1:
        raise Reject(
            f"the top-k reads {len(updates)} cached values [B, S + T, width], expected an indexer's keys", topk, 7
        )
    behind = {n for n in cone if updates[0] in ancestors([n], until=[])}
    rectified = [n for n in behind if is_call(n, _RELU)]
    if len(rectified) != 1:
        raise Reject(
            f"the scores that the top-k reads pass {len(rectified)} relu, expected one: sum of w * relu(scale * q . key)",
            topk,
            7,
        )
    relu = rectified[0]
    inner, before = _scaled(relu.args[0])
    product = product_of(inner)
    if product is None:
        raise Reject(f"relu is not over products of q and keys, but over `{inner.name}`", relu, 7)
    key_side, q = (product.b, product.a) if updates[0] in ancestors([product.b], until=[]) else (product.a, product.b)
    if updates[0] in ancestors([q], until=[]):
        raise Reject("q of the indexer depends on what is cached", relu, 7)
    in_order = [n for n in relu.graph.nodes if n in behind and n is not inner]
    sum_over_heads = next((p for n in in_order if (p := product_of(n))), None)
    if sum_over_heads is None:
        raise Reject("the scores of the index heads are not summed with weights", relu, 7)
    rectified_side, w = sum_over_heads.a, sum_over_heads.b
    if relu not in ancestors([rectified_side], until=[]):
        rectified_side, w = w, rectified_side
    if relu in ancestors([w], until=[]):
        raise Reject("the weights of the index heads depend on their scores", relu, 7)
    peeled, between = _scaled(rectified_side)
    if peeled is not relu:
        raise Reject(f"between relu and the weights stands `{peeled.name}` ({peeled.target})", relu, 7)
    roles = _roles(product, key_side)
    end, after = _upwards(sum_over_heads.node, behind)
    if between * after <= 0:
        raise Reject(f"the scores are scaled by {between * after}, expected a positive number", relu, 7)
    return _Raw(
        node=end,
        q=_narrow(q),
        q_form="".join(roles.get(c, "1") for c in product.letters_of(q)),
        w=w,
        w_form=_weights_form(w, sum_over_heads),
        keys=updates[0],
        scale=before * between * after,
    )


def _roles(product: Product, keys: fx.Node) -> dict[str, str]:
    """Letter of the product of q and keys -> B, T, J, S or I."""
    q = product.a if keys is product.b else product.b
    key_letters, q_letters = product.letters_of(keys), product.letters_of(q)
    sizes = dict(zip(q_letters, q.meta["val"].shape, strict=True))
    hidden = next(iter(q.graph.nodes)).meta["val"]
    batch, tokens = (str(size) for size in hidden.shape[:2])
    roles = {product.summed: "I"}
    for letter, size in sizes.items():
        if letter not in roles:
            roles[letter] = {batch: "B", tokens: "T"}.get(str(size), "J")
    own = [
        c for c, size in zip(key_letters, keys.meta["val"].shape, strict=True) if c not in q_letters and _is_size(size)
    ]
    roles |= dict.fromkeys(own[-1:], "S")
    if sorted(roles.get(c, "?") for c in product.out) != sorted("BTJS"):
        raise Reject(
            f"the products of the indexer are {product.a_letters},{product.b_letters}->{product.out}, expected q [B, T, J, I] "
            "and keys [B, S, I]",
            product.node,
            7,
        )
    return roles


def _is_size(size: Any) -> bool:
    return isinstance(size, torch.SymInt)


def _weights_form(w: fx.Node, product: Product) -> str:
    """Order of the dims of w: B, T, J, and 1."""
    hidden = next(iter(w.graph.nodes)).meta["val"]
    names = {str(hidden.shape[0]): "B", str(hidden.shape[1]): "T"}
    letters = product.letters_of(w)
    form = "".join(
        "J" if c == product.summed else "1" if str(size) == "1" else names.get(str(size), "?")
        for c, size in zip(letters, w.meta["val"].shape, strict=True)
    )
    if sorted(form.replace("1", "")) != sorted("BTJ"):
        raise Reject(
            f"the weights of the index heads are [{', '.join(form)}], expected one for each query and head", w, 7
        )
    return form


def _scaled(node: Any) -> tuple[Any, float]:
    """(what is behind casts, moves and factors, the product of the factors)."""
    factor = 1.0
    while True:
        if is_call(node, aten.mul.Tensor, aten.div.Tensor) and isinstance(node.args[1], (int, float)):
            number = float(node.args[1])
            factor = factor * number if node.target is aten.mul.Tensor else factor / number
        elif not (is_layout_op(node) or is_call(node, aten._to_copy.default)) or product_of(node):
            return node, factor
        node = node.args[0]


def _upwards(node: fx.Node, behind: set[fx.Node]) -> tuple[fx.Node, float]:
    """(the last node that only moves, casts or scales what `node` computes, the product of the factors)."""
    factor = 1.0
    while True:
        users = [u for u in node.users if u in behind]
        if len(users) != 1:
            return node, factor
        (user,) = users
        scaled = is_call(user, aten.mul.Tensor, aten.div.Tensor) and isinstance(user.args[1], (int, float))
        if scaled:
            number = float(user.args[1])
            factor = factor * number if user.target is aten.mul.Tensor else factor / number
        elif not (is_layout_op(user) or is_call(user, aten._to_copy.default)):
            return node, factor
        node = user


def _narrow(node: fx.Node) -> fx.Node:
    """Q before it was made wider for the product: the op computes wide anyway."""
    while is_call(node, aten._to_copy.default):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if (
            source.meta["val"].dtype.is_floating_point
            and source.meta["val"].dtype.itemsize <= node.meta["val"].dtype.itemsize
        ):
            node = source
            continue
        break
    return node


def _check_formula(raw: _Raw, topk: fx.Node) -> None:
    """Random q, w and keys give the scores of the formula, and nothing else is read."""
    generator = torch.Generator().manual_seed(0)
    drawn = lambda n: torch.randn(shape_of(n), generator=generator, dtype=torch.float64).to(n.meta["val"].dtype)  # noqa: E731
    known: dict[fx.Node, Any] = {n: drawn(n) for n in (raw.q, raw.w, raw.keys)}
    q, w, keys = (known[n] for n in (raw.q, raw.w, raw.keys))
    try:
        got = evaluate(raw.node, known)
    except (KeyError, NotRun) as error:
        raise Reject(
            f"the indexer's scores depend on more than q, weights and cached keys: {error}", topk, 7
        ) from error
    q = in_form(q.double(), raw.q_form, "BTJI")
    w = in_form(w.double(), raw.w_form, "BTJ")
    try:
        by_head = (torch.einsum("btji,bsi->btjs", q, keys.double()) * raw.scale).relu()
        same = close(got, torch.einsum("btj,btjs->bts", w, by_head))
    except RuntimeError:  # the sum is over another dim than the index heads
        same = False
    if not same:
        raise Reject("the indexer's scores are not the sum over heads of w * relu(scale * q . key)", topk, 7)


def in_form(value: Tensor, form: str, wanted: str) -> Tensor:
    """A value whose dims are `form`, dims of one (1) dropped, in the order `wanted`."""
    value = value.reshape([n for n, letter in zip(value.shape, form, strict=True) if letter != "1"])
    form = form.replace("1", "")
    return value.permute([form.index(letter) for letter in wanted])


def check_scores(captured: CapturedGraph, body: str, match: AttentionMatch, max_seq_len: int) -> None:
    """Random scores in place of the raw ones must reach the top-k where a key is visible, and none elsewhere, in every layer.

    Raises:
        MatchError: windows, tokens that are always seen, a bias; says where.
    """
    if not isinstance(match.selection, Selection):
        return
    graph = captured.bodies[body].graph
    topk = next(n for n in ancestors([node_named(graph, match.selection.indices)], until=[]) if is_call(n, _TOPK))
    scores = topk.args[0]
    assert isinstance(scores, fx.Node)
    raw = _raw(scores, topk).node
    for subject in subjects_of(captured, body, match, scores.name, [raw.name]):
        for mask, T in tried_masks(max_seq_len):
            _compare_scores(subject, scores, raw, mask, T)


def _compare_scores(subject: Subject, scores: fx.Node, raw: fx.Node, mask: Tensor, T: int) -> None:
    B, total = mask.shape
    drawn = torch.randn(B, T, total, generator=torch.Generator().manual_seed(1)).to(raw.meta["val"].dtype)
    got = evaluated(subject, scores.name, mask, T, {raw: drawn})
    causal = torch.arange(total) <= torch.arange(total - T, total)[:, None]
    seen = causal & (mask[:, None] > 0)
    real = (mask[:, -T:, None] > 0).expand_as(seen)
    hidden = got <= torch.finfo(got.dtype).min / 2
    if bool(((got != drawn) & seen & real).any()) or bool((~hidden & ~seen & real).any()):
        raise mask_error(
            subject,
            "the scores that the indexer chooses by are hidden elsewhere than where causal + padding hides keys "
            "(a window, tokens that are always seen, a bias?)",
        )
