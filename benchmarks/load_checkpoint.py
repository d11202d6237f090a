"""Memory and time of loading a checkpoint folder shard by shard, beside transformers' from_pretrained.

    python benchmarks/load_checkpoint.py [--cp 4] [--layers 4] [--keep DIR] [--json]

Makes a bf16 checkpoint of more than 2 GB (small random weights, per-expert names, several files) in a temporary
folder. A process of its own loads it by from_pretrained, another does so and copies the weights to memory, a third
loads all ranks and then each rank alone, one after the other. Memory is anonymous resident
memory (RssAnon, sampled every 2 ms), beyond what the process held when the graphs were ready; caches are not allocated
by what is measured. Mapped pages of the files belong to the page cache and count nowhere.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from measuring import MB, format_machine, print_table
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, DeepseekV3Config

from helix_compile import helix_compile
from helix_compile.checkpoint.model import open_checkpoint
from helix_compile.models.presets import build_model
from helix_compile.runtime.rank import build_ranks

CONFIG: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "moe_intermediate_size": 1024,
    "first_k_dense_replace": 1,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "n_routed_experts": 32,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 1,
    "topk_group": 1,
    "max_position_embeddings": 4096,
    "eos_token_id": None,
    "bos_token_id": None,
}


def make_checkpoint(folder: Path, layers: int) -> int:
    """Write config and one file a layer; returns the bytes of all weights."""
    config = DeepseekV3Config(**CONFIG, num_hidden_layers=layers)
    config.dtype, config.architectures = torch.bfloat16, ["DeepseekV3ForCausalLM"]
    config.save_pretrained(folder)
    stored: dict[str, tuple[int, ...]] = {}
    for name, tensor in build_model(config, dtype=torch.bfloat16, meta=True).state_dict().items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            stored[name] = tuple(tensor.shape)
            continue
        prefix, _, part = name.rpartition(".")
        E, rows, columns = tensor.shape
        for e in range(E):
            for each in ("gate_proj", "up_proj") if part == "gate_up_proj" else ("down_proj",):
                height = rows // 2 if part == "gate_up_proj" else rows
                stored[f"{prefix}.{e}.{each}.weight"] = (height, columns)
    files: dict[str, list[str]] = {}
    for name in stored:
        layer = name.split("layers.")[1].split(".")[0] if "layers." in name else "x"
        files.setdefault(f"model-{layer}.safetensors", []).append(name)
    total = 0
    for file, names in files.items():
        tensors = {n: torch.randn(stored[n], dtype=torch.bfloat16) * 0.02 for n in names}
        total += sum(t.numel() * 2 for t in tensors.values())
        save_file(tensors, folder / file)
    index = {"metadata": {}, "weight_map": {n: f for f, names in files.items() for n in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def peak_over(function: Callable[[], Any]) -> tuple[int, float, Any]:
    """(bytes that anonymous memory rises at its highest, seconds, what `function` returns)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = peak = _anonymous()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, _anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    try:
        result = function()
    finally:
        seconds = time.perf_counter() - start
        done.set()
        watcher.join()
    return max(peak, _anonymous()) - before, seconds, result


def _anonymous() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def load_ranks(folder: Path, cp: int) -> dict[str, dict[str, float]]:
    """Read the shards of all ranks, then of each alone, of a module that was compiled without weights (meta)."""
    compiled = helix_compile(folder, cp=cp, device="meta", max_batch_size=1, max_seq_len=64)
    measured = {}
    for way in ("all", *range(cp)):
        weights = open_checkpoint(folder, None, torch.device("cpu")).weights
        originals = {"originals": weights, "device": torch.device("cpu")}
        facts = type(compiled.facts)(**{**vars(compiled.facts), **originals})
        world: Any = SimpleNamespace(ranks=range(cp) if way == "all" else [way])
        load = partial(build_ranks, compiled.plan, compiled.graph, facts, world)
        peak, seconds, ranks = peak_over(load)
        held = {t.untyped_storage().data_ptr(): t for r in ranks for t in r.params.values()}
        sizes = [t.untyped_storage().nbytes() for t in held.values()]
        measured[str(way)] = {"peak": peak, "seconds": seconds, "held": sum(sizes), "largest": max(sizes)}
        del ranks, held
    return measured


def load_whole(folder: Path, copied: bool) -> dict[str, float]:
    """Transformers' own loading; `copied` makes the weights memory of this process, as a training loop would."""

    def load() -> Any:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        if copied:
            for tensor in model.parameters():
                tensor.data = tensor.data.clone()
        return model

    peak, seconds, model = peak_over(load)
    held = sum(t.numel() * t.element_size() for t in model.parameters())
    return {"peak": peak, "seconds": seconds, "held": held, "largest": 0}


def main() -> None:
    """Make the checkpoint, measure in fresh processes, print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cp", type=int, default=4)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--keep", type=Path, help="make the checkpoint here and leave it")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", nargs=2, metavar=("FOLDER", "WHAT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)  # torch.export's own pytree
    if arguments.only:
        folder, what = Path(arguments.only[0]), arguments.only[1]
        if what == "ranks":
            print(json.dumps(load_ranks(folder, arguments.cp)))
        else:
            print(json.dumps({what: load_whole(folder, copied=what.endswith("copied"))}))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        total = make_checkpoint(folder, arguments.layers)
        measured: dict[str, dict[str, float]] = {}
        for way in ("transformers", "transformers copied", "ranks"):
            measured |= _in_a_process(folder, way, arguments.cp)
    if arguments.json:
        print(json.dumps({"checkpoint": total, "cp": arguments.cp, "measured": measured}))
        return
    print(f"{format_machine()}; checkpoint {total / 1e9:.2f} GB bf16, cp={arguments.cp}\n")
    base = measured["transformers copied"]
    rows = []
    for way, m in measured.items():
        bound = 1.1 * m["held"] + m["largest"]
        name = way if way.startswith("transformers") else f"rank {way}" if way != "all" else "all ranks"
        within = "-" if way.startswith("transformers") else f"{m['peak'] / bound:.2f}"
        rows.append(
            [
                name,
                f"{m['held'] / MB:.0f} MB",
                f"{m['peak'] / MB:.0f} MB",
                f"{m['peak'] / m['held']:.3f}",
                within,
                f"{m['peak'] / base['peak']:.2f}x",
                f"{m['seconds'] / base['seconds']:.2f}x",
            ]
        )
    header = ["loaded", "holds", "peak", "peak / holds", "peak / bound", "memory", "time"]
    print_table(header, rows)


def _in_a_process(folder: Path, way: str, cp: int) -> dict[str, dict[str, float]]:
    command = [sys.executable, __file__, "--cp", str(cp), "--only", str(folder), way]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
