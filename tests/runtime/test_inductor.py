"""lower="inductor": compiled segments are the graph, bit for bit in bfloat16, and follow what is edited."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx
from torch._inductor import config
from transformers import DynamicCache

from helix_compile import (
    HelixError,
    HelixModule,
    LoweringError,
    LoweringUnavailable,
    RuntimeFault,
    helix_compile,
    verify,
)
from helix_compile.ir.graph import aten, calls
from helix_compile.ir.stage import bodies_of, graphs_of
from helix_compile.runtime import inductor
from tests.support.driver import left_padded, random_ids
from tests.support.models import fresh_model

OPTIONS: dict[str, Any] = {"cp": 2, "tpa": 2, "tokens_per_block": 2, "max_batch_size": 4, "max_seq_len": 256}


@pytest.fixture(scope="module")
def pair() -> tuple[Any, HelixModule, HelixModule]:
    """A model, its interpreted and its compiled step."""
    torch.manual_seed(0)
    model = fresh_model("short", torch.bfloat16)
    return model, helix_compile(model, lower="reference", **OPTIONS), helix_compile(model, lower="inductor", **OPTIONS)


@pytest.mark.parametrize("lengths", [[1], [5], [5, 2, 7], [1, 1, 1, 1]], ids=str)
def test_bfloat16_is_equal_bit_for_bit(pair: Any, lengths: list[int]) -> None:
    """Ragged prompts, T in {1, 2, 4}, an empty shard, and the caches afterwards."""
    model, interpreted, compiled = pair
    for module in (interpreted, compiled):
        module.reset()
        for rank in module.ranks:
            for cache in rank.cache:
                cache.fill_(torch.nan)
    prompt = left_padded(lengths)
    for mask in (prompt, *(torch.ones(len(lengths), tokens, dtype=torch.int64) for tokens in (1, 4, 1, 2))):
        ids = random_ids(model, *mask.shape)
        assert torch.equal(compiled(ids, mask)[mask.bool()], interpreted(ids, mask)[mask.bool()])
    for mine, theirs in zip(compiled.ranks, interpreted.ranks, strict=True):
        for a, b in zip(mine.cache, theirs.cache, strict=True):
            assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


def test_ids_may_lie_anyhow(pair: Any) -> None:
    """A loop slices the last column off what it has: [B, 1] whose rows are far apart."""
    model, interpreted, compiled = pair
    ids = random_ids(model, 3, 9)
    for module in (interpreted, compiled):
        module.reset()
    for part in (ids[:, :6:2], ids[:, -1:], ids.t().contiguous().t()[:, :1]):
        assert torch.equal(compiled(part), interpreted(part))


def test_nothing_is_compiled_after_warm_up(pair: Any) -> None:
    model, _, compiled = pair
    compiled.reset()
    ids = random_ids(model, 2, 3)
    compiled(ids)
    known, programs = dict(inductor._CODE), compiled.programs()
    for tokens in (1, 1, 2, 7, 1):
        compiled(random_ids(model, 2, tokens))
    assert inductor._CODE == known and compiled.programs() is programs


def test_edits_are_followed(pair: Any) -> None:
    """Of the graph, of a rank's parameters, and of the model in place: as the interpreted step follows them."""
    model, interpreted, compiled = pair
    ids = random_ids(model, 2, 3)

    def logits(module: HelixModule) -> Any:
        module.reset()
        return module(ids)

    before = logits(compiled)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    assert not torch.equal(logits(compiled), before) and torch.equal(logits(compiled), logits(interpreted))
    for module in (interpreted, compiled):
        name = "model.layers.1.self_attn.o_proj.weight"
        module.ranks[1].params[name] = module.ranks[1].params[name] * 2
    assert torch.equal(logits(compiled), logits(interpreted))
    for module in (interpreted, compiled):
        body = next(iter(bodies_of(module.graph).values()))
        silu = calls(body.graph, aten.silu.default)[0]
        silu.target = aten.relu.default
        body.recompile()
    assert torch.equal(logits(compiled), logits(interpreted))
    assert "aten.relu" in compiled.stage_diff("lowered", "segments")


def test_a_reloaded_module_runs_compiled(pair: Any, tmp_path: Path) -> None:
    model, _, compiled = pair
    compiled.save(tmp_path / "saved")
    loaded = HelixModule.load(tmp_path / "saved")
    known = dict(inductor._CODE)
    ids = random_ids(model, 2, 5)
    compiled.reset()
    assert torch.equal(loaded(ids), compiled(ids)) and loaded.programs() is not None
    assert inductor._CODE == known  # the same code, in one process
    loaded.inspect(tmp_path / "views")
    assert "segment_0" in (tmp_path / "views" / "05_segments.txt").read_text()


def test_stages_can_be_run_and_are_equal(pair: Any) -> None:
    model, _, compiled = pair
    ids, found = random_ids(model, 2, 4), []
    for stage in ("lowered", "segments"):
        compiled.reset()
        found.append(compiled.run_stage(stage, ids))
    assert torch.equal(*found)


def test_code_that_computes_something_else_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verify names the segment, the layer and the value; with right code it says how many calls were compared."""
    model = fresh_model("short", torch.bfloat16)
    compiled = helix_compile(model, lower="inductor", **OPTIONS)
    report = verify(compiled, model)
    assert report.ok and any("bit for bit" in note for note in report.notes), report
    made = inductor.code_of

    def faulty(segment: Any, bound: Any, name: str) -> Any:
        code = made(segment, bound, name)
        if name.startswith("layer_0") or not name.endswith(".segment_2"):
            return code
        return lambda *tensors: [x * 1.05 for x in code(*tensors)]

    monkeypatch.setattr("helix_compile.runtime.inductor.code_of", faulty)
    (finding,) = verify(compiled, model).findings
    assert finding.code == "HX411" and ".segment_2" in finding.where and "layer_0" not in finding.where


def test_kernels_of_a_segment_are_called_from_cpp(pair: Any) -> None:
    """Code that Python calls kernels from asks for each buffer, and for the layout of each input, by a call from Python."""
    model, _, compiled = pair
    called: set[str] = set()
    compiled.reset()
    sys.setprofile(lambda _, event, what: called.add(what.__name__) if event == "c_call" else None)
    try:
        compiled(random_ids(model, 2, 1))
    finally:
        sys.setprofile(None)
    assert called and not called & {"_empty_strided_cpu", "assert_size_stride"}


def test_without_a_compiler_it_is_refused() -> None:
    absent = config.patch({"cpp.cxx": ("no-such-compiler",)})
    with absent, pytest.raises(LoweringUnavailable, match=r"finds no compiler \(looked for no-such-compiler\)"):
        helix_compile(fresh_model("short", torch.bfloat16), lower="inductor", **OPTIONS)


def test_a_segment_that_inductor_refuses_is_named(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no lowering for this\nmore")

    monkeypatch.setattr("torch._inductor.standalone_compile", fails)
    monkeypatch.setattr(inductor, "_CODE", type(inductor._CODE)())
    with pytest.raises(
        LoweringError, match=r"segment_0: Inductor does not compile .*RuntimeError: no lowering for this; "
    ):
        helix_compile(pair[0], lower="inductor", **OPTIONS)


def test_a_function_that_an_edit_calls_is_called_at_every_step(pair: Any) -> None:
    """What it reads may change: it is no part of compiled code."""
    model, _, compiled = pair
    factor, ids = [2.0], random_ids(model, 1, 3)
    (body, *_) = bodies_of(compiled.graph).values()
    node = calls(body.graph, aten.linear.default)[0]
    with body.graph.inserting_after(node):
        scaled = body.graph.call_function(lambda x: x * factor[0], (node,))
    scaled.meta = dict(node.meta)
    node.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)
    body.recompile()
    found = []
    for factor[0] in (2.0, -3.0):
        compiled.reset()
        found.append(compiled(ids))
        compiled.reset()
        assert torch.equal(found[-1], compiled.run_stage("lowered", ids))
    assert not torch.equal(*found)


def test_torch_compile_around_a_module_traces_nothing_of_it(pair: Any) -> None:
    """Dynamo would follow a step through every call, and guard lengths and page tables."""
    model, _, compiled = pair

    def refuse(*_: Any) -> Any:
        raise AssertionError("a graph was traced")

    torch._dynamo.reset()
    again, ids = torch.compile(compiled, backend=refuse), random_ids(model, 2, 3)
    found = []
    for step in (compiled, again, again):
        compiled.reset()
        found.append(torch.cat([step(ids), step(ids[:, :1])], dim=1))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    with pytest.raises(torch._dynamo.exc.Unsupported, match="a HelixModule is compiled already"):
        torch.compile(lambda x: compiled(x) * 2, backend=refuse, fullgraph=True)(ids)
    torch._dynamo.reset()


WEIGHT = "model.layers.0.input_layernorm.weight"


def test_what_code_was_not_made_for_is_refused_or_followed(pair: Any) -> None:
    """It reads memory as what the graph says: of another dtype it would compute with other numbers, and say nothing."""
    model, _, compiled = pair
    ids, params = random_ids(model, 1, 3), compiled.ranks[1].params
    compiled.reset()
    before, own, said = (
        compiled(ids),
        params[WEIGHT],
        r"rank 1, .*param input_layernorm.weight is torch\.float32 \[72\] ",
    )
    params[WEIGHT] = own.float()
    with pytest.raises(RuntimeFault, match=said + r".*compiled for torch\.bfloat16 \[72\]"):
        compiled(ids)
    params[WEIGHT] = held = own.clone()
    compiled.reset()
    assert torch.equal(compiled(ids), before)
    held.data = own.float()
    with pytest.raises(RuntimeFault, match=said):
        compiled(ids)
    params[WEIGHT] = own
    caches = compiled.ranks[0].cache
    cache, caches[0] = caches[0], torch.zeros(*caches[0].shape[:2], 30, dtype=torch.bfloat16)[..., :26]
    with pytest.raises(RuntimeFault, match=r"rank 0, .*cache cache_0 is .* with strides \[3840, 30, 1\]"):
        compiled(ids)
    caches[0] = cache
    name = "model.layers.1.self_attn.o_proj.weight"
    kept, params[name] = params[name], params[name].clone()
    compiled.reset()
    compiled(ids)
    params[name].data = (kept * 2).t().contiguous().t()
    found = []
    for step in (compiled, partial(compiled.run_stage, "lowered")):
        compiled.reset()
        found.append(step(ids))
    params[name] = kept
    assert torch.equal(*found) and not torch.equal(found[0], before)


def behind_silu(module: HelixModule, make: Callable[[fx.Graph, fx.Node], fx.Node]) -> fx.GraphModule:
    """Put what `make` makes of it behind the first silu, with no word of its shape or dtype; the body."""
    body = next(iter(bodies_of(module.graph).values()))
    node = calls(body.graph, aten.silu.default)[0]
    users = list(node.users)
    with body.graph.inserting_before(node.next):
        made = make(body.graph, node)
    for user in users:
        user.replace_input_with(node, made)
    body.recompile()
    return body


def test_a_constant_of_an_edit_is_followed_and_a_function_held_to_its_word() -> None:
    model = fresh_model("short", torch.bfloat16)
    modules = [helix_compile(model, lower=lower, **OPTIONS) for lower in ("reference", "inductor")]
    compiled, ids, wide = modules[1], random_ids(model, 2, 3), [False]
    for module in modules:
        body = next(iter(bodies_of(module.graph).values()))
        body.register_buffer("factor", torch.tensor(3.0, dtype=torch.bfloat16))
        behind_silu(module, lambda graph, x: graph.call_function(aten.mul.Tensor, (x, graph.get_attr("factor"))))

    def logits(module: HelixModule) -> torch.Tensor:
        module.reset()
        return module(ids)

    first = logits(compiled)
    assert torch.equal(logits(modules[0]), first)
    for module in modules:
        next(iter(bodies_of(module.graph).values())).factor = torch.tensor(-1.0, dtype=torch.bfloat16)
    assert torch.equal(*map(logits, modules)) and not torch.equal(logits(compiled), first)

    def widens(x: torch.Tensor) -> torch.Tensor:
        return x.float() if wide[0] else x

    for module in modules:
        behind_silu(module, lambda graph, x: graph.call_function(widens, (x,)))
    assert torch.equal(*map(logits, modules))
    wide[0] = True
    with pytest.raises(RuntimeFault, match=r"`widens` is torch\.float32, and the graph says torch\.bfloat16"):
        compiled(ids)
    body = behind_silu(compiled, lambda graph, x: graph.call_function(aten.to.dtype, (x, torch.float32)))
    with pytest.raises(HelixError, match=r"body_0: it returns .* in torch\.float32, and layers take torch\.bfloat16"):
        compiled(ids)


@pytest.mark.slow
def test_kernels_between_collectives(pair: Any) -> None:
    """lower="triton+inductor": the plan's kernels stay calls, and what is around them is compiled."""
    model = fresh_model("short", torch.bfloat16)
    both, kernels = (helix_compile(model, lower=lower, **OPTIONS) for lower in ("triton+inductor", "triton"))
    called = [
        str(n.target) for s in graphs_of(both.stages["segments"]) if "_segment_" in s[0] for n in s[1].graph.nodes
    ]
    assert "helix_triton.mla_decode.splits" in called or "helix_triton.mla_decode.default" in called, called
    prompt = left_padded([5, 2])
    for mask in (prompt, torch.ones(2, 1, dtype=torch.int64)):
        ids = random_ids(model, *mask.shape)
        assert torch.equal(both(ids, mask)[mask.bool()], kernels(ids, mask)[mask.bool()])


@pytest.mark.parametrize(
    ("dtype", "step", "terms"), [(torch.bfloat16, 7 / 2**7, 300), (torch.float16, 20 / 2**10, 450)], ids=str
)
def test_a_product_of_one_row_is_rounded_once(
    dtype: torch.dtype, step: float, terms: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inductor writes it out, and would round each of its terms: by two fifths of a digit, all in one direction."""
    a, b = torch.full((3, 1, terms), 1 + step).to(dtype), torch.full((3, terms, 5), 1 + step).to(dtype)
    exact = (a.double() @ b.double()).to(dtype)

    def computed() -> torch.Tensor:
        graph = fx.Graph()
        nodes = [graph.placeholder(name) for name in "ab"]
        for node, value in zip(nodes, (a, b), strict=True):
            node.meta = {"val": value, "input": ["hidden", node.name]}
        graph.output((graph.call_function(aten.bmm.default, tuple(nodes)),))
        (got,) = inductor.code_of(fx.GraphModule(torch.nn.Module(), graph), {}, "product")(a, b)
        return got

    assert torch.equal(computed(), exact)
    monkeypatch.setattr(inductor, "_CODE", type(inductor._CODE)())
    monkeypatch.setattr(inductor, "_narrow_bmm", lambda a, b: NotImplemented)
    assert not torch.equal(computed(), exact)


@pytest.mark.slow  # two builds
def test_tables_of_positions_are_torchs_own_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cos and sin of float32, and a temperature of positions alone; Inductor's own vectors round one value in four otherwise."""

    def computed() -> list[bool]:
        graph = fx.Graph()
        positions, frequencies = torch.arange(4096)[None], 10000.0 ** -torch.arange(0, 1, 1 / 7)
        taken = [graph.placeholder(name) for name in ("positions", "frequencies")]
        for node, value in zip(taken, (positions, frequencies), strict=True):
            node.meta = {"val": value, "input": ["input", node.name]}
        column = graph.call_function(aten.unsqueeze.default, (taken[0], 2))
        wide = graph.call_function(aten._to_copy.default, (column,), {"dtype": torch.float32})
        angle = graph.call_function(aten.mul.Tensor, (wide, taken[1]))
        later = graph.call_function(aten.add.Tensor, (wide, 1.0))
        tables = [graph.call_function(op, (angle,)) for op in (aten.cos.default, aten.sin.default)]
        graph.output((*tables, graph.call_function(aten.log.default, (later,))))
        segment = fx.GraphModule(torch.nn.Module(), graph)
        got = inductor.code_of(segment, {}, "tables")(positions, frequencies)
        return [torch.equal(a, b) for a, b in zip(got, segment(positions, frequencies), strict=True)]

    assert computed() == [True, True, True]
    monkeypatch.setattr(inductor, "_CODE", type(inductor._CODE)())
    monkeypatch.setitem(inductor._OPTIONS, "post_grad_custom_post_pass", None)
    assert computed() == [False, False, False]


@pytest.mark.slow
def test_a_bar_counts_what_is_compiled(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is known is not in it; a rank that is not the leader shows none."""
    shown: list[tuple[int, dict[str, Any]]] = []

    def bar(calls: list[Any], **keywords: Any) -> list[Any]:
        shown.append((len(calls), keywords))
        return calls

    monkeypatch.setattr("helix_compile.runtime.segments.tqdm", bar)
    monkeypatch.setattr(inductor, "_CODE", type(inductor._CODE)())
    for _ in range(2):
        helix_compile(pair[0], lower="inductor", **OPTIONS)
    (first, keywords), (again, _) = shown
    assert first >= len(inductor._CODE) > 3 and again == 0
    assert keywords["desc"] == "compile" and keywords["unit"] == "segment" and keywords["disable"] is None  # a terminal


@pytest.mark.slow
def test_torch_compile_runs_the_same_segments() -> None:
    model = fresh_model("short", torch.bfloat16)
    compiled = helix_compile(model, lower="inductor", **OPTIONS)
    ids = random_ids(model, 2, 5)
    known = dict(inductor._CODE)
    torch._dynamo.reset()
    entered = torch.compile(model, backend="helix", fullgraph=True, options={**OPTIONS, "lower": "inductor"})
    cache = DynamicCache(config=model.config)
    for part in (ids, ids[:, :1], ids[:, :3]):
        with torch.no_grad():
            logits = entered(input_ids=part, past_key_values=cache, use_cache=True).logits
        assert torch.equal(logits, compiled(part))
    torch._dynamo.reset()
    assert inductor._CODE == known


_ONE_PROCESS = """
import json, torch
from torch._dynamo.utils import counters
from helix_compile import helix_compile
from tests.support.driver import random_ids
from tests.support.models import fresh_model
torch.manual_seed(0)
model = fresh_model("short", torch.float32)
compiled = helix_compile(model, cp=2, lower="inductor", max_seq_len=64)
logits = compiled(random_ids(model, 2, 3))
found = counters["inductor"]
print(json.dumps([found["fxgraph_cache_miss"], found["fxgraph_cache_hit"], logits.sum().item()]))
"""


@pytest.mark.slow
def test_another_process_reads_the_code_from_disk(tmp_path: Path) -> None:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    runs = []
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", _ONE_PROCESS], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    (missed, _, first), (missed_again, found, second) = runs
    assert missed > 3 and (missed_again, found) == (0, missed) and first == second
