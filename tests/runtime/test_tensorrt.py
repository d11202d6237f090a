"""lower="tensorrt": pieces are convex and hold what an engine takes, a step of engines is the model, nothing falls back silently.

The builder here hands back the exported piece itself, so all is real but the engine.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import fx
from torch.export import ExportedProgram

from helix_compile import (
    HelixModule,
    HelixOptions,
    LoweringError,
    LoweringUnavailable,
    PlanError,
    RuntimeFault,
    capture,
    helix_compile,
    verify,
)
from helix_compile.compile import plan_model, rewrite_model
from helix_compile.ir.graph import aten, helix_op, placeholders
from helix_compile.ir.stage import bodies_of, nodes_of
from helix_compile.kernels.target import offline_target
from helix_compile.passes.lower.pieces import pieces, pieces_of
from helix_compile.predict.schedule import is_convex
from helix_compile.runtime import tensorrt
from helix_compile.runtime.segments import bound_inputs
from helix_compile.runtime.tensorrt import EngineInput, check_tensorrt
from helix_compile.worlds.program import Program, SegmentCall
from tests.support.driver import random_ids, worst_deviation
from tests.support.families import fresh_family
from tests.support.gqa_models import fresh_gqa
from tests.support.models import fresh_model, tiny_model

CAPACITY = {"max_batch_size": 4, "max_seq_len": 64}


class Built:
    """Builds nothing: the program is its own engine. Keeps what it was asked for."""

    def __init__(self) -> None:
        self.where: list[str] = []
        self.inputs: list[Sequence[EngineInput]] = []

    def __call__(self, program: ExportedProgram, inputs: Sequence[EngineInput], where: str) -> Any:
        assert len(program.graph_signature.user_inputs) == len(inputs), where  # no weight is handed in
        self.where.append(where)
        self.inputs.append(inputs)
        return program.module()


@pytest.fixture(scope="module")
def engines() -> tuple[Any, HelixModule, Built]:
    model, built = fresh_model("short", torch.float32), Built()
    return model, helix_compile(model, cp=4, lower="tensorrt", builder=built, **CAPACITY), built


def test_a_step_of_engines_is_the_model(engines: Any) -> None:
    """Ragged prompt, empty shards, T in {1, 3, 4}; then one sequence, one token."""
    model, compiled, _ = engines
    for lengths in ([5, 2, 7], [1]):
        compiled.reset()
        assert worst_deviation(model, compiled, lengths) <= 1e-5


def test_one_engine_a_piece_and_rank_and_one_for_all_where_weights_are_whole(engines: Any) -> None:
    """Prologue and the norm before experts have replicated weights; what is cut has an engine a rank. The report says the same."""
    _, compiled, built = engines
    dense, sparse = sorted({where.split(".")[0] for where in built.where})
    once, a_rank = 1, 4
    assert {where: built.where.count(where) for where in built.where} == {
        f"{dense}.segment_0": once,  # norm to W_UK
        f"{dense}.segment_1": a_rank,  # W_UV, o_proj
        f"{dense}.segment_2": a_rank,  # norm, dense FFN
        f"{sparse}.segment_0": once,
        f"{sparse}.segment_1": a_rank,
        f"{sparse}.segment_2": once,  # the norm before experts
        f"{sparse}.segment_3": a_rank,  # shared expert
    }
    said = {row["piece"]: row for body in compiled.inspect().facts["engines"] for row in body["pieces"]}
    for inputs, where in zip(built.inputs, built.where, strict=True):
        row = said[where.replace(f"{dense}.", "body_0_").replace(f"{sparse}.", "body_1_")]
        assert [i.name for i in inputs] == [text.split("[")[0] for text in row["inputs"]]
    assert [len(said[f"body_0_segment_{n}"]["weights"]) for n in range(3)] == [7, 2, 4]


def test_engines_are_for_every_shape_up_to_the_capacity(engines: Any) -> None:
    _, _, built = engines
    (hidden, *_) = built.inputs[0]
    assert (hidden.name, hidden.smallest, hidden.usual, hidden.largest) == (
        "hidden",
        (1, 1, 72),
        (4, 1, 72),
        (4, 64, 72),
    )


CASES: dict[str, Any] = {
    "mla, v_up before": (lambda: tiny_model("short", torch.float32), {"cp": 2, "tpa": 2, "v_up": "before"}),
    "mla, ag_rs": (lambda: tiny_model("short", torch.float32), {"cp": 4, "merge": "ag_rs", "q_proj": "gather"}),
    "gqa": (lambda: fresh_gqa("qwen3", torch.float32), {"cp": 2, "tpa": 2}),
    "dsa": (lambda: fresh_family("deepseek_v32", dtype=torch.float32), {"cp": 2}),
}


@pytest.mark.parametrize("case", [*[c for c in CASES if c != "dsa"], pytest.param("dsa", marks=pytest.mark.slow)])
def test_pieces_are_convex_and_hold_floats_of_b_and_t(case: str) -> None:
    """By their nodes in the lowered graph: no path leaves a piece and comes back."""
    make, options = CASES[case]
    compiled = helix_compile(make(), lower="reference", **options)
    stage = pieces_of(compiled.graph)
    found = 0
    for name, body in bodies_of(compiled.graph).items():
        known = {node.name for node in body.graph.nodes}
        for piece, graph in bodies_of(stage.get_submodule(name)).items():
            own = [n for n in graph.graph.nodes if n.op == "call_function" and n.name in known]
            values = [v for n in own for v in ([n.meta["val"]] if isinstance(n.meta["val"], torch.Tensor) else [])]
            assert is_convex(body.graph, [n.name for n in own]), piece
            assert not [n for n in own if helix_op(n) or "_c10d" in str(n.target)]
            assert all(v.dtype == torch.float32 for v in values)
            assert all(n.meta["val"].dtype == torch.float32 for n in placeholders(graph.graph))
            found += 1
    assert found >= 3


def test_pieces_beside_the_kernels_of_a_card() -> None:
    """As on an H100, where "tensorrt" leaves the rest to Triton: fused kernels are in no piece, and what they left is."""
    planned = plan_model(capture(tiny_model("short", torch.float32)), HelixOptions(cp=4, lower="tensorrt", **CAPACITY))
    stages = rewrite_model(planned, offline_target("sm_90"))
    kernels = {n.name for n in nodes_of(stages["lowered"]) if str(n.target).startswith("helix_triton.")}
    inside = [n for _, g in pieces(stages["segments"]) for n in g.graph.nodes if n.op == "call_function"]
    assert len(kernels) >= 4 and not [n for n in inside if str(n.target).startswith(("helix", "_c10d"))]
    assert sum(n.target is aten.linear.default for n in inside) >= 8


def test_a_region_that_is_not_convex_is_told(engines: Any) -> None:
    """The check itself: attention between the first and the second piece, taken as one with them."""
    _, compiled, _ = engines
    body = bodies_of(compiled.graph)["body_0"]
    first, second, *_ = (graph for name, graph in pieces(compiled.stages["segments"]) if name.startswith("body_0"))
    names = {n.name for n in body.graph.nodes}
    both = [n.name for g in (first, second) for n in g.graph.nodes if n.op == "call_function" and n.name in names]
    assert not is_convex(body.graph, both)


def test_the_report_says_what_is_in_no_engine_and_why(engines: Any) -> None:
    _, compiled, _ = engines
    bodies = {body["body"]: body for body in compiled.inspect().facts["engines"]}
    why = {row["node"]: row["why"] for row in bodies["body_1"]["in_no_engine"]}
    assert why["mla_decode"] == "mla_decode: an op of ours" and why["all_reduce"] == "a collective"
    assert "chooses experts" in why["topk"] and "chooses experts" in why["linear_5"]
    assert why["view_12"].startswith("reads `routed`: [B*T,72]") and why["first_expert"].startswith("int64")
    text = str(compiled.inspect())
    assert "none has been built or run on a card yet" in text and "body_1_segment_3 | 6 " in text
    of_body = bodies_of(compiled.stages["segments"].get_submodule("body_1")).values()
    in_pieces = {n.name for g in of_body for n in g.graph.nodes if n.op == "call_function"}
    assert not in_pieces & set(why)


def test_a_weight_that_is_edited_or_assigned_is_another_engine(engines: Any) -> None:
    """In place in the model, and of one rank: only engines with that weight are built again."""
    model, compiled, built = engines
    ids = random_ids(model, 2, 3)
    before = compiled.programs()
    compiled.reset()
    compiled(ids)
    assert compiled.programs() is before
    for edit, count in ((lambda: model.model.layers[0].mlp.up_proj.weight.mul_(1.5), 4), (lambda: assign(compiled), 1)):
        with torch.no_grad():
            edit()
        known = len(built.where)
        compiled.reset()
        got = compiled(ids)
        compiled.reset()
        assert torch.equal(got, compiled.run_stage("lowered", ids))
        assert len(built.where) == known + count


def assign(compiled: HelixModule) -> None:
    params, name = compiled.ranks[1].params, "model.layers.1.self_attn.o_proj.weight"
    params[name] = params[name] * 2


def test_what_an_engine_was_not_built_for_is_refused(engines: Any) -> None:
    """The first piece is handed 65 tokens, and was built for 64."""
    _, compiled, _ = engines
    called = list[SegmentCall]()
    stage = compiled.stages["segments"]
    bound = bound_inputs(stage, compiled.ranks[0], compiled.plan.layout, compiled.device)
    Program(0, stage, bound, lambda call: called.append(call) or call.segment)  # type: ignore[func-returns-value]
    nodes = placeholders(called[0].segment.graph)
    tensors = [
        called[0].bound.get(place, torch.zeros(1, 65, int(n.meta["val"].shape[-1]))) for place, n in enumerate(nodes)
    ]
    with pytest.raises(
        RuntimeFault, match=r"`hidden` is \[1, 65, 72\], and its engine was built for up to \[4, 64, 72\]"
    ):
        compiled.segment_compiler.code(called[0])(*tensors)


def test_verify_finds_an_engine_that_computes_something_else() -> None:
    model = tiny_model("short", torch.float32)

    def halves(program: ExportedProgram, inputs: Sequence[EngineInput], where: str) -> Any:
        module = program.module()
        return lambda *given: [x * (1.01 if where.endswith("segment_1") else 1) for x in module(*given)]

    compiled = helix_compile(model, cp=2, lower="tensorrt", builder=halves, **CAPACITY)
    (finding,) = verify(compiled, model).findings
    assert finding.code == "HX411" and ".segment_1" in finding.where


def test_a_saved_module_is_built_anew(engines: Any, tmp_path: Path) -> None:
    model, compiled, _ = engines
    compiled.save(tmp_path / "saved")
    built = Built()
    loaded = HelixModule.load(tmp_path / "saved", builder=built)
    ids = random_ids(model, 2, 5)
    compiled.reset()
    assert torch.equal(loaded(ids), compiled(ids)) and len(set(built.where)) == 7


# refusals


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("nothing may be captured")


def test_without_the_package_nothing_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    monkeypatch.setattr("helix_compile.compile.captured_from", never)
    with pytest.raises(LoweringUnavailable, match=r"not installed: pip install 'helix-compile\[tensorrt\]'"):
        helix_compile(tiny_model("short", torch.float32), cp=2, lower="tensorrt")


def test_a_package_that_cannot_load_is_a_refusal_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its import prints, and raises a bare Exception: neither reaches who asks for JSON."""
    (tmp_path / "torch_tensorrt.py").write_text(
        "print('import error when try to import _TensorRTProxyModule')\nraise Exception('libnvinfer.so.11: no such file\\nmore')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch_tensorrt", raising=False)
    monkeypatch.setattr("helix_compile.compile.captured_from", never)
    with pytest.raises(
        LoweringUnavailable, match=r"can't be loaded: Exception: libnvinfer.so.11: no such file; it wants"
    ):
        helix_compile(tiny_model("short", torch.float32), cp=2, lower="tensorrt")
    assert capsys.readouterr().out == ""


def test_a_builder_without_engines_has_no_effect() -> None:
    with pytest.raises(PlanError, match="builder has no effect at lower='reference'"):
        helix_compile(tiny_model("short", torch.float32), cp=2, lower="reference", builder=Built())


class Converted(torch.nn.Module):
    """What torch_tensorrt puts in the place of what it converted."""

    def __init__(self, inputs: int):
        super().__init__()
        self.input_binding_names = [f"x{n}" for n in range(inputs)]


def torch_tensorrt(result: Any, without: str = "") -> ModuleType:
    """A package whose compile() gives `result`, or raises it; `without` is a keyword that it lacks."""

    def compile(exported_program: Any, *, arg_inputs: Any, **keywords: Any) -> Any:
        if isinstance(result, Exception):
            raise result
        return result

    known = json.loads((Path(__file__).parents[1] / "data/torch_tensorrt_compile.json").read_text())["compile"]
    kinds = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in known if name != without]
    compile.__signature__ = inspect.Signature(kinds)  # type: ignore[attr-defined]
    package = ModuleType("torch_tensorrt")
    package.Input = SimpleNamespace  # type: ignore[attr-defined]
    runtime = SimpleNamespace(TorchTensorRTModule=Converted)
    package.dynamo = SimpleNamespace(compile=compile, runtime=runtime)  # type: ignore[attr-defined]
    return package


def converted(engines: int, inputs: int, beside: bool) -> fx.GraphModule:
    graph = fx.Graph()
    x = graph.placeholder("x")
    for n in range(engines):
        x = graph.call_module(f"_run_on_acc_{n}", (x,))
    graph.output((graph.call_function(torch.ops.aten.topk.default, (x, 2)) if beside else x,))
    return fx.GraphModule({f"_run_on_acc_{n}": Converted(inputs) for n in range(engines)}, graph)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (converted(1, 1, beside=True), r"made 1 engines and left \['topk_default'\] to torch"),
        (converted(0, 0, beside=True), "made 0 engines"),
        (converted(2, 1, beside=False), "made 2 engines and left no op"),
        (converted(1, 6, beside=False), "takes 6 inputs, expected 1"),
        (
            AssertionError("not fully supported\nmore"),
            "builds no engine of this piece: AssertionError: not fully supported;",
        ),
    ],
    ids=["an op beside", "nothing converted", "two engines", "weights handed in", "refused"],
)
def test_a_piece_that_is_not_one_engine_is_an_error(result: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_tensorrt", torch_tensorrt(result))
    one = [EngineInput("x", torch.float32, (1, 1, 8), (4, 1, 8), (4, 64, 8))]
    builder = tensorrt.TorchTensorRT(torch.device("cpu"))
    with pytest.raises(LoweringError, match=f"layer_0.segment_0: .*{message}"):
        builder(None, one, "layer_0.segment_0")  # type: ignore[arg-type]


def test_one_whole_engine_is_taken_and_doubles_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = converted(1, 1, beside=False)
    monkeypatch.setitem(sys.modules, "torch_tensorrt", torch_tensorrt(whole))
    builder = tensorrt.TorchTensorRT(torch.device("cpu"))
    shapes = ((1, 1, 8), (4, 1, 8), (4, 64, 8))
    assert builder(None, [EngineInput("x", torch.float16, *shapes)], "here") is whole  # type: ignore[arg-type]
    with pytest.raises(LoweringError, match=r"here: TensorRT computes in .*, got x: torch.float64"):
        builder(None, [EngineInput("x", torch.float64, *shapes)], "here")  # type: ignore[arg-type]


def test_a_package_that_forgot_a_keyword_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """compile() swallows what it does not know: tf32 would be on again."""
    monkeypatch.setitem(sys.modules, "torch_tensorrt", torch_tensorrt(None, without="disable_tf32"))
    with pytest.raises(LoweringUnavailable, match="has no disable_tf32"):
        tensorrt.TorchTensorRT(torch.device("cpu"))


def test_on_meta_nothing_is_built_and_nothing_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inspect --meta shows the pieces anywhere."""
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    check_tensorrt(torch.device("meta"), None)
    with pytest.raises(LoweringUnavailable, match="not installed"):
        check_tensorrt(torch.device("cuda"), None)


def test_a_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_tensorrt", torch_tensorrt(None))
    with pytest.raises(LoweringUnavailable, match="builds engines for an NVIDIA card; got device cpu"):
        check_tensorrt(torch.device("cpu"), None)
