"""Each function of helix_ops.onnx.txt is the torch reference of its op, in onnx's evaluator and in onnxruntime, dead rows included."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import FunctionProto, ModelProto, TensorProto, ValueInfoProto, helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from helix_compile.export.onnx_ops import TEXT, functions_for, helix_functions
from helix_compile.export.onnx_scope import HELIX, IR_VERSION, OPSET
from helix_compile.ir.ops import helix

B, T, H, R, r, S = 2, 3, 4, 6, 2, 16  # two pages of 8 slots
FLOAT, DOUBLE = TensorProto.FLOAT, TensorProto.DOUBLE
TABLE = torch.tensor([[2, 0], [1, 3]])
VISIBLE = torch.tensor([[1, 9, 16], [0, 0, 3]], dtype=torch.int32)  # row 1 has two queries that see nothing
FIRST = torch.tensor([[0, 4, 7], [0, 0, 3]], dtype=torch.int32)  # its last one has forgotten all
NOWHERE = 2**31 - 1


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + len(shape)), dtype=torch.float64)


def model_of(
    name: str, inputs: list[Tensor], outputs: int, attributes: dict[str, int], functions: list[FunctionProto]
) -> ModelProto:
    names, ends = [f"x{i}" for i in range(len(inputs))], [f"y{i}" for i in range(outputs)]
    infos = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(x.numpy().dtype), [None] * x.dim())
        for n, x in zip(names, inputs, strict=True)
    ]
    node = helper.make_node(name, names, ends, domain=HELIX, **attributes)
    graph = helper.make_graph([node], "one", infos, [ValueInfoProto(name=end) for end in ends])
    imports = [helper.make_opsetid("", OPSET), helper.make_opsetid(HELIX, 1)]
    return helper.make_model(graph, functions=functions, opset_imports=imports, ir_version=IR_VERSION)


def both(name: str, *inputs: Tensor, outputs: int = 1, functions: Any = None, **attributes: int) -> list[list[Tensor]]:
    """Outputs of the function in onnx's reference evaluator, and in onnxruntime."""
    model = model_of(name, list(inputs), outputs, attributes, functions or functions_for({name}))
    feeds = {f"x{i}": x.numpy() for i, x in enumerate(inputs)}
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    runs = ReferenceEvaluator(model).run(None, feeds), session.run(None, feeds)
    return [[torch.tensor(np.asarray(x)) for x in run] for run in runs]


def agree(got: list[list[Tensor]], *expected: Tensor) -> None:
    for run in got:
        for x, y in zip(run, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def cases() -> dict[str, tuple[Any, ...]]:
    """Op -> inputs of the function, its attributes, what the torch op makes of the same."""
    cache, kv = normal(4, 8, R + r), normal(4, 8, 2, 5)
    cache[3, 4:] = torch.nan  # slots that nobody has written: never multiplied by 0
    q, q_rope, scale = normal(B, T, H, R), normal(B, T, H, r), torch.tensor(0.3, dtype=torch.float64)
    k, v = kv[..., :2], kv[..., 2:]
    q_k = normal(B, T, H, 2)
    parts, lse_P = normal(3, B, T, H, R), normal(3, B, T, H)
    lse_P[:, 0, 0, 0] = -torch.inf
    lse_P[1, 1] = -torch.inf
    parts[1, 1] = torch.nan
    positions = torch.tensor([[0, 5, 11], [-1, -1, 6]])
    rank = torch.tensor(1)
    scores = normal(B, T, S)
    scores[0, 2, 3] = scores[0, 2, 9] = scores[0, 2].max() + 1  # a tie
    slot = torch.arange(S)
    scores = torch.where(slot < VISIBLE[..., None], scores, -torch.inf)
    bound, at = (
        torch.tensor([[0.0, 0.1, float(scores[0, 2, 3])], [0.0, 0.0, -torch.inf]]).double(),
        torch.full((B, T), 14),
    )
    at[1, 2] = NOWHERE
    slots, count = helix.select_slots(scores, VISIBLE, bound, at, rank, 4, 2, 2)
    x, ids = normal(7, 5), torch.tensor([[0, 5], [1, 2], [5, 3], [4, 2], [0, 1], [5, 4], [3, 2]])
    weights, gate_up, down = normal(7, 2), normal(3, 2, 9, 5), normal(3, 5, 9)
    ledger = {"cp": 2, "tokens_per_block": 2}
    none = torch.zeros_like(VISIBLE)
    return {
        "shard_index": ((positions, rank), ledger, helix.shard_index(positions, rank, 2, 2)),
        "first_visible window": ((positions, rank), {**ledger, "window": 3, "chunk": 0}, helix.first_visible(positions, rank, 2, 2, 3, 0)),
        "first_visible chunk": ((positions, rank), {**ledger, "window": 0, "chunk": 4}, helix.first_visible(positions, rank, 2, 2, 0, 4)),
        "embed_rows": ((positions.clamp(min=0), normal(4, 5), torch.tensor(4)), {}, helix.embed_rows(positions.clamp(min=0), normal(4, 5), torch.tensor(4))),
        "mla_decode": ((q, q_rope, cache, TABLE, VISIBLE, none, scale), {"accumulate": DOUBLE}, helix.mla_decode(q, q_rope, cache, TABLE, VISIBLE, 0.3)),
        "mla_decode first": ((q, q_rope, cache, TABLE, VISIBLE, FIRST, scale), {"accumulate": DOUBLE}, helix.mla_decode(q, q_rope, cache, TABLE, VISIBLE, 0.3, first=FIRST)),
        "gqa_decode": ((q_k, k, v, TABLE, VISIBLE, FIRST, scale), {"accumulate": DOUBLE}, helix.gqa_decode(q_k, k, v, TABLE, VISIBLE, 0.3, first=FIRST)),
        "merge_lse": ((parts, lse_P), {}, helix.merge_lse(parts, lse_P)),
        "total_lse": ((lse_P,), {}, helix.total_lse(lse_P)),
        "rescale_by_lse": ((parts[1], lse_P[1], lse_P), {}, helix.rescale_by_lse(parts[1], lse_P[1], lse_P)),
        "apply_sinks": ((q, lse_P[0], normal(H)), {}, helix.apply_sinks(q, lse_P[0], normal(H))),
        "pack_heads": ((q, lse_P[0]), {"peers": 2}, helix.pack_heads(q, lse_P[0], 2)),
        "unpack_heads": ((helix.pack_heads(q, lse_P[0], 2), q, lse_P[0]), {}, helix.unpack_heads(helix.pack_heads(q, lse_P[0], 2), q, lse_P[0])),
        "moe_experts": ((x, ids, weights, gate_up, down, torch.tensor(2)), {"accumulate": DOUBLE}, helix.moe_experts(x, ids, weights, gate_up, down, torch.tensor(2))),
        "index_scores": ((q, normal(B, T, H), normal(4, 8, R), TABLE, VISIBLE, scale), {"accumulate": DOUBLE}, helix.index_scores(q, normal(B, T, H), normal(4, 8, R), TABLE, VISIBLE, 0.3)),
        "select_slots": ((scores, VISIBLE, bound, at, rank), {**ledger, "top_k": 4}, (slots, count)),
        "mla_decode_slots": ((q, q_rope, cache, TABLE, VISIBLE, slots, count, scale), {"accumulate": DOUBLE}, helix.mla_decode_slots(q, q_rope, cache, TABLE, VISIBLE, slots, count, 0.3)),
    }  # fmt: skip


@pytest.mark.parametrize("case", cases())
def test_a_function_is_its_op(case: str) -> None:
    inputs, attributes, expected = cases()[case]
    expected = expected if isinstance(expected, tuple) else (expected,)
    agree(both(case.split()[0], *inputs, outputs=len(expected), **attributes), *expected)


def test_cache_append_returns_what_the_op_leaves_in_its_argument() -> None:
    slots = torch.tensor([[0, 8, -1], [-1, -1, 15]])
    cache, latent, rope = normal(4, 8, R + r), normal(B, T, R), normal(B, T, r)
    before = cache.clone()
    got = both("cache_append", cache, TABLE, slots, VISIBLE, latent, rope, outputs=2)
    agree(got[1:], before.clone().index_put_((torch.tensor([2, 0, 3]), torch.tensor([0, 0, 7])), torch.cat([latent, rope], -1)[[0, 0, 1], [0, 1, 2]]), VISIBLE)  # fmt: skip
    helix.cache_append(cache, TABLE, slots, VISIBLE, latent, rope)
    agree(got, cache, VISIBLE)


@pytest.mark.parametrize("top_k", [3, 20])
def test_all_ranks_find_the_same_key(top_k: int) -> None:
    """Candidates of two ranks, ties among them, and fewer keys than are asked for."""
    scores = [normal(B, T, S, seed=seed).mul(2).round() for seed in (1, 2)]  # many ties
    each = []
    for rank, of_rank in enumerate(scores):
        masked = torch.where(torch.arange(S) < VISIBLE[..., None], of_rank, -torch.inf)
        ours = both(
            "topk_candidates", masked, VISIBLE, torch.tensor(rank), outputs=2, top_k=top_k, cp=2, tokens_per_block=2
        )
        theirs = helix.topk_candidates(masked, VISIBLE, torch.tensor(rank), top_k, 2, 2)
        each.append((ours, theirs))
    expected = helix.kth_candidate(torch.stack([theirs for _, theirs in each]), top_k)
    for run in (0, 1):
        score, position = (torch.stack([ours[run][i] for ours, _ in each]) for i in (0, 1))
        agree(both("kth_candidate", score, position, outputs=2, top_k=top_k), *expected)


def test_rows_are_dealt_to_owners_and_come_back() -> None:
    rows = normal(B, T, 5)
    dealt = both("rows_for_owners", rows, torch.tensor(-torch.inf, dtype=torch.float64), peers=4)
    filled = torch.cat([rows.flatten(0, 1), torch.full((2, 5), -torch.inf, dtype=torch.float64)])
    agree(dealt, filled.view(4, 2, 5))
    agree(both("rows_of_owners", filled[:, :1].contiguous(), VISIBLE), rows[..., 0])


def test_a_function_that_is_not_the_op_is_rejected() -> None:
    """The comparison can fail: without the mask of dead parts a NaN comes through."""
    inputs, attributes, expected = cases()["merge_lse"]
    functions = [FunctionProto.FromString(f.SerializeToString()) for f in functions_for({"merge_lse"})]
    node = next(n for f in functions for n in f.node if f.name == "weighted" and n.op_type == "Where")
    node.CopyFrom(helper.make_node("Identity", [node.input[2]], list(node.output)))
    with pytest.raises(AssertionError):
        agree(both("merge_lse", *inputs, functions=functions, **attributes), expected)


def test_every_function_is_explained_and_checks() -> None:
    assert TEXT.read_text().count("=> (") >= len(helix_functions())
    for function in helix_functions().values():
        assert function.doc_string, function.name
        context = onnx.checker.C.CheckerContext()
        context.ir_version, context.opset_imports = IR_VERSION, {"": OPSET, HELIX: 1}
        onnx.checker.check_function(function, context, onnx.checker.LEXICAL_SCOPE_CONTEXT)
