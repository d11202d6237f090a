"""Configuration files: ours, TensorRT-LLM's and vLLM's; every refusal has key path, got and expected."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from typer.testing import CliRunner, Result

import helix_compile
from helix_compile import HelixError
from helix_compile.cli import commands as cli
from helix_compile.config import options as options_module
from helix_compile.config.dialects import fields_of_file
from helix_compile.config.options import HelixOptions
from helix_compile.config.schema import options_schema, schema_text

HELIX = {"cp_type": "HELIX", "tokens_per_block": 32}
TRTLLM = {"context_parallel_size": 4, "cp_config": HELIX, "kv_cache_config": {"tokens_per_block": 32}}


def trtllm(**change: Any) -> dict[str, Any]:
    """TRTLLM with keys changed; a key given as ... is left out."""
    return {k: v for k, v in {**TRTLLM, **change}.items() if v is not ...}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (trtllm(), {"cp": 4, "tpa": 1, "ep": 1, "tokens_per_block": 32}),
        (trtllm(tensor_parallel_size=2, moe_expert_parallel_size=8), {"cp": 4, "tpa": 2, "ep": 8}),
        (trtllm(moe_tensor_parallel_size=2), {"cp": 4, "ep": 2}),
        (trtllm(kv_cache_config=...), {"cp": 4, "tokens_per_block": 32}),  # its default
        (
            trtllm(cp_config={"cp_type": "helix", "tokens_per_block": 64}, kv_cache_config={"tokens_per_block": 64}),
            {"tokens_per_block": 64},
        ),
        (trtllm(cp_config={**HELIX, "use_nccl_for_alltoall": False, "fifo_version": 2}), {"cp": 4}),
        ({"tensor_parallel_size": 8}, {"cp": 1, "tpa": 8, "ep": 1}),
        (trtllm(cp_config={"cp_type": "HELIX"}), {"cp": 4, "tokens_per_block": 32}),  # with a note
        (trtllm(cuda_graph_config=None, speculative_config=None, max_seq_len=None), {"cp": 4, "max_seq_len": 4096}),
        (trtllm(pipeline_parallel_size=2), {"cp": 4, "pp": 2, "stage": 0, "pp_split": "first"}),
        (
            trtllm(enable_attention_dp=True, tensor_parallel_size=4, moe_expert_parallel_size=16),
            {"cp": 4, "tpa": 1, "ep": 4},
        ),
        (
            {"generation_servers": TRTLLM, "context_servers": {"num_instances": 0}, "max_seq_len": 99},
            {"cp": 4, "max_seq_len": 99},
        ),
        ({"worker_config": {"gen": TRTLLM, "ctx": {}}, "hardware": {"gpus_per_node": 4}}, {"cp": 4}),
        (
            trtllm(
                max_batch_size=3, max_seq_len=70000, max_num_tokens=8192, cuda_graph_config={"enable_padding": True}
            ),
            {"max_batch_size": 3, "max_seq_len": 70000},
        ),
        (
            trtllm(
                kv_cache_config={"tokens_per_block": 32, "enable_block_reuse": False, "free_gpu_memory_fraction": 0.5}
            ),
            {"cp": 4},
        ),
    ],
    ids=[
        "helix",
        "degrees",
        "moe_tp",
        "default block",
        "case",
        "medium",
        "plain tp",
        "one block",
        "nulls",
        "stages",
        "replica",
        "disaggregated",
        "workers",
        "capacity",
        "cache keys",
    ],
)
def test_trtllm(source: dict[str, Any], expected: dict[str, int]) -> None:
    options = asdict(HelixOptions.from_trtllm(source))
    assert {k: options[k] for k in expected} == expected
    assert options["merge"] == "a2a"


MISMATCH = (
    "cp_config.tokens_per_block: When HELIX parallelism is active, cp_config.tokens_per_block (64) must match "
    "kv_cache_config.tokens_per_block (32). got 64, expected 32"
)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (trtllm(cp_config={**HELIX, "tokens_per_block": 64}), MISMATCH),
        (
            trtllm(cp_config={**HELIX, "tokens_per_block": 64}, kv_cache_config=...),
            MISMATCH + "; the latter is the default",
        ),
        (
            trtllm(cp_config={**HELIX, "tokens_per_block": None}),
            "cp_config.tokens_per_block: got None, expected a value",
        ),
        (trtllm(cp_config={**HELIX, "use_nccl_for_alltoall": None}), "cp_config.use_nccl_for_alltoall: got None"),
        (
            trtllm(cp_config={**HELIX, "fifo_version": 3, "use_nccl_for_alltoall": False}),
            "cp_config.fifo_version: got 3 (int), expected 1 or 2",
        ),
        (trtllm(cp_config={**HELIX, "fifo_version": "2"}), "cp_config.fifo_version: got '2' (str), expected an int"),
        (
            trtllm(cp_config={**HELIX, "fifo_version": 2}),
            "use_nccl_for_alltoall is true by default, expected no fifo_version",
        ),
        (
            trtllm(cp_config={**HELIX, "fifo_versoin": 2}),
            "cp_config.fifo_versoin: got an unknown key, expected one that is understood; did you mean fifo_version?",
        ),
        (
            trtllm(cp_config={**HELIX, "cp_type": "HELX"}),
            "cp_config.cp_type: Invalid cp_type: HELX. Must be one of: ULYSSES, STAR, RING, HELIX",
        ),
        (
            trtllm(cp_config={**HELIX, "cp_type": "star"}),
            "cp_config.cp_type: CP type must be HELIX for MLA, but got STAR",
        ),
        (trtllm(cp_config={"tokens_per_block": 32}), "CP type must be HELIX for MLA, but got ULYSSES, the default"),
        (trtllm(cp_config=...), "cp_config: got none, expected {cp_type: HELIX"),
        (
            trtllm(context_parallel_size=1),
            "cp_config.cp_type: got HELIX with context_parallel_size 1, expected context_parallel_size >= 2",
        ),
        (trtllm(context_parallel_size=...), "got HELIX with context_parallel_size 1"),
        (trtllm(context_parallel_size=True), "context_parallel_size: got True (bool), expected an int >= 1"),
        (trtllm(context_parallel_size="4"), "context_parallel_size: got '4' (str), expected an int >= 1"),
        (trtllm(context_parallel_size=4.0), "context_parallel_size: got 4.0 (float)"),
        (
            trtllm(moe_expert_parallel_size=3),
            "moe_expert_parallel_size: moe_tp_size * moe_ep_size * moe_cluster_size must equal to moe_world_size, but got 1 * 3 * 1 != 4",
        ),
        (trtllm(moe_expert_parallel_size=4, moe_tensor_parallel_size=2), "but got 2 * 4 * 1 != 4"),
        (
            trtllm(speculative_config={"decoding_type": "MTP"}),
            "speculative_config: got {'decoding_type': 'MTP'}, expected no such key",
        ),
        (trtllm(max_num_tokens="8192"), "max_num_tokens: got '8192' (str), expected int"),
        (
            trtllm(kv_cache_config={"dtype": "nvfp4"}),
            "kv_cache_config.dtype: got 'nvfp4' (str), expected 'auto' (the dtype",
        ),
        (trtllm(kv_cache_config=[32]), "kv_cache_config: got [32] (list), expected mapping"),
        (trtllm(kv_cache_config={}), "kv_cache_config is empty"),
        (trtllm(context_parallel_size=None), "context_parallel_size: got None, expected a value"),
        (
            trtllm(pp_partition=[31, 20], pipeline_parallel_size=2),
            "pp_partition: got [31, 20] (list), expected 2 sizes",
        ),
        (trtllm(moe_config={"load_balancer": {"num_slots": 288}}), "moe_config.load_balancer: got {'num_slots': 288}"),
        ({"generation_servers": {}}, "generation_servers: got dict without options"),
        ({"context_servers": TRTLLM}, "generation_servers: got none beside context_servers"),
        (
            {"worker_config": {"ctx": TRTLLM}},
            "worker_config.gen: got NoneType, expected the generation servers' options",
        ),
        ({1: 2}, "1: got a key of type int, expected a name"),
        ({}, "the configuration is empty"),
        ([], "expected a mapping or the path of a file, got list"),
    ],
)
def test_trtllm_refuses(source: Any, message: str) -> None:
    with pytest.raises(HelixError) as caught:
        HelixOptions.from_trtllm(source)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (
            {
                "tensor_parallel_size": 8,
                "decode_context_parallel_size": 4,
                "cp_kv_cache_interleave_size": 16,
                "dcp_comm_backend": "a2a",
            },
            {"cp": 4, "tpa": 2, "ep": 1, "tokens_per_block": 16, "merge": "a2a"},
        ),
        (
            {"tensor-parallel-size": 8, "decode-context-parallel-size": 8, "enable-expert-parallel": True},
            {"cp": 8, "tpa": 1, "ep": 8, "tokens_per_block": 1, "merge": "ag_rs"},
        ),  # its defaults
        ({"tensor_parallel_size": 4}, {"cp": 1, "tpa": 4, "merge": "a2a"}),
        (
            {
                "tensor_parallel_size": 2,
                "decode_context_parallel_size": 2,
                "max_num_seqs": 16,
                "max_model_len": 9000,
                "block_size": 64,
            },
            {"max_batch_size": 16, "max_seq_len": 9000},
        ),
    ],
)
def test_vllm(source: dict[str, Any], expected: dict[str, Any]) -> None:
    options = asdict(HelixOptions.from_vllm(source))
    assert {k: options[k] for k in expected} == expected


DCP = {"tensor_parallel_size": 4, "decode_context_parallel_size": 4}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            {**DCP, "decode_context_parallel_size": 3},
            "decode_context_parallel_size: got 3 with tensor_parallel_size 4, expected a divisor",
        ),
        ({"decode_context_parallel_size": 2}, "got 2 with tensor_parallel_size 1"),
        (
            {"tensor_parallel_size": 4, "dcp_comm_backend": "a2a"},
            "dcp_comm_backend: got 'a2a' (str), expected no such key at decode_context_parallel_size 1",
        ),
        (
            {"tensor_parallel_size": 4, "cp_kv_cache_interleave_size": 4},
            "cp_kv_cache_interleave_size: got 4 (int), expected no such key",
        ),
        ({**DCP, "dcp_comm_backend": "fi_a2a"}, "dcp_comm_backend: got 'fi_a2a' (str), expected one of 'ag_rs', 'a2a'"),
        ({**DCP, "dcp_comm_backend": None}, "dcp_comm_backend: got None"),
        ({**DCP, "dcp_kv_cache_interleave_size": 4}, "write cp_kv_cache_interleave_size"),
        (
            {**DCP, "cp_kv_cache_interleave_size": 48, "block_size": 64},
            "block_size: got 64 (int), expected a multiple of cp_kv_cache_interleave_size (48)",
        ),
        ({**DCP, "tensor-parallel-size": 4}, "tensor_parallel_size: got it with dashes and with underscores"),
        ({**DCP, "data_parallel_size": 0}, "data_parallel_size: got 0 (int), expected an int >= 1"),
        ({**DCP, "kv_cache_dtype": "fp8_e5m2"}, "kv_cache_dtype: got 'fp8_e5m2'"),
        ({**DCP, "enable_expert_parallel": "yes"}, "enable_expert_parallel: got 'yes' (str), expected bool"),
        ({**DCP, "max_model_len": "many"}, "max_model_len: got 'many' (str), expected an int"),
        ({**DCP, "dcp_com_backend": "a2a"}, "did you mean dcp_comm_backend"),
    ],
)
def test_vllm_refuses(source: Any, message: str) -> None:
    with pytest.raises(HelixError) as caught:
        HelixOptions.from_vllm(source)
    assert message in str(caught.value)


def test_our_own_file_in_three_formats(tmp_path: Path) -> None:
    texts = {
        "o.toml": 'cp = 4\ntpa = 2\nmerge = "ag_rs"\ntokens_per_block = 16\n',
        "o.yaml": "cp: 4\ntpa: 2\nmerge: ag_rs\ntokens_per_block: 16\n",
        "o.json": '\ufeff{"cp": 4, "tpa": 2, "merge": "ag_rs", "tokens_per_block": 16}',
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        read = HelixOptions.from_file(tmp_path / name)
        assert read == HelixOptions(cp=4, tpa=2, merge="ag_rs", tokens_per_block=16)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("o.yaml", "cp: 4\ncp: 2\n", "key 'cp' is written twice"),
        ("o.json", '{"cp": 4, "cp": 4}', "key 'cp' is written twice"),
        ("o.toml", "cp = 4\ncp = 4\n", "can't be parsed"),
        ("o.json", '{"cp": NaN}', "NaN is not a number of JSON"),
        ("o.yaml", "cp: !!int ''", "can't be parsed"),
        ("o.yaml", "[" * 1500, "can't be parsed"),
        ("o.yaml", "- 4", "expected a mapping of options at the top, got list"),
        ("o.yaml", "", "got NoneType"),
        ("o.yaml", "cp: null", "cp: got None, expected a value"),
        ("o.yaml", "ep: 2", "cp: got none, expected an int >= 1; cp has no default"),
        ("o.yaml", "cp: [4]", "cp: got [4] (list), expected an int >= 1"),
        ("o.yaml", "cp: 4\nmerg: a2a", "merg: got an unknown key, expected one that is understood; did you mean merge"),
        ("o.yaml", "cp: 4\nmerge: fast", "merge: got 'fast' (str), expected one of 'a2a', 'ag_rs'"),
        ("o.yaml", "cp: 4\ndtype: float32", "dtype: got 'float32', expected no such key: it is no option of a file"),
        ("o.yaml", "cp: 4\nkvp: 4", "write 'cp', our name of it"),
        ("o.yaml", "cp: 4\nstage: 1", "option stage=1 has no effect at pp=1"),
        ("o.yaml", "cp: 4\npp: 2\nstage: 2", "stage=2 is none of the pp=2 stages"),
        ("o.yaml", "cp: 1\nmerge: ag_rs", "o.yaml: option merge='ag_rs' has no effect at cp=1"),
        ("o.yaml", "cp: 4\nep: 3", "o.yaml: ep=3 does not divide"),
        ("o.yaml", "cp: 1\noverlap: hopb", "o.yaml: option overlap='hopb' has no effect at cp=1"),
        ("o.ini", "cp=4", "unknown kind of file '.ini'; expected one of .toml"),
        ("o.yaml", "#" * 300_000, "more than 262144 bytes"),
        ("o.yaml", None, "can't read this configuration: No such file"),
    ],
)
def test_our_own_file_refuses(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(HelixError) as caught:
        HelixOptions.from_file(tmp_path / name)
    assert message in str(caught.value) and str(tmp_path / name) in str(caught.value)


def test_a_file_says_whose_it_is(tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    for content, dialect in (
        (trtllm(max_num_tokens=1), "TensorRT-LLM"),
        ({"decode-context-parallel-size": 2, "tensor-parallel-size": 2}, "vLLM"),
        ({"max_seq_len": 99}, "helix_compile"),
    ):
        file.write_text(json.dumps(content))
        assert fields_of_file(file).dialect == dialect
    file.write_text(json.dumps({"cp": 4, "cp_config": HELIX}))
    with pytest.raises(HelixError, match=r"several dialects.*cp of helix_compile; cp_config of Ten"):
        fields_of_file(file)


def test_keys_without_effect_are_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger=options_module.__name__):
        HelixOptions.from_trtllm(trtllm(max_num_tokens=1, cp_config={**HELIX, "use_nccl_for_alltoall": True}))
    assert "no effect here: cp_config.use_nccl_for_alltoall, max_num_tokens" in caplog.text


def test_the_shipped_schema_is_the_generated_one() -> None:
    shipped = Path(helix_compile.__file__).with_name("options.schema.json").read_text()
    assert shipped == schema_text()
    jsonschema.Draft202012Validator.check_schema(options_schema())


GOOD: list[dict[str, Any]] = [
    {"cp": 4, "max_seq_len": 2**31 - 1},
    {"cp": 1},
    {"cp": 4, "tpa": 2, "ep": 8, "tokens_per_block": 1, "max_batch_size": 1, "max_seq_len": 1},
    {"cp": 2, "merge": "ag_rs", "q_proj": "gather", "v_up": "after", "lower": "triton", "overlap": "hopb"},
    {"cp": 1, "merge": "a2a", "v_up": "auto", "lower": "reference"},
    {"cp": 2, "pp": 4, "stage": 3, "pp_split": "middle"},
    {"cp": 2, "stage": 0, "pp_split": "first"},
    {"cp": 2, "pad_heads": True},
    {"cp": 1, "tpa": 2, "pad_heads": True},
    {"cp": 1, "pad_heads": False},
    {"cp": 1, "cuda_graphs": False},
    {"cp": 1, "tpa": 2, "check": "off"},
    {"cp": 2, "head": "shard"},
    {"cp": 2, "window": "replicate"},
    {"cp": 1, "check": "deferred"},
]
BAD: list[Any] = [
    {"cp": 4, "max_seq_len": 2**31},
    {},
    [],
    {"cp": 0},
    {"cp": -1},
    {"cp": "4"},
    {"cp": True},
    {"cp": None},
    {"cp": 2.5},
    {"tpa": 2},
    {"cp": 4, "x": 1},
    {"cp": 4, "merge": "fast"},
    {"cp": 4, "merge": None},
    {"cp": 1, "merge": "ag_rs"},
    {"cp": 1, "v_up": "before"},
    {"cp": 1, "overlap": "hopb"},
    {"cp": 4, "ep": None},
    {"cp": 4, "dtype": "float32"},
    {"cp": 1, "q_proj": "gather"},
    {"cp": [4]},
    {"cp": 4, "max_seq_len": 0},
    {"cp": 4, "stage": 1},
    {"cp": 4, "pp_split": "last"},
    {"cp": 4, "pp": 2, "stage": -1},
    {"cp": 4, "pad_heads": 1},
    {"cp": 4, "cuda_graphs": 0},
    {"cp": 4, "pad_heads": "yes"},
    {"cp": 1, "pad_heads": True},
    {"cp": 1, "check": "every"},
    {"cp": 1, "head": "shard"},
    {"cp": 1, "window": "auto"},
    {"cp": 4, "check": False},
]


@pytest.mark.parametrize(("content", "good"), [*((c, True) for c in GOOD), *((c, False) for c in BAD)], ids=str)
def test_schema_and_loader_agree(tmp_path: Path, content: Any, good: bool) -> None:
    file = tmp_path / "o.json"
    file.write_text(json.dumps(content))
    fits = jsonschema.Draft202012Validator(options_schema()).is_valid(content)
    try:
        HelixOptions.from_file(file)
        loaded = True
    except HelixError:
        loaded = False
    assert (fits, loaded) == (good, good)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a command asks of helix_compile(), which is not run."""
    asked: dict[str, Any] = {}

    def record(model: object, *, options: HelixOptions, world: str, **_: Any) -> None:
        asked.update(options.to_json(), world=world)
        raise HelixError("recorded")

    monkeypatch.setattr(cli, "_model", lambda *_, **__: None)
    monkeypatch.setattr("helix_compile.compile.helix_compile", record)
    return asked


def test_the_command_line_overrides_the_file(tmp_path: Path, asked: dict[str, Any]) -> None:
    ours, theirs = tmp_path / "o.toml", tmp_path / "t.yaml"
    ours.write_text('cp = 2\ntokens_per_block = 8\nmerge = "ag_rs"\n')
    theirs.write_text(
        "context_parallel_size: 4\ntensor_parallel_size: 2\nmax_num_tokens: 9\ncp_config: {cp_type: HELIX, tokens_per_block: 32}\n"
    )
    for command in (("inspect", "tiny"), ("verify", "tiny"), ("generate", "tiny", "--prompt-ids", "1")):
        done = run(*command, "--config", str(ours), "--cp", "4", "--merge", "a2a")
        expected = asdict(HelixOptions(cp=4, tokens_per_block=8)) | {"world": "auto"}
        assert asked == expected and str(done.exception) == "recorded"
        assert "o.toml (helix_compile): overridden by the command line: cp, merge" in done.stderr
    done = run("inspect", "tiny", "--config", str(theirs))
    assert asked == asdict(HelixOptions(cp=4, tpa=2, ep=1)) | {"world": "auto"}
    assert "t.yaml (TensorRT-LLM): no effect here: max_num_tokens" in done.stderr
    assert "overridden" not in done.stderr
    done = run("inspect", "tiny", "--config", str(ours), "--cp", "1")
    assert "merge='ag_rs' has no effect at cp=1" in str(done.exception)


def test_every_command_that_compiles_takes_a_file(tmp_path: Path) -> None:
    file = tmp_path / "o.yaml"
    file.write_text("cp: 4\ntokens_per_block: 2\nmegre: a2a\n")
    for arguments in (
        ("inspect",),
        ("generate", "--prompt-ids", "1"),
        ("verify",),
        ("kernels", "--out", str(tmp_path / "k")),
    ):
        done = run(arguments[0], "tiny", *arguments[1:], "--config", str(file))
        assert isinstance(done.exception, HelixError), done.output
        assert "megre: got an unknown key" in str(done.exception)
    file.write_text("cp: 4\nlower: triton\n")
    done = run("kernels", "tiny", "--config", str(file), "--arch", "sm_1")
    assert "no effect here: lower" in done.stderr
    file.write_text("max_seq_len: 99\n")
    done = run("inspect", "tiny", "--config", str(file))
    assert "Missing option '--cp'" in str(done.exception)
    file.write_text("cp: 2\ntokens_per_block: 4\nmerge: ag_rs\n")
    facts = json.loads(run("inspect", "tiny", "--meta", "--json", "--config", str(file)).stdout)
    assert facts["world_size"] == 2
    assert "reduce_scatter_tensor" in {c["op"] for c in facts["collectives"]}
