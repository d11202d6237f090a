"""The command line under torchrun, eight ranks, and one rank of a world that is too big to run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from typer.testing import CliRunner

from helix_compile import LayoutError, helix_compile
from helix_compile.cli.commands import app
from helix_compile.models.presets import build_model, preset_config
from helix_compile.views.rank_share import RankShare
from tests.distributed.steps import OPTIONS, ROOT, launch, run_steps, torchrun
from tests.support.graphs import stage_text
from tests.support.models import fresh_model


@pytest.mark.multi_process
def test_generate_under_torchrun_prints_once(tmp_path: Path) -> None:
    """Of a checkpoint folder, which each rank reads slice by slice."""
    original = fresh_model("short", torch.float32)
    original.save_pretrained(tmp_path, max_shard_size="60KB")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "-m",
        "helix_compile",
        "generate",
        str(tmp_path),
        "--cp",
        "2",
        "--prompt-ids",
        "3,1,4; 1,5",
        "--json",
        "--max-new-tokens",
        "5",
        "--max-seq-len",
        "64",
    ]
    result = launch(command, 400)
    assert result.returncode == 0, result.stderr
    printed = json.loads(result.stdout)  # one document: one rank printed
    ids, mask = torch.tensor([[3, 1, 4], [0, 1, 5]]), torch.tensor([[1, 1, 1], [0, 1, 1]])
    expected = original.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert printed["new_ids"] == expected[:, 3:].tolist()
    assert result.stderr.count("compiling") == 1


@pytest.mark.slow
@pytest.mark.multi_process
def test_a_folder_that_one_rank_lacks_ends_all_with_its_name(tmp_path: Path) -> None:
    """As on two nodes of which one has no copy."""
    fresh_model("short", torch.float32).save_pretrained(tmp_path / "rank0")
    line = f'exec "{sys.executable}" -m helix_compile generate "{tmp_path}/rank$RANK" --cp 2 --prompt-ids 3,1'
    result = launch(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python", "bash", "-c", line], 400
    )
    assert result.returncode != 0 and result.stdout == ""
    error = f"HelixError: MODEL '{tmp_path}/rank1': no preset"
    assert f"helix_compile: rank 1: {error}" in result.stderr, result.stderr
    assert f"helix_compile: rank 0 lost its peers before step 1: rank 1 raised at step 0: {error}" in result.stderr, (
        result.stderr
    )
    assert result.stderr.count(error) == 2, result.stderr  # by each rank once


@pytest.mark.slow
@pytest.mark.multi_process
def test_eight_ranks_in_three_layouts(tmp_path: Path) -> None:
    model = fresh_model("short", torch.float32)
    expected = {}
    for cp, tpa in ((8, 1), (4, 2), (2, 4)):
        virtual = helix_compile(model, cp=cp, tpa=tpa, world="virtual", **OPTIONS)
        virtual.save(tmp_path / f"cp{cp}")
        expected[f"cp{cp}"] = run_steps(virtual)
    result = torchrun("load_worker.py", str(tmp_path), processes=8, seconds=500)
    assert result.returncode == 0, result.stderr
    seen = [load_file(tmp_path / f"seen_{r}.safetensors") for r in range(8)]
    for name, logits in expected.items():
        assert (seen[0][name] - logits).abs().max() <= 1e-5 * logits.abs().max()
        assert all(torch.equal(s[name], seen[0][name]) for s in seen)


def test_any_rank_of_a_big_world_compiles_as_itself() -> None:
    """Ranks 5 and 37 of 64 on the fake group: the same graph text, each with its own shards and no others."""
    config = preset_config("deepseek-v3")
    config.num_hidden_layers, config.first_k_dense_replace = 2, 1
    model = build_model(config, dtype=torch.bfloat16, meta=True)
    texts, held = set(), []
    for rank in (5, 37):
        dist.init_process_group("fake", store=dist.HashStore(), rank=rank, world_size=64)
        try:
            compiled = helix_compile(model, cp=64, world="distributed")
            texts.add(stage_text(compiled.graph))
            held.append(compiled.ranks)
        finally:
            dist.destroy_process_group()
    assert [[r.rank for r in ranks] for ranks in held] == [[5], [37]]
    texts.add(stage_text(helix_compile(model, cp=64, world="virtual").graph))
    assert len(texts) == 1


@pytest.mark.slow
def test_the_documented_rank_of_deepseek_v3() -> None:
    """The command of docs/distributed.md, by hand: 128 heads, 256 experts and 18432 FFN rows over 64 ranks."""
    command = "helix-compile inspect deepseek-v3 --meta --cp 64 --rank 37"
    assert f"\n{command}\n" in (ROOT / "docs/distributed.md").read_text()
    result = CliRunner().invoke(app, [*command.split()[1:], "--json"])
    facts = json.loads(result.stdout)
    assert facts["coordinates"] == {"tpa": 0, "kvp": 37, "ep": 37, "tpf": 0}
    assert facts["cache"]["blocks"] == "b with b % 64 == 37"
    dense, routed = facts["bodies"]
    assert (len(dense["layers"]), len(routed["layers"])) == (3, 58)
    assert dense["heads"] == routed["heads"] == [[74, 76]] and routed["experts"] == [[148, 152]]
    rows = {s["name"]: [c["rows"] for c in s["cuts"]] for s in dense["shards"]}
    assert rows["mlp.gate_proj.weight"] == [[37 * 288, 38 * 288]]
    # by hand: 64 ranks exchange, but for its own part, 128 heads of 512 bf16 and an fp32 lse; each rank sends 63/64 of it
    assert dense["exchanges"][0]["bytes_sent_per_token"] == 63 / 64 * 128 * (512 * 2 + 4)


def test_inspect_one_rank(tmp_path: Path) -> None:
    """The figures by hand: 24 heads and 8 experts over 4 ranks, blocks of 32 tokens in turn."""
    fresh_model("short", torch.float32).config.save_pretrained(tmp_path)
    model = [str(tmp_path / "config.json"), "--meta", "--cp", "2", "--tpa", "2", "--max-seq-len", "100"]
    result = CliRunner().invoke(app, ["inspect", *model, "--rank", "3", "--json"])
    facts = json.loads(result.stdout)
    assert facts["coordinates"] == {"tpa": 1, "kvp": 1, "ep": 3, "tpf": 0}
    assert facts["groups"]["kvp"] == [2, 3] and facts["groups"]["tpa"] == [1, 3]
    assert facts["cache"]["tokens_of_a_full_sequence"] == 32 + 4  # 32 to 63, and 96 to 99
    assert facts["bodies"][0]["heads"] == [[18, 24]]
    assert facts["bodies"][1]["experts"] == [[6, 8]]
    text = str(RankShare(facts))
    assert "rank 3 of 4: tpa=1, kvp=1, ep=3, tpf=0" in text
    assert "heads 18 to 23, experts 6 to 7" in text
    refused = CliRunner().invoke(app, ["inspect", *model, "--rank", "4"])
    assert isinstance(refused.exception, LayoutError) and "ranks, 0 to 3" in str(refused.exception)
    assert not dist.is_initialized()


@pytest.mark.slow
@pytest.mark.multi_process
def test_compiled_or_not_in_either_world(tmp_path: Path) -> None:
    """Four processes over gloo and four virtual ranks, node by node and compiled: one result."""
    model, virtual = fresh_model("short", torch.float32), {}
    for lower in ("reference", "inductor"):
        compiled = helix_compile(model, cp=2, tpa=2, world="virtual", lower=lower, **OPTIONS)
        virtual[lower] = run_steps(compiled)
        compiled.save(tmp_path / lower)
    result = torchrun("load_worker.py", str(tmp_path), processes=4, seconds=900)
    assert result.returncode == 0, result.stderr
    expected = virtual["reference"]
    for rank in range(4):
        for lower, got in load_file(tmp_path / f"seen_{rank}.safetensors").items():
            for logits in (got, virtual[lower]):
                assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
